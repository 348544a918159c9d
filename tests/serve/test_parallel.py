"""Several ranks say what one says: the engine over gloo, ranks as processes, next to the engine in one process.

Sums over ranks add in another order, so logits differ by rounding: tokens are compared, and logprobs to 1e-4.
"""

import itertools
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_deepseek import LatentDriver, make_deepseek, quantize
from helpers_llama import edit_json, make_llama
from helpers_parallel import Pool
from helpers_server import serve
from safetensors.torch import load_file
from test_demo import TEXT, pairs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from wave64 import distributed
from wave64.backends import peers
from wave64.distributed import ALONE, Group
from wave64.serve.args import ArgsError, ServerArgs
from wave64.serve.engine import ranks
from wave64.serve.engine.memory import _available_ram
from wave64.serve.engine.rank import refuse
from wave64.serve.engine.ranks import ranks_of
from wave64.serve.engine.team import Member, Team
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.model import parallel
from wave64.serve.model.checkpoint import StoredTensor
from wave64.serve.model.config import ConfigError, ModelConfig
from wave64.serve.model.load import load_model
from wave64.serve.model.parallel import Ranks
from wave64.serve.model_path import resolve_model_path

PROMPTS = [[17, 3, 99, 42, 8, 8, 71], [0, 55], [23, 64, 90, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9], [77]]
GREEDY = dict(max_new_tokens=10, temperature=0.0, ignore_eos=True)
#: greedy, with penalties, drawn, drawn with penalties
KINDS = [GREEDY, GREEDY | dict(repetition_penalty=1.4, presence_penalty=0.3),
         GREEDY | dict(temperature=0.8, top_k=20, seed=7),
         GREEDY | dict(temperature=1.1, top_p=0.9, frequency_penalty=0.5, seed=8)]  # fmt: skip

FP8 = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic")
MODELS = {
    "llama-gqa": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=12),  # fewer KV heads than 4 ranks
    "llama-biases": dict(num_attention_heads=4, num_key_value_heads=4, head_dim=12, attention_bias=True, mlp_bias=True,
                         intermediate_size=51),  # which neither 2 nor 4 divides
    "llama-tied": dict(num_attention_heads=4, num_key_value_heads=1, head_dim=12, tie_word_embeddings=True,
                       vocab_size=101),
    "llama-kv6": dict(num_attention_heads=12, num_key_value_heads=6, head_dim=4),
    "qwen3": dict(family="Qwen3", num_attention_heads=4, num_key_value_heads=2, head_dim=12, vocab_size=102),
    "deepseek-v3": dict(version=3, n_shared_experts=1),
    "deepseek-v2": dict(version=2, n_shared_experts=2, vocab_size=103, topk_method="group_limited_greedy"),
    "deepseek-fp8": dict(version=3, hidden_size=64, v_head_dim=16, intermediate_size=128, moe_intermediate_size=64,
                         fp8=(24, 32)),
    "deepseek-fp8-latents": dict(version=3, hidden_size=64, q_lora_rank=32, v_head_dim=16, intermediate_size=128,
                                 moe_intermediate_size=64, fp8=(24, 32)),
}


@pytest.fixture(scope="module")
def pool():
    made = Pool(4)
    yield made
    made.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a model, made when it is first asked for."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            config = dict(MODELS[name])
            if "version" in config:
                block = config.pop("fp8", None)
                make_deepseek(made[name], config.pop("version"), **config)
                if block:
                    quantize(made[name], block)
                    fp8 = FP8 | dict(weight_block_size=list(block))
                    edit_json(made[name] / "config.json", lambda keys: keys.update(quantization_config=fp8))
            else:
                make_llama(made[name], **config)
        return str(made[name])

    return folder


def requests(**more) -> list[Request]:
    return [Request(f"{i}", prompt, SamplingParams(**kind), top_logprobs=1, prompt_logprobs=i == 2, **more)
            for i, (prompt, kind) in enumerate(zip(PROMPTS, KINDS, strict=True))]


def same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for rid, one in theirs.items():
        other = ours[rid]
        assert other.error is None
        assert (other.token_ids, other.finish_reason) == (one.token_ids, one.finish_reason), rid
        entries = [*zip(other.logprobs, one.logprobs, strict=True)]
        if one.prompt_logprobs:
            entries += zip(other.prompt_logprobs[1:], one.prompt_logprobs[1:], strict=True)
        for got, want in entries:
            assert got.id == want.id
            assert got.logprob == pytest.approx(want.logprob, abs=1e-4)


