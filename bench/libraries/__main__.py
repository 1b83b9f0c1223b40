"""``python -m bench.libraries NAME ...``: checks the pipelines of these libraries, times them, and keeps the rows."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from bench import machine, timing
from bench.libraries import parity, table
from bench.libraries.pipeline import Pipeline, seed

MIN_PAIRS, BUDGET_S = 7, 20.0


def pipelines(names: Sequence[str]) -> Iterator[Pipeline]:
    for name in names:
        yield from importlib.import_module(f"bench.libraries.{name}").PIPELINES


def measure(pipeline: Pipeline) -> table.Row:
    """No figure without its check: parity.Mismatch where the two do not agree."""
    verdict = parity.check(pipeline)
    jobs = []
    for moved in (True, False):
        seed()
        jobs.append(pipeline.build(False, moved))
        jobs[-1].train()  # kernels compile, memory is fetched, a library sets itself up
    ours, peer = timing.turns([job.train for job in jobs], min_rounds=MIN_PAIRS, budget_s=BUDGET_S, probed=False)
    times = {
        f"{side}p{share}_ms": timing.percentile(values, share / 100) * 1e3
        for side, values in (("", ours), ("peer_", peer))
        for share in (20, 50, 80)
    }
    versions = machine.versions()
    return table.Row(
        pipeline=pipeline.name,
        distribution=pipeline.distribution,
        version=version(pipeline.distribution),
        commit=machine.commit(),
        date=machine.today(),
        **{name: versions[name] for name in ("torch", "numba", "lstmcore")},
        device=machine.device_name(),
        threads=machine.units(),
        how=pipeline.how,
        checked=verdict.told,
        share=verdict.share,
        float64=verdict.float64,
        timed=pipeline.timed,
        pairs=len(ours),
        **times,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a pipeline does not agree."""
    parser = argparse.ArgumentParser(prog="python -m bench.libraries", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="a file of bench/libraries, such as skorch")
    parser.add_argument(
        "--out", type=Path, default=table.FOLDER, metavar="DIR", help="of the rows (default: %(default)s)"
    )
    parser.add_argument("--no-save", action="store_true", help="show the figures, write no file")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # what libraries say of each other
    logging.disable(logging.WARNING)
    status = 0
    for pipeline in pipelines(given.names):
        try:
            row = measure(pipeline)
        except parity.Mismatch as mismatch:
            print(f"{pipeline.name}: wrong result, no figure: {mismatch}")
            status = 1
            continue
        print(
            f"{row.pipeline} {row.version}: {row.peer_p50_ms:.1f} ms, moved over {row.p50_ms:.1f} ms, "
            f"{row.speed:.2f}x; equal: {row.checked}; {row.share:.2f} of the allowed difference",
            flush=True,
        )
        if not given.no_save:
            table.save(given.out / f"{machine.slug()}.csv", [row])
    return status


if __name__ == "__main__":
    sys.exit(main())
