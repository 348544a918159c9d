"""A layer of production models, one rank's dimensions, on an emulated MI300X: a step in caches beyond 2 GiB is as near
to the CPU's as two evaluations in bf16 are. Only in the tier `long`: a step takes minutes."""

import device_layers
import pytest
from device_layers import Work

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("batch", "context", "chunk"), [(1, 4096, 0), (4, 4096, 0), (1, 0, 128)],
                         ids=["decode-1", "decode-4", "chunk-128"])
@pytest.mark.parametrize("name", device_layers.LAYERS)
def test_a_layer_says_on_the_device_what_it_says_on_a_cpu(name, batch, context, chunk, compiling, record_property):
    saw = compiling.submit(device_layers.layer, name, "gfx942", Work(batch, context, chunk)).result()
    assert 0 < saw["distance"] < device_layers.CLOSE
    assert saw["step"].bound_us > 10
    record_property("step", (name, saw["step"]))
