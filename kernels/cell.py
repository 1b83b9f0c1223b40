"""The arithmetic of the LSTM cell, forward and backward, for all backends.

Pure functions of ``+ - *`` on any type that implements them: tensors (the reference), LLVM vectors (the Numba kernels),
Triton blocks.  Each backend has its own activations; everything between them is here.

Equations: Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, in PyTorch's gate order i, f, g, o.
All arguments are element-wise and of one shape.
"""


def cell_state(i, f, g, c_prev):
    """c_t = f c_{t-1} + i g, from activated gates."""
    return f * c_prev + i * g


def hidden_state(o, tanh_c):
    """h_t = o tanh(c_t), before the projection if there is one."""
    return o * tanh_c


def cell_grad(dc, dh, o, tanh_c):
    """dL/dc_t in full: from step t + 1 and from c_t itself (``dc``), and through h_t."""
    return dc + dh * o * (1.0 - tanh_c * tanh_c)


def gate_grads(dc, dh, i, f, g, o, c_prev, tanh_c):
    """(dz^i, dz^f, dz^g, dz^o), the gradients before the activations; ``dc`` is that of :func:`cell_grad`."""
    dz_i = dc * g * (i * (1.0 - i))
    dz_f = dc * c_prev * (f * (1.0 - f))
    dz_g = dc * i * (1.0 - g * g)
    dz_o = dh * tanh_c * (o * (1.0 - o))
    return dz_i, dz_f, dz_g, dz_o


def cell_grad_prev(dc, f):
    """dL/dc_{t-1} along the direct, additive path, which is scaled by the forget gate alone."""
    return dc * f
