"""sb3-contrib: RecurrentPPO on a task that takes memory, in episodes that end in the middle of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

import lstmcore
from bench.libraries import pages
from bench.libraries.pipeline import SEED, Job, Pipeline

LSTMPolicy = pages.run("sb3-contrib")["LSTMPolicy"]  # the recipe as it stands there
FEATURES, ACTIONS, EPISODE = 24, 4, 48  # an episode has so many steps on average


class Recall(gymnasium.Env):
    """Noise, and a cue in the first step of an episode: an action is rewarded if it names the cue."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (FEATURES,), np.float32)
    action_space = gymnasium.spaces.Discrete(ACTIONS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._left, self._cue = int(self.np_random.integers(EPISODE // 2, EPISODE * 3 // 2)), self._drawn()
        observation = self._noise()
        observation[self._cue] += 3
        return observation, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._left -= 1
        return self._noise(), float(action == self._cue), self._left == 0, False, {}

    def _drawn(self) -> int:
        return int(self.np_random.integers(ACTIONS))

    def _noise(self) -> np.ndarray:
        return self.np_random.standard_normal(FEATURES, np.float32)


def agent(small: bool, policy: Any) -> RecurrentPPO:
    """One that has a rollout to train on; small, or of RecurrentPPO's own sizes, in eight environments."""
    sizes = {"n_steps": 48, "batch_size": 48, "n_epochs": 2} if small else {"n_epochs": 1}
    model = RecurrentPPO(
        policy,
        DummyVecEnv([Recall for _ in range(2 if small else 8)]),
        policy_kwargs={"lstm_hidden_size": 16} if small else None,
        seed=SEED,
        **sizes,
    )
    model.learn(1, log_interval=None)
    return model


def job(model: RecurrentPPO, whole: bool) -> Job:
    """The training on a rollout, or the rollout with it."""
    names = [
        f"train/{name}" for name in ("loss", "value_loss", "entropy_loss")
    ]  # that of the policy cancels to nothing
    observations = torch.randn(32, FEATURES)

    def train() -> Sequence[float]:
        if whole:
            model.learn(1, reset_num_timesteps=False, log_interval=None)
        else:
            model.train()
        return [model.logger.name_to_value[name] for name in names]

    def outputs() -> Tensor:
        lstm, starts = model.policy.lstm_actor, torch.zeros(len(observations))
        starts[10] = 1.0
        states = tuple(torch.zeros(lstm.num_layers, 1, lstm.hidden_size) for _ in range(2))
        with torch.no_grad():
            distribution, _ = model.policy.get_distribution(observations, states, starts)
        return distribution.distribution.logits

    return Job(train, outputs)


def patched(small: bool, moved: bool) -> Job:
    model = agent(small, "MlpLstmPolicy")
    if moved:
        lstmcore.patch(model.policy)
    return job(model, whole=small)


def with_reset(small: bool, moved: bool, whole: bool = False) -> Job:
    return job(agent(small, LSTMPolicy if moved else "MlpLstmPolicy"), whole=whole)


SIZE = "8 environments × 128 steps, H 256"
TRAINING = f"an epoch on a rollout of {SIZE}, batches of 128"
COMMON = {"distribution": "sb3-contrib", "float64": False}  # it makes observations float32
PIPELINES = (
    Pipeline(
        name="sb3-contrib RecurrentPPO, the class alone",
        how="lstmcore.patch(model.policy)",
        timed=TRAINING,
        build=patched,
        **COMMON,
    ),
    Pipeline(
        name="sb3-contrib RecurrentPPO, with `reset=`: training",
        how="RecurrentPPO(LSTMPolicy, env)",
        timed=TRAINING,
        build=with_reset,
        **COMMON,
    ),
    Pipeline(
        name="sb3-contrib RecurrentPPO, with `reset=`: rollout and training",
        how="RecurrentPPO(LSTMPolicy, env)",
        timed=f"a rollout of {SIZE}, and an epoch on it",
        build=partial(with_reset, whole=True),
        **COMMON,
    ),
)
