"""Whether ``torch.compile`` compiles what a function calls where it meets it outside of a graph.

It breaks the graph at every instance of ``torch.nn.LSTM``, and would go on inside of its forward, frame by frame, down
to the kernels' host code.  torch's own forward is on its list of files to leave alone; ours is traced in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def eager(function: _Function, wanted: bool = True) -> _Function:
    """``function``, which from now on runs without being compiled if a frame of it is met; a graph still traces it."""
    frames = torch._C._dynamo.eval_frame  # known without importing the compiler
    action = frames._FrameAction.SKIP if wanted else frames._FrameAction.DEFAULT
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(action, action))
    return function
