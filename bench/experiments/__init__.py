"""The experiments, a file each: what is put to cases, how it is answered, and what the rows say.

An experiment yields rows; drawing, checking, timing by turns, saving and showing are ``measure`` and ``session``.
"""

from bench.experiments.after_torch import AFTER_TORCH
from bench.experiments.control import CONTROL
from bench.experiments.designs import DESIGNS
from bench.experiments.flow import FLOW
from bench.experiments.gain import GAIN
from bench.experiments.handoff import HANDOFF
from bench.experiments.layers import LAYERS
from bench.experiments.long import LONG
from bench.experiments.speed import SPEED
from bench.experiments.steps import STEPS
from bench.experiments.stream import STREAM
from bench.measure import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each for each in (SPEED, AFTER_TORCH, GAIN, CONTROL, FLOW, LONG, LAYERS, STREAM, STEPS, HANDOFF, DESIGNS)
}
# What is the main figure on a device, and second ones: plain ``python -m bench``.
MAIN = {"cpu": (AFTER_TORCH, SPEED, GAIN), "cuda": (SPEED,)}
