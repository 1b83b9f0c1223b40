"""A recording as files and for loggers: CSV, JSON and back, TensorBoard and anything that takes a dictionary.

T steps, B rows of the batch, H hidden units, Q quantiles.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lstmcore.flow.measure import measure
from lstmcore.flow.record import GATES, QUANTILES, Gates, Norms, Record

FORMAT, VERSION = "lstmcore.flow", 1
ENTERING = ("entering", "entering_by_lag")
COLUMNS = (
    *("iteration", "module", "layer", "direction", "call", "quantity", "axis", "position", "mean"),
    *(f"q{100 * quantile:02.0f}" for quantile in QUANTILES),
    *("closed", "open"),
)
ITSELF = "(model)"  # the module that is the model; pandas would take its name, "", for missing and drop it in groupby


def to_csv(records: Sequence[Record], path: str | Path) -> Path:
    """Writes a tidy table and returns its path: each line has one quantity at one position of one layer in one pass.

    | quantity              | axis | columns filled                                                             |
    |-----------------------|------|----------------------------------------------------------------------------|
    | h, c                  | step | mean, q05 ... q95 over the rows of the batch, at time step ``position``    |
    | h, c                  | lag  | the same, ``position`` steps back from the last that a layer computes      |
    | entering              | step | mean: what comes from the loss or the layer above                          |
    | entering              | lag  | the same by lag                                                            |
    | input, forget, output | step | mean, closed (share below 0.1), open (share of 0.9 and above)              |
    | horizon               | unit | mean: steps until the forget gates of unit ``position`` have left one half |

    Empty is NaN or not applicable, ``inf`` infinite, as pandas reads them; numbers are exact.  The model itself is
    called ``(model)``.  For the norms by lag, one column per iteration:

        table = pandas.read_csv(path).query("quantity == 'c' and axis == 'lag' and layer == 0")
        table.pivot(index="position", columns="iteration", values="mean").plot(logy=True)

    Raises:
        OSError: the file cannot be written.
    """
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for record in records:
            key = (record.iteration, record.module or ITSELF, record.layer, record.direction, record.call)
            for quantity, axis, columns in _tables(record):
                for position, values in enumerate(zip(*(column.tolist() for column in columns.values()), strict=True)):
                    fields = dict(zip(columns, map(_field, values), strict=True))
                    writer.writerow([*key, quantity, axis, position, *(fields.get(name, "") for name in COLUMNS[8:])])
    return Path(path)


def to_json(records: Sequence[Record], path: str | Path) -> Path:
    """Writes everything, one record per line, and returns the path; :func:`from_json` reads it back exactly.

    JSON has no NaN and no infinity: NaN is written as null, the infinities as the strings "inf" and "-inf".

    Raises:
        OSError: the file cannot be written.
    """
    head = {"format": FORMAT, "version": VERSION, "gates": GATES, "quantiles": QUANTILES}
    with writing(path), open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + ', "records": [')
        for index, record in enumerate(records):
            file.write(",\n" if index else "\n")
            json.dump(_plain(record), file, allow_nan=False)
        file.write("\n]}\n")
    return Path(path)


def from_json(path: str | Path) -> list[Record]:
    """Reads what :func:`to_json` wrote.

    Raises:
        ValueError: a file that it did not write.
        OSError: a file that cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            data = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON, or not all of it: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} holds no recorded gradient flow: expected a file written by to_json")
    if data.get("version") != VERSION:
        raise ValueError(f"{path} has version {data.get('version')} of the format, this lstmcore reads {VERSION}")
    try:
        return [_record(each) for each in data["records"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: a record lacks or spoils {error}") from error


def scalars(record: Record) -> dict[str, float]:
    """The main numbers for a logger; the logarithm of 0 is -inf, unknown values are NaN.

    Of the gradient at h and, with a cell, at c: the mean norm at lag 0 and at the far end, the latter over the former,
    and log10 of that ratio at lag 100, if there is one.  With gates: the median memory horizon in steps, the mean of
    the forget gates, and the shares of closed and open gates.
    """
    found: dict[str, float] = {}
    far = measure(record).far
    for state, norms in (("h", record.h), ("c", record.c)):
        if norms is None:
            continue
        curve = norms.mean_by_lag
        found[f"{state}/norm_lag_0"], found[f"{state}/norm_far_end"] = float(curve[0]), float(curve[far])
        found[f"{state}/ratio"] = float(curve[far] / curve[0])
        if far >= 100:
            found[f"{state}/log10_ratio_lag_100"] = float((curve[100] / curve[0]).log10())
    if record.gates is not None:
        gates = record.gates
        horizon = gates.horizon[~gates.horizon.isnan()].sort().values
        found["horizon/median"] = float(horizon[(len(horizon) - 1) // 2]) if len(horizon) else math.nan
        found["gates/forget_mean"] = float(gates.mean[GATES.index("forget")].nanmean())
        for gate, closed, opened in zip(GATES, gates.closed.nanmean(-1), gates.open.nanmean(-1), strict=True):
            found[f"gates/{gate}_closed"], found[f"gates/{gate}_open"] = float(closed), float(opened)
    return found


def log(records: Sequence[Record], writer: Any) -> None:
    """Hands :func:`scalars` of every record to a logger, tagged like ``gradient_flow/encoder.lstm/layer_0/c/ratio``.

    Args:
        records: as :func:`lstmcore.record_gradient_flow` collects them.
        writer: TensorBoard's SummaryWriter, or another object with ``add_scalar(tag, value, step)``; if it also has
            ``add_histogram(tag, values, step)``, it gets log2 of the units' finite memory horizons.
            Or a callable, which gets a dictionary and the iteration, once per iteration (such as ``wandb.log``).

    Raises:
        TypeError: anything else.
    """
    add_scalar, add_histogram = getattr(writer, "add_scalar", None), getattr(writer, "add_histogram", None)
    if callable(add_scalar):
        for record in records:
            for name, value in scalars(record).items():
                add_scalar(f"{_tag(record)}/{name}", value, record.iteration)
            if record.gates is not None and callable(add_histogram):
                horizon = record.gates.horizon
                known = horizon[horizon.isfinite() & (horizon > 0)]
                if len(known):
                    add_histogram(f"{_tag(record)}/horizon/log2", known.log2(), record.iteration)
    elif callable(writer):
        _call(records, writer)
    else:
        raise TypeError(
            "expected an object with add_scalar(tag, value, step), such as TensorBoard's SummaryWriter, or a callable"
            f" that takes a dictionary and the iteration; got {type(writer).__name__}"
        )


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Creates the folders of ``path``; an OSError inside says which path could not be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write this file: {error.strerror or error}", str(path)) from error


def _call(records: Sequence[Record], function: Callable[[dict[str, float], int], object]) -> None:
    passes: dict[int, dict[str, float]] = {}
    for record in records:
        found = passes.setdefault(record.iteration, {})
        found |= {f"{_tag(record)}/{name}": value for name, value in scalars(record).items()}
    for iteration in sorted(passes):
        function(passes[iteration], iteration)


def _tag(record: Record) -> str:
    tag = f"gradient_flow/{record.module or ITSELF}/layer_{record.layer}"
    return tag + "_reverse" * bool(record.direction) + (f"/call_{record.call}" if record.call else "")


def _tables(record: Record) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Quantity, axis and columns, all of one length, of every section of the CSV."""
    for state, norms in (("h", record.h), ("c", record.c)):
        if norms is None:
            continue
        for axis, mean, quantiles in (
            ("step", norms.mean, norms.quantiles),
            ("lag", norms.mean_by_lag, norms.quantiles_by_lag),
        ):
            yield state, axis, {"mean": mean, **dict(zip(COLUMNS[9:14], quantiles, strict=True))}
    yield "entering", "step", {"mean": record.entering}
    yield "entering", "lag", {"mean": record.entering_by_lag}
    if record.gates is not None:
        gates = record.gates
        for gate, mean, closed, opened in zip(GATES, gates.mean, gates.closed, gates.open, strict=True):
            yield gate, "step", {"mean": mean, "closed": closed, "open": opened}
        yield "horizon", "unit", {"mean": gates.horizon}


def _field(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _plain(record: Record) -> dict[str, Any]:
    """A record as JSON can hold it."""
    plain: dict[str, Any] = {key: getattr(record, key) for key in ("iteration", "module", "layer", "direction", "call")}
    for name in ("h", "c", "gates"):
        part = getattr(record, name)
        plain[name] = None if part is None else {key: _listed(value) for key, value in vars(part).items()}
    return plain | {name: _listed(getattr(record, name)) for name in ENTERING}


def _record(plain: dict[str, Any]) -> Record:
    def part(cls: type, values: dict[str, Any] | None) -> Any:
        return None if values is None else cls(**{key: _tensor(value) for key, value in values.items()})

    values = dict(plain)
    states = {"h": part(Norms, values.pop("h")), "c": part(Norms, values.pop("c"))}
    entering = {name: _tensor(values[name]) for name in ENTERING}
    return Record(**values | states | entering | {"gates": part(Gates, values["gates"])})


def _listed(tensor: Tensor | None) -> Any:
    """Nested lists, with null for NaN and strings for the infinities."""
    if tensor is None:
        return None
    return _each(lambda x: x if math.isfinite(x) else None if math.isnan(x) else str(x), tensor.tolist())


def _tensor(values: Any) -> Tensor | None:
    if values is None:
        return None
    return torch.tensor(_each(lambda x: math.nan if x is None else float(x), values), dtype=torch.float64)


def _each(function: Callable[[Any], Any], values: Any) -> Any:
    return [_each(function, value) for value in values] if isinstance(values, list) else function(values)
