"""From a checkpoint folder to a model with weights on its device."""

import contextlib
import ctypes
import logging
import re
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wave64 import platform, quant
from wave64.serve.model import FAMILIES
from wave64.serve.model.checkpoint import FP8, Shard, StoredTensor, WeightsError, is_scale, stored_tensors
from wave64.serve.model.config import ModelConfig
from wave64.serve.model.cpu import products_by, slow_dtype
from wave64.serve.model.layers import CausalLM, RMSNorm
from wave64.serve.model.linear import Layer
from wave64.serve.model.parallel import ONE, Ranks
from wave64.serve.model.schemes import matches

log = logging.getLogger(__name__)

DUMMY_SEED = 0
QUANTIZED_AT_ONCE = 2**22  # numbers of a weight, which take several times 4 bytes each meanwhile
SCALE = re.compile(r"_scale[^.]*$")  # of any kind, at the end of a name

Progress = Callable[[int, int], None]


def load_model(config: ModelConfig, folder: str | Path, dtype: torch.dtype, device: str | torch.device,
               load_format: str = "auto", ranks: Ranks = ONE, progress: Progress | None = None) -> nn.Module:
    """Builds the model of `config` on `device` in `dtype`, or the part of it that one of `ranks` holds, and fills it.

    load_format  "auto": the safetensors of `folder`, tensor by tensor; "dummy": random weights, the same at every
                 start on the same kind of device, `folder` is not read
    progress     is called with bytes read and bytes to read; None: a bar on a terminal
    raises       WeightsError naming file and tensor
    """
    started = time.perf_counter()
    if load_format != "dummy":
        _refuse_scales(_plan(_build(config, dtype, "meta", ranks), Path(folder)))  # before memory is allocated
    model = _build(config, dtype, device, ranks)
    if load_format == "dummy":
        fill_with_noise(model)
    else:
        fill_from(model, Path(folder), progress)
    is_cpu = torch.device(device).type == "cpu" and platform.emulated() is None
    products = f", {products_by(dtype)}" if is_cpu else ""
    size = sum(weight.nbytes for weight in model.parameters())
    log.info("%s: %.2f GB of %s weights on %s%s in %.1f s", folder, size / 1e9, str(dtype).removeprefix("torch."),
             device if is_cpu else platform.device_name(), products, time.perf_counter() - started)
    if is_cpu and (hint := slow_dtype(dtype)):
        log.warning(hint)
    return model


def without_weights(config: ModelConfig, dtype: torch.dtype, ranks: Ranks = ONE) -> CausalLM:
    """The model, or a rank's part of it, laid out as `load_model` does for a GPU, its tensors without memory."""
    model = _build(config, dtype, "meta", ranks)
    for module in model.modules():
        if isinstance(module, Layer):
            module.finish()
    return model


def refuse_unless_split(config: ModelConfig, ranks: Ranks) -> None:
    """Raises ConfigError if the model cannot be split over `ranks`; allocates nothing."""
    _build(config, config.dtype, "meta", ranks)


def _build(config: ModelConfig, dtype: torch.dtype, device: str | torch.device,
           ranks: Ranks = ONE) -> CausalLM:
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return FAMILIES[config.architecture].build(config, ranks).eval()
    finally:
        torch.set_default_dtype(default_dtype)


def fill_from(model: CausalLM, folder: Path, progress: Progress | None = None) -> None:
    """Read every weight of `model` from the checkpoint in `folder`; progress as for load_model.

    Raises WeightsError if a weight is missing there or has another shape, or if the model does not have one of them.
    """
    _read(model, folder, progress)
    for module in model.modules():  # nothing else holds a weight that is laid out anew: it goes at once
        if isinstance(module, Layer):
            module.finish()
            _give_back()


