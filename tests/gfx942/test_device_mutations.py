"""Bugs between a model and an emulated device, at load, in graphs and in launches, are caught: the logits of a small
model are far from the CPU's, or the device refuses."""

import device_mutations
import pytest

#: What refuses a bug before the model answers, in the words that say so.
REFUSED = {
    "weights_stay_in_the_other_flavor": "operation not permitted when stream is capturing",  # the reference serves
    "a_launch_is_given_other_tensors": "reads",  # memory of none of its tensors
}
CLOSE, FAR = 0.1, 0.3  # of logits in bf16, next to the largest: those that are right, and those that are not
CASES = [(name, True) for name in device_mutations.OF_FP8] + [
    (name, False) for name in device_mutations.MUTATIONS if name == "none" or name not in device_mutations.OF_FP8]


@pytest.mark.parametrize(("name", "is_fp8"), CASES)
def test_a_bug_is_caught(name, is_fp8, compiling):
    saw = compiling.submit(device_mutations.answered, name, "gfx942", is_fp8).result()
    if name in REFUSED:
        assert REFUSED[name] in saw["refused"]
        return
    assert saw["refused"] == ""
    assert saw["distance"] < CLOSE if name == "none" else saw["distance"] > FAR
