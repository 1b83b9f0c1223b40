"""The meaning of a recording, in plain words: ``print(summarize(records))``.

T steps, B rows of the batch, H hidden units.  A lag counts steps back from the last one that a layer computes.  What is
judged is the gradient at the cell state, which is the LSTM's memory, or at the hidden state of a plain RNN.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lstmcore.flow.measure import EXPLODED, VANISHED, Flow, by_layer, measure, ragged
from lstmcore.flow.record import GATES, Record

KINDS = ("non-finite", "exploding", "vanishing", "no-gradient", "saturated", "unclear", "short-horizon", "healthy")

MOSTLY = 0.5  # a gate is called closed if more than half of its activations are
SWITCHES = 0.9  # hardly any activation is where the sigmoid's slope exceeds 0.09, so these gates hardly learn
# Over ten times its horizon a unit keeps 2^-10, a thousandth; the longest of chrono's is two thirds of the sequence.
HORIZONS = 10
WIDTH = 96  # characters per line


@dataclass(frozen=True)
class Finding:
    """One judgement about one layer."""

    kind: str  # one of KINDS
    where: str  # the record's name
    numbers: dict[str, float]  # what the text says, unrounded
    text: str  # the judgement, in sentences
    advice: str = ""  # what to try, one suggestion per line


@dataclass(frozen=True)
class Summary:
    """What :func:`summarize` found; ``str`` of it is a text in lines of up to 96 characters."""

    heading: str  # what was recorded, and what is compared
    findings: list[Finding]  # layer by layer, the worst of each first

    def __str__(self) -> str:
        paragraphs = ["\n".join(map(_wrapped, self.heading.splitlines()))]
        for where in dict.fromkeys(finding.where for finding in self.findings):
            here = [finding for finding in self.findings if finding.where == where]
            lines = [f"{where}: {', '.join(dict.fromkeys(finding.kind for finding in here))}"]
            lines += [_wrapped(finding.text, "  ", 2) for finding in here]
            advice = dict.fromkeys(line for finding in here for line in finding.advice.splitlines())
            lines += [_wrapped(line, "       " if n else "  Try: ", 9) for n, line in enumerate(advice)]
            paragraphs.append("\n".join(lines))
        return "\n\n".join(paragraphs)


def summarize(records: Sequence[Record]) -> Summary:
    """Judges the last recorded pass of every layer and direction, and how it differs from the first one.

    Raises:
        ValueError: an empty recording.
    """
    layers = by_layer(records)
    passes = sorted({record.iteration for record in records})
    count = _count(len({(record.module, record.layer) for record in records}), "layer")
    both = ", both directions," if any(record.direction for record in records) else ""
    heading = f"Gradient flow of {count}{both} in {_count(len(passes), 'recorded backward pass', 'es')}"
    if len(passes) > 1:
        heading += f" (iterations {passes[0]} to {passes[-1]})"
    shortest, longest = min(record.steps for record in records), max(record.steps for record in records)
    lengths = f"{shortest} to {longest} steps" if shortest < longest else _count(longest, "step")
    heading += (
        f", sequences of {lengths}.\nA lag counts the steps back from the last one that a layer computes, which is"
        " lag 0. What is compared is the size (Euclidean norm) of the gradient at each step."
    )
    return Summary(heading, [finding for history in layers.values() for finding in _judge(history, layers)])


def number(value: float) -> str:
    """Two significant digits: ``0.51``, ``1200``, ``3e-12``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    if -3 <= int(exponent) < 5:
        decimals = max(0, 1 - int(exponent))
        return f"{float(f'{mantissa}e{exponent}'):.{decimals}f}"
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def share(value: float) -> str:
    """A share as a percentage, a tiny one in scientific notation: ``62%``, ``3e-12``."""
    return f"{number(100 * value)}%" if value == 0 or value >= 1e-3 else number(value)


# ------------------------------------------------------------------------------------------------------ one layer


def _judge(history: list[Record], layers: dict[str, list[Record]]) -> list[Finding]:
    """All findings of one layer and direction, the worst first."""
    record, flows = history[-1], [measure(record) for record in history]
    place = (record.module, record.layer + 1, record.call)
    above = any((other.module, other.layer, other.call) == place for other, *_ in layers.values())
    short = _short_horizon(record, flows[-1])
    found = [_non_finite(history, flows), _main(history, flows, above, short is not None), short, *_saturated(record)]
    return sorted((finding for finding in found if finding), key=lambda finding: KINDS.index(finding.kind))


