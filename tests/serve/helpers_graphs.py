"""A stand-in for a device's graphs, which replays what was captured by computing it again, on the CPU."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from wave64.serve.engine import graphs, prompt_graphs


class Graph:
    """What was computed while it was captured, and where the result lies."""

    ours = threading.local()  # of a thread, which stands for a rank: the graph replayed last
    run: Callable[[], torch.Tensor]
    result: torch.Tensor

    def pool(self):
        return "memory"

    def replay(self):
        Graph.ours.replayed = self
        with torch.inference_mode():
            self.result.copy_(self.run())


def capture(run: Callable[[], torch.Tensor], memory: str | None) -> tuple[Graph, torch.Tensor]:
    graph = Graph()
    with torch.inference_mode():
        graph.run, graph.result = run, run()
    return graph, graph.result


@contextmanager
def captures_on_cpu() -> Iterator[None]:
    """The engine's graphs are such ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "capture", capture)
        patch.setattr(prompt_graphs, "capture", capture)
        yield
