"""Decode graphs without a GPU: a stand-in for CUDA's, which replays what was captured by calling it again, on the CPU.

What it cannot show is that a model can be captured; `test_engine.py` does, on a GPU.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers_deepseek import make_deepseek
from helpers_graphs import Graph, captures_on_cpu
from helpers_llama import load, make_llama

from wave64.serve.args import ServerArgs
from wave64.serve.engine import graphs
from wave64.serve.engine.ranks import ranks_of
from wave64.serve.engine.runner import Runner
from wave64.serve.engine.schedule import LAST_SAMPLED, Schedule
from wave64.serve.model import parallel
from wave64.serve.model.config import ModelConfig
from wave64.serve.model.load import load_model

PAGE, PAGES = 2, 24


@pytest.fixture
def capture():
    with captures_on_cpu():
        yield


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_replays_write_and_say_what_eager_steps_do(tmp_path, capture, name):
    """Batches that shrink and grow, in graphs that are larger; every other slot of the pool keeps what it had."""
    make_llama(tmp_path) if name == "llama" else make_deepseek(tmp_path, 3)
    model, config = load(tmp_path, "cpu")

    def runner(captures: bool) -> Runner:
        made = Runner(model, config, torch.float32, torch.device("cpu"), PAGES, PAGE, 8, False)
        for layer in made.kv_cache:
            for tensor in layer:
                tensor.fill_(0.5)
        if captures:
            made._graphs = graphs.DecodeGraphs(made.model, made.kv_cache, made.device, 8, made._page_table.shape[1],
                                               last_sampled=made._last_sampled[0])  # fmt: skip
        return made

    eager, replayed = runner(False), runner(True)
    assert sorted(replayed._graphs._graphs) == [1, 2, 4, 8]
    assert all((tensor == 0.5).all() for layer in replayed.kv_cache for tensor in layer), "capturing wrote to the pool"
    free, lengths = list(range(PAGES))[::-1], {}
    for step in range(12):
        rows = [[0, 1, 2, 3, 4], [3], [4, 1, 0], [2, 0], [0, 1, 2, 3, 4, 5, 6]][step % 5]
        starts = [lengths.get(row, 0) for row in rows]
        new = [(row, start // PAGE, [free.pop()]) for row, start in zip(rows, starts, strict=True) if start % PAGE == 0]
        tokens = [(7 * step + 3 * row) % config.vocab_size for row in rows]
        if step % 2:  # what a row sampled last is read on the device
            replayed._last_sampled[:, :8] = torch.tensor([(5 * step + row) % config.vocab_size for row in range(8)])
            named = [LAST_SAMPLED if row % 2 else token for row, token in zip(rows, tokens, strict=True)]
            tokens = [(5 * step + row) % config.vocab_size if row % 2 else token
                      for row, token in zip(rows, tokens, strict=True)]  # fmt: skip
        else:
            named = tokens
        schedule = Schedule(len(rows), rows, starts, [1] * len(rows), [1] * len(rows), tokens, new)
        told = replace(schedule, tokens=named)
        lengths |= {row: start + 1 for row, start in zip(rows, starts, strict=True)}
        torch.testing.assert_close(replayed.forward(told), eager.forward(schedule), rtol=0, atol=1e-4)
        graph = min(size for size in (1, 2, 4, 8) if size >= len(rows))
        assert Graph.ours.replayed is replayed._graphs._graphs[graph][0], "the smallest graph that holds the batch"
        assert not replayed._graphs._staged["seq_lens"][len(rows) : graph].any(), "padding rows attend to nothing"
        for ours, theirs in zip(replayed.kv_cache, eager.kv_cache, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


class Exchange:
    """The collectives of two ranks that are threads."""

    def __init__(self):
        self.barrier, self.there = threading.Barrier(2, timeout=60), {}

    def _all(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.there[rank] = x.clone()
        self.barrier.wait()
        both = [self.there[0], self.there[1]]
        self.barrier.wait()
        assert both[0].shape == both[1].shape, "ranks would wait for each other"
        return both

    def patch(self, monkeypatch, rank_of: Callable[[], int]) -> None:
        def reduce_scatter(x: torch.Tensor, group: str) -> torch.Tensor:
            return torch.stack(self._all(rank_of(), x)).sum(0).chunk(2)[rank_of()]

        monkeypatch.setattr(parallel, "all_gather", lambda x, group: torch.cat(self._all(rank_of(), x)))
        monkeypatch.setattr(parallel, "reduce_scatter", reduce_scatter)


def test_two_attention_groups_replay_the_graph_of_the_larger_batch(tmp_path, capture, monkeypatch):
    """Ranks as threads, each with an eager runner and one of graphs, on batches of which one is smaller, or empty. What
    prefills anywhere is eager everywhere."""
    make_deepseek(tmp_path, 3)
    config, flags = ModelConfig.from_folder(tmp_path), ServerArgs(tp_size=2, dp_size=2, enable_dp_attention=True)
    me = threading.local()
    Exchange().patch(monkeypatch, lambda: me.rank)
    batches = [((3, 1), 4), ((1, 0), 1), ((2, 5), 8), ((0, 2), 2), ((4, 3), 4)]  # of the two, and the graph's

    def steps(count: int, rank: int, number: int) -> Schedule:
        """So many sequences that begin, with a page each and one token."""
        rows = list(range(count))
        tokens = [(11 * number + 5 * row + 7 * rank) % config.vocab_size for row in rows]
        return Schedule(count, rows, [0] * count, [1] * count, [1] * count, tokens, [(row, 0, [row]) for row in rows])

    def be(rank: int) -> list[tuple]:
        me.rank = rank
        ranks = ranks_of(flags, rank)
        model = load_model(config, tmp_path, torch.float32, "cpu", ranks=ranks)
        eager, replayed = (Runner(model, config, torch.float32, torch.device("cpu"), PAGES, PAGE, 8, captures,
                                  ranks=ranks) for captures in (False, True))  # fmt: skip
        seen = []
        for number, (counts, _) in enumerate(batches):
            both = [steps(count, group, number) for group, count in enumerate(counts)]
            wanted = eager.forward(*both).unflatten(0, (2, -1))
            got = replayed.forward(*both).clone().unflatten(0, (2, -1))
            size = next(size for size, (graph, _) in replayed._graphs._graphs.items() if graph is Graph.ours.replayed)
            seen.append((size, [(got[group, :count], wanted[group, :count]) for group, count in enumerate(counts)]))
        Graph.ours.replayed = None
        prefills = Schedule(0, [0], [0], [2], [1], [3, 4], [(0, 0, [0])])
        both = [prefills if group == 1 else steps(1, 0, 9) for group in range(2)]
        assert torch.equal(replayed.forward(*both), eager.forward(*both))
        assert Graph.ours.replayed is None
        return seen

    with ThreadPoolExecutor(2) as threads:
        for seen in threads.map(be, range(2)):
            assert [size for size, _ in seen] == [size for _, size in batches]
            for _, pairs in seen:
                for got, wanted in pairs:
                    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_a_prompt_leaves_decodes_their_graph(tmp_path, capture, name):
    """Logits and caches are those of one eager batch; a batch beyond the largest graph is launched kernel by kernel."""
    make_llama(tmp_path) if name == "llama" else make_deepseek(tmp_path, 3)
    model, config = load(tmp_path, "cpu")

    def runner(sizes: tuple[int, ...]) -> Runner:
        made = Runner(model, config, torch.float32, torch.device("cpu"), PAGES, PAGE, 8, False)
        for layer in made.kv_cache:
            for tensor in layer:
                tensor.zero_()
        if sizes:
            made._graphs = graphs.DecodeGraphs(made.model, made.kv_cache, made.device, 8, made._page_table.shape[1],
                                               sizes)
        return made

    eager, replayed = runner(()), runner((1, 3, 99))
    assert replayed._graphs.largest == 8
    replayed = runner((1, 3))
    assert sorted(replayed._graphs._graphs) == [1, 3]

    def both(num_decodes, rows, starts, counts, logits, tokens, pages) -> Graph | None:
        Graph.ours.replayed = None
        schedule = Schedule(num_decodes, rows, starts, counts, logits, tokens, pages)
        torch.testing.assert_close(replayed.forward(schedule), eager.forward(schedule), rtol=0, atol=1e-4)
        for ours, theirs in zip(replayed.kv_cache, eager.kv_cache, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        return Graph.ours.replayed

    prompts = [(row, 0, [2 * row, 2 * row + 1]) for row in range(5)]
    assert both(0, [0, 1], [0, 0], [3, 3], [1, 1], [1, 2, 3, 4, 5, 6], pages=prompts) is None
    mixed = both(2, [0, 1, 2, 3], [3, 3, 0, 0], [1, 1, 3, 2], [1, 1, 2, 1], [7, 8, 1, 2, 3, 4, 5], pages=[])
    assert mixed is replayed._graphs._graphs[3][0]
    for row, rows in enumerate(eager._page_table[:4]):
        assert rows[:2].tolist() == [2 * row, 2 * row + 1]
    assert both(4, [0, 1, 2, 3], [4, 4, 3, 2], [1] * 4, [1] * 4, [9, 8, 7, 6],
                pages=[(0, 2, [20]), (1, 2, [21])]) is None, "four are more than three"


def test_a_step_is_the_two_that_it_is_split_into():
    step = Schedule(1, [4, 2], [9, 0], [1, 3], [1, 2], [7, 1, 2, 3], [(2, 0, [5])])
    assert step.split() == (Schedule(1, [4], [9], [1], [1], [7], [(2, 0, [5])]),
                            Schedule(0, [2], [0], [3], [2], [1, 2, 3]))


def test_the_log_says_how_far_capturing_is_and_what_it_took(tmp_path, capture, monkeypatch, caplog):
    make_llama(tmp_path)
    model, config = load(tmp_path, "cpu")
    made = Runner(model, config, torch.float32, torch.device("cpu"), PAGES, PAGE, 8, False)
    monkeypatch.setattr(graphs, "NOTE_S", -1.0)
    free = iter([5 << 20, 2 << 20])
    monkeypatch.setattr(graphs, "free_bytes", lambda device: next(free))
    with caplog.at_level("INFO", "wave64"):
        graphs.DecodeGraphs(made.model, made.kv_cache, made.device, 8, made._page_table.shape[1], [4, 2])
    first, second, last = caplog.messages
    assert (first, second) == tuple(f"decode graphs: {i} of 2 batch sizes captured" for i in (1, 2))
    assert last.startswith("decode graphs: 2 batch sizes up to 4, 3 MiB in all, in ")


@pytest.mark.parametrize(("largest", "wanted", "sizes"), [
    (8, [4, 1, 4], [1, 4]), (8, [2, 16], [2, 8]), (2, [], [1, 2])])
def test_the_sizes_that_were_asked_for(largest, wanted, sizes):
    assert graphs.batch_sizes(largest, wanted) == sizes


@pytest.mark.parametrize("largest", [1, 3, 8, 100, 256, 1000])
def test_graph_sizes_hold_every_batch(largest):
    sizes = graphs.batch_sizes(largest)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, largest)
    assert all(after <= max(2 * before, before + 4) for before, after in zip(sizes, sizes[1:], strict=False))
