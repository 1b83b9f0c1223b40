"""A plain recurrent network, to compare the LSTM with: h_t = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

Elman 1990, with torch.nn.RNN's parameters.  It has no kernels, only a loop of in-place torch operations between one
product for all inputs and one for all weight gradients; its backward passes can be recorded like those of the LSTM.

T time, B batch, I input, H hidden, L layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import Proxy
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence

from lstmcore import checks, recording, scripting
from lstmcore.kernels.contract import Rows


class Nonlinearity(NamedTuple):
    """A nonlinearity σ."""

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]  # in place
    derivative: Callable[[Tensor], Tensor]  # σ'(z) from σ(z), a new tensor
    slope: float  # the largest σ'(z)


NONLINEARITIES = {
    "sigmoid": Nonlinearity(torch.sigmoid, torch.sigmoid_, lambda h: h * (1 - h), 0.25),
    "tanh": Nonlinearity(torch.tanh, torch.tanh_, lambda h: 1 - h * h, 1.0),
    "relu": Nonlinearity(torch.relu, torch.relu_, lambda h: (h > 0).to(h.dtype), 1.0),
}


class Parameters(NamedTuple):
    """The parameters of one layer."""

    weight_ih: Tensor  # (H, I)
    weight_hh: Tensor  # (H, H)
    bias_ih: Tensor | None = None  # (H,)
    bias_hh: Tensor | None = None  # (H,)


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    nonlinearity: str = "tanh",
    has_biases: bool = True,
) -> tuple[Tensor, Tensor]:
    """A plain recurrent network as a loop that autograd differentiates any number of times.

    Args:
        input: (T, B, I).
        hx: the initial states, (L, B, H); None for zeros.
        params: the flat list of ``torch.nn.RNN``: layer by layer weight_ih (H, I or H), weight_hh (H, H), and with
            ``has_biases`` bias_ih (H,), bias_hh (H,).
        nonlinearity: ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        has_biases: whether ``params`` holds biases.

    Returns:
        ``output, h_n``, (T, B, H) and (L, B, H).

    Raises:
        ValueError: an unknown nonlinearity.
        RuntimeError: sizes that do not fit.
    """
    _check_nonlinearity(nonlinearity)
    layers = _layers(params, has_biases)
    shape = (len(layers), input.shape[1], len(params[0]))
    if hx is not None and hx.shape != shape:
        raise RuntimeError(f"Expected hidden size {shape}, got {list(hx.shape)}")
    output, h_n = input, []
    for layer, parameters in enumerate(layers):
        output, h = _reference(output, None if hx is None else hx[layer], parameters, nonlinearity)
        h_n.append(h)
    return output, torch.stack(h_n)


class RNN(nn.RNNBase):
    """A multi-layer recurrent network: ``torch.nn.RNN`` in one direction, whose backward passes can be recorded.

    Parameters, their names, order and initialisation, ``state_dict``, shapes, results and errors are those of
    ``torch.nn.RNN``; a state_dict loads either way.  Under autocast it computes in the dtype of its parameters.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state.
        num_layers: L, layers stacked, each over the output of the one before.
        nonlinearity: ``"sigmoid"``, ``"tanh"`` or ``"relu"``.
        bias: whether the layers have ``bias_ih`` and ``bias_hh``.
        batch_first: input and output are (B, T, ·) instead of (T, B, ·); the states are not affected.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError, TypeError: as ``torch.nn.RNN``; ValueError for an unknown nonlinearity.
    """

    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_nonlinearity(nonlinearity)
        nn.RNNBase.__init__(
            self, "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, device=device, dtype=dtype
        )  # fmt: skip
        self.mode = f"RNN_{nonlinearity.upper()}"  # RNNBase knows no sigmoid
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The network over whole sequences.

        Args:
            input: (T, B, I), (B, T, I) when batch_first, (T, I) unbatched.
            hx: the initial state, (L, B, H), without B when unbatched; None for zeros.

        Returns:
            ``output, h_n`` as ``torch.nn.RNN`` returns them: like ``input`` with H features, and like ``hx``.

        Raises:
            ValueError: a wrong rank or dtype of the input.
            RuntimeError: sizes, dtypes and devices that do not fit; T = 0.
            TypeError: a ``PackedSequence``.
        """
        if isinstance(input, Proxy):
            return scripting.leaf(self, input, hx)
        if isinstance(input, PackedSequence):
            raise TypeError(
                "RNN expects a tensor, got a PackedSequence; pass padded rows, or use torch.nn.RNN or lstmcore.LSTM"
            )
        self._update_flat_weights()
        params: list[Tensor] = self._flat_weights  # type: ignore[assignment]
        x, batched = checks.time_first("RNN", input, self.batch_first)  # (T, B, I)
        if hx is not None and hx.dim() != input.dim():
            kind = f"{'batched' if batched else 'unbatched'} {input.dim()}"
            raise RuntimeError(f"For {kind}-D input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor")
        if checks.is_autocast(input):
            dtype = params[0].dtype
            with torch.autocast(input.device.type, enabled=False):
                return self.forward(input.to(dtype), None if hx is None else hx.to(dtype))
        self.check_input(x, None)
        if hx is not None:
            hx = hx if batched else hx.unsqueeze(1)
            self.check_hidden_size(hx, (self.num_layers, x.shape[1], self.hidden_size))
            if hx.device != x.device or hx.dtype != x.dtype:
                raise RuntimeError(
                    "Input and hidden tensors are not at the same device and of the same dtype, "
                    f"found input tensor at {x.device} in {x.dtype} and hidden tensor at {hx.device} in {hx.dtype}"
                )
        checks.some_steps(len(x))

        module: weakref.ref[nn.Module] = weakref.ref(self)
        output, states = x, []
        for layer, parameters in enumerate(_layers(params, self.bias)):
            h_0 = None if hx is None else hx[layer]
            output, h = _layer(recording.Source(module, layer), self.nonlinearity, output, h_0, parameters)
            states.append(h)
        form = checks.Form(batched, batched and self.batch_first)
        return form.of_input(output), form.of_state(torch.stack(states))  # type: ignore[return-value]

    def flatten_parameters(self) -> None:
        """Does nothing: parameters need not be contiguous.  It exists for code written for ``torch.nn.RNN``."""

    def __prepare_scriptable__(self) -> nn.Module:
        """The module that ``torch.jit.script`` compiles instead: torch's, unless σ is sigmoid, which that lacks."""
        return self if self.nonlinearity == "sigmoid" else scripting.stand_in(self, RNN, nn.RNN)

    def extra_repr(self) -> str:
        return nn.RNNBase.extra_repr(self) + (
            "" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity!r}"
        )


