"""Checkpoint folders, whole and damaged: the whole ones load to the last bit, each damage is named."""

import json
import os
import struct
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from helpers_llama import LLAMAS, edit_json, load, make_llama
from safetensors.torch import load_file, save_file

from wave64.serve.args import ArgsError
from wave64.serve.model import FAMILIES
from wave64.serve.model.checkpoint import INDEX, Shard, WeightsError, read_header
from wave64.serve.model.config import ModelConfig
from wave64.serve.model.linear import Layer, Linear
from wave64.serve.model.load import load_model
from wave64.serve.model_path import TOKENIZER_FILES, resolve_model_path

Q = "model.layers.0.self_attn.q_proj.weight"
BIASED = LLAMAS["linear-gqa3-bias"]


@pytest.fixture
def file(tmp_path):
    """The one weight file of a checkpoint in `tmp_path`."""
    make_llama(tmp_path, **BIASED)
    return tmp_path / "model.safetensors"


def change(file, edit):
    """Applies `edit(tensors)` to a safetensors file in place."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def message(folder, device="cpu") -> str:
    with pytest.raises(WeightsError) as refusal:
        load(folder, device)
    text = str(refusal.value)
    assert "\n" not in text
    return text


def plain(weight):
    """The values of a weight, whatever its layout, on the host."""
    return (weight.to_dense() if weight.is_mkldnn else weight).detach().cpu()


def assert_holds(model, tensors):
    """Every weight of `model` is the checkpoint's; merged ones are its parts below each other."""
    left = dict(tensors)
    for name, weight in model.named_parameters():
        for merged, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
            if merged in name:
                want = torch.cat([left.pop(name.replace(merged, part)) for part in parts])
                break
        else:
            want = left.pop(name)
        assert torch.equal(plain(weight), want.to(weight.dtype)), name
    assert not left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_file(file, device, dtype):
    model, _ = load(file.parent, device, dtype)
    assert {w.dtype for w in model.parameters()} == {dtype}
    assert {w.device.type for w in model.parameters()} == {device}
    assert_holds(model, load_file(file))


def test_many_files_with_index(tmp_path, device):
    theirs = make_llama(tmp_path, max_shard_size="20KB", **BIASED)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model, _ = load(tmp_path, device)
    assert_holds(model, theirs.state_dict())


def test_a_tensor_larger_than_the_buffer(monkeypatch, file, device):
    monkeypatch.setattr("wave64.serve.model.checkpoint.BUFFER_BYTES", 1000)
    model, _ = load(file.parent, device, torch.bfloat16)
    assert_holds(model, load_file(file))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the stored one, read into the view; another
@pytest.mark.parametrize("buffer", [16 << 20, 40])
@pytest.mark.parametrize(("dim", "begin", "end"), [(0, 0, 48), (0, 7, 19), (0, 47, 48), (1, 0, 52), (1, 13, 26),
                                                   (1, 51, 52)])
def test_a_shard_is_the_slice_and_reads_no_other_bytes(monkeypatch, tmp_path, dtype, buffer, dim, begin, end):
    whole = torch.randn(48, 52)
    save_file({"before": torch.ones(3), "w": whole, "z": torch.ones(5)}, tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors")["w"]
    shard, want = Shard(dim, begin, end), whole.narrow(dim, begin, end - begin).to(dtype)
    monkeypatch.setattr("wave64.serve.model.checkpoint.BUFFER_BYTES", buffer)
    counts, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *where: counts.append(preadv(*where)) or counts[-1])
    target = torch.full(want.shape, float("nan"), dtype=dtype)
    stored.load(target, shard)
    assert torch.equal(target, want)
    assert sum(counts) == want.numel() * 4 == stored.nbytes(shard)
    assert stored.equals(target, shard)
    target[-1, -1] += 1
    assert not stored.equals(target, shard)


def test_a_shard_of_three_dimensions(tmp_path):
    whole = torch.randn(3, 5, 4)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    for dim, begin, end in ((0, 1, 3), (1, 2, 4), (2, 1, 2)):
        target = torch.empty(whole.narrow(dim, begin, end - begin).shape)
        read_header(tmp_path / "model.safetensors")["w"].load(target, Shard(dim, begin, end))
        assert torch.equal(target, whole.narrow(dim, begin, end - begin))


