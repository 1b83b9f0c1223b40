"""torch.autograd.gradcheck through the kernels in float64: no oracle but central differences."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

from ..support.cases import Case, build, draw
from ..support.tolerances import GRADCHECK

GRADCHECK_CASES = [
    Case("dense", T=4, B=3, I=2, H=5),
    Case("no_bias", T=3, B=2, I=3, H=4, bias=False),
    Case("h17", T=3, B=2, I=3, H=17),
    Case("one_row", T=5, B=1, I=2, H=3, batch_first=True),
    Case("bidirectional", T=4, B=2, I=2, H=3, bidirectional=True),
    Case("proj", T=4, B=3, I=2, H=5, proj_size=2),
    Case("layers", T=3, B=2, I=2, H=3, num_layers=2, bidirectional=True, proj_size=2),
    Case("packed", I=2, H=4, lengths=(4, 2, 1)),
    Case("packed_all", I=2, H=3, lengths=(1, 4, 2), bidirectional=True, proj_size=2),
    Case("no_hx", T=3, B=2, I=2, H=4, hx=False),
    Case("unbatched", T=4, I=2, H=4, unbatched=True),
]


def function_and_arguments(case: Case, backend: str):
    """The case as a function of its input, states and parameters, and those as leaves that want gradients."""
    data = draw(case, torch.float64)
    module = build(case, data, torch.float64, backend)
    names = [name for name, _ in module.named_parameters()]
    states = list(data.hx or ())

    def function(x, *rest):
        if data.batch_sizes is not None:
            x = PackedSequence(x, data.batch_sizes, data.sorted_indices, data.unsorted_indices)
        hx = tuple(rest[: len(states)]) or None
        output, (h_n, c_n) = functional_call(module, dict(zip(names, rest[len(states) :], strict=True)), (x, hx))
        return (output.data if data.batch_sizes is not None else output), h_n, c_n

    leaves = [data.input, *states, *(p.detach() for p in module.parameters())]
    return function, [leaf.clone().contiguous().requires_grad_() for leaf in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradcheck(case, backend):
    function, arguments = function_and_arguments(case, backend)
    assert torch.autograd.gradcheck(function, arguments, **GRADCHECK)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("dense", T=2, B=2, I=1, H=2),
        Case("packed", I=1, H=2, lengths=(1, 2), bidirectional=True),
        Case("proj", T=2, B=1, I=2, H=3, proj_size=1),
        Case("layers", T=2, B=1, I=1, H=2, num_layers=2),
    ],
    ids=str,
)
def test_gradgradcheck(case, backend):
    function, arguments = function_and_arguments(case, backend)
    assert torch.autograd.gradgradcheck(function, arguments, **GRADCHECK)