def _check_nonlinearity(name: str) -> None:
    if name not in NONLINEARITIES:
        raise ValueError(f"Unknown nonlinearity '{name}'. Select from 'sigmoid', 'tanh' or 'relu'.")


def _layers(params: Sequence[Tensor], has_biases: bool) -> list[Parameters]:
    """The flat list of parameters, layer by layer."""
    fields = 4 if has_biases else 2
    if not params or len(params) % fields:
        raise RuntimeError(
            f"got an incorrect number of RNN parameters: each layer has {fields}, got {len(params)} in all"
        )
    return [Parameters(*params[at : at + fields]) for at in range(0, len(params), fields)]


def _reference(input: Tensor, h_0: Tensor | None, parameters: Parameters, nonlinearity: str) -> tuple[Tensor, Tensor]:
    """(output, h_n), (T, B, H) and (B, H), of one layer: the formula, differentiable any number of times."""
    apply = NONLINEARITIES[nonlinearity].apply
    h = input.new_zeros(input.shape[1], len(parameters.weight_hh)) if h_0 is None else h_0
    output = []
    for x in linear(input, parameters.weight_ih, parameters.bias_ih).unbind(0):
        h = apply(x + linear(h, parameters.weight_hh, parameters.bias_hh))
        output.append(h)
    return torch.stack(output), h