def _give_back() -> None:
    """Give the system what glibc keeps of memory that was freed: with weights laid out anew, some of a layer's in every
    few. Where the C library has no such function, nothing is done."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _read(model: CausalLM, folder: Path, progress: Progress | None) -> None:
    targets, reads, copies, unused = _plan(model, folder)
    if unused:
        log.info("%s: %d weights of %s... are not used", folder, len(unused), unused[0].rpartition(".")[0])
    size, quiet = sum(t.nbytes(targets[t.name].shard) for t in reads), not sys.stderr.isatty() or progress is not None
    read = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="weights", disable=quiet) as bar:
        for tensor in sorted(reads, key=lambda t: (t.file, t.begin)):
            view, shard, scale = targets[tensor.name]
            if scale is None:
                tensor.load(view, shard)
                if is_scale(tensor.name):
                    _refuse_unless_positive(tensor, view)
                elif view.dtype == torch.float8_e4m3fn:
                    _refuse_nan(tensor, view)
            else:
                _load_quantized(tensor, view, shard, scale)
            bar.update(tensor.nbytes(shard))
            read += tensor.nbytes(shard)
            if progress is not None:
                progress(read, size)
    for tensor, original in copies:
        if not tensor.equals(*targets[tensor.name][:2]):
            raise WeightsError(f"{tensor.file}: {tensor.name}: expected the values of {original}, because config.json "
                               "ties the two, got others; set tie_word_embeddings to false there")


def fill_with_noise(model: nn.Module) -> None:
    """Weights that keep activations in range: gains of norms 1, all else normal with deviation 0.02, which FP8 leaves
    to its scales. What ranks hold alike is alike: the values follow from a weight's name and shape."""
    generator = torch.Generator(next(model.parameters()).device)
    for module_name, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            generator.manual_seed(DUMMY_SEED + zlib.crc32(f"{module_name}.{name}".encode()))
            if isinstance(module, RMSNorm):
                weight.data.fill_(1.0)
            elif name.endswith("_scale"):
                weight.data.fill_(0.02)
            elif weight.dtype == torch.float8_e4m3fn:
                for part in weight.data.view(-1).split(2**24):  # a copy of all of it in another dtype may not fit
                    part.copy_(torch.empty(part.shape, device=part.device).normal_(generator=generator))
            else:
                weight.data.normal_(std=0.02, generator=generator)
        if isinstance(module, Layer):
            module.finish()


class Target(NamedTuple):
    view: Tensor  # to fill
    shard: Shard | None  # that it wants
    scale: Tensor | None = None  # to fill with the scales of the view's rows, where the stored weight is not FP8

    def check(self, tensor: StoredTensor) -> None:
        tensor.check(self.view if self.scale is None else torch.empty_like(self.view, dtype=torch.bfloat16,
                                                                           device="meta"), self.shard)


def _targets(model: nn.Module) -> dict[str, Target]:
    """Checkpoint name -> what to fill. Tied weights are two names of one view."""
    return {
        name: Target(*cast(Any, target))
        for module_name, module in model.named_modules() if isinstance(module, Layer)
        for name, *target in module.checkpoint(module_name)
    }  # fmt: skip


