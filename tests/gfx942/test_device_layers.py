"""A layer of production models, one rank's dimensions, on an emulated MI300X: a step in caches beyond 2 GiB is as near
to the CPU's as two evaluations in bf16 are. Only in the tier `long`: a step takes a minute or two."""

import device_layers
import pytest
from device_layers import Work

pytestmark = pytest.mark.long
WORKS = {"decode-1": Work(1, 4096), "decode-4": Work(4, 4096), "chunk-128": Work(1, 0, 128)}


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("name", device_layers.LAYERS)
def test_a_layer_says_on_the_device_what_it_says_on_a_cpu(name, work, compiling):
    saw = compiling.submit(device_layers.layer, name, "gfx942", WORKS[work], False).result()
    assert 0 < saw["distance"] < saw["close"]
    assert saw["instructions"] > 100_000
