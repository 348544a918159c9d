"""Bugs put between a model and an emulated device, each a context in which it is there: at load, in the graphs, in what
launches are given. tests/gfx942/test_device_mutations.py sees each change the answer or be refused."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from device_layers import Work, distances, emulated, on_cpu
from numpy.typing import NDArray
from torch import Tensor

from wave64 import quant
from wave64.serve.engine.graphs import DecodeGraphs
from wave64.serve.model.config import ModelConfig
from wave64.serve.model_path import resolve_model_path
from wave64.testing.emulator import graphs
from wave64.testing.emulator.device import Device, Launch

MUTATIONS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {"none": contextlib.nullcontext}


def mutation(make: Callable[[], Iterator[None]]) -> Callable:
    MUTATIONS[make.__name__] = contextlib.contextmanager(make)
    return make


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@mutation
def bits_of_the_other_flavor_are_taken_as_they_are():
    """The same bits mean half the number, and the scales stay."""
    with replaced(quant, "fn_to_fnuz", lambda weight, scale: (weight.view(torch.float8_e4m3fnuz), scale)):
        yield


@mutation
def scales_are_not_doubled():
    with replaced(quant, "fn_to_fnuz_kv_scale", lambda scale: scale.clone()):
        yield


@mutation
def weights_stay_in_the_other_flavor():
    with replaced(quant, "fp8_dtype", lambda: torch.float8_e4m3fn):
        yield


@mutation
def minus_zero_becomes_nan():
    """0x80, which is -0 in OCP's flavor and NaN in the card's."""
    def kept(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return weight.view(torch.float8_e4m3fnuz), scale * 2

    with replaced(quant, "fn_to_fnuz", kept):
        yield


@mutation
def padding_rows_write_to_the_cache():
    """Rows of a graph beyond the batch keep a slot of the step before."""
    pack = DecodeGraphs.pack

    def without_padding(self, arrays, largest):
        staged = self._staged
        self._staged = {**staged, "slot_mapping": _Unfilled(staged["slot_mapping"])}
        try:
            return pack(self, arrays, largest)
        finally:
            self._staged = staged

    with replaced(DecodeGraphs, "pack", without_padding):
        yield


class _Unfilled:
    """An array of which only the first elements can be written to."""

    def __init__(self, array: NDArray):
        self._array = array

    def __setitem__(self, index: slice, value: Any) -> None:
        if index.start is None:
            self._array[index] = value


@mutation
def the_page_table_of_the_step_before_is_read():
    replay = DecodeGraphs.replay

    def with_what_is_there(self, packed, page_table, largest):
        count, width = page_table.shape
        return replay(self, packed, self._inputs.page_table[:count, :width].clone(), largest)

    with replaced(DecodeGraphs, "replay", with_what_is_there):
        yield


@mutation
def torchs_operations_are_not_replayed():
    with replaced(graphs._Recorder, "_record", lambda *args: None):
        yield


@mutation
def a_graph_forgets_its_last_launch():
    replay = graphs.CUDAGraph.replay

    def shorter(self):
        kept, self.nodes = self.nodes, self.nodes[:-1]
        replay(self)
        self.nodes = kept

    with replaced(graphs.CUDAGraph, "replay", shorter):
        yield


@mutation
def a_launch_has_one_workgroup_less():
    with _launches(lambda launch: replace(launch, grid=(max(1, launch.grid[0] - 1), *launch.grid[1:]))):
        yield


@mutation
def a_launch_is_given_other_tensors():
    """What it may touch are copies: the addresses in its arguments are no longer among them."""
    with _launches(lambda launch: replace(launch, tensors={name: t.clone() for name, t in launch.tensors.items()})):
        yield


@contextlib.contextmanager
def _launches(change: Callable[[Launch], Launch]) -> Iterator[None]:
    execute = Device._execute
    with replaced(Device, "_execute", lambda self, launch, op: execute(self, change(launch), op)):
        yield


def demo(name: str, num_layers: int) -> ModelConfig:
    """A demo's dimensions with fewer layers."""
    return replace(ModelConfig.from_folder(resolve_model_path(name, None)), num_layers=num_layers)


#: Mutations of weights in FP8; the others show in a Llama, which is quicker.
OF_FP8 = ("none", "bits_of_the_other_flavor_are_taken_as_they_are", "scales_are_not_doubled",
          "weights_stay_in_the_other_flavor", "minus_zero_becomes_nan")
#: three sequences in a graph of four, then a smaller batch in other pages
WORKS = [Work(3, 2), Work(1, 17)]


def answered(mutation: str, arch: str, is_fp8: bool) -> dict[str, Any]:
    """How far the logits of a small model are from the CPU's with a bug in between, or what refused it."""
    config = demo("demo-deepseek-fp8" if is_fp8 else "demo-llama", 2)
    wanted = on_cpu(arch, config, WORKS, 64, steps=2)
    try:
        logits, *_ = emulated(arch, config, WORKS, 64, steps=2, mutation=MUTATIONS[mutation], counts=False)
    except Exception as e:  # a bug may be refused anywhere
        return {"refused": f"{type(e).__name__}: {e}", "distance": None}
    return {"refused": "", "distance": max(distances(logits, wanted))}