@pytest.mark.parametrize(("shape", "shard", "expected"), [
    ((4, 6), Shard(0, 6, 10), "['at least 10', 6]"), ((4, 5), Shard(0, 0, 4), "['at least 4', 5]"),
    ((8, 2), Shard(1, 5, 7), "[8, 'at least 7']"), ((4, 6, 1), Shard(0, 0, 4), "['at least 4', 6, 1]")])
def test_a_shard_that_the_stored_tensor_does_not_have(tmp_path, shape, shard, expected):
    save_file({"w": torch.ones(8, 6)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as refusal:
        read_header(tmp_path / "model.safetensors")["w"].load(torch.empty(shape), shard)
    assert str(refusal.value).endswith(f"w: expected shape {expected}, got [8, 6]")


def test_a_layer_reads_the_shard_that_it_names(monkeypatch, file, device):
    """A rank's part of the head: the rest of the model is whole."""
    monkeypatch.setattr(Linear, "checkpoint", lambda self, name: [(f"{name}.weight", self.weight.data, Shard(0, 0, 40))]
                        if name == "lm_head" else Layer.checkpoint(self, name))
    build = FAMILIES["LlamaForCausalLM"].build

    def with_part_of_the_head(config, ranks):
        model = build(config, ranks)
        model.lm_head = Linear(config.hidden_size, 40)
        return model

    monkeypatch.setitem(FAMILIES, "LlamaForCausalLM", replace(FAMILIES["LlamaForCausalLM"],
                                                              build=with_part_of_the_head))
    model: Any = load(file.parent, device)[0]
    assert torch.equal(plain(model.lm_head.weight), load_file(file)["lm_head.weight"][:40])


def test_checkpoint_in_another_dtype(file, device):
    stored = {1: torch.float64, 2: torch.bfloat16}
    change(file, lambda t: t.update({name: w.to(stored[w.ndim]) for name, w in t.items()}))
    model, _ = load(file.parent, device, torch.float32)
    assert_holds(model, load_file(file))


@pytest.mark.parametrize("stored", [("model.embed_tokens.weight",), ("lm_head.weight",),
                                    ("model.embed_tokens.weight", "lm_head.weight")])
def test_tied_weights_may_be_stored_under_either_name_or_both(tmp_path, device, stored):
    theirs = make_llama(tmp_path, **LLAMAS["llama3-gqa4-tied"])
    weight = theirs.model.embed_tokens.weight.detach()
    change(tmp_path / "model.safetensors", lambda t: (t.pop("model.embed_tokens.weight"),
                                                      t.update({name: weight.clone() for name in stored})))
    model: Any = load(tmp_path, device)[0]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight.cpu(), weight)


def test_tied_weights_that_differ(tmp_path):
    make_llama(tmp_path, **LLAMAS["llama3-gqa4-tied"])
    change(tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    text = message(tmp_path)
    assert "model.safetensors: lm_head.weight: " in text or "model.safetensors: model.embed_tokens.weight: " in text
    assert "tie_word_embeddings" in text


def test_frequencies_in_old_checkpoints_are_left_aside(file, device):
    change(file, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    load(file.parent, device)


def test_missing_tensor(file):
    change(file, lambda t: [t.pop(name) for name in [*t] if "k_proj" in name])
    text = message(file.parent)
    assert text.startswith(str(file.parent))
    assert "model.layers.0.self_attn.k_proj.weight, " in text
    assert "and 1 more" in text


def test_unexpected_tensor(file):
    change(file, lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2)}))
    assert message(file.parent).startswith(f"{file}: model.layers.9.mlp.up_proj.weight: unexpected")


def test_bias_the_configuration_does_not_know(file):
    edit_json(file.with_name("config.json"), lambda c: c.update(attention_bias=False))
    assert ".bias" in message(file.parent)


def test_wrong_shape(file):
    change(file, lambda t: t.update({Q: torch.ones(47, 48)}))
    assert message(file.parent) == f"{file}: {Q}: expected shape [48, 48], got [47, 48]"


def test_transposed_is_a_wrong_shape_too(file):
    up = "model.layers.1.mlp.up_proj.weight"
    change(file, lambda t: t.update({up: t[up].T.contiguous()}))
    assert message(file.parent) == f"{file}: {up}: expected shape [52, 48], got [48, 52]"


