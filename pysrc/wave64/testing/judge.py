"""How far results may be from their evaluation in fp64.

Distances are relative, so that they mean the same for any scale: of the worst element, to the largest exact value, and
root mean square, to that of the exact values. They are taken in each row (the last dimension; a vector is one row), to
that row's own spread. A backend may have twice the distance of the reference in the operator's own dtype in that row,
for its sums are as long and merely in another order; and `floor`, where the reference happens to be exact: it covers
the rounding of the result, which is half a unit of an element at most, and no element of a row is larger than the row's
largest. What keeps this in every row keeps it over the whole tensor.
"""

import torch
from torch import Tensor


def floor(dtype: torch.dtype) -> float:
    """What is always allowed: half a unit in the last place of 1; of fp32 eight units, since its sums are long."""
    return torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 0.5)


def distance(got: Tensor, exact: Tensor) -> float:
    """The larger of two distances: of the worst element relative to the largest exact value, and root mean square.

    Infinite and NaN elements must be the same on both sides; infinity otherwise."""
    if not alike(got, exact):
        return float("inf")
    return distances(got.reshape(1, -1), exact.reshape(1, -1)).max().item() if got.numel() else 0.0


def alike(got: Tensor, exact: Tensor) -> bool:
    """True if infinite and NaN elements are the same on both sides."""
    got, exact = got.double(), exact.double()
    finite = exact.isfinite()
    return torch.equal(finite, got.isfinite()) and got[~finite].allclose(exact[~finite], equal_nan=True)


def distances(got: Tensor, exact: Tensor) -> Tensor:
    """[rows, 2] of two tensors [rows, width]: of the worst element, and root mean square; of finite elements."""
    got, exact = got.double(), exact.double()
    finite = exact.isfinite()
    off, exact = torch.where(finite, got - exact, 0).abs(), torch.where(finite, exact, 0).abs()
    worst = off.amax(1) / exact.amax(1).clamp_min(1e-30)
    mean = _length(off) / _length(exact).clamp_min(1e-30)
    return torch.stack([worst, mean], 1)


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)


def compare(got: Tensor, own: Tensor, exact: Tensor) -> tuple[float, float, str]:
    """(error, bound, what is too far or "") of a result, by that of the reference in the operator's own dtype and the
    evaluation in fp64; error and bound of the row where the one is the largest part of the other."""
    always = floor(got.dtype)
    if not alike(own, exact):
        return 0.0, 0.0, "the reference in its own dtype is infinite or NaN where in fp64 it is not, or vice versa"
    if not alike(got, exact):
        return float("inf"), always, "error inf against fp64: other elements are infinite or NaN"
    if not got.numel():
        return 0.0, always, ""
    errors, bounds = distances(rows(got), rows(exact)), 2 * distances(rows(own), rows(exact)) + always
    row, which = divmod(int((errors / bounds).argmax()), 2)
    error, bound = errors[row, which].item(), bounds[row, which].item()
    kind = ("of the worst element", "root mean square")[which]
    text = f"error {error:.3g} against fp64 in row {row}, {kind}, allowed {bound:.3g}"
    return error, bound, "" if error <= bound else text
