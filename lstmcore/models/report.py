"""A table of the LSTMs in a model: what ``lstmcore.explain`` and ``lstmcore.patch`` return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from lstmcore.backends import Choice
from lstmcore.tables import table


class State(Enum):
    """Whose code runs an LSTM."""

    OURS = "lstmcore's"
    TORCHS = "torch's"
    OTHER = "other"  # neither's: quantised, scripted, or another implementation
    MOVED = "moved"
    WOULD = "would move"
    LEFT = "left"
    BACK = "moved back"


@dataclass(frozen=True)
class Called:
    """A kind of call that a module received: on what, how often, and the backend that runs it."""

    shape: str
    times: int
    choice: Choice

    @property
    def why(self) -> str:
        """The reason for the backend."""
        return dict(self.choice.reasons)[self.choice.name]


@dataclass(frozen=True)
class Row:
    """One LSTM of a model."""

    names: tuple[str, ...]  # those it has in the model, as in named_modules()
    module: str  # its class and sizes
    state: State
    why: str = ""
    calls: tuple[Called, ...] | None = None  # None: the model was not run

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    def cells(self, run: bool) -> Iterator[tuple[str, ...]]:
        """Its lines in the table: one, or one for each kind of call."""
        name = ", ".join(each or "(the model)" for each in self.names)
        line = (name, self.module, self.state.value)
        if not run:
            yield (*line, self.why)
        elif not self.calls:
            yield (*line, "0", "", "", self.why or "not called with this input")
        for call in self.calls or ():
            if self.state in (State.TORCHS, State.LEFT, State.OTHER):
                runs, why = "torch.nn", f"{self.why}; lstmcore would run {call.choice.name!r}"
            else:
                runs, why = call.choice.name, call.why + (f"; {self.why}" if self.why else "")
            yield (*line, str(call.times), call.shape, runs, why)
            line = ("", "", "")


@dataclass(frozen=True)
class Report:
    """Every LSTM of a model, in the order of ``named_modules()``; ``print`` shows it as a table."""

    title: str
    rows: tuple[Row, ...]

    @property
    def moved(self) -> list[str]:
        """The names of the LSTMs that moved, or, in a dry run, would move."""
        return [row.name for row in self.rows if row.state in (State.MOVED, State.WOULD, State.BACK)]

    @property
    def left(self) -> dict[str, str]:
        """By name, why an LSTM was left as it was."""
        return {row.name: row.why for row in self.rows if row.state in (State.LEFT, State.OTHER)}

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if name in row.names:
                return row
        raise KeyError(
            f"there is no LSTM {name!r}: there are {', '.join(repr(row.name) for row in self.rows) or 'none'}"
        )

    def __str__(self) -> str:
        if not self.rows:
            return self.title
        run = any(row.calls is not None for row in self.rows)
        header = ("name", "module", "state", *(("calls", "input", "runs") if run else ()), "why")
        return f"{self.title}\n\n{table(header, [line for row in self.rows for line in row.cells(run)])}"

    __repr__ = __str__