@pytest.mark.parametrize(("dtype", "hint"), [
    (torch.int8, "got I8; such weights are not served"),
    (torch.float8_e4m3fn, "got F8_E4M3; config.json has no quantization_config that says so")])
def test_quantized_tensor(file, dtype, hint):
    change(file, lambda t: t.update({Q: torch.ones(48, 48).to(dtype)}))
    text = message(file.parent)
    assert text.startswith(f"{file}: {Q}: expected dtype ")
    assert text.endswith(hint)


def test_truncated(file):
    whole = file.read_bytes()
    last = max(read_header(file).values(), key=lambda t: t.end).name
    for length in (len(whole) - 1, len(whole) // 2):
        file.write_bytes(whole[:length])
        text = message(file.parent)
        assert text.startswith(f"{file}: ")
        assert f"expected {len(whole)} bytes up to the end of {last}, got {length}" in text
        assert "truncated" in text


@pytest.mark.parametrize("length", [0, 5, 8, 100])
def test_truncated_in_the_header(file, length):
    file.write_bytes(file.read_bytes()[:length])
    text = message(file.parent)
    assert text.startswith(f"{file}: ")
    assert f"got {length} bytes" in text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path),
                                  lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_opened(file, make):
    file.unlink()
    make(file)
    assert f"{file}: expected a safetensors file, got" in message(file.parent)


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(("content", "words"), [
    (b"\x80\x02}q\x00(X\x05\x00\x00\x00model" * 9, "safetensors"),  # the start of a pickle
    (struct.pack("<Q", 3) + b"{]}" + bytes(8), "damaged"),
    (header([1]), "damaged"),
    (header({"a": {"dtype": "F32", "shape": [2]}}), "damaged"),
    (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}) + bytes(7), "a: the header is damaged"),
    (header({"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]}}) + bytes(8), "damaged"),
    (header({"a": {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}}), "damaged"),
    (header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}), "a: the header is damaged"),
    (header({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}) + bytes(8), "damaged"),
    (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "a: expected a size or an offset, got -8"),
    (header({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}) + bytes(8), "damaged"),
    (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + bytes(9), "appended"),
    (struct.pack("<Q", 10**5) + b"[" * 10**5, "damaged"),
])  # fmt: skip
def test_damaged_header(file, content, words):
    file.write_bytes(content)
    text = message(file.parent)
    assert text.startswith(f"{file}: ")
    assert words in text


def test_a_header_is_not_read_beyond_what_the_format_allows(file):
    with file.open("r+b") as f:
        f.truncate(200 << 20)  # a sparse file: nothing of it is on the disk
        f.write(struct.pack("<Q", 100_000_001))
    assert "expected a safetensors header of at most 100000000 bytes, got 100000001" in message(file.parent)


