"""A task that no policy without a memory solves, learned by an actor-critic with lstmcore.LSTM.

    python examples/reinforcement.py             # under a minute
    python examples/reinforcement.py --resume    # goes on from the checkpoint, as if it had never stopped

The task is the T-maze.  A sign at its entrance says on which side the goal lies; a corridor follows, in which every
place looks the same; at its end the agent turns to one side, and what it sees there says nothing about the goal.  So a
policy that sees the present alone is right in half of the episodes, whatever it does: that is the baseline, and the
same actor-critic with a layer without memory in place of the LSTM, trained alongside, shows it.

What lstmcore does here:

* A rollout has T steps of B environments, and episodes end anywhere in it.  Training runs all of it in one call, with
  ``reset=``: where an episode begins, the state of that row is zeroed, and no gradient passes.  ``reset[t]`` is
  ``done[t - 1]``, and a rollout starts from the state and the ``done`` that the one before ended with.
* ``chrono`` starts the forget gates so that they can span the longest corridor.
* Acting takes one step at a time, each after the one before: ``lstmcore.Stream``, with the results of that call.

At the end the same call is timed beside what is written with ``torch.nn.LSTM`` instead, on the last rollout.

The training is PPO (Schulman et al. 2017) with generalised advantages, every epoch over the whole rollout.

Legend: T steps, B environments, I observation, H hidden, A actions, S episodes (or parts of one) in a rollout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

import lstmcore
from common import (
    CannotRun,
    Checkpoint,
    above_zero,
    add_options,
    brought_by,
    fast_arithmetic,
    fraction,
    positive,
    reported,
)
from loop import repeat

with brought_by("examples"):
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from lstmcore.flow import plots

WITH, WITHOUT = "lstmcore.LSTM", "no memory"
COLOURS = {WITH: plots.BLUE, WITHOUT: plots.ORANGE}
SIGN_LEFT, SIGN_RIGHT, CORRIDOR, JUNCTION = range(4)  # what is seen: I
LEFT, RIGHT, WALK = range(3)  # what can be done: A
OBSERVATIONS, ACTIONS = 4, 3
GOAL, WRONG, BUMP = 1.0, -1.0, -0.1  # rewards; a step along the corridor has none
TEST_EPISODES = 2000
RECENT = 10  # rollouts that a point of the learning curve is a mean of
State = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------------------------------------- task


class TMaze:
    """B mazes side by side.  An episode that ends is followed by the next one at once, in a maze of another length."""

    def __init__(self, batch: int, shortest: int, longest: int, seed: int) -> None:
        self.shortest, self.longest = shortest, longest
        self._generator = torch.Generator().manual_seed(seed)
        self.goal, self.length, self.place, self.time = torch.zeros(4, batch, dtype=torch.int64)
        self._enter(torch.ones(batch, dtype=torch.bool))

    def _enter(self, rows: Tensor) -> None:
        """New mazes for these rows, a mask: draws for all, so that the draws of a row do not depend on the others."""
        goal = torch.randint(LEFT, RIGHT + 1, rows.shape, generator=self._generator)
        length = torch.randint(self.shortest, self.longest + 1, rows.shape, generator=self._generator)
        self.goal, self.length = torch.where(rows, goal, self.goal), torch.where(rows, length, self.length)
        self.place, self.time = self.place * ~rows, self.time * ~rows

    def observe(self) -> Tensor:
        """(B, I), float32: one-hot, the sign at the entrance, then the corridor, then the junction."""
        seen = torch.full_like(self.place, CORRIDOR)
        seen = torch.where(self.place == 0, SIGN_LEFT + self.goal, seen)
        seen = torch.where(self.place == self.length, JUNCTION, seen)
        return F.one_hot(seen, OBSERVATIONS).float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) actions to the reward of each, whether its episode ended with it, and whether at the goal."""
        turned, at_junction = action != WALK, self.place == self.length
        decided = turned & at_junction
        solved = decided & (action == self.goal)
        reward = torch.where(turned == at_junction, 0.0, BUMP)  # a wall: beside the corridor, or behind the junction
        reward = torch.where(decided, torch.where(solved, GOAL, WRONG), reward)
        self.place = self.place + (~turned & ~at_junction)
        self.time = self.time + 1
        late = ~decided & (self.time >= 2 * self.longest)  # who stands about is sent home, and has lost as well
        reward = torch.where(late, WRONG, reward)
        done = decided | late
        self._enter(done)
        return reward, done, solved

    def state_dict(self) -> dict[str, Tensor]:
        names = ("goal", "length", "place", "time")
        return {name: getattr(self, name) for name in names} | {"generator": self._generator.get_state()}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        self.goal, self.length, self.place, self.time = (saved[name] for name in ("goal", "length", "place", "time"))
        self._generator.set_state(saved["generator"])


