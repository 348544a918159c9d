"""AITER's Python sources, those of PyPI's wheel, imported where it is installed, over stand-ins for its native modules.

A stand-in of an entry that launches a code object packs its argument as AITER's C++ does, struct by struct
(csrc/py_itfs_cu), and executes the wheel's code object on the emulator; one of another entry computes with torch what
its kernel is for. AITER asks its compilers and the driver as it is imported: those are stood in for, too.
"""

import contextlib
import enum
import functools
import importlib.util
import io
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent / "bench"))
from aiter_objects import VERSION, Objects, installed  # noqa: E402
from aiter_work import BEYOND, Arrays, Launch, in_turn, prepared_by, slots  # noqa: E402

from wave64 import quant  # noqa: E402

ARCH = "gfx942"
BLOCK = 128


class ActivationType(enum.IntEnum):
    """Members: as in csrc/include/aiter_enum.h."""
    No, Silu, Gelu, Swiglu = -1, 0, 1, 2


class QuantType(enum.IntEnum):
    """Members: as in csrc/include/aiter_enum.h."""
    No, per_Tensor, per_Token, per_1x32, per_1x128, per_128x128 = range(6)


def lacking() -> str | None:
    """None, or why AITER's sources cannot be imported."""
    if installed() is None:
        return f"amd-aiter is not installed (pip install amd-aiter=={VERSION})"
    for name in ("pandas", "jinja2", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"amd-aiter imports {name}, which is not installed"
    return None


class Native:
    """The native modules. `launched` has the names of the code objects, in order."""

    def __init__(self):
        self.objects, self.launched = Objects(), []
        self.modules = {name: ModuleType(name) for name in (
            "module_aiter_enum", "module_mla_asm", "module_moe_sorting", "module_moe_asm", "module_quant",
            "module_gemm_a8w8_blockscale", "module_gemm_mi350_a8w8_blockscale_asm")}
        for module in self.modules.values():
            module.__file__ = "a stand-in"
        entries = {
            "module_aiter_enum": (ActivationType, QuantType), "module_mla_asm": (self.mla_decode_stage1_asm_fwd,),
            "module_moe_sorting": (moe_sorting_fwd,), "module_quant": (dynamic_per_token_scaled_quant,),
            "module_moe_asm": (self.fmoe_fp8_blockscale_g1u1, self.fmoe_g1u1, self.fmoe_g1u1_tkw1),
            "module_gemm_mi350_a8w8_blockscale_asm": (self.mi350_a8w8_blockscale_asm,),
        }
        for module, functions in entries.items():
            for function in functions:
                setattr(self.modules[module], function.__name__, function)

    def launch(self, name: str, grid: tuple[int, int, int], given: list, written: list[Tensor]) -> None:
        """Execute the code object on copies of the tensors among `given`, the argument's fields in order, and copy back
        those that are written."""
        self.launched.append(name)
        memory, copies = Arrays(), {}
        for i, tensor in enumerate(x for x in given if isinstance(x, Tensor)):
            if tensor.data_ptr() not in copies:
                octets = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                copies[tensor.data_ptr()] = memory.put(f"argument {i}", octets)
        packed = slots(*(copies[x.data_ptr()] if isinstance(x, Tensor) else x for x in given))
        code = self.objects.read(name)
        with prepared_by(code, Launch(grid, 256, packed, memory, lambda: 0.0)) as recorded:
            in_turn(recorded, memory.buffers(BEYOND), ())
        for tensor in written:
            assert tensor.is_contiguous()
            tensor.view(-1).view(torch.uint8).numpy()[...] = copies[tensor.data_ptr()]

    # ---- entries of csrc/py_itfs_cu: what they check, and what they launch

    def mla_decode_stage1_asm_fwd(self, Q, KV, qo_indptr, kv_indptr, kv_page_indices, kv_last_page_lens,
                                  num_kv_splits_indptr, work_metadata, work_indptr, work_info_set, max_seqlen_q,
                                  softmax_scale, splitData, splitLse, output, q_scale=None, kv_scale=None):
        """Members: of asm_mla.cu."""
        heads, page_size, kv_heads, splits = Q.shape[1], KV.shape[1], KV.shape[2], splitData.shape[1]
        assert Q.is_contiguous()
        assert kv_heads == 1
        assert Q.shape[2] == KV.shape[3]
        assert Q.dtype == KV.dtype == torch.bfloat16
        assert (heads, max_seqlen_q) == (16, 1)
        given = [splitData, splitLse, Q, KV, kv_indptr, kv_page_indices, kv_last_page_lens, float(softmax_scale), heads,
                 splits, Q.stride(0) * Q.itemsize, KV.stride(0) * KV.itemsize, int(math.log2(page_size)), qo_indptr,
                 num_kv_splits_indptr, output, None, None, splits]
        self.launch(f"{ARCH}/mla/mla_dec_stage1_bf16_a16w16_subQ16_mqa16.co", (1, len(qo_indptr) - 1, splits), given,
                    [splitData, splitLse])

    def _fmoe(self, name: str, columns: int, out, input, gate, down, ids, weights, experts, valid, topk, x_scale,
              w1_scale, w2_scale):
        hidden, inter = down.shape[1], down.shape[2]
        given = [out, input, gate, valid, down, x_scale, w1_scale, w2_scale, None, ids, weights, experts, hidden, inter,
                 len(out), len(gate), input.stride(0) * input.itemsize, hidden, inter, hidden * 2,
                 hidden * inter * (2 if inter * 2 == gate.shape[1] else 1), inter * hidden, w1_scale.stride(0) * 4,
                 w2_scale.stride(0) * 4, inter * 4, topk, 0, -(-inter // columns)]
        self.launch(f"{ARCH}/fmoe/silu/{name}", (-(-inter // columns), len(experts), 1), given, [out])

    def fmoe_fp8_blockscale_g1u1(self, out, input, gate, down, sorted_token_ids, sorted_weights, sorted_expert_ids,
                                 num_valid_ids, topk, input_scale, fc1_scale, fc2_scale, kernelName, fc_scale_blkn=128,
                                 fc_scale_blkk=128, fc2_smooth_scale=None, activation=0):
        """Members: of asm_fmoe.cu."""
        assert (fc_scale_blkn, fc_scale_blkk, down.shape[2] % 256) == (BLOCK, BLOCK, 0)
        self._fmoe("fmoe_bf16_blockscaleFp8_g1u1_vs_silu_1tg_32x256.co", 256, out, input, gate, down, sorted_token_ids,
                   sorted_weights, sorted_expert_ids, num_valid_ids, topk, input_scale, fc1_scale, fc2_scale)

    def fmoe_g1u1(self, out, input, gate, down, sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
                  topk, input_scale, fc1_scale, fc2_scale, kernelName, fc2_smooth_scale=None, activation=0):
        """Members: of asm_fmoe.cu."""
        self._fmoe("fmoe_bf16_pertokenFp8_g1u1_vs_silu_1tg_32x128.co", 128, out, input, gate, down, sorted_token_ids,
                   sorted_weights, sorted_expert_ids, num_valid_ids, topk, input_scale, fc1_scale, fc2_scale)

    def fmoe_g1u1_tkw1(self, out, input, gate, down, sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
                       topk, input_scale, fc1_scale, fc2_scale, kernelName, fc2_smooth_scale=None, activation=0):
        """Members: of asm_fmoe.cu."""
        self._fmoe("fmoe_bf16_pertokenFp8_g1u1_vs_tkw1_silu_1tg_32x128.co", 128, out, input, gate, down,
                   sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids, topk, input_scale, fc1_scale,
                   fc2_scale)

    def mi350_a8w8_blockscale_asm(self, XQ, WQ, x_scale, w_scale, out):
        """Members: of asm_mi350_a8w8_blockscale.cu."""
        (m, k), n = XQ.shape, out.shape[1]
        assert out.dtype == torch.bfloat16
        assert (n % 128, k % 128) == (0, 0)
        assert m >= 16
        assert k >= 512
        rows = 32 if m <= 32 else 128
        given = [out, XQ, WQ, None, x_scale, w_scale, None, None, None, k, n, m, 1, k, k, n * 2, 0, 0, 0, 0, 0, 0, None]
        self.launch(f"gfx950/f8_block_scale_mi350_x{rows}.co", (-(-n // 256), -(-m // rows), 1), given, [out])
        return out


# ---- entries whose kernels the wheel has no code objects of

def moe_sorting_fwd(topk_ids, topk_weights, sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf,
                    num_experts, unit_size, local_expert_mask=None, num_local_tokens=None, dispatch_policy=0):
    """Members: each expert's (choice << 24 | token), padded to whole units, of the experts of the mask, which are
    counted without the others; the result is set to 0. Memory behind what is valid is not written."""
    assert 0 <= int(topk_ids.min()) <= int(topk_ids.max()) < num_experts
    moe_buf.zero_()
    tokens, top_k = topk_ids.shape
    at = block = local = 0
    for expert in range(num_experts):
        if local_expert_mask is not None and not local_expert_mask[expert]:
            continue
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        size = -(-len(token) // unit_size) * unit_size
        sorted_token_ids[at : at + size] = top_k << 24 | tokens
        sorted_weights[at : at + size] = 0
        sorted_token_ids[at : at + len(token)] = (slot << 24 | token).int()
        sorted_weights[at : at + len(token)] = topk_weights[token, slot]
        sorted_expert_ids[block : block + size // unit_size] = local
        at, block, local = at + size, block + size // unit_size, local + 1
    num_valid_ids[0], num_valid_ids[1] = at, tokens


def dynamic_per_token_scaled_quant(out, input, scales, scale_ub=None, shuffle_scale=False, num_rows=None,
                                   num_rows_factor=1):
    """Members: rows in FP8, with a scale each; shuffle_scale: the scales of a token's groups lie a group after another
    and in it token by token."""
    q, scale = quant.quantize(input, -1, out.dtype)
    out.copy_(q.view(out.shape))
    groups = out.numel() // len(out) // input.shape[-1]
    ordered = scale.view(-1, groups).t() if shuffle_scale else scale
    scales.view(-1).copy_(ordered.reshape(-1))


# ---- the import

#: What AITER asks the environment for, as it is imported and later.
ENVIRONMENT = {"GPU_ARCHS": ARCH, "CU_NUM": "304", "AITER_JIT_DIR": "nowhere"}


@functools.cache
def native() -> Native:
    return Native()


@functools.cache
def _modules() -> dict[str, ModuleType]:
    """AITER's modules by name, imported once: its operators are registered with torch for good."""
    folder = str(installed().parents[1])
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in ("aiter", "csrc")}
    known = set(sys.modules)
    with (mock.patch.dict(os.environ, ENVIRONMENT), mock.patch.object(sys, "path", [folder, *sys.path]),
          mock.patch.dict(sys.modules, native().modules), mock.patch("shutil.which", return_value=sys.executable),
          mock.patch("subprocess.check_output", return_value="6.4.43484"),
          mock.patch("os.popen", side_effect=lambda command: io.StringIO("0"))):
        for name in ("aiter", "aiter.mla", "aiter.fused_moe", "aiter.fused_moe_bf16_asm"):
            importlib.import_module(name)
        found = {name: module for name, module in sys.modules.items() if name not in known}
    for name in found:
        sys.modules.pop(name, None)
        library = getattr(found[name], "aiter_lib", None)
        if library is not None:  # torch fails to take back its operators, whose names it has twice, as it ends
            library._op_defs.clear()
    sys.modules.update(before)
    return found | native().modules


@contextlib.contextmanager
def imported() -> Iterator[ModuleType]:
    """AITER, as long as the block lasts."""
    modules = _modules()
    hidden = {name: None for name in sys.modules if name.partition(".")[0] == "aiter" and name not in modules}
    with (mock.patch.dict(os.environ, ENVIRONMENT), mock.patch.dict(sys.modules, modules),
          mock.patch("os.popen", side_effect=lambda command: io.StringIO("0"))):  # it leaves those that it opens
        for name in hidden:
            del sys.modules[name]
        native().launched.clear()
        yield modules["aiter"]
