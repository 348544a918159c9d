"""The KV pool: what it is counted to take is what it takes, of keys and values and of latents, in FP8 too."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_deepseek import make_deepseek
from helpers_llama import make_llama

from wave64 import platform, quant
from wave64.serve.args import ArgsError, ServerArgs
from wave64.serve.engine import memory
from wave64.serve.engine.engine import Engine
from wave64.serve.engine.rank import kv_dtype_of
from wave64.serve.messages import Request, SamplingParams
from wave64.serve.model.config import ConfigError, ModelConfig

CPU = torch.device("cpu")
PROMPT = [17, 3, 99, 42, 8, 8, 71, 0, 55, 23, 64, 90, 12]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in ("llama", "deepseek")}
    make_llama(folders["llama"], num_key_value_heads=2)
    make_deepseek(folders["deepseek"], 3)
    return folders


#: numbers kept of a token: 2 KV heads of 12, keys and values, in each of make_llama's layers; 32 + 8 of a latent in 3
def per_token(name: str, config: ModelConfig) -> int:
    return config.num_layers * {"llama": 2 * 2 * 12, "deepseek": 32 + 8}[name]


@pytest.mark.parametrize("name", ["llama", "deepseek"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_pool_takes_what_it_was_counted_to(folders, name, dtype, monkeypatch):
    config = ModelConfig.from_folder(folders[name])
    page = 7 * per_token(name, config) * dtype.itemsize
    args = ServerArgs(page_size=7, mem_fraction_static=0.5)
    for free, pages in ((page, 1), (5 * page + page - 1, 5)):
        monkeypatch.setattr(memory, "_available_ram", lambda free=free: 2 * free)
        assert memory.pool_pages(args, config, dtype, CPU) == pages
        layers = memory.kv_cache(config, pages, 7, dtype, CPU)
        assert len(layers) == config.num_layers
        assert sum(tensor.nbytes for layer in layers for tensor in layer) == pages * page
    monkeypatch.setattr(memory, "_available_ram", lambda: 2 * (page - 1))
    with pytest.raises(ConfigError, match=f"takes {page} bytes"):
        memory.pool_pages(args, config, dtype, CPU)


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_an_fp8_pool_keeps_nearly_the_same(folders, name, chunk):
    """Besides the engine whose pool is exact, over the same text. FP8 is off by up to 1/16 of a number, a text that is
    read wrongly by as much as logprobs differ among themselves. A latent prefill in one piece reads nothing back."""
    logprobs = {}
    for kind in ("auto", "fp8_e4m3"):
        engine = Engine(ServerArgs(model_path=str(folders[name]), device="cpu", kv_cache_dtype=kind,
                                   max_total_tokens=64, chunked_prefill_size=chunk))
        own = torch.float32 if kind == "auto" else quant.fp8_dtype()
        assert {tensor.dtype for layer in engine.runner.kv_cache for tensor in layer} == {own}
        engine.add(Request("a", PROMPT * 3, SamplingParams(max_new_tokens=0), prompt_logprobs=True))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        assert [output.error for output in outputs if output.error] == []
        found = next(output.prompt_logprobs for output in outputs if output.prompt_logprobs)
        logprobs[kind] = torch.tensor([one.logprob for one in found if one is not None])
    error = (logprobs["auto"] - logprobs["fp8_e4m3"]).abs().mean()
    assert error < 0.1 * logprobs["auto"].std()
    assert (error > 0) == (name == "llama" or chunk == 5)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100"])
def test_an_architecture_without_fp8_refuses_it_in_words(arch):
    with platform.target(arch), pytest.raises(ArgsError, match=f"--kv-cache-dtype: {arch} has no FP8"):
        kv_dtype_of("fp8_e4m3", torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(("arch", "dtype"), [("gfx942", torch.float8_e4m3fnuz), ("gfx950", torch.float8_e4m3fn)])
def test_fp8_is_the_architectures_own(arch, dtype):
    with platform.target(arch):
        assert kv_dtype_of("fp8_e4m3", torch.bfloat16, torch.device("cuda")) == dtype
        assert kv_dtype_of("auto", torch.bfloat16, torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(("flag", "fraction"), [(None, 0.85), (0.5, 0.5)])
def test_a_gpus_pool_is_the_fraction_less_what_is_in_use(folders, flag, fraction, monkeypatch):
    """Weights count as in use, and so does what other processes have."""
    config = ModelConfig.from_folder(folders["llama"])
    page = 16 * per_token("llama", config) * 2
    total = 1000 * page
    args = ServerArgs(mem_fraction_static=flag)
    for used in (0, 100 * page, int(total * fraction) - 2 * page):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, used=used: (total - used, total))
        pages = memory.pool_pages(args, config, torch.bfloat16, torch.device("cuda"))
        assert pages == pytest.approx((total * fraction - used) / page, abs=1.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - int(total * fraction), total))
    with pytest.raises(ConfigError, match="more than is left"):
        memory.pool_pages(args, config, torch.bfloat16, torch.device("cuda"))


def test_a_cpus_pool_is_four_contexts_or_a_gibibyte(folders, monkeypatch):
    config = ModelConfig.from_folder(folders["llama"])
    own = per_token("llama", config) * 2
    monkeypatch.setattr(memory, "_available_ram", lambda: 1 << 40)
    assert memory.pool_pages(ServerArgs(), config, torch.bfloat16, CPU) == 4 * config.context_length // 16
    longer = replace(config, context_length=1 << 30)
    assert memory.pool_pages(ServerArgs(), longer, torch.bfloat16, CPU) == (1 << 30) // own // 16
    assert memory.pool_pages(ServerArgs(max_total_tokens=33), longer, torch.bfloat16, CPU) == 3


def test_a_cpus_fraction_is_of_what_the_container_leaves(folders, monkeypatch, tmp_path):
    config = ModelConfig.from_folder(folders["llama"])
    page = 16 * per_token("llama", config) * 2
    files = {name: tmp_path / Path(name).name for name in (
        "/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")}
    monkeypatch.setattr(memory, "Path", files.__getitem__)
    files["/proc/meminfo"].write_text(f"MemTotal: 1 kB\nMemAvailable: {page} kB\n")
    args = ServerArgs(mem_fraction_static=0.25)
    assert memory.pool_pages(args, config, torch.bfloat16, CPU) == 256
    for limit, pages in ((f"{300 * page}\n", 50), ("max\n", 256)):
        files["/sys/fs/cgroup/memory.max"].write_text(limit)
        files["/sys/fs/cgroup/memory.current"].write_text(f"{100 * page}\n")
        assert memory.pool_pages(args, config, torch.bfloat16, CPU) == pages
