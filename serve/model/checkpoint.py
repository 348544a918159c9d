"""A checkpoint folder as a set of named tensors: safetensors files, one or many, with or without an index.

The format is eight bytes of header length, a JSON header, then the tensors' bytes back to back, little-endian.
Files are read, not mapped: straight into the target where the dtypes agree and the target is in host memory, else
through a small buffer. So a load never needs more memory than the model itself, and a rank that wants a shard of a
tensor reads no other bytes of it.
"""

import io
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
FP8 = ("F8_E4M3",)
SCALES = ("F8_E8M0",)  # powers of two, which only scales are
BUFFER_BYTES = 16 << 20
NEAR_BYTES = 1 << 18  # runs of a shard that begin no further apart are read from the disk together
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library


class WeightsError(ValueError):
    """Weights that cannot be loaded; names the file and the tensor, what was expected and what was found."""


@dataclass(frozen=True)
class Shard:
    """The slice [begin, end) of dimension `dim` of a stored tensor, as one rank holds it."""

    dim: int
    begin: int
    end: int


def is_scale(name: str) -> bool:
    """Whether a stored name is that of scales of an FP8 weight, input or cache."""
    return name.endswith(("_scale", "_scale_inv"))


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; its bytes are [begin, end) of the file."""

    file: Path
    name: str
    dtype: str  # as the file spells it: F32, BF16, ...
    shape: tuple[int, ...]
    begin: int
    end: int

    def chunks(self, target: Tensor, shard: Shard | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (slice of `target`, flattened; its stored values in their own dtype, in host memory), in order.

        target  contiguous, of the shard's shape, any floating dtype and device
        shard   the slice of this tensor that is wanted; None: all
        raises  WeightsError for another shape, or a dtype that holds no plain floating-point numbers
        """
        self._check_shape(target, shard)
        dtype = self._plain_dtype(target)
        flat = target.view(-1)
        step = BUFFER_BYTES // dtype.itemsize
        buffer = torch.empty(min(step, flat.numel()), dtype=dtype, device="cpu")
        with self.file.open("rb", buffering=0) as f:
            for start in range(0, flat.numel(), step):
                values = buffer[: min(step, flat.numel() - start)]
                self._read(f, values, start, shard)
                yield flat[start : start + step], values

    def load(self, target: Tensor, shard: Shard | None = None) -> None:
        """Fill `target`, converting to its dtype; arguments as for `chunks`."""
        if target.device.type == "cpu" and target.dtype == DTYPES.get(self.dtype):
            self._check_shape(target, shard)
            with self.file.open("rb", buffering=0) as f:
                self._read(f, target.view(-1), 0, shard)
        else:
            for piece, values in self.chunks(target, shard):
                piece.copy_(values)

    def equals(self, target: Tensor, shard: Shard | None = None) -> bool:
        """Whether `target` holds what `load` would write to it."""
        return all(torch.equal(piece, values.to(piece)) for piece, values in self.chunks(target, shard))

    def check(self, target: Tensor, shard: Shard | None = None) -> None:
        """Raises WeightsError as `chunks` does; reads nothing."""
        self._check_shape(target, shard)
        self._plain_dtype(target)

    def nbytes(self, shard: Shard | None = None) -> int:
        """The stored bytes of a shard, of the whole tensor for None."""
        size = self.end - self.begin
        return size * (shard.end - shard.begin) // self.shape[shard.dim] if shard and size else size

    def _check_shape(self, target: Tensor, shard: Shard | None) -> None:
        expected: list[int | str] = list(target.shape)
        found = list(self.shape)
        if is_scale(self.name):  # one number is stored as [] or [1], a number per row as [rows] or [rows, 1]
            found = found[: max(1, len(expected))] if all(n == 1 for n in found[len(expected):]) else found
            found = found or [1]
        if shard is not None and len(found) == len(expected) and found[shard.dim] >= shard.end:
            found[shard.dim] = shard.end - shard.begin
        if found != expected:
            if shard is not None:
                expected[shard.dim] = f"at least {shard.end}"
            raise WeightsError(f"{self.file}: {self.name}: expected shape {expected}, got {list(self.shape)}")

    def _plain_dtype(self, target: Tensor) -> torch.dtype:
        """FP8 is read as such, where there are scales for it, and nothing else is."""
        fp8 = target.dtype == torch.float8_e4m3fn
        accepted = list(FP8) if fp8 else [name for name in DTYPES if name not in FP8 + SCALES or
                                          name in SCALES and is_scale(self.name)]
        if self.dtype not in accepted:
            hint = "config.json's quantization_config says FP8" if fp8 else (
                "config.json has no quantization_config that says so" if self.dtype in DTYPES else
                "such weights are not served")
            raise WeightsError(f"{self.file}: {self.name}: expected dtype {', '.join(accepted)}, got {self.dtype}; "
                               f"{hint}")
        return DTYPES[self.dtype]

    def _read(self, f: io.FileIO, out: Tensor, start: int, shard: Shard | None) -> None:
        """Fill the 1-D `out` with the shard's elements from `start` on, in the shard's order. A shard is one run of
        elements per index of the dimensions before its own: one for rows, one per row for columns."""
        if out.numel() == 0:
            return
        run = stride = math.prod(self.shape)
        first = 0
        if shard is not None:
            inner = math.prod(self.shape[shard.dim + 1 :])
            run, stride, first = ((n * inner) for n in (shard.end - shard.begin, self.shape[shard.dim], shard.begin))
        size, raw = out.element_size(), out.view(torch.uint8).numpy().data
        run, stride, done, total = run * size, stride * size, 0, out.numel() * size
        index, offset = divmod(start * size, run)
        at = self.begin + first * size
        if run < stride <= NEAR_BYTES:  # what lies between is other ranks', which read it soon, or is read in passing
            begin, end = at + index * stride, at + -(-(start * size + total) // run) * stride
            os.posix_fadvise(f.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)
        while done < total:
            count = min(run - offset, total - done)
            self._fill(f, raw[done : done + count], at + index * stride + offset)
            index, offset, done = index + 1, 0, done + count

    def _fill(self, f: io.FileIO, raw: memoryview, at: int) -> None:
        while len(raw):
            count = os.preadv(f.fileno(), (raw,), at)
            if not count:
                raise WeightsError(f"{self.file}: {self.name}: the file ended {len(raw)} bytes early; fetch it again")
            raw, at = raw[count:], at + count


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder` by name, after checking that its files are all there and whole.

    Raises WeightsError for a folder without safetensors, a file that is missing, truncated or not safetensors, and a
    tensor that the index expects in a file that does not have it.
    """
    index = folder / INDEX
    if index.exists():
        file_of = _read_index(index)
        files = sorted({folder / file for file in file_of.values()})
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise WeightsError(f"{folder}: {len(missing)} of {len(files)} weight files named in {INDEX} are missing: "
                               f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; fetch them again")
        tensors = {name: tensor for file in files for name, tensor in read_header(file).items()}
        for name, file in file_of.items():
            if name not in tensors:
                raise WeightsError(f"{folder / file}: {name}: expected here by {INDEX}, but the file does not have it")
        return tensors
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern))
        found = f"found {', '.join(other[:3])}, which wave64 does not read" if other else "found no weights"
        raise WeightsError(f"{folder}: expected model.safetensors or {INDEX}, {found}")
    single = folder / "model.safetensors"
    if single in files:
        return read_header(single)
    if len(files) > 1:
        raise WeightsError(f"{folder / INDEX}: expected one for {len(files)} safetensors files, got none; fetch it")
    return read_header(files[0])


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if odd := [file for file in weight_map.values() if not _is_file_name(file)]:
            raise ValueError(f"weight_map has a value that is not the name of a file of this folder: {odd[0]!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise WeightsError(f"{index}: expected JSON with a weight_map of tensor names to files: {e!r}") from None
    return weight_map


def _is_file_name(name: object) -> bool:
    """Whether a name stays within its folder, on every system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(name) < 256


def _count(name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name}: expected a size or an offset, got {value!r}")
    return value


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises WeightsError unless the header is sound and the file has the very
    length the header asks for."""
    if not file.is_file():  # opening a pipe would wait for ever
        raise WeightsError(f"{file}: expected a safetensors file, got {'something else' if file.exists() else 'none'}")
    size = file.stat().st_size
    with file.open("rb") as f:
        prefix = f.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= size - 8:
            raise WeightsError(f"{file}: expected a safetensors file, got {size} bytes, {length} of them header; "
                               "fetch it again")
        if length > MAX_HEADER:
            raise WeightsError(f"{file}: expected a safetensors header of at most {MAX_HEADER} bytes, got {length}")
        header = f.read(length)
    data = 8 + length
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {}
        for name, entry in entries.items():
            begin, end = (data + _count(name, offset) for offset in entry["data_offsets"])
            shape = tuple(_count(name, n) for n in entry["shape"])
            tensors[name] = StoredTensor(file, name, str(entry["dtype"]), shape, begin, end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise WeightsError(f"{file}: the safetensors header is damaged: {e!r}") from None
    for t in tensors.values():
        itemsize = DTYPES[t.dtype].itemsize if t.dtype in DTYPES else None
        if not data <= t.begin <= t.end or (itemsize and t.end - t.begin != itemsize * math.prod(t.shape)):
            raise WeightsError(f"{file}: {t.name}: the header is damaged: {t.end - t.begin} bytes for "
                               f"{t.dtype} {list(t.shape)}")
    end = max((t.end for t in tensors.values()), default=data)
    if size != end:
        last = max(tensors.values(), key=lambda t: t.end).name if tensors else "the header"
        raise WeightsError(f"{file}: expected {end} bytes up to the end of {last}, got {size}; "
                           f"{'it is truncated, fetch it again' if size < end else 'something was appended'}")
    return tensors
