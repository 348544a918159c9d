"""demo-llama as AMD publishes its Llamas, made by Quark: FP8 weights and inputs, scales of keys and values. It recites,
and what reads it wrongly is found."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_llama import edit_json
from helpers_server import serve
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import wave64
import wave64.serve.demo
from wave64 import platform
from wave64.serve.args import ArgsError, ServerArgs
from wave64.serve.engine.engine import Engine
from wave64.serve.engine.rank import kv_dtype_of
from wave64.serve.http import accuracy
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.model.scaled import ScaledLinear

FOLDER = Path(__file__).with_name("quantized") / "demo-quark-kv"
TEXT = (Path(next(iter(wave64.serve.demo.__path__))) / "gettysburg.txt").read_text(encoding="utf-8").strip()
BEGINNING = "Four score and seven years ago"
FLAGS = ["--max-total-tokens", "1024", "--max-running-requests", "2"]


def recite(count: int, *flags: str) -> tuple[str, torch.dtype]:
    """`count` tokens behind the beginning of the text, and what keys were kept in."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    engine = Engine(ServerArgs.from_cli(["--model-path", str(FOLDER), *FLAGS, *flags]))
    engine.add(Request("0", tokenizer(BEGINNING).input_ids, SamplingParams(max_new_tokens=count, temperature=0)))
    got: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            got += output.token_ids
    return BEGINNING + tokenizer.decode(got, skip_special_tokens=True), engine.runner.kv_cache[0][0].dtype


@pytest.mark.parametrize(("flags", "dtype"), [((), torch.float8_e4m3fn),
                                              (("--kv-cache-dtype", "bf16"), torch.bfloat16)])
def test_the_engine_recites(flags, dtype):
    text, kept_in = recite(60, "--device", "cpu", *flags)
    assert TEXT.startswith(text)
    assert len(text) > 150
    assert kept_in == dtype


@pytest.mark.slow
def test_it_recites_by_machine_code():
    """The short form of what test_emulated asks over HTTP, of both architectures and of two ranks."""
    command = [sys.executable, "-m", "wave64", "emulate", "--model-path", str(FOLDER), "--prompt", "Four score and",
               "--device", "gfx942", "--max-tokens", "2", "--disable-cuda-graph"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^'(.*)' +(?:prompt, \d+ tokens|a decode step): ", done.stdout, re.MULTILINE)
    assert len(said) == 2
    assert TEXT.startswith("Four score and" + "".join(said))
    assert re.search(r"^fp8_scaled_mm ", done.stdout, re.MULTILINE)


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("--tp-size", "2")])
def test_the_server_recites(tmp_path, flags):
    with serve(str(FOLDER), tmp_path / "log", "--device", "cpu", *flags, "--max-total-tokens", "1024") as server:
        answer = server.complete(prompt=BEGINNING, max_tokens=1000)
    assert BEGINNING + answer["choices"][0]["text"] == TEXT


def test_auto_is_fp8_where_there_are_scales_and_an_architecture_that_has_it():
    cuda = torch.device("cuda")
    for arch, dtype in (("gfx942", torch.float8_e4m3fnuz), ("gfx950", torch.float8_e4m3fn), ("gfx90a", torch.bfloat16)):
        with platform.target(arch):
            assert kv_dtype_of("auto", torch.bfloat16, cuda, scaled=True) == dtype
            assert kv_dtype_of("auto", torch.bfloat16, cuda) == torch.bfloat16
            assert kv_dtype_of("bf16", torch.bfloat16, cuda, scaled=True) == torch.bfloat16
    with pytest.raises(ArgsError, match="--kv-cache-dtype: expected auto or fp8_e4m3, or --dtype bfloat16, got bf16"):
        kv_dtype_of("bf16", torch.float16, cuda)


@pytest.mark.parametrize(("model", "method", "words"), [
    (str(FOLDER), "fp8", "--quantization: expected quark, as .* has it, or no such flag, got fp8"),
    ("demo-llama", "quark", "--quantization: expected fp8, which quantizes the plain weights of .*, got quark"),
    ("demo-deepseek", "fp8", "--quantization: DeepseekV3ForCausalLM is not quantized while it is loaded")])
def test_what_quantization_cannot_mean_is_refused(model, method, words):
    with pytest.raises(ArgsError, match=words):
        Engine(ServerArgs(model_path=model, device="cpu", quantization=method))


