"""wave64's DeepSeek against transformers' V2 and V3."""

import numpy as np
import pytest
import torch
from helpers_deepseek import DEEPSEEKS, LatentDriver, make_deepseek, quantize
from helpers_llama import edit_json, load
from helpers_parity import PROMPT, Parity, answers_without_near_ties
from torch.nn import functional as F

from wave64 import ops, quant


@pytest.fixture(scope="module", params=DEEPSEEKS)
def models(request, tmp_path_factory, device):
    """(transformers' model, wave64's, its config), loaded from the same folder."""
    folder = tmp_path_factory.mktemp("deepseek")
    version, overrides = DEEPSEEKS[request.param]
    theirs = make_deepseek(folder, version, **overrides)
    return theirs, *load(folder, device)


class TestDeepseek(Parity):
    Driver = LatentDriver

    def answers(self, theirs):
        return answers_without_near_ties(theirs)


@pytest.mark.parametrize("block", [(16, 32), (128, 128)], ids=["blocks", "cut-blocks"])
@pytest.mark.parametrize(("name", "scale_fmt"), [
    ("v3", "float"), ("v3", "ue8m0"), ("v3-no_q_lora-groups1-dense0", "float"), ("v2-groups4-yarn", "float")])
def test_fp8_blocks_against_the_dequantized_weights(tmp_path, device, monkeypatch, name, scale_fmt, block):
    """transformers with the weights that the checkpoint's mean, and each product's activations rounded to FP8 by groups
    of a block's columns: what is left are sums in another order, which in other products, those of decoding, now and
    then round to another FP8 number, 2^-3 away at most."""
    version, overrides = DEEPSEEKS[name]
    theirs = make_deepseek(tmp_path, version, **overrides)
    exact = quantize(tmp_path, block)
    edit_json(tmp_path / "config.json", lambda c: c.update(quantization_config=dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=list(block),
        scale_fmt=scale_fmt)))
    ours, config = load(tmp_path, device)
    theirs.load_state_dict(_fused(exact, theirs.state_dict()))
    theirs.set_experts_implementation("eager")  # whose products are F.linear
    plain = {w.untyped_storage().data_ptr() for n, w in theirs.named_parameters()
             if "kv_b_proj" in n or "proj" not in n}
    product = F.linear

    def of_quantized(x, weight, bias=None):
        if weight.untyped_storage().data_ptr() not in plain:
            rows = x.flatten(0, -2)
            if scale_fmt == "ue8m0":
                x = powers_of_two(rows, block[1]).view(x.shape)
            else:
                q, scale = ops.per_token_group_quant_fp8(rows, block[1])
                x = quant.dequantize(q, scale, [1, block[1]]).view(x.shape)
        return product(x, weight, bias)

    monkeypatch.setattr(F, "linear", of_quantized)
    with torch.inference_mode():
        want = theirs(torch.tensor([PROMPT])).logits[0]
    monkeypatch.undo()
    whole, driver = LatentDriver(ours, config, device), LatentDriver(ours, config, device)
    steps = [driver.step({}, {"a": PROMPT[:5]})] + [driver.step({"a": token}, {}) for token in PROMPT[5:]]
    for got, allowed in ((whole.step({}, {"a": PROMPT}), 1e-4), (torch.cat(steps), 0.03)):
        off = ((got - want).square().mean() / want.square().mean()).sqrt()
        assert off < allowed, f"{off:.2g} of the logits"


def powers_of_two(x, group):
    """x rounded to e4m3 group by group, by numpy's logarithm: with 2^ceil(log2(amax / 448)) as a group's scale."""
    wide = F.pad(x, (0, -x.shape[1] % group)).double().numpy().reshape(len(x), -1, group)
    amax = np.maximum(np.abs(wide).max(-1, keepdims=True), 1e-10)
    scale = np.exp2(np.ceil(np.log2(amax / quant.limit(quant.fp8_dtype()))))
    rounded = torch.from_numpy(wide / scale).float().to(quant.fp8_dtype()).double().numpy() * scale
    return torch.from_numpy(rounded.reshape(len(x), -1)[:, : x.shape[1]]).to(x.dtype)


def _fused(stored, wanted):
    """A checkpoint's weights under the names of transformers' modules, which hold experts in one tensor each."""
    found = dict(stored)
    for name, value in wanted.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parent, kinds = name.rpartition(".")[0], ("gate_proj", "up_proj") if "gate" in name else ("down_proj",)
            found[name] = torch.stack([torch.cat([found.pop(f"{parent}.{e}.{kind}.weight") for kind in kinds])
                                       for e in range(len(value))])
    return found