def _load_quantized(tensor: StoredTensor, view: Tensor, shard: Shard | None, scale: Tensor) -> None:
    """Fill an FP8 view and the scales of its rows with a stored weight that is not FP8: one tensor at a time is in
    memory twice."""
    plain = torch.empty(view.shape, dtype=torch.float32 if tensor.dtype == "F32" else torch.bfloat16 if
                        tensor.dtype == "BF16" else torch.float16, device=view.device)
    tensor.load(plain, shard)
    many = max(1, QUANTIZED_AT_ONCE // max(1, view.shape[1]))
    for begin in range(0, len(view), many):
        rows = slice(begin, begin + many)
        q, scale[rows] = quant.quantize_weight_channels(plain[rows], view.dtype)
        view[rows] = q


def _refuse_scales(plan: "Plan") -> None:
    """Raises WeightsError for a scale that is not a positive finite number. Reads no weights, and of scales not those
    of blocks, which are many and of which a rank reads its own once, when they are needed."""
    for tensor in plan.reads:
        if is_scale(tensor.name) and plan.targets[tensor.name].view.ndim == 1:
            values = torch.empty(tensor.shape or 1, dtype=torch.float32, device="cpu")
            tensor.load(values)
            _refuse_unless_positive(tensor, values)


def _refuse_unless_positive(tensor: StoredTensor, scales: Tensor) -> None:
    good = scales.isfinite() & (scales > 0)
    if not good.all():
        first = int((~good).flatten().nonzero()[0])
        raise WeightsError(f"{tensor.file}: {tensor.name}: expected positive finite scales, got "
                           f"{float(scales.flatten()[first]):g} at {first} of {good.numel()}; quantize the model "
                           "again, with calibration where scales of activations are static")


def _refuse_nan(tensor: StoredTensor, weight: Tensor) -> None:
    bits = weight.view(torch.uint8) & 0x7F
    if weight.numel() and bits.amax() == 0x7F:
        raise WeightsError(f"{tensor.file}: {tensor.name}: expected numbers, got {int((bits == 0x7F).sum())} NaN (0x7F "
                           f"or 0xFF) among {weight.numel()}; download the file again, or quantize the model again")


class Plan(NamedTuple):
    targets: dict[str, Target]
    reads: list[StoredTensor]
    copies: list[tuple[StoredTensor, str]]  # what is stored a second time, and the name it is read under
    unused: list[str]


def _plan(model: CausalLM, folder: Path) -> Plan:
    """Which stored tensor fills which view. Raises WeightsError as fill_from does; reads no weight, and works for a
    model on the meta device."""
    stored, targets = stored_tensors(folder), _targets(model)
    derived = tuple(f".{name}" for name in model.derived_weights)
    unused = [name for name in stored if name.startswith(model.unused_weights)]
    surplus = [tensor for name, tensor in stored.items()
               if name not in targets and not name.endswith(derived) and name not in unused]
    if surplus:
        raise WeightsError(f"{surplus[0].file}: {_listed(t.name for t in surplus)}: unexpected, "
                           f"{_why_surplus(surplus[0].name, model)}")
    names: dict[tuple, list[str]] = {}
    for name, (view, shard, _) in targets.items():
        names.setdefault((view.untyped_storage()._cdata, view.storage_offset(), view.shape, shard), []).append(name)
    reads, copies, missing = [], [], []
    for tied in names.values():
        found = [name for name in tied if name in stored]
        if not found:
            missing.append(tied[0])
        reads += [stored[name] for name in found[:1]]
        copies += [(stored[name], found[0]) for name in found[1:]]
    if missing:
        if is_scale(missing[0]):
            _refuse_without_scale(missing[0], stored, model)
        raise WeightsError(f"{folder}: {_listed(missing)}: expected by the model, not in any of its safetensors files")
    for tensor in (*reads, *(tensor for tensor, _ in copies)):
        targets[tensor.name].check(tensor)
    return Plan(targets, reads, copies, unused)


PLAIN_KEYS = "ignore, exclude, ignored_layers or modules_to_not_convert"


def _why_surplus(name: str, model: CausalLM) -> str:
    if not SCALE.search(name):
        return "the model config.json describes has no such weight; does it belong to these weights?"
    if not model.is_quantized:
        return "config.json has no quantization_config that says what these scales are; fetch it again"
    return ("config.json's quantization_config leaves this layer plain or has other scales for it; expected no "
            f"such name under {PLAIN_KEYS} there, and the schemes that the weights were quantized with")


def _refuse_without_scale(name: str, stored: dict[str, StoredTensor], model: CausalLM) -> None:
    """Raises WeightsError for the scale that is missing of a weight that is not FP8, if it is that."""
    weight = stored.get(f"{name.rpartition('.')[0]}.weight")
    if weight is None or weight.dtype in FP8:
        return
    layer, layers = weight.name.removesuffix(".weight"), [each.rpartition(".")[0] for each in stored]
    idle = [pattern for pattern in (model.schemes.plain if model.schemes else ())
            if not any(matches(pattern, each) for each in layers)]
    unmatched = f"; what is there and matches no layer: {_listed(idle)}" if idle else ""
    raise WeightsError(f"{weight.file}: {weight.name}: expected {', '.join(FP8)} with {name}, as config.json's "
                       f"quantization_config says, got {weight.dtype}; name {layer} there under {PLAIN_KEYS}, if it is "
                       f"stored plain{unmatched}")


def _listed(names) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