def _main(history: list[Record], flows: list[Flow], above: bool, short: bool) -> Finding | None:
    """The finding about the curve of the last pass; None if norms that are not finite hide it.

    ``above``: there is a layer above; ``short``: there is a finding about the horizons.
    """
    record, flow, far = history[-1], flows[-1], flows[-1].far
    if flow.start is None:
        if flow.broken is not None:
            return None
        text = "No gradient arrives at this layer: it is exactly 0 at every step."
        advice = "a loss that uses this layer's output, with no .detach(), torch.no_grad() or factor of 0 between"
        return Finding("no-gradient", record.name, {"far": far}, text, advice)

    trend, numbers = _trend(flows)
    numbers |= {"far": far, "rate": flow.rate, "ratio_far": flow.ratio(far)}
    if far > 100:
        numbers["ratio_100"] = flow.ratio(100)
    if 0 < flow.rate < 1:
        numbers["half_life"] = math.log(0.5) / math.log(flow.rate)

    exploded = [each.iteration for each, its in zip(history, flows, strict=True) if its.growth > EXPLODED]
    inherited = above and _grows(record)
    if flow.growth > EXPLODED or inherited:
        numbers["growth"] = flow.growth
        per_step = f"each step back multiplies it by {flow.rate:.3g}, and " if flow.rate > 1 else ""
        text = f"The gradient explodes: {per_step}at {_place(record, flow.peak)} it is {number(flow.ratio(flow.peak))}"
        text += f" times what it is at {_place(record, flow.start)}."
        if inherited and flow.growth <= EXPLODED:
            text += " What the layer above sends grows like that already: look there first."
        if len(flows) > 1 and exploded:
            text += f" It exploded in {len(exploded)} of the {len(flows)} passes."
        advice = (
            "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) before optimizer.step()\n"
            "a smaller learning rate\n"
            "torch.nn.init.orthogonal_ for each block of the recurrent weights weight_hh"
        )
        return Finding("exploding", record.name, numbers, text, advice)
    if flow.broken is not None:
        return None
    if exploded:
        trend += f" It had exploded in {len(exploded)} of the {len(flows)} passes, the last time in iteration"
        trend += f" {exploded[-1]}."

    if flow.vanished is not None:
        numbers["lag"] = flow.vanished
        if not ragged(record):
            numbers["step"] = _step(record, flow.vanished)
        text = f"The gradient vanishes: from {_place(record, flow.vanished)} on, walking back, it stays below"
        text += f" {number(VANISHED)} of its largest value. {_per_step(flow)}{_left(record, flow)}{trend}"
        if above and flow.throughout:
            text += " What the layer above sends fades with it: look there first."
        return Finding("vanishing", record.name, numbers, text, _remedy(record, far + 1))

    if far == 0:
        return Finding("unclear", record.name, numbers, "Each sequence is one step long: there is nothing to cross.")
    if flow.throughout:
        source = "layer above" if above else "loss"
        text = f"The {source} sends gradient to almost every step, so what is seen at a step comes mostly from just"
        text += " after it: that it does not vanish says nothing about long lags." + trend
        if record.gates is not None and not short:
            numbers |= _horizon_numbers(record, far + 1)
            text += f" The forget gates say more: {_horizons(numbers)}."
        advice = (
            "output[-1].sum().backward(), recorded once: a loss that reads the last step alone\n" if not above else ""
        )
        if record.c is not None:
            where = f"layer={record.layer}" + (f", direction={record.direction}" if record.direction else "")
            advice += f"lstmcore.cell_jacobian({_module(record)}, input, {where}) for products of the steps over a lag"
        return Finding("unclear", record.name, numbers, text, advice)

    text = "The gradient crosses the whole sequence. " + _left(record, flow) + trend
    if flow.rate < 1 and (lost := math.log(VANISHED) / math.log(flow.rate)) < 10 * (far + 1):
        text += f" {_per_step(flow)}At that rate a sequence of {number(max(lost, far + 1))} steps would lose it."
    return Finding("healthy", record.name, numbers, text)