def _layer(
    source: recording.Source, nonlinearity: str, input: Tensor, h_0: Tensor | None, parameters: Parameters
) -> tuple[Tensor, Tensor]:
    """The results of :func:`_reference`, faster; with a graph only if autograd needs one."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, h_0, *parameters)):
        return _Layer.apply(source, nonlinearity, input, h_0, *parameters)
    output = _forward(nonlinearity, input, h_0, parameters)
    return output, output[-1].clone()


def _forward(nonlinearity: str, input: Tensor, h_0: Tensor | None, parameters: Parameters) -> Tensor:
    """Every h_t (T, B, H), computed in place of the projections of the inputs."""
    apply_ = NONLINEARITIES[nonlinearity].apply_
    bias = None if parameters.bias_ih is None or parameters.bias_hh is None else parameters.bias_ih + parameters.bias_hh
    output = linear(input, parameters.weight_ih, bias).contiguous()  # (T, B, H), now z without the recurrent part
    recurrent = parameters.weight_hh.t().contiguous()
    h = h_0
    for step in output.unbind(0):
        if h is not None:
            step.addmm_(h, recurrent)
        h = apply_(step)
    return output


def _backward(
    nonlinearity: str,
    grad_output: Tensor | None,  # (T, B, H)
    grad_h_n: Tensor | None,  # (B, H)
    weight_hh: Tensor,
    output: Tensor,  # (T, B, H)
) -> tuple[Tensor, Tensor]:
    """(dL/dh_t, dL/dz_t), each (T, B, H)."""
    dz = NONLINEARITIES[nonlinearity].derivative(output)  # of all steps at once; becomes dz_t step by step
    if grad_output is None:
        dh = torch.zeros_like(output)
    else:
        dh = grad_output.clone(memory_format=torch.contiguous_format)
    if grad_h_n is not None:
        dh[-1] += grad_h_n
    all_dh, all_dz = dh.unbind(0), dz.unbind(0)
    dz_next = all_dz[-1].mul_(all_dh[-1])
    for dh_t, dz_t in zip(all_dh[-2::-1], all_dz[-2::-1], strict=True):
        dh_t.addmm_(dz_next, weight_hh)
        dz_next = dz_t.mul_(dh_t)
    return dh, dz


class _Layer(Function):
    """One layer; differentiated twice, through the reference."""

    @staticmethod
    def forward(
        ctx: Any, source: recording.Source, nonlinearity: str, input: Tensor, h_0: Tensor | None, *flat: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output = _forward(nonlinearity, input, h_0, Parameters(*flat))  # type: ignore[arg-type]
        ctx.source, ctx.nonlinearity = source, nonlinearity
        ctx.save_for_backward(input, h_0, *flat, output)
        ctx.set_materialize_grads(False)  # an unused output has no gradient, and costs nothing
        return output, output[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, grad_h_n = grads
        used = [grad for grad in grads if grad is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        with torch.autocast(used[0].device.type, enabled=False):
            *tensors, output = ctx.saved_tensors
            needs = ctx.needs_input_grad[2:]
            watching = recording.watchers(ctx.source)
            if not torch.is_grad_enabled():
                dh, dz = _backward(ctx.nonlinearity, grad_output, grad_h_n, tensors[3], output)
                found = _gradients(dz, output, tensors, needs)
            else:  # create_graph=True: the gradient itself has to be differentiable
                found = _through_reference(ctx.nonlinearity, tensors, needs, grads)
                if watching:
                    with torch.no_grad():
                        dh, _ = _backward(ctx.nonlinearity, grad_output, grad_h_n, tensors[3], output)
            if watching:
                grad_output, grad_h_n = (None if grad is None else grad.detach() for grad in grads)
                norms = torch.linalg.vector_norm(dh, dim=-1, dtype=torch.float64)  # squares of float32 would underflow
                ends = None if grad_h_n is None else grad_h_n[None]
                recording.show(watching, ctx.source, Rows(*norms.shape), norms[None, None], None, (grad_output, ends))
        return None, None, *found


def _gradients(
    dz: Tensor,  # (T, B, H)
    output: Tensor,  # (T, B, H)
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``tensors``, which are input, h_0, weight_ih, weight_hh, bias_ih, bias_hh."""
    input, h_0, weight_ih, weight_hh, *_ = tensors
    assert input is not None
    assert weight_ih is not None
    assert weight_hh is not None
    flat = dz.flatten(0, 1)  # (T * B, H)
    d_input = (flat @ weight_ih).view_as(input) if needs[0] else None
    d_h_0 = dz[0] @ weight_hh if needs[1] else None
    d_weight_ih = flat.t() @ input.flatten(0, 1) if needs[2] else None
    d_weight_hh = None
    if needs[3]:
        d_weight_hh = dz[1:].flatten(0, 1).t() @ output[:-1].flatten(0, 1)
        if h_0 is not None:
            d_weight_hh.addmm_(dz[0].t(), h_0)
    d_bias = flat.sum(0) if any(needs[4:]) else None
    # two tensors, because accumulating in place into one .grad must not change the other
    return d_input, d_h_0, d_weight_ih, d_weight_hh, d_bias, d_bias.clone() if d_bias is not None else None


def _through_reference(
    nonlinearity: str, tensors: Sequence[Tensor | None], needs: Sequence[bool], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The same gradients, by differentiating the reference, and so differentiable themselves.

    Every tensor enters through an alias of its own, which stops the walk back at this layer: without it the gradient
    with respect to ``input`` would include the paths that lead from ``input`` to ``h_0`` outside the layer.
    """
    aliases: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
    input, h_0, *flat = aliases
    results = _reference(input, h_0, Parameters(*flat), nonlinearity)
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in used],
            [alias for alias, need in zip(aliases, needs, strict=True) if need],
            [grad for _, grad in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(found) if need else None for need in needs)
