"""The models of the demonstration, how each is trained, and what is recorded of it.

T steps, B rows of the batch, H hidden units.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

import lstmcore
from lstmcore.flow.record import Record

from .tasks import Model, Task

LAG = 200  # what is left of the gradient is given for this lag, over lag 1
LEARNED = 0.3  # of the chance-level loss: whoever is below has learned more than a guess can explain
SOLVED = 0.05  # of it, over the last MEAN iterations: the training need not go on
MEAN = 25
TEST = 256  # fresh sequences that a trained model is judged by
RECORDS = 30  # backward passes that are recorded of a training


def _rnn(nonlinearity: str) -> Callable[[int, int, int], nn.RNNBase]:
    return lambda inputs, hidden_size, lag: lstmcore.RNN(inputs, hidden_size, nonlinearity=nonlinearity)


def _chrono(inputs: int, hidden_size: int, lag: int) -> nn.RNNBase:
    # from a generator of its own: what is drawn next, the readout, stays the same as in the other models
    generator = torch.Generator().manual_seed(torch.initial_seed())
    return lstmcore.init.chrono_(lstmcore.LSTM(inputs, hidden_size), max(3, lag), generator)


# From the features of the input, H and the longest lag.  The LSTMs differ in their biases alone.
MODELS: dict[str, Callable[[int, int, int], nn.RNNBase]] = {
    "sigmoid RNN": _rnn("sigmoid"),
    "tanh RNN": _rnn("tanh"),
    "LSTM, default": lambda inputs, hidden_size, lag: lstmcore.LSTM(inputs, hidden_size),
    "LSTM, bias 1": lambda inputs, hidden_size, lag: lstmcore.init.forget_bias_(lstmcore.LSTM(inputs, hidden_size)),
    "LSTM, chrono": _chrono,
}


@dataclass(frozen=True)
class Settings:
    """How a task is trained, the same for every model."""

    optimizer: Callable[..., torch.optim.Optimizer]
    learning_rate: float
    options: dict[str, object]
    clip: float
    hidden_size: int
    iterations: int
    batch: int = 32


# The gradients of these losses are large while a model finds the constant answer, and tiny from then on, when it has to
# find the memory: an optimizer that remembers the large ones for a thousand iterations spends them standing still.
SETTINGS = {
    "adding": Settings(torch.optim.Adam, 2e-2, {"betas": (0.9, 0.99)}, clip=0.1, hidden_size=32, iterations=800),
    "copy": Settings(torch.optim.RMSprop, 1e-2, {}, clip=0.02, hidden_size=64, iterations=1000),
}


@dataclass
class Run:
    """One model on one task, and what came of it."""

    name: str
    task: Task
    loss: float = math.nan
    accuracy: float = math.nan
    iterations: int = 0
    seconds: float = 0.0
    records: list[Record] = field(default_factory=list)  # the first of the untrained, the last of the trained model
    losses: list[float] = field(default_factory=list)
    remark: str = ""  # why it ended early

    @property
    def learned(self) -> bool:
        return self.loss < LEARNED * self.task.chance

    @property
    def before(self) -> float:
        return left(self.records[0]) if self.records else math.nan

    @property
    def after(self) -> float:
        return left(self.records[-1]) if self.records else math.nan


def curve(record: Record) -> Tensor:
    """(T,): the mean norm by lag, of dL/dc_t, in a plain RNN of dL/dh_t."""
    return (record.h if record.c is None else record.c).mean_by_lag


def left(record: Record, lag: int = LAG) -> float:
    """How much of the gradient at lag 1 is left at ``lag``, in a shorter sequence at its first step."""
    norms = curve(record)
    return float(norms[min(lag, len(norms) - 1)] / norms[min(1, len(norms) - 1)])


def build(name: str, task: Task, hidden_size: int, seed: int) -> Model:
    """The model ``name`` for ``task``, drawn from ``seed``."""
    torch.manual_seed(seed)
    return Model(MODELS[name](task.inputs, hidden_size, task.lag + 1), task.outputs, task.at_end)


def probe(model: Model, task: Task, batch: tuple[Tensor, Tensor], iteration: int = 0) -> Record:
    """One recorded backward pass, from the answers that need memory: from others, gradient enters at every step."""
    input, target = batch
    with lstmcore.record_gradient_flow(model) as flow:
        task.memory_loss(model(input), target).backward()
    model.zero_grad()
    return replace(flow.records[0], iteration=iteration)


def untrained(name: str, task: Task, hidden_size: int, seed: int, batch: int = 8) -> Record:
    """A pass of an untrained model, in float64: in float32 the gradient of a plain RNN is soon exactly 0."""
    model = build(name, task, hidden_size, seed).double()
    input, target = task.draw(batch, torch.Generator().manual_seed(seed))
    return probe(model, task, (input.double(), target.double() if target.is_floating_point() else target))


def train(
    run: Run,
    settings: Settings,
    seed: int,
    deadline: float = math.inf,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[Run], None] = lambda run: None,
) -> None:
    """Trains ``run``'s model until it has solved the task, or for all of its iterations, and fills in ``run``."""
    task, start, solved = run.task, time.monotonic(), False
    model = build(run.name, task, settings.hidden_size, seed)
    optimizer = settings.optimizer(model.parameters(), lr=settings.learning_rate, **settings.options)
    generator = torch.Generator().manual_seed(seed)  # every model sees the same batches
    watched = task.draw(settings.batch, generator)
    every = max(1, settings.iterations // RECORDS)
    while run.iterations < settings.iterations and not solved:
        if run.iterations % every == 0:
            run.records.append(probe(model, task, watched, run.iterations))
        input, target = task.draw(settings.batch, generator)
        loss = task.loss(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        run.losses.append(loss.item())
        run.iterations += 1
        solved = len(run.losses) >= MEAN and statistics.fmean(run.losses[-MEAN:]) < SOLVED * task.chance
        tell(run)
        if stop() or time.monotonic() > deadline:
            run.remark = "interrupted" if stop() else "out of time"
            break
    run.records.append(probe(model, task, watched, run.iterations))
    with torch.no_grad():
        input, target = task.draw(TEST, generator)
        answer = model(input)
        run.loss, run.accuracy = task.loss(answer, target).item(), task.accuracy(answer, target)
    run.seconds = time.monotonic() - start
