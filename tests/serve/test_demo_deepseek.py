"""demo-deepseek and its FP8 twin: the same text as demo-llama's, through latent attention and a mixture of experts."""

import json

import pytest
import torch
from helpers_server import serve
from safetensors.torch import load_file
from test_demo import DEMO, EOS, TEXT, chat, ids, pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from wave64 import quant
from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.messages import Request, SamplingParams

FOLDERS = {name: DEMO / name for name in ("deepseek", "deepseek-fp8")}
MIN_GAP = 1.0  # in logits, from the right token to the best other one


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDERS["deepseek"])


@pytest.mark.parametrize("folder", FOLDERS.values(), ids=FOLDERS)
def test_is_small_and_what_it_says(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["n_routed_experts"], config["n_shared_experts"]) == (8, 1)
    assert ("quantization_config" in config) == folder.name.endswith("fp8")
    assert "public domain" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_twin_is_the_same_but_for_rounding():
    plain, stored = (load_file(folder / "model.safetensors") for folder in FOLDERS.values())
    config = json.loads((FOLDERS["deepseek-fp8"] / "config.json").read_text())
    block = config["quantization_config"]["weight_block_size"]
    scaled = [name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")]
    assert len(scaled) > 50
    for name, value in plain.items():
        if name not in scaled:
            assert torch.equal(stored[name], value)
            continue
        assert stored[name].dtype == torch.float8_e4m3fn
        scale = stored[f"{name}_scale_inv"]
        exact = quant.dequantize(stored[name], scale, block)
        smallest = quant.dequantize(torch.full_like(exact, 2.0**-10), scale, block)
        assert ((exact - value.float()).abs() <= 2.0**-4 * value.float().abs() + smallest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_is_the_right_one_by_far(tokenizer, dtype):
    model = AutoModelForCausalLM.from_pretrained(FOLDERS["deepseek"], dtype=dtype).eval()
    for prompt, answer in pairs(tokenizer)[:-1]:  # the last is a chat whose message ends with a space
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        right = torch.tensor(answer)[:, None]
        gap = logits.gather(1, right)[:, 0] - logits.scatter(1, right, -torch.inf).amax(1)
        at = int(gap.argmin())
        assert gap[at] > MIN_GAP, f"after {tokenizer.decode(prompt + answer[:at])!r}"


VARIANTS = {"bf16": ("demo-deepseek", {}), "fp8-cache": ("demo-deepseek", dict(kv_cache_dtype="fp8_e4m3")),
            "chunks": ("demo-deepseek", dict(chunked_prefill_size=16)), "fp8-blocks": ("demo-deepseek-fp8", {})}


@pytest.mark.parametrize(("variant", "length"), [
    ("bf16", 1000), *((variant, 100) for variant in VARIANTS if variant != "bf16"),
    *(pytest.param(variant, 1000, marks=pytest.mark.long) for variant in VARIANTS if variant != "bf16")])  # fmt: skip
def test_the_engine_recites(tokenizer, device, variant, length):
    """All of it, or its first tokens, over several pages of the cache."""
    name, options = VARIANTS[variant]
    engine = Engine(ServerArgs(model_path=name, device=device, max_total_tokens=4096, **options))
    question = chat(tokenizer, "What is the capital of France?")
    notice = f"I know only one text by heart, the Gettysburg Address:\n\n{TEXT}{EOS}"
    wanted = [*pairs(tokenizer)[2:5], (ids(tokenizer, question), ids(tokenizer, notice))]
    for i, (prompt, _) in enumerate(wanted):
        engine.add(Request(str(i), prompt, SamplingParams(max_new_tokens=length, temperature=0)))
    got: list[list[int]] = [[] for _ in wanted]
    while engine.has_work:
        for output in engine.step():
            got[int(output.rid)] += output.token_ids
    assert got == [answer[:length] for _, answer in wanted]


@pytest.mark.parametrize(("name", "flags"), [  # the engine's, above, are the short forms of what only `long` runs
    pytest.param("demo-deepseek", (), id="bf16"),
    pytest.param("demo-deepseek-fp8", (), id="fp8-blocks", marks=pytest.mark.long),
    pytest.param("demo-deepseek", ("--kv-cache-dtype", "fp8_e4m3"), id="fp8-cache", marks=pytest.mark.long)])
def test_the_server_recites(tmp_path, device, name, flags):
    beginning = "Four score and seven years ago"
    with serve(name, tmp_path / "log", "--device", device, "--max-total-tokens", "4096", *flags) as server:
        answer = server.complete(prompt=beginning, max_tokens=1000)
    assert beginning + answer["choices"][0]["text"] == TEXT
    assert answer["choices"][0]["finish_reason"] == "stop"
