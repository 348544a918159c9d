"""Arrays reach the device as they are, whatever they are packed with."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wave64.serve.engine.crossing import Crossing, Fetched, pack, packed_size, unpack

DTYPES = [np.int64, np.int32, np.float32, np.uint8]
dims = st.lists(st.integers(0, 5), min_size=1, max_size=3)
shapes = st.lists(st.tuples(st.sampled_from(DTYPES), dims, st.booleans()), min_size=1, max_size=6)


def drawn(shapes) -> dict[str, np.ndarray]:
    """Arrays of these dtypes and shapes, some of them transposed views."""
    made = {}
    for i, (dtype, shape, transposed) in enumerate(shapes):
        array = (np.arange(int(np.prod(shape))) * 7 + i).astype(dtype).reshape(shape)
        made[f"{i}"] = array.T if transposed else array
    return made


@given(shapes)
def test_what_is_packed_is_unpacked(shapes):
    arrays = drawn(shapes)
    memory = np.full(packed_size(arrays), 255, dtype=np.uint8)
    pack(arrays, memory)
    views = unpack(arrays, torch.from_numpy(memory))
    assert views.keys() == arrays.keys()
    for name, array in arrays.items():
        assert torch.equal(views[name], torch.from_numpy(array.copy()))
        assert views[name].data_ptr() % 16 == 0 or not array.size


def test_there_and_back(device):
    arrays = {"a": np.arange(5), "b": np.ones((2, 3), dtype=np.float32), "none": np.zeros(0, dtype=np.int32)}
    there = Crossing(torch.device(device))(arrays)
    assert {each.device.type for each in there.values()} == {device}
    for back, array in zip(Fetched(list(there.values())).wait(), arrays.values(), strict=True):
        assert back.device.type == "cpu"
        assert torch.equal(back, torch.from_numpy(array))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU computes while the host goes on")
def test_nothing_waits_for_the_device():
    """Behind half a second of work, arrays are sent and results are asked for at once."""
    cross = Crossing(torch.device("cuda"))
    Fetched([cross({"a": np.arange(5)})["a"] + 1]).wait()  # what loads a kernel waits for the device, too
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    fetched = Fetched([cross({"a": np.arange(5)})["a"] + 1])
    assert not torch.cuda.current_stream().query(), "the device still works"
    assert fetched.wait()[0].tolist() == [1, 2, 3, 4, 5]
