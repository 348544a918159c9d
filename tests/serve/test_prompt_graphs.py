"""Steps with prompts in graphs, without a GPU: what is replayed is what one eager batch computes."""

import random

import pytest
import torch
from helpers_graphs import Graph, captures_on_cpu
from helpers_llama import load, make_llama

from wave64.serve.engine import prompt_graphs
from wave64.serve.engine.runner import Runner
from wave64.serve.engine.schedule import LAST_SAMPLED, Schedule

PAGE, PAGES, ROWS = 4, 64, 6


@pytest.fixture(scope="module")
def runners(tmp_path_factory):
    """An eager one, and one with graphs of 0, 2 and 4 decodes next to 16, 32 and 64 tokens of prompts."""
    make_llama(folder := tmp_path_factory.mktemp("llama"))
    model, config = load(folder, "cpu")
    with captures_on_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_graphs, "MIN_TOKENS", 16)
        patch.setattr(prompt_graphs, "DECODES", (0, 2, 9))
        return [Runner(model, config, torch.float32, torch.device("cpu"), PAGES, PAGE, ROWS, captures,
                       graph_sizes=(1, 4), prompt_tokens=64) for captures in (False, True)]  # fmt: skip


def cleared(runners):
    for runner in runners:
        for layer in runner.kv_cache:
            for tensor in layer:
                tensor.fill_(0.5)
    return runners


def both(runners, eager: Schedule, named: Schedule | None = None) -> tuple[int, int] | None:
    """Run a step in both, compare, and say which graph it was, if there was one."""
    Graph.ours.replayed = None
    got = runners[1].forward(named or eager)
    torch.testing.assert_close(got, runners[0].forward(eager), rtol=0, atol=1e-4)
    for ours, theirs in zip(runners[1].kv_cache, runners[0].kv_cache, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    return next((size for size, (graph, _) in runners[1]._prompt_graphs._graphs.items()
                 if graph is Graph.ours.replayed), None)


def test_a_replay_computes_what_an_eager_step_does(runners):
    """Steps drawn with 0 to 4 decodes and 1 to 3 prompts, whole, begun and gone on with, one behind the other in the
    same memory; logits and every slot of the pool, those of none among them."""
    runners, drawn, seen = cleared(runners), random.Random(3), set()
    assert all((tensor == 0.5).all() for layer in runners[1].kv_cache for tensor in layer)
    for _ in range(14):
        rows = drawn.sample(range(ROWS), ROWS)
        free, decodes = drawn.sample(range(PAGES), PAGES), drawn.choice([0, 1, 2, 3, 4])
        prompts = drawn.choice([1, 2]) if decodes > 3 else drawn.choice([1, 2, 3])
        rows = rows[: decodes + prompts]
        lengths = [drawn.choice([1, 2, 5, 9, 16, 21]) for _ in range(prompts)]
        before = [drawn.randrange(1, 9) for _ in rows]
        # What stands before: a step of its own.
        pages = [(row, 0, [free.pop() for _ in range(8)]) for row in rows]
        first = Schedule(0, rows, [0] * len(rows), before, [0] * len(rows),
                         [drawn.randrange(100) for _ in range(sum(before))], pages)  # fmt: skip
        both(runners, first)
        counts = [1] * decodes + lengths
        tokens = [drawn.randrange(100) for _ in range(sum(counts))]
        wanted = [1] * decodes + [drawn.choice([0, 1]) for _ in range(prompts)]
        named = list(tokens)
        for i in range(decodes):
            if drawn.random() < 0.5:
                runners[1]._last_sampled[0, rows[i]], named[i] = tokens[i], LAST_SAMPLED
        steps = [Schedule(decodes, rows, before, counts, wanted, ids, []) for ids in (tokens, named)]
        size = both(runners, *steps)
        assert size is not None
        assert size == min((d, t) for d in (0, 2, 4) for t in (16, 32, 64)
                           if d >= decodes and t >= max(sum(lengths), 16 * prompts))  # fmt: skip
        seen.add(size)
    assert len(seen) > 5, "of nine"


@pytest.mark.parametrize(("why", "step"), [
    ("too many decodes", Schedule(5, [0, 1, 2, 3, 4, 5], [3] * 5 + [0], [1] * 5 + [2], [1] * 6, [7] * 7)),
    ("too many tokens", Schedule(0, [0], [0], [65], [1], [5] * 65)),
    ("prompts that ask for logprobs", Schedule(0, [0], [0], [4], [4], [5] * 4)),
    ("too many prompts", Schedule(0, [0, 1, 2, 3, 4], [0] * 5, [2] * 5, [1] * 5, [5] * 10)),
])  # fmt: skip
def test_what_no_graph_holds_is_launched_kernel_by_kernel(runners, why, step):
    eager, graphed = cleared(runners)
    step.pages = [(row, 0, list(range(8 * row, 8 * row + 1 + (start + count) // PAGE)))
                  for row, start, count in zip(step.rows, step.starts, step.counts, strict=True)]
    Graph.ours.replayed = None
    graphed.max_split = 0
    torch.testing.assert_close(graphed.forward(step), eager.forward(step), rtol=0, atol=1e-4)
    assert Graph.ours.replayed is None, why


def test_without_graphs_of_decodes_none_is_replayed(runners, monkeypatch):
    """As tests launch a step kernel by kernel."""
    eager, graphed = cleared(runners)
    monkeypatch.setattr(graphed, "_graphs", None)
    Graph.ours.replayed = None
    prompt = Schedule(0, [0], [0], [3], [1], [1, 2, 3], [(0, 0, [5])])
    for step in (prompt, Schedule(1, [0], [3], [1], [1], [4])):
        torch.testing.assert_close(graphed.forward(step), eager.forward(step), rtol=0, atol=1e-4)
    assert Graph.ours.replayed is None


def test_all_graphs_write_their_logits_to_the_same_memory(runners):
    """The largest step's: those of every graph would take as much as a small model."""
    graphs, prompts = runners[1]._graphs, runners[1]._prompt_graphs
    found = [logits for _, logits in (*graphs._graphs.values(), *prompts._graphs.values())]
    assert len(found) == 2 + 9
    assert len({logits.data_ptr() for logits in found}) == 1
    assert max(len(logits) for logits in found) * 101 * 4 == found[0].untyped_storage().nbytes()


def test_sizes():
    assert prompt_graphs.sizes(1, 64) == [(0, 64), (1, 64)]
    assert prompt_graphs.sizes(64, 300) == [(d, t) for t in (75, 150, 300) for d in (0, 16, 64)]
