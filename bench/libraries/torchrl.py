"""torchrl: an LSTMModule that learns from rollouts in which new trajectories begin."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import LSTMModule, set_recurrent_mode

import lstmcore
from bench.libraries.models import Size
from bench.libraries.pipeline import Job, Pipeline

SMALL = Size(input_size=6, hidden_size=16, num_layers=2, batch=4, steps=24, batches=3)
USUAL = Size(input_size=32, hidden_size=128, num_layers=1, batch=32, steps=128, batches=4)
TRAJECTORY = 50  # steps, on average; in the small one 12


def rollout(size: Size, trajectory: int) -> TensorDict:
    """What a collector with an InitTracker brings: (B, T) steps, and where a trajectory begins."""
    shape = (size.batch, size.steps)
    begins = torch.rand(*shape, 1) < 1 / trajectory
    begins[:, 0] = True
    values = {"observation": torch.randn(*shape, size.input_size), "is_init": begins, "target": torch.randn(*shape, 1)}
    return TensorDict(values, shape)


def build(small: bool, moved: bool) -> Job:
    size, trajectory = (SMALL, 12) if small else (USUAL, TRAJECTORY)
    memory = LSTMModule(
        size.input_size, size.hidden_size, num_layers=size.num_layers, in_key="observation", out_key="features"
    )
    model = TensorDictSequential(
        memory, TensorDictModule(nn.Linear(size.hidden_size, 1), in_keys=["features"], out_keys=["value"])
    )
    if moved:
        lstmcore.patch(model, subclass=True)
    rollouts = [rollout(size, trajectory) for _ in range(size.batches)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(given: TensorDict) -> float:
        optimizer.zero_grad()
        with set_recurrent_mode(True):
            loss = nn.functional.mse_loss(model(given.clone())["value"], given["target"])
        loss.backward()
        optimizer.step()
        return loss.item()

    def train() -> Sequence[float]:
        return [step(each) for each in rollouts]

    def outputs() -> Tensor:
        """The values, and the states at the ends of trajectories."""
        with torch.no_grad(), set_recurrent_mode(True):
            found = model(rollouts[0].clone())
        return torch.cat([found[key].flatten() for key in ("value", ("next", "recurrent_state_h"))])

    return Job(train, outputs)


PIPELINES = (
    Pipeline(
        name="torchrl LSTMModule",
        distribution="torchrl",
        how="lstmcore.patch(model, subclass=True)",
        timed=f"{USUAL}, trajectories of {TRAJECTORY} steps",
        build=build,
    ),
)
