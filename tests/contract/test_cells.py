"""``cell.py``, the arithmetic that every backend shares, against autograd through the textbook's formula in float64."""

import ast
import inspect

import pytest
import torch
from lstmcore.kernels import cell

from ..support.tolerances import ORDER_OF_SUMS, error


@pytest.fixture
def one_step():
    """A step from gates before activation: what the formula gives, and what autograd makes of its gradients."""
    z, c_prev, dh, dc_next = (torch.randn(4 if k == 0 else 1, 7, dtype=torch.float64) for k in range(4))
    z.requires_grad_(), c_prev.requires_grad_()
    i, f, g, o = z[0:1].sigmoid(), z[1:2].sigmoid(), z[2:3].tanh(), z[3:4].sigmoid()
    c = f * c_prev + i * g
    c.retain_grad()
    h = o * c.tanh()
    torch.autograd.backward((h, c), (dh, dc_next))
    gates = [gate.detach() for gate in (i, f, g, o)]
    return {
        "z": z,
        "c_prev": c_prev,
        "c": c,
        "h": h,
        "dh": dh,
        "dc_next": dc_next,
        "gates": gates,
        "tanh_c": c.detach().tanh(),
    }


def test_forward(one_step):
    i, f, g, o = one_step["gates"]
    c = cell.cell_state(i, f, g, one_step["c_prev"].detach())
    assert error(c, one_step["c"].detach()) < ORDER_OF_SUMS
    assert error(cell.hidden_state(o, c.tanh()), one_step["h"].detach()) < ORDER_OF_SUMS


def test_backward(one_step):
    i, f, g, o = one_step["gates"]
    dc = cell.cell_grad(one_step["dc_next"], one_step["dh"], o, one_step["tanh_c"])
    assert error(dc, one_step["c"].grad) < ORDER_OF_SUMS
    dz = cell.gate_grads(dc, one_step["dh"], i, f, g, o, one_step["c_prev"].detach(), one_step["tanh_c"])
    assert error(torch.cat(dz), one_step["z"].grad) < ORDER_OF_SUMS
    assert error(cell.cell_grad_prev(dc, f), one_step["c_prev"].grad) < ORDER_OF_SUMS


def test_arithmetic_only():
    """Backends call these on vectors and blocks that know + - * and nothing else."""
    tree = ast.parse(inspect.getsource(cell))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp):
            assert isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)), ast.unparse(node)
        assert not isinstance(node, (ast.Call, ast.If, ast.IfExp, ast.Compare, ast.Attribute)), ast.unparse(node)
