"""--enable-hierarchical-cache: pages that the prefix cache evicted come back from host memory, and hold what was
computed, whatever the model caches."""

import msgspec
import pytest
import torch
from helpers_deepseek import make_deepseek
from helpers_llama import make_llama
from helpers_parallel import Pool, collect

from wave64.serve.args import ServerArgs
from wave64.serve.engine import memory
from wave64.serve.engine.control import LENGTH, Step, frame
from wave64.serve.engine.engine import Engine
from wave64.serve.engine.host_tier import HostTier
from wave64.serve.engine.schedule import Schedule
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.model.config import ConfigError

VOCAB = 100
#: A pool of 16 pages of 4 tokens, and 64 of the host.
FLAGS = dict(dtype="float32", page_size=4, max_total_tokens=64, enable_hierarchical_cache=True, hicache_ratio=4.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {name: tmp_path_factory.mktemp(name) for name in ("llama", "deepseek")}
    make_llama(made["llama"], vocab_size=VOCAB)
    make_deepseek(made["deepseek"], 3, vocab_size=VOCAB)
    return made


def chats() -> list[Request]:
    """Three chats whose turns alternate: together they need more pages than there are."""
    texts = [[(7 * i * i + 3 * i + 31 * chat) % VOCAB for i in range(42)] for chat in range(3)]
    params = SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True)
    return [Request(f"{chat} {turn}", texts[chat][: 12 + 10 * turn], params, top_logprobs=0)
            for turn in range(4) for chat in range(3)]  # fmt: skip


def loads_of(engine: Engine) -> list[tuple[int, int]]:
    """What its steps load, as they run."""
    seen, copy = [], engine.runner._host_tier.copy
    engine.runner._host_tier.copy = lambda step: (seen.extend(step.loads), copy(step))[1]
    return seen


@pytest.mark.parametrize(("name", "kv", "overlap"), [
    ("llama", "auto", True), ("llama", "fp8_e4m3", False), ("deepseek", "auto", True),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        ("llama", "auto", False), ("llama", "fp8_e4m3", True), ("deepseek", "auto", False)))])
def test_answers_are_those_without_it(folders, device, name, kv, overlap):
    """One after another, and many at once, with preemption."""
    flags = FLAGS | dict(model_path=str(folders[name]), device=device, kv_cache_dtype=kv)
    calm = Engine(ServerArgs(**flags | dict(enable_hierarchical_cache=False, disable_radix_cache=True)))
    made = Engine(ServerArgs(**flags), overlap=overlap)
    loads = loads_of(made)
    want, got = {}, {}
    for each in chats():
        want |= collect(calm, each)
        got |= collect(made, each)
    assert len(loads) > 10
    again = collect(made, *chats())
    assert made.statistics().preemptions > 0
    for rid, one in want.items():
        for other in (got[rid], again[rid]):
            assert other.token_ids == one.token_ids
            assert [each.logprob for each in other.logprobs] == pytest.approx(
                [each.logprob for each in one.logprobs], abs=1e-4 if kv == "auto" else 0.1)
    assert made.flush()
    assert made.scheduler.cache.host_pool.num_free == 64


def test_a_step_reaches_ranks_with_its_copies():
    step = Schedule(stores=[(1, 2)], loads=[(3, 4), (5, 6)], reads_loads=True)
    sent = frame(Step([step]))[LENGTH.size :]
    assert msgspec.msgpack.decode(sent, type=Step) == Step([step])


@pytest.mark.long  # the single rank above, and the message that others get, are its short form
def test_ranks_copy_what_rank_0_decides(folders):
    """Their slices of the pools, and with data-parallel attention each group its own pages."""
    pool = Pool(2)
    try:
        for name, more in (("llama", dict(tp_size=2)),
                           ("deepseek", dict(tp_size=2, dp_size=2, enable_dp_attention=True))):  # fmt: skip
            flags = FLAGS | dict(model_path=str(folders[name]), device="cpu")
            want = collect(Engine(ServerArgs(**flags | dict(enable_hierarchical_cache=False))), *chats())
            got, statistics = pool.run(flags | more, [*chats()])
            assert {rid: each.token_ids for rid, each in got.items()} == {
                rid: each.token_ids for rid, each in want.items()}
            assert statistics.cached_tokens > 0
    finally:
        pool.close()


def test_copies_are_of_whole_pages_of_every_layer():
    shapes = [((5, 4, 2, 3), (5, 4, 2, 3))] * 2
    device, host = ([tuple(torch.randn(shape) for shape in layer) for layer in shapes] for _ in range(2))
    before = [[tensor.clone() for tensor in layer] for layer in device]
    tier = HostTier(device, host, torch.device("cpu"))
    tier.copy(Schedule(stores=[(1, 4), (3, 0)]))
    tier.copy(Schedule(loads=[(4, 2), (0, 1)]))
    for layer, old in zip(device, before, strict=True):
        for tensor, was in zip(layer, old, strict=True):
            assert torch.equal(tensor[2], was[1])
            assert torch.equal(tensor[1], was[3])
            assert torch.equal(tensor[[0, 3, 4]], was[[0, 3, 4]])


def test_more_than_the_host_has_is_refused_in_words(folders, monkeypatch):
    monkeypatch.setattr(memory, "_available_ram", lambda: 1 << 14)
    with pytest.raises(ConfigError, match=r"--hicache-ratio: 4 times the KV pool is .* GiB are available; give"):
        Engine(ServerArgs(model_path=str(folders["llama"]), device="cpu", **FLAGS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU copies while it computes")
def test_a_step_waits_for_the_copies_that_it_reads():
    device = torch.device("cuda")
    pools = [(torch.zeros(600, 1 << 16, device=device),)]
    host = [(torch.ones(600, 1 << 16).pin_memory(),)]
    tier = HostTier(pools, host, device)
    for reads in (True, False):
        pools[0][0].zero_()
        tier.copy(Schedule(loads=[(i, i) for i in range(600)], reads_loads=reads))
        if not reads:
            tier.copy(Schedule())
        assert bool((pools[0][0] == 1).all())
