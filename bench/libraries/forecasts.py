"""What the forecasting libraries share: series to forecast, and how they run the Trainer of Lightning."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

# Lightning's Trainer is silent and leaves nothing behind
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning_utilities"):
    logging.getLogger(name).setLevel(logging.ERROR)


def waves(series: int, steps: int) -> np.ndarray:
    """(series, steps): hourly values with a day and a week in them, and noise."""
    hours = np.arange(steps)
    phases, noise = np.random.uniform(0, 2 * np.pi, (series, 1)), np.random.standard_normal((series, steps))
    day, week = (np.sin(2 * np.pi * hours / period + phases) for period in (24, 168))
    return 5 + day + 0.5 * week + 0.2 * noise


def losses_of(callback: type) -> Any:
    """A callback that keeps the losses of all batches, of the class that Lightning has in this library."""

    class Losses(callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.found.append((outputs["loss"] if isinstance(outputs, dict) else outputs).item())

    return Losses()