def _non_finite(history: list[Record], flows: list[Flow]) -> Finding | None:
    """Infinite or NaN gradients, in the last pass or in an earlier one."""
    bad = [index for index, flow in enumerate(flows) if flow.broken is not None]
    if not bad:
        return None
    record, flow = history[bad[-1]], flows[bad[-1]]
    lag = flow.broken
    assert lag is not None
    numbers: dict[str, float] = {"lag": lag, "iteration": record.iteration, "passes": len(bad)}
    if not ragged(record):
        numbers["step"] = _step(record, lag)
    states = [record.h] if record.c is None else [record.h, record.c]
    many = any(torch.isinf(norms.quantiles_by_lag[2, lag]) for norms in states)  # [2]: the median
    rows = "at least half of the rows" if many else "less than half of the rows"
    when = " is not finite (inf or NaN)"
    if record is not history[-1]:
        when = f" was not finite (inf or NaN) in iteration {record.iteration}, though it is in the last one"
    text = f"The gradient{when}: walking back, first at {_place(record, lag)}, in {rows}."
    if lag == 0:
        text += " That is where the backward pass begins: the loss or the forward pass brought it in."
    elif flow.growth > EXPLODED:
        text += " It had grown until it overflowed."
    if len(flows) > 1:
        text += f" That was so in {len(bad)} of the {len(flows)} passes."
    advice = (
        "torch.isfinite(input).all() and torch.isfinite(loss): look for NaN in what goes in\n"
        "a smaller learning rate\n"
        "in float16, torch.amp.GradScaler, which skips such passes and then scales the loss down"
    )
    return Finding("non-finite", record.name, numbers, text, advice)


def _saturated(record: Record) -> list[Finding]:
    """Findings about gates that are closed and should not be, or that have become switches."""
    if record.gates is None:
        return []
    closed = dict(zip(GATES, record.gates.closed.nanmean(-1).tolist(), strict=True))
    opened = dict(zip(GATES, record.gates.open.nanmean(-1).tolist(), strict=True))
    numbers = {f"{gate}_closed": closed[gate] for gate in GATES} | {f"{gate}_open": opened[gate] for gate in GATES}
    calmer = "smaller initial weights, weight decay, or inputs normalised to mean 0 and variance 1"
    found = []

    def add(text: str, advice: str) -> None:
        found.append(Finding("saturated", record.name, numbers, text, advice))

    if closed["forget"] > MOSTLY:
        text = f"The forget gates are mostly closed ({share(closed['forget'])} of their values are below 0.1): a unit"
        add(f"{text} forgets at once what it held.", f"lstmcore.init.forget_bias_({_module(record)}, 1.0)")
    if closed["output"] > MOSTLY:
        text = (
            f"The output gates are mostly closed ({share(closed['output'])} of their values are below 0.1): little of"
        )
        add(f"{text} the cell is shown, and the gradient hardly gets in.", calmer)
    # With open forget gates, closed input gates protect what is kept for long: chrono sets them so.
    if closed["input"] > MOSTLY and opened["forget"] <= MOSTLY:
        text = f"The input gates are mostly closed ({share(closed['input'])} of their values are below 0.1): hardly"
        add(f"{text} anything is written into the cell.", calmer)
    for gate in ("input", "output"):
        if closed[gate] <= MOSTLY and closed[gate] + opened[gate] > SWITCHES:
            text = f"The {gate} gates have become switches ({share(closed[gate])} closed, {share(opened[gate])} open):"
            add(f"{text} where a gate is at either end it hardly learns any more.", calmer)
    return found


def _short_horizon(record: Record, flow: Flow) -> Finding | None:
    """A finding about forget gates that cannot carry anything across the sequence."""
    if record.gates is None or not (flow.vanished is not None or flow.throughout):
        return None  # no gates, or no problem: the gradient crosses the sequence
    steps = flow.far + 1
    numbers = _horizon_numbers(record, steps)
    if not numbers["longest"] * HORIZONS < steps:  # NaN: unknown
        return None
    text = f"The forget gates are too low for {_count(steps, 'step')}: {_horizons(numbers)}."
    return Finding("short-horizon", record.name, numbers, text, _remedy(record, steps))


# ------------------------------------------------------------------------------------------------------- wording