def test_no_weights(tmp_path):
    make_llama(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    text = message(tmp_path)
    assert "expected model.safetensors" in text
    assert "pytorch_model.bin" in text


class TestIndex:
    @pytest.fixture(autouse=True)
    def sharded(self, tmp_path):
        make_llama(tmp_path, max_shard_size="20KB", **BIASED)

    def test_missing_file(self, tmp_path):
        gone = tmp_path / sorted(p.name for p in tmp_path.glob("*.safetensors"))[1]
        gone.unlink()
        assert gone.name in message(tmp_path)

    def test_missing_index(self, tmp_path):
        (tmp_path / INDEX).unlink()
        assert message(tmp_path).startswith(str(tmp_path / INDEX))

    def test_tensor_not_where_the_index_says(self, tmp_path):
        edit_json(tmp_path / INDEX, lambda index: index["weight_map"].update({"model.extra": index["weight_map"][Q]}))
        assert "model.extra: expected here by " in message(tmp_path)

    @pytest.mark.parametrize("name", ["../elsewhere.safetensors", "..", ".", "", "/x", "a/b", "a\\b", "..\\x", "a\0b"])
    def test_file_outside_the_folder(self, tmp_path, name):
        edit_json(tmp_path / INDEX, lambda index: index["weight_map"].update({Q: name}))
        assert message(tmp_path).startswith(str(tmp_path / INDEX))
        assert f"not the name of a file of this folder: {name!r}" in message(tmp_path).replace("\\\\", "\\")

    @pytest.mark.parametrize("text", [
        "{", '{"weight_map": ' + "[" * 10**5, "{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
    def test_malformed(self, tmp_path, text):
        (tmp_path / INDEX).write_text(text)
        assert message(tmp_path).startswith(str(tmp_path / INDEX))


def test_dummy_needs_a_config_alone_and_is_the_same_every_time(tmp_path, device):
    make_llama(tmp_path, **BIASED)
    (tmp_path / "model.safetensors").unlink()
    config = ModelConfig.from_folder(tmp_path)
    one, two = (load_model(config, tmp_path, torch.bfloat16, device, load_format="dummy") for _ in range(2))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        a, b = plain(a), plain(b)
        assert torch.equal(a, b), name
        assert a.isfinite().all()
        assert (a == 1).all() if "norm" in name else a.std() > 0


def test_loading_says_one_line(file, device, caplog, capfd):
    with caplog.at_level("INFO", logger="wave64"):
        load(file.parent, device)
    assert len(caplog.records) == 1
    assert str(file.parent) in caplog.text
    assert capfd.readouterr() == ("", "")  # no bar: stderr is not a terminal here


class TestResolveModelPath:
    def test_folder(self, tmp_path):
        assert resolve_model_path(str(tmp_path)) == tmp_path

    def test_built_in(self):
        assert (resolve_model_path("demo-llama") / "config.json").exists()

    @pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c", "", "what is this"])
    def test_neither_folder_nor_name(self, path):
        with pytest.raises(ArgsError, match="expected a folder, a built-in name .demo-llama, .*. or a hub name"):
            resolve_model_path(path)

    @pytest.mark.parametrize(("path", "meant"), [
        ("demo-lama", "demo-llama"), ("demo-deepsek-fp8", "demo-deepseek-fp8"), ("{}/Llama-3.1-8b-Instuct", None),
        ("{}/x/Llama-3.1-8B-Instruct", ""), ("somebody/some-model", ""),
    ])  # fmt: skip
    def test_a_slip_is_told_as_one(self, path, meant, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        right = tmp_path / "Llama-3.1-8B-Instruct"
        right.mkdir()
        with pytest.raises(ArgsError) as refusal:
            resolve_model_path(path.format(tmp_path))
        meant = str(right) if meant is None else meant
        assert str(refusal.value).endswith(f"; did you mean {meant}?") == bool(meant)
        assert ("did you mean" in str(refusal.value)) == bool(meant)

    def test_file(self, file):
        with pytest.raises(ArgsError, match="got a file"):
            resolve_model_path(str(file))

    def test_hub_name_that_cannot_be_fetched(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ArgsError) as refusal:
            resolve_model_path("somebody/some-model")
        text = str(refusal.value)
        assert text.startswith("somebody/some-model: neither a folder nor a built-in name (demo-llama, ")
        assert "\n" not in text

    @pytest.mark.parametrize(("tokenizer_only", "fetched"), [
        (False, ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
                 "generation_config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]),
        (True, ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]),
    ])  # fmt: skip
    def test_what_is_fetched_from_the_hub(self, monkeypatch, tmp_path, tokenizer_only, fetched):
        asked = {}
        monkeypatch.setattr("huggingface_hub.snapshot_download",
                            lambda name, **how: asked.update(name=name, **how) or str(tmp_path))  # fmt: skip
        files = (TOKENIZER_FILES,) if tokenizer_only else ()
        assert resolve_model_path("somebody/some-model", "v2", *files) == tmp_path
        assert (asked["name"], asked["revision"]) == ("somebody/some-model", "v2")

        def wanted(name: str) -> bool:
            return any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])

        assert [name for name in fetched if not wanted(name)] == []
        assert not any(map(wanted, ["pytorch_model.bin", "consolidated.00.pth", "modeling.py", "model.gguf"]))
        assert wanted("model.safetensors") != tokenizer_only

    def test_hub_name_in_the_local_cache(self, monkeypatch, tmp_path):
        snapshot = tmp_path / "models--somebody--some-model" / "snapshots" / "0123456789012345678901234567890123456789"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text(snapshot.name)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
        assert resolve_model_path("somebody/some-model") == snapshot
