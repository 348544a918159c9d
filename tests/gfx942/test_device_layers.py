"""A layer of production models, one rank's dimensions, on an emulated MI300X: a step in caches beyond 2 GiB is as near
to the CPU's as two evaluations in bf16 are. Only in the tier `long`: a step takes minutes."""

import device_layers
import pytest
from device_layers import Work

pytestmark = pytest.mark.long


#: A chunk of a prompt reaches all experts of DeepSeek's layers: an hour of execution.
WORKS = {"decode-1": Work(1, 4096), "decode-4": Work(4, 4096), "chunk-128": Work(1, 0, 128)}


@pytest.mark.parametrize(("name", "work"), [
    (name, work) for name in device_layers.LAYERS for work in WORKS
    if "llama" in name or work.startswith("decode")])
def test_a_layer_says_on_the_device_what_it_says_on_a_cpu(name, work, compiling, record_property):
    saw = compiling.submit(device_layers.layer, name, "gfx942", WORKS[work]).result()
    assert 0 < saw["distance"] < saw["close"]
    assert saw["step"].bound_us > 10
    record_property("step", (name, saw["step"]))
