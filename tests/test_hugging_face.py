"""transformers' own models, tiny and random, with wave64's attention, norms and experts: what eager computes."""

import pytest
import torch
import transformers
from transformers import masking_utils

from wave64 import ops
from wave64.integrations import hugging_face

SIZES = dict(vocab_size=89, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.3,
             eos_token_id=None, bos_token_id=None, pad_token_id=0)
MODELS = {
    "llama": (transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralConfig, dict(sliding_window=None)),
    "mistral-window": (transformers.MistralConfig, dict(sliding_window=5)),
    "qwen3": (transformers.Qwen3Config, {}),
    "qwen3-window": (transformers.Qwen3Config, dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3-moe": (transformers.Qwen3MoeConfig, dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
                                                    norm_topk_prob=True)),
    "gemma2": (transformers.Gemma2Config, dict(sliding_window=6, attn_logit_softcapping=4.0,
                                               query_pre_attn_scalar=16, final_logit_softcapping=None)),
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    hugging_face.register()


def pair(name: str):
    """The same random weights twice: eager's model, and ours."""
    torch.manual_seed(3)
    kind, options = MODELS[name]
    models = [transformers.AutoModelForCausalLM.from_config(  # a configuration each: it holds who serves
        kind(**SIZES | options), attn_implementation=how).eval() for how in ("eager", "wave64")]
    assert [model.config._attn_implementation for model in models] == ["eager", "wave64"]
    models[1].load_state_dict(models[0].state_dict())
    if name == "qwen3-moe":
        models[1].set_experts_implementation("wave64")
    return models


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(1, 89, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    for row, count in enumerate((0, 4, 9)):
        mask[row, :count] = 0
    return ids, mask if side == "left" else mask.flip(1)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_are_eagers_with_and_without_padding(name):
    theirs, ours = pair(name)
    norms = hugging_face.use_norms(ours)
    assert norms == {"gemma2": 0, "qwen3": 9, "qwen3-window": 9, "qwen3-moe": 9}.get(name, 5)
    for mask in (None, *(padded(side)[1] for side in ("left", "right"))):
        ids = torch.randint(1, 89, (3, 11))
        expected, got = (model(input_ids=ids, attention_mask=mask).logits for model in (theirs, ours))
        kept = torch.ones(3, 11, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(got[kept], expected[kept], rtol=2e-4, atol=2e-4)
        assert not got.isnan().any()


@pytest.mark.parametrize(("name", "cache"), [
    *((name, None) for name in MODELS), ("llama", "static"), ("qwen3-window", "static")])
@torch.inference_mode()
def test_generate_gives_eagers_tokens(name, cache):
    theirs, ours = pair(name)
    hugging_face.use_norms(ours)
    ids, mask = padded("left")
    expected, got = (model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False,
                                    cache_implementation=cache, disable_compile=True, output_logits=True,
                                    return_dict_in_generate=True) for model in (theirs, ours))
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=2e-4, atol=2e-4)
    assert len({*got.sequences[:, 11:].flatten().tolist()}) > 2  # not one token over and over


@torch.inference_mode()
def test_every_call_is_one_of_wave64s_operators(monkeypatch):
    """And keys are not copied where nothing is padded."""
    seen = []

    def recorded(name, kept):
        def call(*args, **options):
            seen.append((name, args))
            return kept(*args, **options)

        return call

    for name in ("paged_attention", "prefill_attention", "rms_norm", "fused_moe"):
        monkeypatch.setattr(ops, name, recorded(name, getattr(ops, name)))
    _, ours = pair("qwen3-moe")
    hugging_face.use_norms(ours)
    ours.generate(torch.randint(1, 89, (2, 7)), max_new_tokens=3, do_sample=False)
    names = [op for op, _ in seen]
    counts = {name: names.count(name) for name in names}
    assert counts == {"prefill_attention": 2, "paged_attention": 4, "fused_moe": 6, "rms_norm": 27}
    prefill = next(args for op, args in seen if op == "prefill_attention")
    assert prefill[1].shape == (2, 7, 2, 16)  # a page for each sequence
    assert not prefill[1].is_contiguous()


@torch.inference_mode()
def test_a_mask_that_has_more_in_it_is_refused_by_name():
    _, ours = pair("llama")
    ids = torch.randint(1, 89, (1, 6))
    with pytest.raises(ValueError, match="attention_mask: expected causality, a sliding .*, got packed"):
        ours(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[batch, tokens so far\]"):
        ours(input_ids=ids, attention_mask=torch.zeros(1, 1, 6, 6))
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int))
    with pytest.raises(ValueError, match="chunked"):
        hugging_face.mask(1, 6, 6, mask_function=chunked)
    assert hugging_face.mask(1, 6, 6, mask_function=masking_utils.sliding_window_causal_mask_function(3)) is None


def test_slots_of_a_static_cache_that_are_not_written_do_not_count():
    assert hugging_face.mask(2, 3, 16, q_offset=torch.tensor(4)).tolist() == [[True] * 7] * 2
    assert hugging_face.mask(2, 3, 7, q_offset=4) is None
    padding = torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    assert hugging_face.mask(1, 3, 5, q_offset=4, kv_offset=2, attention_mask=padding) is None
    assert hugging_face.mask(1, 3, 16, q_offset=4, attention_mask=padding).tolist() == padding.bool().tolist()


def test_what_the_kernels_do_not_compute_is_refused():
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    module = torch.nn.Module()
    for options, words in ((dict(dropout=0.1), "dropout: expected 0, got 0.1"), (dict(is_causal=False), "is_causal"),
                           (dict(output_attentions=True), "output_attentions"),
                           (dict(position_bias=torch.ones(1)), "position_bias")):
        with pytest.raises(ValueError, match=words):
            hugging_face.attention(module, query, key, key, **options)
    with pytest.raises(ValueError, match="heads of 16 with a window"):
        hugging_face.attention(module, query, key, key[..., :8], sliding_window=2)
    with pytest.raises(ValueError, match="backward|gradient"):
        hugging_face.attention(module, query.requires_grad_(), key, key)
    _, ours = pair("qwen3-moe")
    block = next(each for each in ours.modules() if type(each).__name__ == "Qwen3MoeExperts")
    arguments = torch.randn(2, 48), torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2)
    block.has_bias = True
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts.has_bias: expected False"):
        hugging_face.experts(block, *arguments)
    block.has_bias, block.act_fn = False, torch.nn.Tanh()
    with pytest.raises(ValueError, match="act_fn: expected one of"):
        hugging_face.experts(block, *arguments)


@pytest.mark.parametrize("value_dim", [16, 8])
@pytest.mark.parametrize("queries", [1, 4])
@torch.inference_mode()
def test_sinks_and_other_widths_of_values(value_dim, queries):
    """By the formula, written out: sinks take part in the sum and have no value."""
    torch.manual_seed(1)
    query, key, value = torch.randn(2, 4, queries, 16), torch.randn(2, 2, 6, 16), torch.randn(2, 2, 6, value_dim)
    sinks = torch.randn(4) if value_dim == 16 else None
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    got, weights = hugging_face.attention(torch.nn.Module(), query, key, value, mask, scaling=0.3, s_aux=sinks)
    assert weights is None
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    seen = mask[:, None, None] & (torch.arange(6) <= torch.arange(6 - queries, 6)[:, None])
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        logits = torch.cat([logits, sinks.view(1, 4, 1, 1).expand(2, 4, queries, 1)], -1)
    expected = logits.softmax(-1)[..., :6] @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