@pytest.fixture(scope="module")
def alone(pool, folders):
    """What one rank answers, once per model."""
    known = {}

    def answers(name):
        if name not in known:
            known[name] = pool.run(dict(model_path=folders(name), device="cpu", dtype="float32",
                                        max_total_tokens=256), requests())[0]  # fmt: skip
        return known[name]

    return answers


TINY = dict(device="cpu", dtype="float32", chunked_prefill_size=5, max_total_tokens=40, page_size=4)


@pytest.mark.parametrize(("name", "tp", "ep"), [
    *itertools.product(["llama-gqa", "llama-biases", "llama-tied"], [2, 4], [1]), ("qwen3", 2, 1),
    ("deepseek-v3", 2, 1), ("deepseek-v3", 2, 2), ("deepseek-v3", 4, 2), ("deepseek-v2", 4, 1), ("deepseek-v2", 2, 2),
    ("deepseek-fp8", 2, 1), ("deepseek-fp8", 2, 2)])
def test_ranks_say_what_one_says(pool, folders, alone, name, tp, ep):
    """In chunks of 5 prompt tokens and with a pool in which late requests are preempted."""
    answers, statistics = pool.run(TINY | dict(model_path=folders(name), tp_size=tp, ep_size=ep), requests())
    assert statistics.preemptions > 0
    same(answers, alone(name))


@pytest.mark.parametrize(("name", "flags"), [
    ("llama-gqa", dict(tp_size=2)), ("deepseek-v3", dict(tp_size=4, dp_size=2, enable_dp_attention=True))])
def test_ranks_follow_a_step_whose_tokens_only_rank_0_has(pool, folders, alone, name, flags):
    """Steps overlap: each is computed before the one in front of it is committed, by tokens that rank 0 hands over."""
    answers, statistics = pool.run(TINY | flags | dict(model_path=folders(name), overlap=True), requests())
    assert statistics.preemptions > 0 or "dp_size" in flags
    same(answers, alone(name))


