"""Matrices for every step and row of a sequence: their norms, and properties of their products over many steps.

They are applied to vectors, and formed only on request; nothing here depends on the network they come from.

T time, B batch, H the size of a matrix.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

# Singular values: H up to which a matrix is formed and decomposed, and how the iteration beyond it ends.
EXACT = 64
TOLERANCE = 1e-10  # relative change over CONVERGENCE_EVERY iterations
CONVERGENCE_EVERY = 8
ITERATIONS = 400  # by then the result has a few correct digits at least

AT_ONCE = 2**20  # entries that are computed together, for several steps
STACK = 2**26  # entries of the largest stack of matrices that is returned: half a GiB


class Operators(ABC):
    """An H×H matrix for every step and row, as products with vectors; formed only on request.

    A step ``t`` is one of the input's, in either direction; if it is a slice, results have its steps in front.
    """

    shape: tuple[int, int, int]  # T, B, H
    device: torch.device

    @abstractmethod
    def jvp(self, t: int | slice, v: Tensor) -> Tensor:
        """Each matrix of the step times a vector; (..., B, H), or (..., T', B, H) for a slice of T' steps."""

    @abstractmethod
    def vjp(self, t: int | slice, u: Tensor) -> Tensor:
        """A vector times each matrix of the step, as for a gradient; shapes of :meth:`jvp`."""

    @abstractmethod
    def matrix(self, t: int | slice) -> Tensor:
        """The matrices (B, H, H) of a step, or (T', B, H, H) of a slice.

        Raises IndexError for a step that does not exist, ValueError for a slice too large to hold.
        """

    @abstractmethod
    def frobenius(self) -> Tensor:
        """(T, B): Frobenius norms, without forming a matrix."""

    def spectral(self) -> Tensor:
        """(T, B): largest singular values; exact for H up to ``EXACT``, then by Lanczos to a relative 1e-9 or so."""
        T, B, H = self.shape
        exact = H <= EXACT
        steps = max(1, AT_ONCE // max(1, B * H * (H if exact else 1)))
        found = []
        for start in range(0, T, steps):
            some = slice(start, min(start + steps, T))
            if exact:
                found.append(_largest_singular(self.matrix(some)))
            else:
                like = _random(some.stop - start, B, H, device=self.device)
                found.append(_lanczos(partial(self.jvp, some), partial(self.vjp, some), like))
        return torch.cat(found)

    def norm(self, ord: int | str = 2) -> Tensor:
        """(T, B): :meth:`spectral` for 2, :meth:`frobenius` for "fro"; ValueError for another ``ord``."""
        if ord == 2:
            return self.spectral()
        if ord == "fro":
            return self.frobenius()
        raise ValueError(f"norms are known for ord=2 and ord='fro', got {ord!r}")

    def _step(self, t: int | slice) -> int | slice:
        """``t``, checked."""
        T, B, H = self.shape
        if isinstance(t, slice):
            steps = len(range(*t.indices(T)))
            if steps * B * H * H > STACK:
                raise ValueError(
                    f"{steps} steps of {B} rows of {H} × {H} matrices have {steps * B * H * H} entries, "
                    f"more than {STACK}; take fewer steps, or one after the other"
                )
            return t
        return self._index(t)

    def _index(self, t: int) -> int:
        """A step of the input, counted from the front; IndexError if it does not exist."""
        T, index = self.shape[0], operator.index(t)
        if not -T <= index < T:
            raise IndexError(f"step {t} of a sequence of {T}: expected {-T} to {T - 1}")
        return index % T


class Diagonal(Operators):
    """diag(values_t)."""

    def __init__(self, values: Tensor) -> None:  # (T, B, H)
        self.values = values
        self.shape, self.device = tuple(values.shape), values.device  # type: ignore[assignment]

    def jvp(self, t: int | slice, v: Tensor) -> Tensor:
        return self.values[t] * v

    def vjp(self, t: int | slice, u: Tensor) -> Tensor:
        return self.values[t] * u

    def matrix(self, t: int | slice) -> Tensor:
        return torch.diag_embed(self.values[self._step(t)])

    def frobenius(self) -> Tensor:
        return torch.linalg.vector_norm(self.values, dim=-1)

    def spectral(self) -> Tensor:
        return self.values.abs().amax(-1)


class Scaled(Operators):
    """diag(left_t) W diag(right_t)."""

    def __init__(self, left: Tensor, weight: Tensor, right: Tensor) -> None:  # (T, B, H), (H, H), (T, B, H)
        self.left, self.weight, self.right = left, weight, right
        self.shape, self.device = tuple(left.shape), left.device  # type: ignore[assignment]

    def jvp(self, t: int | slice, v: Tensor) -> Tensor:
        return self.left[t] * linear(self.right[t] * v, self.weight)

    def vjp(self, t: int | slice, u: Tensor) -> Tensor:
        return (self.left[t] * u) @ self.weight * self.right[t]

    def matrix(self, t: int | slice) -> Tensor:
        t = self._step(t)
        return self.left[t][..., None] * self.weight * self.right[t][..., None, :]

    def frobenius(self) -> Tensor:
        return (self.left.square() @ self.weight.square() * self.right.square()).sum(-1).sqrt()


class Jacobian(Operators):
    """The Jacobians of a state with respect to the previous one, and properties of their products.

    ``end`` is the step of the input that a product ends with; None for the last one of the direction, which is step 0
    in direction 1.  The product over ``lag`` steps is J_end J_{end-1} ... J_{end-lag+1} (with + for -
    in direction 1): how the state at ``end`` depends on the state ``lag`` steps before.
    """

    direction = 0

    def norms(self, ord: int | str = 2) -> dict[str, Tensor]:
        """(T, B) norms of every term, and of their ``"sum"``, the Jacobian.

        Args:
            ord: 2, the spectral norm (the largest singular value), or "fro", the Frobenius norm.

        Raises:
            ValueError: another ``ord``.
        """
        return {"sum": self.norm(ord)}

    def spectral_radius(self, t: int | slice) -> Tensor:
        """(B,), of a slice (T', B): the largest absolute value of an eigenvalue."""
        return torch.linalg.eigvals(self.matrix(t)).abs().amax(-1)

    def product_norm(self, lag: int, end: int | None = None) -> Tensor:
        """(B,): the spectral norm of the product over ``lag`` steps; 1 for ``lag`` = 0.

        Raises:
            IndexError: an ``end`` that does not exist.
            ValueError: a ``lag`` that goes beyond the first step.
        """
        return self.log_product_norm(lag, end).exp()

    def log_product_norm(self, lag: int, end: int | None = None) -> Tensor:
        """(B,): the natural logarithm of :meth:`product_norm`, also where that is too small for a float64."""
        steps = self._walk(end)
        if not 0 <= lag <= len(steps):
            raise ValueError(f"lag {lag} at step {steps[-1]}: expected 0 to {len(steps)}, the steps up to there")
        steps = steps[len(steps) - lag :]
        _, B, H = self.shape
        if H <= EXACT:
            matrices, log_scale = deque(self._products(steps), maxlen=1).pop()
            return _largest_singular(matrices).log() + log_scale
        # One pass finds by how much each step scales a vector.  Divided by these scales, all partial products have a
        # moderate size, and are still linear.
        v, scales = _random(B, H, device=self.device), []
        for t in steps:
            v, scale = _unit(self.jvp(t, v))
            scales.append(scale.masked_fill(scale == 0, 1))

        def jvp(v: Tensor) -> Tensor:
            for t, scale in zip(steps, scales, strict=True):
                v = self.jvp(t, v) / scale
            return v

        def vjp(u: Tensor) -> Tensor:
            for t, scale in zip(reversed(steps), reversed(scales), strict=True):
                u = self.vjp(t, u) / scale
            return u

        return _lanczos(jvp, vjp, v).log() + sum((scale.log()[:, 0] for scale in scales), v.new_zeros(B))

    def log_product_norms(self, end: int | None = None) -> Tensor:
        """(N + 1, B): natural logarithms of the norms of the products over 0, 1, ... N steps, N all up to ``end``.

        -inf where a product is zero.  The product is kept, H×H for each row, as H vectors that go back
        together: one pass for all lags, while iterating on vectors would take one pass for each.

        Raises:
            IndexError: an ``end`` that does not exist.
        """
        products = self._products(self._walk(end))
        return torch.stack([_largest_singular(matrices).log() + log_scale for matrices, log_scale in products])

    def lyapunov_exponents(self, k: int | None = None) -> Tensor:
        """(k, B): the leading ``k`` Lyapunov exponents (None: all H), largest first, in nats per step.

        By the QR method (Benettin et al. 1980) over all T steps: the mean rates, over a sequence of this length, at
        which the longest axes of an ellipsoid grow.  The initial vectors are gradients propagated from the end, which
        are close to the axes that grow most, so that no steps are lost on turning towards them.  All H exponents
        add up to the mean of ln |det J|.

        Raises:
            ValueError: ``k`` out of range.
        """
        T, B, H = self.shape
        k = H if k is None else k
        if not 1 <= k <= H:
            raise ValueError(f"k = {k} Lyapunov exponents of {H} units: expected 1 to {H}")
        steps = self._walk(None)
        q = torch.linalg.qr(_random(B, H, k, device=self.device)).Q
        for t in reversed(steps):
            q = torch.linalg.qr(self.vjp(t, q.permute(2, 0, 1)).permute(1, 2, 0)).Q
        total = q.new_zeros(B, k)
        for t in steps:
            q, r = torch.linalg.qr(self.jvp(t, q.permute(2, 0, 1)).permute(1, 2, 0))
            total += r.diagonal(dim1=-2, dim2=-1).abs().log()
        return (total / T).sort(-1, descending=True).values.T

    def _walk(self, end: int | None) -> list[int]:
        """The steps from the first one of the direction to ``end``."""
        T = self.shape[0]
        last = self._index(end) if end is not None else 0 if self.direction else T - 1
        return list(range(T - 1, last - 1, -1) if self.direction else range(last + 1))

    def _products(self, steps: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """For the last 0, 1, ... of ``steps``: the product (B, H, H), scaled, and the logarithm (B,) of the scale."""
        _, B, H = self.shape
        rows = torch.eye(H, dtype=torch.float64, device=self.device)[:, None].expand(H, B, H)
        scale = rows.new_zeros(B)
        yield rows.transpose(0, 1), scale
        for t in reversed(steps):
            rows = self.vjp(t, rows)
            largest = rows.abs().amax((0, 2))  # (B,)
            largest = largest.masked_fill(largest == 0, 1)
            rows, scale = rows / largest[:, None], scale + largest.log()
            yield rows.transpose(0, 1), scale


def _random(*shape: int, device: torch.device) -> Tensor:
    """Normally distributed, the same each time; the global generators are not used."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., H) of length one (or zero), and their lengths (..., 1)."""
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return v / length.masked_fill(length == 0, 1), length


def _largest_singular(matrices: Tensor) -> Tensor:
    """(...,): the largest singular values of matrices (..., H, H)."""
    if matrices.shape[-1] <= EXACT:
        return torch.linalg.svdvals(matrices)[..., 0]
    like = _random(*matrices.shape[:-1], device=matrices.device)
    return _lanczos(
        lambda v: (matrices @ v[..., None])[..., 0], lambda u: (u[..., None, :] @ matrices)[..., 0, :], like
    )


def _lanczos(jvp: Callable[[Tensor], Tensor], vjp: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """(...,): the largest singular values of linear maps on vectors (..., H), from products with vectors.

    Like the power iteration on JᵀJ, but it keeps the vectors of every iteration: Golub & Kahan's bidiagonalisation
    J V = U S, by Lanczos.  The largest singular value of the small S approaches that of J from below, in the square
    root of the iterations of the power method.  Vectors are not reorthogonalised, which yields copies of singular
    values, but never larger ones.
    """
    v, _ = _unit(start)
    u, alpha = _unit(jvp(v))
    diagonal, above = [alpha], []
    best = alpha[..., 0]
    for iteration in range(2, ITERATIONS + 1):
        v, beta = _unit(vjp(u) - alpha * v)
        u, alpha = _unit(jvp(v) - beta * u)
        diagonal.append(alpha)
        above.append(beta)
        if iteration % CONVERGENCE_EVERY == 0:
            small = torch.diag_embed(torch.cat(diagonal, -1)) + torch.diag_embed(torch.cat(above, -1), offset=1)
            before, best = best, torch.linalg.svdvals(small)[..., 0]
            if ((best - before).abs() <= TOLERANCE * best).all():
                break
    return best