def test_plain_weights_are_quantized_as_they_are_loaded():
    """By the largest of an output feature, to within half a step of e4m3's three bits of mantissa."""
    engine = Engine(ServerArgs(model_path="demo-llama", device="cpu", quantization="fp8", max_total_tokens=1024))
    stored = load_file(Path(next(iter(wave64.serve.demo.__path__))) / "llama" / "model.safetensors")
    layers = {name: layer for name, layer in engine.runner.model.named_modules() if isinstance(layer, ScaledLinear)}
    assert len(layers) == 4 * engine.config.num_layers
    for name, layer in layers.items():
        if name.endswith(("o_proj", "down_proj")):
            plain, scale = stored[f"{name}.weight"].float(), layer.weight_scale[:, None]
            assert layer.weight.dtype == torch.float8_e4m3fn
            assert torch.equal(scale.squeeze(), plain.abs().amax(1) / 448)
            assert ((layer.weight.float() * scale - plain).abs() <= (plain.abs() / 16).maximum(scale / 1024)).all()


QUICK = ["--device", "cpu", "--max-total-tokens", "1024"]


@pytest.mark.slow
def test_accuracy_finds_a_wrong_flavor(tmp_path, capsys, monkeypatch):
    """Weights of e4m3fn that are taken for e4m3fnuz without larger scales are half of what they should be, and those of
    e4m3fnuz that are given them twice are double."""
    def ask(folder: Path, against: str, *flags: str) -> tuple[int, str]:
        return accuracy.main(["--model-path", str(folder), "--against", against, *flags]), capsys.readouterr().out

    found, measure = {}, accuracy.measure
    monkeypatch.setattr(accuracy, "measure", lambda flags, model: found.get(model) or
                        found.setdefault(model, measure(flags, model)))
    monkeypatch.setattr(accuracy, "MAX_TOKENS", 96)
    status, shown = ask(FOLDER, "demo-llama", *QUICK)
    assert status == 0
    assert "as expected" in shown
    assert "gettysburg.txt             95" in shown
    status, shown = ask(FOLDER, str(FOLDER))
    assert status == 0
    assert shown.count("+0.00%") == 2
    for factor, perplexity in ((0.5, "1.4"), (2.0, "")):
        folder = Path(shutil.copytree(FOLDER, tmp_path / f"times{factor}"))
        weights = load_file(folder / "model.safetensors")
        save_file({name: weight * factor if name.endswith("weight_scale") else weight
                   for name, weight in weights.items()}, folder / "model.safetensors")
        status, shown = ask(folder, "demo-llama", *QUICK)
        assert status == 1
        assert f"WRONG: the perplexity of gettysburg.txt is {perplexity}" in shown
    edit_json(folder / "config.json", lambda c: c.update(quantization_config=dict(quant_method="awq")))
    found.clear()
    for path, words in ((folder, "quantization_config.quant_method: expected FP8"), (tmp_path / "absent", "absent")):
        with pytest.raises(SystemExit) as end:
            accuracy.main(["--model-path", str(path), *QUICK])
        said = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 1
        assert words in said
        assert said.startswith("wave64 accuracy: error: ")


def test_accuracy_serves_as_its_flags_say(monkeypatch):
    """With all ranks, and one checkpoint after the other: a device need not hold both."""
    seen = []

    class Recorder:
        def __init__(self, *, model_path, tp_size, quantization, **settings):
            seen.append((model_path, tp_size, quantization))

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            seen.append("ended")

        def generate(self, *, input_ids, **fields):
            tokens = [[None if i == 0 else -1.0, token, ""] for i, token in enumerate(input_ids)]
            likeliest = [None, *([[-0.5, token + 1, ""]] for token in input_ids[1:])]
            return {"meta_info": {"input_token_logprobs": tokens, "input_top_logprobs": likeliest}}

    monkeypatch.setattr(accuracy, "Engine", Recorder)
    flags = ["--tp-size", "2", "--quantization", "fp8"]
    assert accuracy.main(["--model-path", "demo-llama", "--against", "demo-deepseek", *flags]) == 0
    assert seen == [("demo-deepseek", 2, None), "ended", ("demo-llama", 2, "fp8"), "ended"]
    found = accuracy.measure([], "demo-llama")
    assert [round(perplexity, 6) for _, perplexity in found.perplexities.values()] == [2.718282] * 2
    assert found.recited == 0


def test_the_verdict_against_another_checkpoint():
    def found(*perplexities: float, recited: int = 8) -> accuracy.Found:
        return accuracy.Found({name: (9, p) for name, p in zip("abc", perplexities, strict=True)}, recited)

    sound = found(2.0, 3.0, 900.0)  # the third is a text that it does not know
    assert accuracy.verdict(found(2.4, 3.6, 5000.0), sound) is None
    assert "b is 4, expected at most 1.25 times 3" in str(accuracy.verdict(found(2.0, 4.0, 900.0), sound))
    assert "a is nan" in str(accuracy.verdict(found(float("nan"), 3.0, 900.0), sound))
    assert "5 phrases" in str(accuracy.verdict(found(2.0, 3.0, 900.0, recited=5), sound))
    assert accuracy.verdict(sound, None) is None
    assert "the best perplexity is 30" in str(accuracy.verdict(found(30.0, 40.0, 900.0), None))
