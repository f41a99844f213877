"""Frames of the bonds: the gauges that need more than Algorithm 1's sweep.

A bond may be written in any basis: `A B = (A Q) (Q^-1 B)` folds to the same matrix, and an optimizer that works element by
element descends differently in each. Letters: n = batch, a/b = rows/columns of an unfolding, d = bond or rank, p = mode of a
site; cores of a chain are [n, d_left, p, d_right].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["SVDFunction", "balance_chain", "gradient_chain", "gradient_frame", "random_rotations", "rotate_chain"]

#: A backend's `svd(matrix, rank)`.
SVDFunction = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


def balance_chain(cores: Sequence[Tensor]) -> list[Tensor]:
    """The bi-canonical form of a chain in Algorithm 1's gauge: `Lambda^1/2` on both sides of every bond.

    Algorithm 1 leaves bond k in the basis of the singular vectors of the k-th unfolding, `W_(k) = L_k (Lambda_k V_k^T)`. Core k
    becomes `G_{k-1}^-1 A_k G_k` with the diagonal `G_k = Lambda_k^1/2`, so that the parts on both sides of a bond have the
    Gram matrix `Lambda_k`. Any positive G_k folds to the same matrix, and scaling by a diagonal amplifies no rounding of
    the contraction. Singular values below `eps * max(a, b) * max(Lambda_k)`, the usual threshold of numerical rank, are
    raised to it in G_k: those of a rank-deficient matrix then divide nothing by zero, their left parts stay small and not
    zero, and the imbalance that remains is of the size of rounding. A zero matrix has no scale and stays in Algorithm 1's
    gauge, where the gradient reaches the last core.

    The entries must be near 1 for the squares of norms not to overflow.
    """
    n, m = cores[0].shape[0], len(cores)
    # contiguous like what is contracted from it: norms of equal rows are then summed in one order, and equal bit by bit
    rest = cores[-1].reshape(n, cores[-1].shape[1], -1).contiguous()
    roots: list[Tensor] = []
    for core in reversed(cores[:-1]):
        values = rest.norm(dim=2)
        largest = values.amax(dim=1, keepdim=True)
        rows = core.reshape(n, -1, core.shape[3])
        floor = torch.finfo(rest.dtype).eps * max(rows.shape[1], rest.shape[2]) * largest
        roots.insert(0, torch.where(largest > 0, torch.maximum(values, floor).sqrt(), torch.ones_like(values)))
        rest = torch.bmm(rows, rest).reshape(n, core.shape[1], -1)
    outer = torch.ones_like(rest[:, :1, 0])
    scales = [outer, *roots, outer]
    # the ratio first: between equal neighbours it is exactly 1 on the diagonal, and an identity core stays one
    return [
        cores[k] * (scales[k + 1][:, None, :] / scales[k][:, :, None]).unsqueeze(2)  # [n, d_left, 1, d_right]
        for k in range(m)
    ]


def random_rotations(sizes: Sequence[int], seed: int, like: Tensor) -> list[Tensor]:
    """An orthogonal matrix [d, d] for each size, uniform (Haar) by the QR decomposition of normal entries with the signs of
    R taken out (Mezzadri 2007). They are drawn on the CPU from a generator of their own."""
    generator = torch.Generator("cpu").manual_seed(seed)
    rotations = []
    for size in sizes:
        normal = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
        q, r = torch.linalg.qr(normal)
        rotations.append((q * torch.diagonal(r).sign()).to(like))
    return rotations


def rotate_chain(cores: Sequence[Tensor], rotations: Sequence[Tensor]) -> list[Tensor]:
    """`Q_{k-1}^T A_k Q_k` for each core, with one rotation for each inner bond."""
    rotated = list(cores)
    for k, rotation in enumerate(rotations):
        rotated[k] = rotated[k] @ rotation
        rotated[k + 1] = torch.einsum("ab,napc->nbpc", rotation, rotated[k + 1])
    return rotated


def gradient_chain(svd: SVDFunction, tensor: Tensor, gradient: Tensor, bonds: Sequence[int]) -> list[Tensor]:
    """A chain whose bonds are written in the frames of a gradient: Algorithm 1's sweep with `gradient_frame` instead of the
    left singular vectors. All cores but the last are orthonormal."""
    n, modes = tensor.shape[0], tensor.shape[1:]
    cores: list[Tensor] = []
    rest, flow, left = tensor, gradient, 1
    for p, bond in zip(modes[:-1], bonds, strict=True):
        rest, flow = rest.reshape(n, left * p, -1), flow.reshape(n, left * p, -1)
        frame = gradient_frame(svd, rest, flow, bond)
        cores.append(frame.reshape(n, left, p, bond))
        rest, flow, left = frame.mT @ rest, frame.mT @ flow, bond
    return [*cores, rest.reshape(n, left, modes[-1], 1)]


def gradient_frame(
    svd: SVDFunction, matrix: Float[Tensor, "n a b"], gradient: Float[Tensor, "n a b"], rank: int
) -> Float[Tensor, "n a d"]:
    """Orthonormal columns that span what a bond must hold of a matrix, and along which the gradient is diagonal.

    1. The columns span the leading `rank` left singular vectors of the matrix whose singular values are not numerically
       zero: nothing of the matrix is lost that Algorithm 1 keeps.
    2. Directions that the matrix leaves free (all, where it is zero) are the leading left singular vectors of the part
       of the gradient outside of that span.
    3. Inside the span, the columns are the left singular vectors of the gradient projected on it: `frame^T G` has
       orthogonal rows, the longest first.

    For a zero matrix these are the gradient's own singular vectors. Where the span is the whole space, they are too,
    whatever the matrix: then the gauge is a rotation.
    """
    u, s, _ = svd(matrix, rank)
    threshold = torch.finfo(matrix.dtype).eps * max(matrix.shape[1:]) * s[:, :1]
    held = u * (s > threshold).unsqueeze(1)
    beside = gradient - held @ (held.mT @ gradient)
    size = torch.linalg.matrix_norm(beside)[:, None, None]
    # columns of norm 1 beside singular values of at most 1/2: what is held comes first
    both = torch.cat([held, beside / torch.where(size > 0, 2 * size, torch.ones_like(size))], dim=2)
    basis = svd(both, rank)[0]
    return basis @ svd(basis.mT @ gradient, rank)[0]