def best_without_memory() -> tuple[float, float]:
    """The success rate and the mean return that no policy of the present observation alone can exceed.

    At the junction it turns left with some probability p, whatever the sign was.  The goal is on either side with
    probability one half, so it finds it with p / 2 + (1 - p) / 2 = 1/2 at most, and whoever does not find it has lost.
    """
    return 0.5, 0.5 * GOAL + 0.5 * WRONG


# --------------------------------------------------------------------------------------------------------------- agent


class Agent(nn.Module):
    """Actor and critic on what an LSTM makes of the observations so far, or a layer of the present one."""

    def __init__(self, remembers: bool, hidden_size: int, longest: int) -> None:
        super().__init__()
        # A sign has to survive the corridor before anything can be learned from it: with torch's initialisation, and
        # with forget biases of one as well, it does not.
        self.lstm = lstmcore.LSTM(OBSERVATIONS, hidden_size, chrono=max(longest, 3)) if remembers else None
        self.layer = None if remembers else nn.Sequential(nn.Linear(OBSERVATIONS, hidden_size), nn.Tanh())
        self.actor, self.critic = nn.Linear(hidden_size, ACTIONS), nn.Linear(hidden_size, 1)

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(..., H) to scores of the actions (..., A) and the value (...)."""
        return self.actor(features), self.critic(features).squeeze(-1)

    def forward(self, observations: Tensor, state: State | None, reset: Tensor) -> tuple[Tensor, Tensor]:
        """A whole rollout in one call: (T, B, I), the state it starts from, and (T, B) where episodes begin."""
        if self.lstm is None:
            return self.heads(self.layer(observations))
        output, _ = self.lstm(observations, state, reset=reset)
        return self.heads(output)


class Player:
    """An agent in its environments, one step at a time; the state and the last ``done`` go from rollout to rollout."""

    def __init__(self, agent: Agent, maze: TMaze, device: torch.device) -> None:
        self.agent, self.maze, self.device = agent, maze, device
        batch = len(maze.place)
        self.begins = torch.ones(batch, dtype=torch.bool)  # rows whose next step is the first of an episode
        self._stream = None if agent.lstm is None else lstmcore.Stream(agent.lstm, batch)

    @property
    def state(self) -> State | None:
        return None if self._stream is None else self._stream.state

    @state.setter
    def state(self, state: State | None) -> None:
        if self._stream is not None:
            self._stream.state = tuple(each.to(self.device) for each in state)

    def update(self) -> None:
        """After the weights have changed."""
        if self._stream is not None:
            self._stream.update()

    def look(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (B, A) and values (B,) of the present, on the CPU."""
        x = observation.to(self.device)
        reset = self.begins.to(self.device)
        features = self.agent.layer(x) if self._stream is None else self._stream.step(x, reset=reset)
        scores, values = self.agent.heads(features)
        return scores.cpu(), values.cpu()


# ------------------------------------------------------------------------------------------------------------- rollout


@dataclass
class Rollout:
    """What T steps of B environments gave, and all that a training on them needs; on the agent's device."""

    state: State | None  # before the first step
    observations: Tensor  # (T, B, I)
    reset: Tensor  # (T, B), bool: the step is the first of an episode
    actions: Tensor  # (T, B)
    chances: Tensor  # (T, B): log probability of the action when it was taken
    advantages: Tensor  # (T, B)
    returns: Tensor  # (T, B): what the critic is to say
    episodes: int
    solved: int

    @property
    def success(self) -> float:
        """Of the episodes that ended in it; NaN where none did."""
        return self.solved / self.episodes if self.episodes else float("nan")