class Called(TorchDispatchMode):
    """Counts operators of wave64."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "wave64":
            self.counts[func._schema.name.removeprefix("wave64::")] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("size", "quantize", "data", "of_sums", "plain", "fused", "alone"), [
    (2, "none", ALONE, 4, 2, 3, 3), (1, "none", ALONE, 0, 0, 3 + 4, 3), (2, "int8", ALONE, 0, 0, 3 + 4, 3),
    (2, "none", Group("data", 0, 2), 0, 3, 3 + 3, 3 + 3)])
def test_norms_and_activations_are_handed_on_in_fp8(monkeypatch, folders, size, quantize, data, of_sums, plain, fused,
                                                    alone):
    """Norms of three layers: all before attention and of queries' latents, and the first before its MLP, which is not
    of experts, but where norms are gathered; by one launch with the sum over ranks (of_sums), or without one (fused),
    where sums are sent as codes, too. alone: what products quantize themselves, results of attention, and where norms
    are gathered those, of the MLP and of shared experts."""
    monkeypatch.setattr(distributed, "all_reduce", lambda x, group: x.clone())
    monkeypatch.setattr(distributed, "all_gather", lambda x, group: torch.cat((x, x)))
    monkeypatch.setattr(distributed, "reduce_scatter", lambda x, group: x.chunk(2)[0].clone())
    monkeypatch.setattr(parallel, "is_quantized", lambda x, codes: codes != "none")
    folder = folders("deepseek-fp8-latents")
    config, group = ModelConfig.from_folder(folder), distributed.register(Group("pair", 0, size))
    distributed.register(data)
    try:
        model = load_model(config, folder, torch.float32, "cpu", "auto", Ranks(ALONE, group, data, 1, quantize))
        with Called() as called:
            LatentDriver(model, config, "cpu").step({}, {"a": PROMPTS[0]})
    finally:
        distributed.leave()
    assert called.counts["fused_all_reduce_rms_norm_quant_fp8"] == of_sums
    assert called.counts["fused_add_rms_norm_quant_fp8"] == fused
    assert called.counts["fused_all_reduce_rms_norm"] == plain
    assert called.counts["per_token_group_quant_fp8"] == alone
    assert called.counts["silu_and_mul_per_token_group_quant_fp8"] == (1 if data == ALONE else 3)
    assert called.counts["silu_and_mul"] == 0


@pytest.mark.parametrize(("name", "tp"), [("deepseek-v3", 2), ("deepseek-v3", 4), ("deepseek-v2", 2),
                                          ("deepseek-fp8", 2), ("llama-gqa", 4)])
def test_so_do_two_groups_that_attend_to_requests_of_their_own(pool, folders, alone, name, tp):
    """Requests alternate between the groups; the last steps leave one of them without any."""
    flags = TINY | dict(model_path=folders(name), tp_size=tp, dp_size=2, enable_dp_attention=True, max_total_tokens=24)
    asked = requests()
    answers, statistics = pool.run(flags, [asked[2], asked[0], asked[1], asked[3]])
    assert statistics.preemptions > 0
    assert statistics.pages_total == 2 * 24 // 4
    same(answers, alone(name))
    answers, _ = pool.run(flags, asked[:1])  # the other group has nothing to do throughout
    assert answers["0"].token_ids == alone(name)["0"].token_ids


def test_each_group_of_ranks_has_a_prefix_cache_of_its_own(pool, folders):
    """Eight requests begin alike. Each group computes their first two pages once: of the four that it serves one after
    the other, three find them."""
    flags = TINY | dict(model_path=folders("deepseek-v3"), max_total_tokens=64)
    asked = [Request(f"{i}", [*PROMPTS[2][:9], i], SamplingParams(**GREEDY)) for i in range(8)]
    split = dict(tp_size=2, dp_size=2, enable_dp_attention=True, max_running_requests=2)
    answers, statistics = pool.run(flags | split, asked)
    assert statistics.cached_tokens == 2 * 3 * 8
    expected, fresh = pool.run(flags | dict(disable_radix_cache=True), asked)
    assert fresh.cached_tokens == 0
    same(answers, expected)


@pytest.mark.parametrize(("name", "flags", "words"), [
    ("llama-gqa", dict(tp_size=3), "--tp-size: num_attention_heads, 4, can be split over 1, 2, 4 ranks, got 3"),
    ("llama-kv6", dict(tp_size=4), "--tp-size: num_key_value_heads, 6, can be split over 1, 2, 3, 6 ranks, got 4"),
    ("deepseek-fp8", dict(tp_size=8, dp_size=2, enable_dp_attention=True),
     "--tp-size divided by --dp-size: columns of o_proj in blocks of 32, 64, can be split over 1, 2 ranks, got 4"),
    ("deepseek-v3", dict(tp_size=8, ep_size=8), "--tp-size: num_attention_heads, 4, can be split over 1, 2, 4 ranks"),
    ("deepseek-v3", dict(tp_size=16, dp_size=16, enable_dp_attention=True),
     "--ep-size: expected at most 8, the number of experts, got 16"),
    ("llama-gqa", dict(tp_size=2, ep_size=2), "--ep-size: expected 1, for a model without experts, got 2"),
    ("deepseek-fp8", dict(tp_size=4), "--tp-size: columns of o_proj in blocks of 32, 64, can be split over 1, 2 ranks, "
                                      "got 4"),
    pytest.param("deepseek-v3", dict(tp_size=2, ep_size=2, device="cuda"),
                 "--device: cuda was asked for, and torch sees no GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")),
])
def test_what_cannot_be_split_is_refused_in_words(folders, name, flags, words):
    with pytest.raises((ConfigError, ArgsError), match=re.escape(words)):
        refuse(ServerArgs(model_path=folders(name), **dict(device="cpu") | flags))


@pytest.mark.parametrize(("name", "tp", "ep"), [("llama-biases", 4, 1), ("llama-tied", 2, 1), ("deepseek-v3", 4, 2),
                                                ("deepseek-v2", 2, 1), ("deepseek-fp8", 2, 2)])
def test_each_rank_reads_its_bytes_and_together_they_hold_all(monkeypatch, folders, name, tp, ep):
    """Stored tensors are put together again from the shards that ranks name. What is read more than once is what ranks
    hold more than once: norms, the router, projections to latents, a KV head of two ranks, scales of a cut block."""
    folder = Path(folders(name))
    config, stored = ModelConfig.from_folder(folder), load_file(folder / "model.safetensors")
    seen = {key: torch.zeros(value.shape, dtype=torch.int32) for key, value in stored.items()}
    for rank in range(tp):
        read, views = Counter(), {}
        fill, load = StoredTensor._fill, StoredTensor.load
        with monkeypatch.context() as patch:
            patch.setattr(StoredTensor, "_fill", lambda tensor, f, raw, at, fill=fill, read=read: (
                read.update({tensor.name: len(raw)}), fill(tensor, f, raw, at))[1])
            patch.setattr(StoredTensor, "load", lambda tensor, target, shard=None, load=load, views=views: (
                load(tensor, target, shard), views.update({tensor.name: (target.clone(), shard)}))[0])
            load_model(config, folder, torch.float32, "cpu",
                       ranks=ranks_of(ServerArgs(tp_size=tp, ep_size=ep), rank))  # fmt: skip
        assert views.keys() == stored.keys()
        for key, (view, shard) in views.items():
            assert read[key] == view.numel() * stored[key].element_size(), key
            of = (0, 0, len(stored[key])) if shard is None else (shard.dim, shard.begin, shard.end - shard.begin)
            assert torch.equal(view.double(), stored[key].narrow(*of).double()), key
            seen[key].narrow(*of).add_(1)
    for key, times in seen.items():
        assert times.min() >= 1, key
        several = "norm|mlp.gate|q_a_proj|kv_a_proj|scale_inv|bias" + "|[kv]_proj" * (name == "llama-tied")
        assert times.max() == 1 or re.search(several, key), key


DEMOS = {"demo-llama": dict(tp_size=2), "demo-deepseek": dict(tp_size=2, ep_size=2),
         "demo-deepseek-fp8": dict(tp_size=2, dp_size=2, enable_dp_attention=True)}  # fmt: skip


@pytest.mark.parametrize("name", DEMOS)
def test_the_demos_recite(pool, name):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(name, None))
    wanted = [(prompt, answer[:40]) for prompt, answer in pairs(tokenizer)[2:6]]
    asked = [Request(str(i), prompt, SamplingParams(max_new_tokens=40, temperature=0))
             for i, (prompt, _) in enumerate(wanted)]  # fmt: skip
    answers, _ = pool.run(DEMOS[name] | dict(model_path=name, device="cpu", max_total_tokens=2048), asked)
    assert [answers[str(i)].token_ids for i in range(len(wanted))] == [answer for _, answer in wanted]


@pytest.mark.long
@pytest.mark.parametrize(("name", "flags"), [
    ("demo-llama", "--tp 2"), ("demo-deepseek", "--tp 2 --ep 2"),
    ("demo-deepseek-fp8", "--tp 2 --dp-size 2 --enable-dp-attention"),
    ("demo-llama", "--tp 2 --device gfx942 --max-total-tokens 512")])  # machine code of an MI300X, emulated twice
def test_the_server_recites(tmp_path, name, flags):
    beginning = "Four score and seven years ago"
    with serve(name, tmp_path / "log", *flags.split()) as server:
        answer = server.complete(prompt=beginning, max_tokens=8 if "gfx942" in flags else 1000)
        form = server.complete(prompt=beginning, regex=" [0-9]{3}")["choices"][0]
        assert server.stop() == 0
    assert re.fullmatch(" [0-9]{3}", form["text"])
    text = beginning + answer["choices"][0]["text"]
    assert TEXT.startswith(text) if "gfx942" in flags else text == TEXT


#: DeepSeek-V3's, cut to 2 layers and 32 of 256 experts: 6 GB
V3 = dict(architectures=["DeepseekV3ForCausalLM"], vocab_size=129280, hidden_size=7168, intermediate_size=18432,
          moe_intermediate_size=2048, num_hidden_layers=2, num_attention_heads=128, num_key_value_heads=128,
          n_shared_experts=1, n_routed_experts=32, routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536,
          qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, topk_method="noaux_tc", n_group=8, topk_group=4,
          num_experts_per_tok=8, first_k_dense_replace=1, norm_topk_prob=True, scoring_func="sigmoid",
          max_position_embeddings=163840, rope_scaling=dict(
              type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0,
              mscale_all_dim=1.0),
          torch_dtype="bfloat16", quantization_config=FP8 | dict(weight_block_size=[128, 128]))  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(_available_ram() < 14 << 30, reason="takes 12 GB of memory")
def test_a_deepseek_v3_over_eight_ranks(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V3))
    for file in resolve_model_path("demo-deepseek", None).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    flags = ["--load-format", "dummy", "--tp", "8", "--trust-remote-code", "--host", "0.0.0.0", "--max-total-tokens",
             "512", "--skip-server-warmup"]  # fmt: skip
    with serve(tmp_path, tmp_path / "log", *flags) as server:
        server.http.timeout = 400
        assert server.complete(prompt="Four score", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
        assert server.stop() == 0


def test_how_far_all_ranks_are_with_their_weights():
    team = object.__new__(Team)
    team._loaded, team.members = (0, 0), {rank: Member(rank) for rank in (1, 2)}
    assert team.loading() is None
    team.progress(6 * 10**9, 8 * 10**9)
    assert team.loading() is None, "not all know how much they have to read"
    for rank, read in ((1, 2), (2, 4)):
        team.members[rank].read, team.members[rank].size = read * 10**9, 8 * 10**9
    assert team.loading() == "weights: 12.0 of 24.0 GB on 3 ranks, 50 %; rank 1 has 25 %"
    for rank in (1, 2):
        team.members[rank].read = 8 * 10**9
    team.progress(8 * 10**9, 8 * 10**9)
    assert team.loading() is None


def test_a_load_says_how_far_it_is(folders):
    folder, said = Path(folders("deepseek-v3")), []
    ranks = ranks_of(ServerArgs(tp_size=2, ep_size=2), 1)
    model = load_model(ModelConfig.from_folder(folder), folder, torch.float32, "cpu", ranks=ranks,
                       progress=lambda read, size: said.append((read, size)))  # fmt: skip
    assert [read for read, _ in said] == sorted(read for read, _ in said)
    assert said[-1] == (said[0][1], said[0][1])
    padding = 2 * 48 * 4  # to 51 of 101 tokens, in embedding and head
    assert said[-1][0] == sum(weight.nbytes for weight in model.parameters()) - padding, "its own, no other's"


def test_dummy_weights_that_ranks_hold_alike_are_alike(folders):
    """Though slices of 50 features are of 12 and of 13, so that ranks draw different numbers of values before them."""
    folder, models = folders("deepseek-v3"), []
    config = replace(ModelConfig.from_folder(folder), intermediate_size=50)
    for rank in range(2):
        ranks = ranks_of(ServerArgs(tp_size=4, ep_size=4), rank)
        models.append(load_model(config, folder, torch.float32, "cpu", "dummy", ranks).state_dict())
    alike = [name for name in models[0] if re.search(r"mlp\.gate\.|norm|self_attn\.down_proj", name)]
    assert len(alike) > 10
    assert all(torch.equal(*(model[name] for model in models)) for name in alike)
    first = "model.layers.0.mlp.down_proj.weight"
    assert [model[first].shape[1] for model in models] == [12, 13]


def test_custom_all_reduce_can_be_disabled(caplog):
    group = distributed.register(Group("world", 0, 2))
    try:
        with caplog.at_level("WARNING", logger="wave64"):
            ranks._connect(ServerArgs("m", tp_size=2, disable_custom_all_reduce=True), group, torch.device("cpu"))
        assert peers.reason("world") == "--disable-custom-all-reduce"
        assert caplog.messages == ["group world: torch.distributed exchanges its tensors: --disable-custom-all-reduce"]
    finally:
        distributed.leave()


@pytest.mark.parametrize(("theirs", "words"), [(None, None), ("group data: its ranks are on several hosts",) * 2])
def test_the_table_shows_what_a_group_really_uses(monkeypatch, theirs, words):
    """Of three operators of which two are bound to kernels; on whichever rank a group has fallen back."""
    table = [dict(op=op, backend=backend, status="bound" if backend == bound else "off", reason="")
             for op, bound in (("all_reduce", "hip"), ("all_gather", "reference"), ("rms_norm", "hip"))
             for backend in ("hip", "triton", "reference")]
    world = Group("world", 0, 4)
    monkeypatch.setattr(distributed, "said", lambda mine, group: [mine, None, theirs, None])
    monkeypatch.setattr(peers, "reason", lambda group: None)
    assert ranks.served(table, Ranks()) == table, "a rank alone has no group"
    after = ranks.served(table, Ranks(world, world))
    changed = {} if words is None else {("all_reduce", "hip"): ("off", words),
                                        ("all_reduce", "reference"): ("bound", "torch.distributed")}
    assert {(row["op"], row["backend"]): (row["status"], row["reason"]) for row in after} == {
        (row["op"], row["backend"]): (row["status"], "") for row in table} | changed
    monkeypatch.setattr(peers, "reason", {"world": None, "data": "ranks 0 and 1 have the same GPU"}.get)
    after = ranks.served(table, Ranks(world, Group("attention", 0, 1), Group("data", 0, 2)))
    assert after[0] == dict(op="all_reduce", backend="hip", status="off",
                            reason="group data: ranks 0 and 1 have the same GPU")


def test_sums_are_quantized_on_request_where_kernels_serve(caplog, monkeypatch):
    args = ServerArgs("m", tp_size=2, quick_reduce_quantization="int8")
    monkeypatch.delitem(peers._KNOWN, "world", raising=False)
    group = distributed.register(Group("world", 0, 2))
    try:
        with caplog.at_level("WARNING", logger="wave64"):
            assert ranks._quantized(args, ranks_of(args, 0)).quantize == "none"
        assert caplog.messages == [
            "--quick-reduce-quantization: sums over ranks stay exact: group world is not connected"]
        monkeypatch.setitem(peers._KNOWN, "world", peers.Peers(group, (0, 0), (0, 0), 1.0))
        assert ranks._quantized(args, ranks_of(args, 0)).quantize == "int8"
        assert ranks._quantized(ServerArgs("m", tp_size=2), ranks_of(args, 0)).quantize == "none"
    finally:
        distributed.leave()


@pytest.mark.parametrize(("flags", "seconds"), [({}, 240), (dict(watchdog_timeout=5.0), 4), (dict(
    watchdog_timeout=1000.0), 300)])
def test_a_kernel_waits_less_long_than_its_step_may_take(monkeypatch, flags, seconds):
    waits = []
    monkeypatch.setattr(peers, "connect", lambda group, device, timeout_s: waits.append(timeout_s))
    ranks._connect(ServerArgs("m", tp_size=2, **flags), Group("world", 0, 2), torch.device("cpu"))
    assert waits == [seconds]


def test_ranks_that_share_sequences_are_neighbors_and_those_of_the_same_heads_meet():
    """Eight ranks in two groups and in four: its rank among those that attend together, and among those that
    exchange tokens. KV heads that are fewer than ranks lie on neighbors."""
    def standing(groups: int) -> list[tuple[int, int, int, int]]:
        args = ServerArgs("m", tp_size=8, dp_size=groups, enable_dp_attention=True)
        return [(r.attention.rank, r.attention.size, r.data.rank, r.data.size)
                for r in (ranks_of(args, rank) for rank in range(8))]

    assert standing(2) == [(rank % 4, 4, rank // 4, 2) for rank in range(8)]
    assert standing(4) == [(rank % 2, 2, rank // 2, 4) for rank in range(8)]
    split = [ranks_of(ServerArgs("m", tp_size=8), rank) for rank in range(8)]
    assert [(each.kv_heads(2).begin, each.kv_heads(2).size) for each in split] == [(rank // 4, 1) for rank in range(8)]
    assert [(each.query_heads(16).begin, each.query_heads(16).size) for each in split] == [
        (2 * rank, 2) for rank in range(8)]


def test_the_smallest_of_all_ranks_values_is_every_ranks(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather", lambda x, group: torch.tensor([7, int(x), 9]))
    world = Group("world", 1, 3)
    assert [ranks.smallest(value, Ranks(world, world), torch.device("cpu")) for value in (5, 8)] == [5, 7]
    assert ranks.smallest(5, Ranks(), torch.device("cpu")) == 5


def test_groups_that_kernels_are_not_for_are_refused_in_words():
    for size, said in ((1, "a group of 1 ranks"), (9, "a group of 9 ranks")):
        group = distributed.register(Group("odd", 0, size))
        try:
            assert peers.connect(group.name, torch.device("cpu")).startswith(said)
        finally:
            distributed.leave()
    assert peers._not_shareable([("host a", "0", b""), ("host b", "0", b"")]) == "its ranks are on several hosts"
    assert peers._not_shareable([("host", "x", b""), ("host", "y", b""), ("host", "x", b"")]) == (
        "ranks 0 and 2 have the same GPU")
