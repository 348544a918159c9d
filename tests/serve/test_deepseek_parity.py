"""wave64's DeepSeek against transformers' V2 and V3, in fp32 to 1e-4, however the tokens are cut into batches."""

import pytest
import torch
from helpers_deepseek import DEEPSEEKS, LatentDriver, make_deepseek, quantise
from helpers_llama import edit_json, greedy, load
from torch.nn import functional as F

from wave64 import ops, quant

PROMPT = [17, 3, 99, 42, 8, 8, 71, 0, 55, 23, 64, 90, 12]
TOLERANCE = dict(rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=DEEPSEEKS)
def deepseek(request, tmp_path_factory, device):
    """(transformers' model, wave64's, its config), loaded from the same folder."""
    folder = tmp_path_factory.mktemp("deepseek")
    version, overrides = DEEPSEEKS[request.param]
    theirs = make_deepseek(folder, version, **overrides)
    return theirs, *load(folder, device)


@pytest.fixture
def driver(deepseek, device):
    return LatentDriver(*deepseek[1:], device)


def expected(deepseek, tokens):
    with torch.inference_mode():
        return deepseek[0](torch.tensor([tokens])).logits[0]


def test_prefill(deepseek, driver):
    torch.testing.assert_close(driver.step({}, {"a": PROMPT}), expected(deepseek, PROMPT), **TOLERANCE)


def test_decode_through_the_cache(deepseek, driver):
    rows = [driver.step({}, {"a": PROMPT[:3]})] + [driver.step({"a": token}, {}) for token in PROMPT[3:]]
    torch.testing.assert_close(torch.cat(rows), expected(deepseek, PROMPT), **TOLERANCE)


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_chunked_prefill_with_a_prefix(deepseek, driver, size):
    rows = [driver.step({}, {"a": PROMPT[i : i + size]}) for i in range(0, len(PROMPT), size)]
    torch.testing.assert_close(torch.cat(rows), expected(deepseek, PROMPT), **TOLERANCE)


def test_ragged_batch_of_decodes_and_prefills(deepseek, driver):
    a, b, c, d = PROMPT, PROMPT[::-1], PROMPT[4:] + PROMPT[:3], PROMPT[2:7]
    driver.step({}, {"a": a[:5], "b": b[:1]})
    driver.step({"b": b[1]}, {"c": c[:6]})
    got = driver.step({"b": b[2], "a": a[5]}, {"c": c[6:], "d": d})
    want = [expected(deepseek, b)[2:3], expected(deepseek, a)[5:6], expected(deepseek, c)[6:], expected(deepseek, d)]
    torch.testing.assert_close(got, torch.cat(want), **TOLERANCE)


def clear(model, prompt, steps):
    """`greedy`, or None where logits equal to 1e-4 may still choose another token."""
    try:
        return greedy(model, prompt, steps)
    except AssertionError:
        return None


def test_greedy_with_several_prompts_in_flight(deepseek, driver):
    """A new prompt joins every step while the others decode."""
    steps = 64
    prompts = {str(n): PROMPT[:n] for n in range(1, 14, 2)}
    answers = {name: answer for name, prompt in prompts.items() if (answer := clear(deepseek[0], prompt, steps))}
    prompts = {name: prompts[name] for name in answers}
    assert len(prompts) >= 3
    tokens = {name: [] for name in prompts}
    waiting = list(prompts)
    while waiting or any(len(t) < steps for t in tokens.values()):
        decodes = {name: t[-1] for name, t in tokens.items() if 0 < len(t) < steps}
        prefills = {name: prompts[name] for name in waiting[:1]}
        waiting = waiting[1:]
        last = len(decodes) + sum(map(len, prefills.values())) - 1
        logits = driver.step(decodes, prefills, rows=[*range(len(decodes)), last][: len(decodes) + len(prefills)])
        for name, row in zip([*decodes, *prefills], logits, strict=True):
            torch.testing.assert_close(row, answers[name][1][len(tokens[name])], **TOLERANCE)
            tokens[name].append(int(row.argmax()))
    assert tokens == {name: answer for name, (answer, _) in answers.items()}


@pytest.mark.parametrize("block", [(16, 32), (128, 128)], ids=["blocks", "cut-blocks"])
@pytest.mark.parametrize("name", ["v3", "v3-no_q_lora-groups1-dense0", "v2-groups4-yarn"])
def test_fp8_blocks_against_the_dequantised_weights(tmp_path, device, monkeypatch, name, block):
    """transformers with the weights that the checkpoint's mean, and each product's activations rounded to FP8 by groups
    of a block's columns: what is left are sums in another order, which in other products, those of decoding, now and
    then round to another FP8 number, 2^-3 away at most."""
    version, overrides = DEEPSEEKS[name]
    theirs = make_deepseek(tmp_path, version, **overrides)
    exact = quantise(tmp_path, block)
    edit_json(tmp_path / "config.json", lambda c: c.update(quantization_config=dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=list(block))))
    ours, config = load(tmp_path, device)
    theirs.load_state_dict(_fused(exact, theirs.state_dict()))
    theirs.set_experts_implementation("eager")  # whose products are F.linear
    plain = {w.untyped_storage().data_ptr() for n, w in theirs.named_parameters()
             if "kv_b_proj" in n or "proj" not in n}
    product = F.linear

    def of_quantised(x, weight, bias=None):
        if weight.untyped_storage().data_ptr() not in plain:
            q, scale = ops.per_token_group_quant_fp8(x.flatten(0, -2), block[1])
            x = quant.dequantize(q, scale, [1, block[1]]).view(x.shape)
        return product(x, weight, bias)

    monkeypatch.setattr(F, "linear", of_quantised)
    with torch.inference_mode():
        want = theirs(torch.tensor([PROMPT])).logits[0]
    monkeypatch.undo()
    whole, driver = LatentDriver(ours, config, device), LatentDriver(ours, config, device)
    steps = [driver.step({}, {"a": PROMPT[:5]})] + [driver.step({"a": token}, {}) for token in PROMPT[5:]]
    for got, allowed in ((whole.step({}, {"a": PROMPT}), 1e-4), (torch.cat(steps), 0.03)):
        off = ((got - want).square().mean() / want.square().mean()).sqrt()
        assert off < allowed, f"{off:.2g} of the logits"


def _fused(stored, wanted):
    """A checkpoint's weights under the names of transformers' modules, which hold experts in one tensor each."""
    found = dict(stored)
    for name, value in wanted.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parent, kinds = name.rpartition(".")[0], ("gate_proj", "up_proj") if "gate" in name else ("down_proj",)
            found[name] = torch.stack([torch.cat([found.pop(f"{parent}.{e}.{kind}.weight") for kind in kinds])
                                       for e in range(len(value))])
    return found