def _horizon_numbers(record: Record, steps: int) -> dict[str, float]:
    assert record.gates is not None
    horizon = record.gates.horizon[~record.gates.horizon.isnan()]
    if not len(horizon):
        return {"median": math.nan, "longest": math.nan, "beyond": math.nan, "steps": steps}
    median = float(horizon.sort().values[(len(horizon) - 1) // 2])
    beyond = float((horizon > steps).double().mean())
    return {"median": median, "longest": float(horizon.max()), "beyond": beyond, "steps": steps}


def _horizons(numbers: dict[str, float]) -> str:
    median, longest = (
        f"after {number(numbers[key])} steps" if math.isfinite(numbers[key]) else "never"
        for key in ("median", "longest")
    )
    return (
        f"a typical unit (the median) has lost half of what it held {median}, the one that remembers longest {longest},"
        f" and {share(numbers['beyond'])} of the units keep half beyond all {_count(int(numbers['steps']), 'step')}"
    )


def _trend(flows: list[Flow]) -> tuple[str, dict[str, float]]:
    """How much of the gradient crossed the sequence at the start of the recording, over the lags of both passes."""
    then, now = flows[0], flows[-1]
    lag = min(then.far, now.far)
    if len(flows) < 2 or lag == 0 or then.start is None or now.start is None or then.broken is not None:
        return "", {}
    before, after = then.ratio(lag), now.ratio(lag)
    if before == after or (before > 0 and 0.5 <= after / before <= 2):
        text = f" At the start of the recording it was about the same ({share(before)} at lag {lag})."
    else:
        text = f" At the start of the recording it was {share(before)} at lag {lag}, now it is {share(after)}."
    return text, {"first_ratio": before, "last_ratio": after, "trend_lag": lag}


def _left(record: Record, flow: Flow) -> str:
    """How much of the gradient is left at lag 100 and at the far end."""
    assert flow.start is not None
    left = flow.ratio(flow.far)
    arrives = share(left) if left else "nothing (exactly 0)"
    hundred = f"{share(flow.ratio(100))} is left at lag 100, and " if flow.start < 100 < flow.far else ""
    start, far = _place(record, flow.start), _place(record, flow.far)
    return f"Of the gradient at {start}, {hundred}{arrives} arrives at {far}."


def _per_step(flow: Flow) -> str:
    if not 0 < flow.rate < 1:
        return ""
    half = math.log(0.5) / math.log(flow.rate)
    return f"Each step back keeps {_kept(flow.rate)} of it, so it halves every {number(half)} steps. "


def _kept(rate: float) -> str:
    """What is kept, with two digits of it, or of what is lost if that is more precise: 51%, 99.35%."""
    lost = 100 * (1 - rate)
    if not 1e-6 < lost < 10:
        return share(rate)
    return f"{100 * rate:.{1 - math.floor(math.log10(lost))}f}".rstrip("0").rstrip(".") + "%"


def _grows(record: Record) -> bool:
    """Whether the gradient that enters grows with the lag."""
    entering = record.entering_by_lag
    entering = entering[entering.isfinite() & (entering > 0)]
    return len(entering) > 1 and bool(entering.max() > EXPLODED * entering[0])


def _step(record: Record, lag: int) -> int:
    return lag if record.direction else record.steps - 1 - lag


def _place(record: Record, lag: int) -> str:
    return f"lag {lag}" if ragged(record) else f"lag {lag} (step {_step(record, lag)})"


def _module(record: Record) -> str:
    """An expression for the module, given the model."""
    if not record.module:
        return "model"
    parts = record.module.split(".")
    return (
        ".".join(["model", *parts]) if all(map(str.isidentifier, parts)) else f'model.get_submodule("{record.module}")'
    )


def _remedy(record: Record, steps: int) -> str:
    if record.c is None:
        return f"lstmcore.LSTM in place of {_module(record)}: a plain RNN has no path that keeps a gradient"
    bias = f"lstmcore.init.forget_bias_({_module(record)}, 1.0)"
    if steps < 3:
        return bias
    return f"lstmcore.init.chrono_({_module(record)}, max_lag={steps}) before training\nor, milder, {bias}"


def _count(n: int, thing: str, plural: str = "s") -> str:
    return f"{n} {thing}" + (plural if n != 1 else "")


def _wrapped(text: str, first: str = "", indent: int = 0) -> str:
    """Lines of up to WIDTH characters; code is not broken."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