@torch.no_grad()
def play(player: Player, steps: int, options: argparse.Namespace) -> Rollout:
    """T steps, and what they were worth by generalised advantage estimation."""
    state, columns = player.state, []
    solved = 0
    for _ in range(steps):
        observation, begins = player.maze.observe(), player.begins
        scores, values = player.look(observation)
        policy = Categorical(logits=scores, validate_args=False)
        action = policy.sample()
        reward, player.begins, right = player.maze.step(action)
        solved += int(right.sum())
        columns.append((observation, begins, action, policy.log_prob(action), values, reward, player.begins))
    observations, reset, actions, chances, values, rewards, done = map(torch.stack, zip(*columns, strict=True))

    # The value of what comes after the last step: a look ahead that must not count as a step of the stream.
    after = player.state
    following = player.look(player.maze.observe())[1]
    player.state = after
    advantages, advantage = torch.empty_like(rewards), torch.zeros(rewards.shape[1])
    for t in reversed(range(steps)):
        goes_on = (~done[t]).float()
        error = rewards[t] + options.discount * following * goes_on - values[t]
        advantage = error + options.discount * options.trace * goes_on * advantage
        advantages[t], following = advantage, values[t]
    parts = (observations, reset, actions, chances, advantages, advantages + values)
    return Rollout(state, *(part.to(player.device) for part in parts), int(done.sum()), solved)


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Trainee:
    """One of the two agents, with all that training changes."""

    name: str
    player: Player
    optimizer: torch.optim.Optimizer
    success: list[float] = field(default_factory=list)  # share of the episodes of each rollout
    seconds: list[float] = field(default_factory=list)  # a rollout, acting and training

    @staticmethod
    def new(name: str, options: argparse.Namespace) -> Trainee:
        torch.manual_seed(options.seed)
        agent = Agent(name == WITH, options.hidden_size, options.longest).to(options.device)
        maze = TMaze(options.batch, options.shortest, options.longest, options.seed)
        optimizer = torch.optim.Adam(agent.parameters(), lr=options.learning_rate)
        return Trainee(name, Player(agent, maze, options.device), optimizer)

    def iterate(self, options: argparse.Namespace) -> None:
        """A rollout, and some epochs of training on it."""
        start = time.perf_counter()
        rollout = play(self.player, options.steps, options)
        agent = self.player.agent
        for _ in range(options.epochs):
            loss = surrogate(agent, rollout, options)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), options.clip)
            self.optimizer.step()
        self.player.update()
        self.success.append(rollout.success)
        self.seconds.append(time.perf_counter() - start)

    def state_dict(self) -> dict[str, Any]:
        return {
            "agent": self.player.agent.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "maze": self.player.maze.state_dict(),
            "state": self.player.state,
            "begins": self.player.begins,
            "success": self.success,
            "seconds": self.seconds,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.player.agent.load_state_dict(saved["agent"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.player.maze.load_state_dict(saved["maze"])
        self.player.update()
        self.player.state, self.player.begins = saved["state"], saved["begins"]
        self.success, self.seconds = saved["success"], saved["seconds"]


def surrogate(agent: Agent, rollout: Rollout, options: argparse.Namespace) -> Tensor:
    """PPO's loss over a whole rollout, whose episodes begin where ``rollout.reset`` says."""
    scores, values = agent(rollout.observations, rollout.state, rollout.reset)
    policy = Categorical(logits=scores, validate_args=False)
    ratio = (policy.log_prob(rollout.actions) - rollout.chances).exp()
    gain = (rollout.advantages - rollout.advantages.mean()) / (rollout.advantages.std() + 1e-8)
    bounded = ratio.clamp(1 - options.ratio, 1 + options.ratio)
    return (
        -torch.min(ratio * gain, bounded * gain).mean()
        + 0.5 * F.mse_loss(values, rollout.returns)
        - options.entropy * policy.entropy().mean()
    )


SETTINGS = (
    "seed", "batch", "steps", "shortest", "longest", "hidden_size", "learning_rate", "epochs", "clip", "ratio",
    "entropy", "discount", "trace",
)  # fmt: skip


def train(trainees: Sequence[Trainee], checkpoint: Checkpoint, options: argparse.Namespace, console: Console) -> bool:
    """Trains both in turns up to ``options.iterations``; returns False when interrupted.  Saves in either case."""

    def iterate(_: int) -> str:
        for trainee in trainees:
            trainee.iterate(options)
        return "at the goal: " + ", ".join(f"{recent(trainee):.0%}" for trainee in trainees)

    def state() -> dict[str, Any]:
        return {trainee.name: trainee.state_dict() for trainee in trainees}

    return repeat(iterate, len(trainees[0].success), checkpoint, state, options, console)


def recent(trainee: Trainee) -> float:
    """The success rate of the last rollouts."""
    return torch.tensor(trainee.success[-RECENT:]).nanmean().item()


@torch.no_grad()
def test(agent: Agent, options: argparse.Namespace) -> tuple[float, float]:
    """The success rate and the mean return of so many new episodes, played without chance.

    Every row plays the same number, or short episodes would count more than long ones.
    """
    rows = min(100, options.test_episodes)
    each = -(-options.test_episodes // rows)
    maze = TMaze(rows, options.shortest, options.longest, options.seed + 1)
    player = Player(agent, maze, options.device)
    played, solved, total = torch.zeros(rows), torch.zeros(rows), torch.zeros(rows)
    while (active := played < each).any():
        scores, _ = player.look(maze.observe())
        reward, player.begins, right = maze.step(scores.argmax(-1))
        total += reward * active
        solved += right & active
        played += player.begins & active
    return (solved.sum() / played.sum()).item(), (total.sum() / played.sum()).item()


# ----------------------------------------------------------------------------------------------- what reset= saves


def in_one_call(lstm: lstmcore.LSTM, rollout: Rollout) -> Tensor:
    """As above."""
    return lstm(rollout.observations, rollout.state, reset=rollout.reset)[0]


def by_segments(lstm: nn.LSTM, rollout: Rollout) -> Tensor:
    """A call for each stretch of steps up to the next at which an episode begins in any row."""
    begins = rollout.reset.any(1)
    begins[0] = True
    (h, c), parts = rollout.state, []
    for start, end in pairwise([*begins.nonzero().flatten().tolist(), len(begins)]):
        kept = ~rollout.reset[start, :, None]
        output, (h, c) = lstm(rollout.observations[start:end], (h * kept, c * kept))
        parts.append(output)
    return torch.cat(parts)


def by_episodes(lstm: nn.LSTM, rollout: Rollout) -> Tensor:
    """One padded batch with a row for each episode; those under way at the start go on from the state."""
    begins = rollout.reset.t().clone()  # (B, T): in this order an episode is a run of neighbours
    begins[:, 0] = True
    batch, steps = begins.shape
    episode = begins.flatten().cumsum(0) - 1  # of each step
    first = begins.flatten().nonzero().flatten()  # of each episode
    step = torch.arange(batch * steps, device=first.device) - first[episode]
    x = rollout.observations.transpose(0, 1).flatten(0, 1)
    padded = x.new_zeros(int(step.max()) + 1, len(first), x.shape[-1]).index_put((step, episode), x)
    states = []
    for state in rollout.state:
        kept = state[0] * ~rollout.reset[0, :, None]
        states.append(state.new_zeros(1, len(first), state.shape[-1]).index_copy(1, episode[::steps], kept[None]))
    output, _ = lstm(padded, tuple(states))
    return output[step, episode].view(batch, steps, -1).transpose(0, 1)


WAYS: dict[str, Callable[..., Tensor]] = {
    "lstmcore.LSTM, reset=": in_one_call,
    "torch.nn.LSTM, call by call": by_segments,
    "torch.nn.LSTM, padded episodes": by_episodes,
}


@dataclass(frozen=True)
class Comparison:
    """Forward and backward of the LSTM over a rollout, in each of the three ways."""

    seconds: dict[str, float]  # by the way's name; the median
    error: float  # the largest relative difference of outputs and gradients
    episodes: int  # S


def compare(rollout: Rollout, lstm: lstmcore.LSTM, repeats: int) -> Comparison:
    """Times the three ways by turns, after a check that they agree.

    Raises:
        AssertionError: they do not.
    """
    device = rollout.reset.device
    peer = nn.LSTM(lstm.input_size, lstm.hidden_size).to(device)
    peer.load_state_dict(lstm.state_dict())
    modules = {way: lstm if way is in_one_call else peer for way in WAYS.values()}
    weighting = torch.randn(*rollout.reset.shape, lstm.hidden_size, device=device)

    def run(way: Callable[..., Tensor]) -> list[Tensor]:
        module = modules[way]
        module.zero_grad()
        output = way(module, rollout)
        (output * weighting).sum().backward()
        return [output.detach(), *(parameter.grad for parameter in module.parameters())]

    mine, error = run(in_one_call), 0.0
    for way in (by_segments, by_episodes):
        for ours, theirs in zip(mine, run(way), strict=True):
            error = max(error, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    if not error < 1e-3:
        raise AssertionError(f"expected the same outputs and gradients, got a relative difference of {error:.2g}")

    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, way in WAYS.items():
            start = time.perf_counter()
            run(way)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    begins = rollout.reset.clone()
    begins[0] = True
    return Comparison({name: statistics.median(each) for name, each in times.items()}, error, int(begins.sum()))


# -------------------------------------------------------------------------------------------------------------- report


def show(console: Console, results: dict[str, tuple[float, float]], trainees: Sequence[Trainee]) -> None:
    """The final table: both agents, and what no policy without a memory exceeds."""
    table = Table(title="T-maze")
    for name in ("", *results, "best possible without memory"):
        table.add_column(name, justify="right" if name else "left")
    success, reward = best_without_memory()
    table.add_row("success rate", *(f"{each[0]:.1%}" for each in results.values()), f"{success:.1%}")
    table.add_row("mean return", *(f"{each[1]:.3f}" for each in results.values()), f"{reward:.3f}")
    seconds = [f"{statistics.median(trainee.seconds):.3f}" for trainee in trainees]
    table.add_row("seconds a rollout (median)", *seconds, "")
    console.print(table)


def tell(console: Console, comparison: Comparison, options: argparse.Namespace) -> None:
    """What reset= saves."""
    table = Table(title=f"the LSTM over a rollout of {options.steps} steps and {options.batch} rows")
    for name in ("forward and backward", "ms", "times as long"):
        table.add_column(name, justify="left" if name.startswith("forward") else "right")
    ours = comparison.seconds[next(iter(WAYS))]
    for name, seconds in comparison.seconds.items():
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / ours:.2f}")
    console.print(table)
    console.print(
        f"{comparison.episodes} episodes, or parts of one; outputs and gradients agree to {comparison.error:.1g}",
        highlight=False,
    )


@plots.styled
def draw(trainees: Sequence[Trainee], comparison: Comparison, options: argparse.Namespace) -> Figure:
    """The learning curves, and what a pass over a rollout takes."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(1.7, 1))
    for trainee in trainees:
        success = torch.tensor(trainee.success)
        window = min(RECENT, len(success))
        mean = success.unfold(0, window, 1).nanmean(-1) * 100
        steps = torch.arange(window, len(success) + 1) * options.steps * options.batch / 1e3
        curves.plot(steps, mean, color=COLOURS[trainee.name], label=trainee.name)
    limit = best_without_memory()[0] * 100
    curves.axhline(limit, color="black", linestyle="--", linewidth=1, label="best possible without memory")
    curves.set(ylim=(0, 103), xlim=(0, None), ylabel="episodes that reach the goal, %")
    curves.set(xlabel="thousand steps in the environments", title=f"success, mean of {RECENT} rollouts")
    curves.grid(alpha=0.3)
    curves.legend(frameon=False, loc="lower right")

    milliseconds = [seconds * 1e3 for seconds in comparison.seconds.values()]
    names = [name.replace(", ", ",\n") for name in comparison.seconds]
    drawn = bars.barh(names, milliseconds, color=[plots.BLUE, plots.GREY, plots.GREY])
    bars.bar_label(drawn, [f"{value:.1f}" for value in milliseconds], padding=3)
    bars.invert_yaxis()
    bars.set(xlim=(0, max(milliseconds) * 1.25), xlabel="milliseconds, forward and backward")
    bars.set_title(f"the LSTM over a rollout of {options.steps} steps, {options.batch} rows")
    figure.suptitle(f"T-maze with corridors of {options.shortest} to {options.longest} steps", fontsize=11)
    return figure


# ---------------------------------------------------------------------------------------------------------------- main


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Learns a T-maze, which no policy without a memory solves, by PPO with lstmcore.LSTM: rollouts "
        "with resets in them, in one call. Ctrl-C saves a checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--iterations", type=positive, default=250, help="rollouts of each agent, in total")
    parser.add_argument("--steps", type=positive, default=256, help="T: of a rollout")
    parser.add_argument("--batch", type=positive, default=32, help="B: environments side by side")
    parser.add_argument("--shortest", type=positive, default=20, help="steps of the shortest corridor")
    parser.add_argument("--longest", type=positive, default=80, help="steps of the longest corridor")
    parser.add_argument("--hidden-size", type=positive, default=64)
    parser.add_argument("--learning-rate", type=above_zero(float), default=3e-3)
    parser.add_argument("--epochs", type=positive, default=4, help="of training on each rollout")
    parser.add_argument("--discount", type=fraction, default=0.99, help="γ: what a reward is worth a step earlier")
    parser.add_argument("--trace", type=fraction, default=0.95, help="λ of generalised advantages")
    parser.add_argument(
        "--ratio", type=above_zero(float), default=0.2, help="ε: how far PPO lets a probability move in a rollout"
    )
    parser.add_argument(
        "--entropy", type=fraction, default=0.01, help="weight of the entropy: reward for trying things"
    )
    parser.add_argument("--clip", type=above_zero(float), default=0.5, help="largest norm of the gradients")
    parser.add_argument("--test-episodes", type=positive, default=2000, help="that the trained agents are judged by")
    add_options(parser, out="out/reinforcement", save_every=25)
    return parser


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains both agents, compares, reports; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.shortest > options.longest:
        raise CannotRun(
            f"the shortest corridor, {options.shortest} steps, is longer than the longest, {options.longest}; "
            "pass --shortest and --longest the other way round"
        )
    with fast_arithmetic():
        return run(options)


def run(options: argparse.Namespace) -> int:
    """What is left once the options are known to make sense; returns the exit status."""
    console, start = Console(), time.monotonic()
    settings = {"example": "reinforcement"} | {name: getattr(options, name) for name in SETTINGS}
    checkpoint = Checkpoint(options.out / "reinforcement.pt", settings)
    trainees = [Trainee.new(name, options) for name in (WITH, WITHOUT)]
    if options.resume:
        saved = checkpoint.load()
        for trainee in trainees:
            trainee.load_state_dict(saved[trainee.name])
        console.print(f"resumed after iteration {len(trainees[0].success)} from {checkpoint.path}", soft_wrap=True)

    if not train(trainees, checkpoint, options, console):
        return 130
    show(console, {trainee.name: test(trainee.player.agent, options) for trainee in trainees}, trainees)
    rollout = play(trainees[0].player, options.steps, options)
    comparison = compare(rollout, trainees[0].player.agent.lstm, repeats=20)
    tell(console, comparison, options)
    plots.save(draw(trainees, comparison, options), options.out, "reinforcement")
    told = f"picture: {options.out / 'reinforcement.png'}; checkpoint: {checkpoint.path}"
    console.print(f"{told}; {time.monotonic() - start:.0f} s", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
