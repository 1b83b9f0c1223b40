"""``python -m bench control``: all compute the same, wrong results get no figure, rows say what is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import cli, rows, session, tables
from bench.cases import Case, select
from bench.experiments import control
from bench.experiments.control import NONE, CellLoop, Control, Direct, Packed, Segments, Sequences, SplitSegments
from bench.measure import Task
from bench.providers import OURS, PEER, draw
from bench.rows import Row
from bench.timing import Effort
from bench.verify import FLOAT64_BOUND, Mismatch, relative_error

T, B = 9, 4
EXACT = Case("exact", "rollout", 3, 5, B, T, dtype="float64")
TINY = {
    f"{experiment}-tiny": Case(f"{experiment}-tiny", experiment, 3, 5, B, 2 * T, modes=modes)
    for experiment, modes in (
        ("reset", ("inference", "training")),
        ("lengths", ("inference", "training")),
        ("cells", ("inference", "training")),
        ("rollout", ("training",)),
    )
}
FAST = ["control", "--pairs", "1", "--seconds", "0"]


pytestmark = pytest.mark.usefixtures("short_samples")


def some_resets() -> torch.Tensor:
    """In the first step, twice in a row, in the last step, in all rows at once; one row has that one alone."""
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 1] = reset[3, 1] = reset[4, 1] = reset[8, 2] = reset[2, 0] = True
    reset[6] = True
    return reset


def agree(*sides) -> None:
    first, *others = [side.training() for side in sides]
    for side, results in zip(sides[1:], others, strict=True):
        for mine, theirs in zip(first, results, strict=True):
            assert relative_error(theirs, mine) <= FLOAT64_BOUND, side.name
        for mine, theirs in zip(first, side.inference(), strict=False):
            assert relative_error(theirs, mine) <= FLOAT64_BOUND, side.name


@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 1.0, None])
def test_every_way_to_reset_agrees(share):
    reset = some_resets() if share is None else control.draw_reset(EXACT, share)
    assert share not in (0.0, 1.0) or reset.all() == reset.any() == bool(share)
    problem, told = draw(EXACT), Control(reset=reset)
    ours = Direct(problem, told, OURS)
    agree(ours, *(kind(problem, told) for kind in (Segments, SplitSegments, CellLoop, Sequences)))
    if share == 0.0:
        agree(ours, Direct(problem))


@pytest.mark.parametrize("variant", ["uniform", "T and T/2", "short"])
def test_every_way_to_have_lengths_agrees(variant):
    lengths = torch.tensor([2, 7, 1, 7]) if variant == "short" else control.ragged_lengths(EXACT)[variant]
    problem, told = draw(EXACT), Control(lengths)
    ours = Direct(problem, told, OURS)
    agree(ours, Packed(problem, told, OURS), Packed(problem, told), CellLoop(problem, told))
    assert ours.tokens == lengths.sum() < Direct(problem).tokens == T * B


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_cells_agree(read):
    problem, told = draw(EXACT), Control(cells=True, cell_loss=read)
    ours, loop = Direct(problem, told, OURS), CellLoop(problem, told)
    agree(ours, loop)
    _, _, c_n, cells, *gradients = loop.training()
    assert torch.equal(cells[-1], c_n[0])
    unread = Direct(problem).training()[3:]
    assert all(map(torch.allclose, gradients, unread)) == (not read)


def test_what_is_drawn():
    case = Case("many", "reset", 1, 1, 100, 1000)
    for share in control.SHARES:
        assert control.draw_reset(case, share).float().mean() == pytest.approx(share, abs=0.01)
    drawn = control.ragged_lengths(case)
    assert drawn["uniform"].max() == 1000 > drawn["uniform"].min() > 0
    assert drawn["uniform"].float().mean() == pytest.approx(505)
    assert sorted(set(drawn["T and T/2"].tolist())) == [500, 1000]


@pytest.mark.slow
def test_rows_of_every_experiment(registry, monkeypatch, tmp_path, capsys):
    registry(*TINY.values())
    monkeypatch.setattr(control, "PROMISED_BATCH", B)
    arguments = [*FAST, "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    found = rows.read(path)
    assert [row.group for row in found] == ["reset"] * 6 + ["lengths"] * 14 + ["cells"] * 3 + ["rollout"] * 4
    assert len({row.key for row in found}) == len(found)
    for row in found:
        assert (row.experiment, row.pairs) == ("control", 1)
        assert set(row.details) == set(control.CONTROL.details)
        assert 0 < row.p20_ms == row.p50_ms == row.p80_ms
        assert 0 < row.peer_p20_ms == row.peer_p50_ms == row.peer_p80_ms
        assert row.pair_ratio_p20 == row.pair_ratio == row.pair_ratio_p80
        assert row.peer in shown
        per_token = (row.p50_ms / int(row.details["tokens"])) / (row.peer_p50_ms / int(row.details["peer_tokens"]))
        expected = per_token if row.kind == "cost" else row.peer_p50_ms / row.p50_ms
        assert row.pair_ratio == pytest.approx(expected, rel=1e-4)  # the file has a few digits
        promised = row.group != "cells" and (row.kind == "cost" or row.peer == "torch segments")
        assert row.limit == ({"cost": 1.03, "speed": 3.0}[row.kind] if promised else None)
    assert {row.peer for row in found} == {
        "lstmcore dense", "lstmcore packed", "torch packed", "torch segments", "torch split segments",
        "torch cell loop", "torch packed sequences",
    }  # fmt: skip
    uniform = next(row for row in found if row.variant == "uniform")
    assert list(map(int, uniform.details.values())) == [sum((4, 9, 14, 18)), 11 * B]

    # the last of the rollout's
    monkeypatch.setattr(control, "compare", lambda *_: iter([replace(found[-1], p50_ms=1.5)]))
    assert cli.main([*arguments, "--case", "rollout"]) == 0
    again = rows.read(path)
    assert again[:-1] == found[:-1]
    assert again[-1].p50_ms == 1.5


def made_up(**columns: object) -> Row:
    shape = {"input_size": 1, "hidden_size": 1, "batch": 1, "steps": 1, "dtype": "float32"}
    given = {
        "experiment": "control",
        "device": "",
        "threads": 1,
        "case": "a-case",
        "group": "reset",
        "mode": "training",
    }
    return Row(**shape, **given, backend="numba", pairs=1, p50_ms=1.0, peer_p50_ms=1.0, **columns)


def test_broken_limits_are_marked(capsys):
    costs = [
        made_up(kind="cost", pair_ratio=ratio, limit=limit)
        for ratio, limit in ((1.031, 1.03), (1.029, 1.03), (9, None))
    ]
    speeds = [
        made_up(kind="speed", pair_ratio=ratio, limit=limit) for ratio, limit in ((2.9, 3.0), (3.1, 3.0), (0.5, None))
    ]
    assert [each.broken for each in costs + speeds] == [True, False, False] * 2
    tables.show_promised(session.screen(), costs + speeds)
    shown = capsys.readouterr().out
    assert shown.count("over 1.03") == shown.count("under 3") == 1
    for text in ("1.031 over", "1.029", "9.000", "2.90× under", "3.10×", "0.50×"):
        assert text in shown


def without_resets(side):
    """As if nobody had looked at the mask."""
    output, states = side.module(side.input, side.hx)
    return output, *states


def test_wrong_outputs_get_no_figure(monkeypatch):
    case = replace(TINY["rollout-tiny"], name="wrong")
    told = Control(reset=control.draw_reset(case, 0.3))
    true = control.truth(case, told)
    for kind, provider in ((Direct, OURS), (Segments, PEER), (Sequences, PEER)):
        control.checked(kind(draw(case), told, provider), true)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", without_resets)
            with pytest.raises(Mismatch, match=f"wrong, {provider} .*, training, output: expected an error of at most"):
                control.checked(kind(draw(case), told, provider), true)


def test_wrong_gradients_get_no_figure(monkeypatch):
    case = TINY["reset-tiny"]
    true = control.truth(case)
    ours = Direct(draw(case), provider=OURS)
    names = ours.gradient_names
    results = ours.training()
    for index, name in enumerate(names, start=3):
        wrong = [*results[:index], results[index] * (1 + 1e-5), *results[index + 1 :]]
        monkeypatch.setattr(ours, "training", lambda wrong=wrong: wrong)
        with pytest.raises(Mismatch, match=f"reset-tiny, lstmcore dense, training, {name}: "):
            control.checked(ours, true)
    monkeypatch.setattr(ours, "training", lambda: results[:-1])
    with pytest.raises(Mismatch, match="expected 10 results, got 9"):
        control.checked(ours, true)


@pytest.mark.slow
def test_a_wrong_case_does_not_stop_the_others(registry, monkeypatch, tmp_path, capsys):
    def wrong(side):
        results = original(side)
        return (results[0] + (side.problem.case.group == "rollout"), *results[1:])

    original = Direct.forward
    monkeypatch.setattr(Direct, "forward", wrong)
    registry(*(TINY[name] for name in ("rollout-tiny", "cells-tiny")))
    assert cli.main([*FAST, "--out", str(tmp_path)]) == 1
    assert "wrong result: rollout-tiny, lstmcore with control" in " ".join(capsys.readouterr().out.split())
    (path,) = tmp_path.glob("*.csv")
    assert {each.case for each in rows.read(path)} == {"cells-tiny"}


def test_the_interruption_keeps_what_is_done(registry, monkeypatch, tmp_path, capsys):
    def interrupted(case, task):
        yield next(original(case, task))
        raise KeyboardInterrupt

    original = control.resets
    registry(*TINY.values())
    monkeypatch.setitem(control.KINDS, "reset", interrupted)
    assert cli.main([*FAST, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.csv")
    assert [each.key[1:] for each in rows.read(path)] == [("reset-tiny", "inference", "0% resets", "lstmcore dense")]


def test_the_command_line(capsys, tmp_path, registry):
    assert cli.main(["control", "--case", "nothing"]) == 2
    assert "no case matches --case nothing" in capsys.readouterr().err
    assert cli.main(["control", "--device", "cuda"]) == 2
    assert "control measures on cpu, not on cuda" in capsys.readouterr().err
    assert cli.main(["control", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(case.name in listed for case in select("control"))
    assert cli.main(["control", "--list", "--quick", "--case", "reset*"]) == 0
    assert "2 of 16 cases" in capsys.readouterr().out


def test_slow_peers_have_to_be_asked_for(monkeypatch):
    case = replace(TINY["rollout-tiny"], tags=frozenset({"slow"}))
    monkeypatch.setattr(control, "compare", lambda mode, variant, ours, peer, *_: iter([peer.name]))
    quick, slow = (list(control.rollout(case, Task(Effort(1, 0.0), slow=slow))) for slow in (False, True))
    assert slow == [*quick, "torch packed sequences"]
    assert control.truth(case, NONE).expected[0].dtype == torch.float64
