"""Layouts of weights other than rows one after another, each with its inverse. A weight is laid out once: by the server
while it loads, where one backend alone will read the weight, and otherwise at its first call, next to the original.

`tiled` is the layout that AITER calls shuffled, and the one in which a wave loads its operands of a matrix instruction
without LDS: 16 rows by 32 columns lie together, in it pieces of 16 bytes, a piece of each row after the other.
"""

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from wave64.op import Op

ROWS, COLUMNS, PIECE = 16, 32, 16  # of a tile; bytes that a lane loads at once

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def untileable(weight: Tensor, rows: int = ROWS) -> str | None:
    """None, or why a weight [..., N, K] has no whole tiles."""
    n, k = weight.shape[-2:]
    if n % rows or k % COLUMNS:
        return f"takes weights of a multiple of {rows} rows and {COLUMNS} columns, these have {n} and {k}"
    return None


def tiled(weight: Tensor, rows: int = ROWS) -> Tensor:
    """weight [..., N, K], 1 or 2 bytes an element, of any strides but the last -> the same shape and dtype, contiguous,
    in tiles of `rows` by 32. Raises ValueError where N or K is no multiple of a tile's."""
    if why := untileable(weight, rows):
        raise ValueError(f"tiled: weight: {why}")
    piece = PIECE // weight.element_size()
    pieces = _bits(weight).unflatten(-1, (-1, COLUMNS // piece, piece)).unflatten(-4, (-1, rows))
    return pieces.movedim(-4, -2).reshape(weight.shape).view(weight.dtype)


def untiled(weight: Tensor, rows: int = ROWS) -> Tensor:
    """The inverse of `tiled`: contiguous, rows one after another."""
    n, k = weight.shape[-2:]
    piece = PIECE // weight.element_size()
    tiles = _bits(weight).reshape(*weight.shape[:-2], n // rows, k // COLUMNS, COLUMNS // piece, rows, piece)
    return tiles.movedim(-2, -4).reshape(weight.shape).view(weight.dtype)


def _bits(weight: Tensor) -> Tensor:
    """Integers move as they are, whatever the dtype."""
    return weight.view(torch.uint8 if weight.element_size() == 1 else torch.int16)


def is_tiled(weight: Tensor) -> bool:
    """Whether the server laid this weight out. AITER looks at the same attribute."""
    return getattr(weight, "is_shuffled", False)


def marked(weight: Tensor) -> Tensor:
    """The weight, said to be tiled."""
    weight.is_shuffled = True  # type: ignore[attr-defined]
    return weight


def as_read_by(op: Op, weight: nn.Parameter) -> nn.Parameter:
    """A weight of a model, at load: in tiles if all that may serve `op` reads tiles; otherwise the weight itself."""
    serving = op.bound.get(weight.device.type, ())
    if not serving or not all(backend.tiles for backend in serving) or untileable(weight):
        return weight
    laid_out = nn.Parameter(tiled(weight.data), requires_grad=False)
    marked(laid_out)
    return laid_out


def is_kept(weight: Tensor) -> bool:
    """Whether `in_tiles` has nothing to do: a graph's capture must not."""
    return is_tiled(weight) or weight in _kept


def in_tiles(weight: Tensor) -> Tensor:
    """The weight if it is tiled, else its tiles, made at the first call and kept as long as the weight is. A weight is
    not written after its first call."""
    if is_tiled(weight):
        return weight
    if weight not in _kept:
        _kept[weight] = marked(tiled(weight))
    return _kept[weight]
