"""The loop around a training: a progress bar, checkpoints now and then, and Ctrl-C between two iterations."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from common import Checkpoint, Interrupt, brought_by

with brought_by("examples"):
    from rich import progress
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn


def repeat(
    iterate: Callable[[int], str],
    done: int,
    checkpoint: Checkpoint,
    state: Callable[[], dict[str, Any]],
    options: argparse.Namespace,
    console: Console,
) -> bool:
    """Calls ``iterate`` with the number of each iteration from ``done`` up to ``options.iterations``.

    Args:
        iterate: one iteration; returns what the progress bar is to say.
        done: iterations that a checkpoint has brought.
        checkpoint: where ``state()`` goes after every ``options.save_every`` iterations, and in the end.
        state: all that the next iteration depends on.

    Returns:
        Whether all of them are done; False when interrupted, which is said.
    """
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    with (
        Interrupt() as interrupt,
        progress.Progress(*columns, *times, console=console) as bar,
    ):
        task = bar.add_task("", total=options.iterations, completed=done, told="")
        while done < options.iterations and not interrupt.wanted:
            told = iterate(done)
            done += 1
            bar.update(task, advance=1, told=told)
            if done % options.save_every == 0 and done < options.iterations:
                checkpoint.save(state())
    checkpoint.save(state())
    if done < options.iterations:
        console.print(f"stopped after iteration {done}; go on with --resume ({checkpoint.path})", soft_wrap=True)
    return done >= options.iterations
