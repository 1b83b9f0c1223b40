"""The weights of a module, and whether they have changed since somebody read them.

P parameters of the module, W weights: P but where a weight is computed (parametrized, pruned, normed).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.optimizer import register_optimizer_step_post_hook

from lstmcore import guards, stock
from lstmcore.module import LSTMCell


def weights(module: Any) -> list[Tensor]:
    """The flat list of the module's weights, in the order of :func:`lstmcore.lstm`, detached."""
    with torch.no_grad():
        computed = _by_hooks(module)
        found = (computed[name] if name in computed else getattr(module, name) for name in _names(module))
        return list(guards.plain(tuple(each.detach() for each in found)))


def _names(module: Any) -> list[str]:
    if isinstance(module, (stock.LSTMCell, LSTMCell)):
        return ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"] * module.bias]
    return module._flat_weights_names


def _by_hooks(module: nn.Module) -> dict[str, Tensor]:
    """The weights that torch's hooks compute before each call of the module, which may be those of the last call."""
    found = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = hook.apply_mask(module)
        elif isinstance(hook, WeightNorm):
            found[hook.name] = hook.compute_weight(module)
        elif isinstance(hook, SpectralNorm):
            found[hook.name] = hook.compute_weight(module, do_power_iteration=False)
    return found


class Watch:
    """What the weights of a module are made of, and its state when they were read.

    Changed: ``marks`` are (tensor, version, address), of which one is another now, or ``[*map(id, owned)]`` is not
    ``ids`` any more.  (Whoever calls often compares by himself: a call more takes as long as the comparison.)
    """

    def __init__(self, module: Any) -> None:
        """Begins to watch, and reads ``weights`` after that."""
        names, own = _names(module), module._parameters
        self.owned: Any = own.values()
        made_of = [own.get(name) for name in names]
        if computed := any(each is None for each in made_of):
            self.owned = _Tree(
                module, [name for name in names if name in vars(module) and name not in _by_hooks(module)]
            )
            made_of = [each for each in self.owned if isinstance(each, Tensor)]
        self.ids = [*map(id, self.owned)]
        self._kept: list[Any] = [*self.owned]  # so that nothing new has the id, or the address, of what was replaced
        _listen()
        _watches.add(weakref.ref(self, _watches.discard))
        self.marks = _marks(made_of)
        self._kept += [tensor.detach() for tensor, _, _ in self.marks]
        self.parameters = {*map(id, made_of)}
        self.weights = weights(module)
        if computed:  # reading may have written: in training a spectral norm improves its vectors
            buffers = {*map(id, module.buffers())}
            self.marks = [mark for mark in self.marks if id(mark[0]) not in buffers] + _marks(module.buffers())


def _marks(tensors: Any) -> list[tuple[Tensor, int, int]]:
    """Inference tensors have no version."""
    return [(each, each._version, each.data_ptr()) for each in tensors if not each.is_inference()]


class _Tree:
    """All that the modules of a tree own, and some tensors that are plain attributes of its root."""

    def __init__(self, module: nn.Module, plain: list[str]) -> None:
        self._module, self._plain = module, plain

    def __iter__(self) -> Iterator[Any]:
        every = self._module.modules()
        owned = (chain(m._parameters.values(), m._buffers.values(), m._modules.values()) for m in every)
        return chain(chain.from_iterable(owned), (vars(self._module).get(name) for name in self._plain))


_watches: set[weakref.ref[Watch]] = set()


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Torch does not count what fused optimizers write."""
    if not _watches:
        return
    written = {id(each) for group in optimizer.param_groups for each in group["params"] if each.grad is not None}
    for reference in tuple(_watches):
        watch = reference()
        if watch is not None and not written.isdisjoint(watch.parameters):
            watch.ids.clear()


@functools.cache
def _listen() -> None:
    """Once there is something to watch: programs without streams have no hook on their optimizers."""
    register_optimizer_step_post_hook(_stepped)
