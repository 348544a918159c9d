"""A stand-in for CUDA's graphs, which replays what was captured by calling it again, on the CPU."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch


class Graph:
    """What was launched while it was being captured, and where the result lies."""

    ours = threading.local()  # of a thread, which stands for a rank: the graph being captured, and the last replayed
    call: Callable[[], torch.Tensor]
    result: torch.Tensor

    def pool(self):
        return "memory"

    def replay(self):
        Graph.ours.replayed = self
        self.result.copy_(self.call())


class Captured(torch.nn.Module):
    """A model that tells the graph being captured how to compute its result again."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, kv_cache):
        logits = self.model(batch, kv_cache)
        if (graph := getattr(Graph.ours, "capturing", None)) is not None:
            graph.call, graph.result = lambda: self.model(batch, kv_cache), logits
        return logits


@contextmanager
def captures_on_cpu() -> Iterator[None]:
    """CUDA as serve/engine/graphs.py uses it."""

    @contextmanager
    def graph(made, pool):
        Graph.ours.capturing = made
        yield
        Graph.ours.capturing = None

    def stream():
        return type("Stream", (), {"wait_stream": lambda self, other: None})()

    fakes = dict(Stream=stream, current_stream=stream, stream=lambda _: nullcontext(), CUDAGraph=Graph, graph=graph)
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        yield
