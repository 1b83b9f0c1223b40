"""Rows: what is written is read again, what is committed too, and other files are refused."""

from __future__ import annotations

import pytest

from bench import rows
from bench.cases import CASES, GROUPS
from bench.experiments import EXPERIMENTS
from bench.rows import COLUMNS, RESULTS, Row

COMMITTED = sorted(RESULTS.glob("*.csv"))


def made_up(case: str, experiment: str = "speed", **columns: object) -> Row:
    """A row that nobody has measured."""
    sizes = {"input_size": 1, "hidden_size": 1, "batch": 1, "steps": 1, "dtype": "float32"}
    given = {"experiment": experiment, "case": case, "group": CASES[case].group, "mode": "training", "peer": "torch"}
    return Row(
        **{
            "device": "Made Up",
            "threads": 1,
            "backend": "numba",
            "pairs": 7,
            "p50_ms": 1.0,
            **sizes,
            **given,
            **columns,
        }
    )


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_rows(path):
    """They read, in the order of the registry, and say nothing but what their experiments explain."""
    found = rows.read(path)
    assert found == rows.merge([], found)
    for row in found:
        experiment = EXPERIMENTS[row.experiment]
        assert set(row.details) <= set(experiment.details)
        assert row.on_gpu == path.stem.endswith("sm")
        assert GROUPS[row.group].device in experiment.full


def test_there_are_committed_rows():
    assert COMMITTED


def test_a_round_trip(tmp_path):
    case = next(iter(CASES))
    found = [
        made_up(case, p20_ms=0.1234567, pair_ratio=1.0123456, details={"kind": "split", "chosen": "True"}),
        made_up(case, mode="inference", limit=1.03, variant="0% resets", memory_mib=None),
    ]
    rows.write(tmp_path / "rows.csv", found)
    assert rows.read(tmp_path / "rows.csv") == found
    assert rows.read(tmp_path / "none.csv") == []
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_files_of_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    for wrong in (COLUMNS[:5], [*COLUMNS, "surplus"], [*COLUMNS[1:], COLUMNS[0]]):
        path.write_text(",".join(wrong) + "\n")
        with pytest.raises(ValueError, match=r"expected the columns .* move the file away"):
            rows.read(path)
    path.write_text("commit,date,torch,case,ratio\n")
    with pytest.raises(ValueError, match="from before all experiments had the same columns"):
        rows.read(path)


def test_merge():
    first, second = list(CASES)[:2]
    old = [made_up(second), made_up(first), made_up(first, variant="b"), made_up(first, "control")]
    new = [made_up(first, p50_ms=2.0)]
    merged = rows.merge([*old, made_up(first, "flow")], new)
    assert [(row.experiment, row.case, row.variant) for row in merged] == [
        ("control", first, ""), ("flow", first, ""), ("speed", first, ""), ("speed", first, "b"), ("speed", second, ""),
    ]  # fmt: skip
    assert merged[2].p50_ms == 2.0
    whole = rows.merge(old, new, whole=["speed"])
    assert [(row.experiment, row.case, row.variant) for row in whole] == [
        ("control", first, ""), ("speed", first, ""), ("speed", second, ""),
    ]  # fmt: skip


def test_merge_drops_cases_that_the_registry_has_lost(registry):
    first, second = list(CASES)[:2]
    old = [made_up(first), made_up(second)]
    registry(CASES[second])
    assert rows.merge(old, []) == old[1:]
