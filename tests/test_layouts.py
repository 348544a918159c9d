"""Layouts of weights: a tile's bytes are where they are said to be, and every layout has its inverse."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wave64 import layouts

DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.bfloat16, torch.float16)


@settings(max_examples=25, deadline=None)
@given(outer=st.sampled_from([(), (1,), (3,)]), rows=st.sampled_from([16, 32]), n=st.integers(1, 3),
       k=st.integers(1, 3), padded=st.sampled_from([0, 8]), dtype=st.sampled_from(DTYPES))
def test_a_tiled_weight_is_untiled_to_itself(outer, rows, n, k, padded, dtype):
    shape = *outer, n * rows, k * 32 + padded
    bits = torch.randint(256 if dtype.itemsize == 1 else 32768, shape).to(
        torch.uint8 if dtype.itemsize == 1 else torch.int16)
    weight = bits.view(dtype)[..., : k * 32]
    tiled = layouts.tiled(weight, rows)
    assert tiled.shape == weight.shape
    assert tiled.is_contiguous()
    assert torch.equal(layouts.untiled(tiled, rows).view(bits.dtype), bits[..., : k * 32])


@pytest.mark.parametrize(("dtype", "piece"), [(torch.uint8, 16), (torch.int16, 8)])
def test_where_a_number_goes(dtype, piece):
    """Row r, column c of a tile: its piece's column, then the row, then within the piece."""
    weight = (torch.arange(32 * 64) % 251).to(dtype).view(32, 64)
    flat = layouts.tiled(weight).flatten()
    for r, c in ((0, 0), (3, 5), (15, 31), (17, 40), (31, 63)):
        tile = r // 16 * 2 + c // 32
        offset = tile * 512 + c % 32 // piece * 16 * piece + r % 16 * piece + c % piece
        assert flat[offset] == weight[r, c]


def test_part_of_a_tile_is_refused():
    with pytest.raises(ValueError, match="multiple of 16 rows and 32 columns, these have 24 and 32"):
        layouts.tiled(torch.zeros(24, 32, dtype=torch.bfloat16))


def test_a_weight_is_laid_out_once_and_goes_with_it():
    weight = torch.randn(16, 32).bfloat16()
    assert not layouts.is_kept(weight)
    tiles = layouts.in_tiles(weight)
    assert layouts.is_kept(weight)
    assert layouts.in_tiles(weight) is tiles
    assert layouts.in_tiles(tiles) is tiles
    before = len(layouts._kept)
    del weight
    gc.collect()
    assert len(layouts._kept) == before - 1
