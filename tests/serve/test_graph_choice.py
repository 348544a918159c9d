"""Tokens that the graph of a step chooses, where nothing else is wanted of it: they are those that are chosen behind
it, and little is launched between two replays. On a CPU, by the stand-in for graphs."""

import random

import pytest
import torch
from helpers_graphs import Graph, captures_on_cpu
from helpers_llama import make_llama
from helpers_parallel import collect
from torch.utils._python_dispatch import TorchDispatchMode

from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.engine.graphs import DecodeGraphs
from wave64.serve.engine.sequence import Sequence
from wave64.serve.messages import Request, SamplingParams

PLAIN = [dict(temperature=0), dict(seed=1), dict(seed=2, top_k=5, temperature=1.3), dict(seed=3, top_p=0.7, min_p=0.01),
         dict(seed=4, max_new_tokens=3), dict(seed=5, stop_token_ids=[*range(25)])]  # fmt: skip
OTHERS = [dict(seed=6, presence_penalty=0.5), dict(temperature=0, min_new_tokens=4, stop_token_ids=[*range(50)]),
          dict(seed=7, logit_bias={3: 4.0})]  # fmt: skip


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Without graphs and with ones that choose, in the plain loop."""
    make_llama(folder := tmp_path_factory.mktemp("llama"), vocab_size=100)
    torch.set_num_threads(1)
    with captures_on_cpu():
        made = [Engine(ServerArgs(model_path=str(folder), device="cpu", dtype="float32", max_total_tokens=512,
                                  max_running_requests=8, disable_radix_cache=True)) for _ in range(2)]  # fmt: skip
        runner = made[1].runner
        runner._graphs = DecodeGraphs(runner.model, runner.kv_cache, runner.device, 8, runner._page_table.shape[1],
                                      (1, 8), runner._last_sampled[0], torch.zeros(8, 100))  # fmt: skip
    return made


def requests(kinds, length=6):
    return [Request(f"{i}", [(7 * i + j * j) % 100 for j in range(length)],
                    SamplingParams(**dict(max_new_tokens=12, ignore_eos=True) | kind)) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_same_tokens_are_chosen_in_the_graph(engines, monkeypatch, overlap):
    """Until one comes that wants more, and again once it has ended; one that stops a step late draws for nothing."""
    plain, graphed = engines
    chosen, choose = [], graphed.runner._graphs.choose
    monkeypatch.setattr(graphed.runner._graphs, "choose", lambda largest: (chosen.append(largest), choose(largest))[1])
    monkeypatch.setattr(graphed, "overlaps", overlap)
    for kinds, counts in ((PLAIN, {11}), ([*PLAIN, OTHERS[0] | dict(max_new_tokens=5)], {7}), (OTHERS, {0})):
        chosen.clear()
        want, got = (collect(engine, *requests(kinds)) for engine in (plain, graphed))
        assert {rid: (each.token_ids, each.finish_reason) for rid, each in got.items()} == {
            rid: (each.token_ids, each.finish_reason) for rid, each in want.items()}
        assert {len(chosen)} == counts


@pytest.mark.parametrize(("wants", "is_plain"), [
    *((kind, True) for kind in PLAIN), *((kind, False) for kind in OTHERS), (dict(frequency_penalty=0.1), False),
    (dict(repetition_penalty=1.1), False), (dict(bad_words=[[3]]), False)])
def test_which_requests_want_nothing_else(wants, is_plain):
    request, = requests([wants])
    assert Sequence(request, frozenset(), random.Random(0)).is_plain == is_plain
    for more in (dict(top_logprobs=0), dict(prompt_logprobs=True)):
        other = Request("a", [1], request.params, **more)
        assert not Sequence(other, frozenset(), random.Random(0)).is_plain
    seq = Sequence(request, frozenset(), random.Random(0))
    seq.grammar = object()  # pyright: ignore[reportAttributeAccessIssue]: whether there is one is all that counts
    assert not seq.is_plain


class Launches(TorchDispatchMode):
    """Names of the operations outside of replays, views left out."""

    def __init__(self):
        super().__init__()
        self.names, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.replays and not func.is_view:
            self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_little_is_launched_between_replays(engines, monkeypatch):
    """The step's inputs, the page table's rows and their copy; on a CPU, the ids' clone, which a GPU's copy back is."""
    _, graphed = engines
    replay, launches = Graph.replay, Launches()

    def unseen(graph):
        launches.replays += 1
        try:
            replay(graph)
        finally:
            launches.replays -= 1

    monkeypatch.setattr(Graph, "replay", unseen)
    monkeypatch.setattr(graphed, "overlaps", True)
    for each in requests([dict(max_new_tokens=8, seed=i) for i in range(3)], length=1):
        graphed.add(each)
    for _ in range(3):
        graphed.step()
    with launches:
        graphed.step()
    assert sorted(launches.names) == ["clone", "copy_", "copy_", "index"]
    collect(graphed)
