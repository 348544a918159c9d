"""A checkpoint folder as a set of named tensors: safetensors files, one or many, with or without an index.

The format is eight bytes of header length, a JSON header, then the tensors' bytes back to back, little-endian.
Files are read, not mapped, straight into the memory where a tensor is to live where dtypes agree and that memory is
the host's, else through a small buffer: so a load never needs more than the model itself.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn}
BUFFER_BYTES = 16 << 20
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library


class WeightsError(ValueError):
    """Weights that cannot be loaded; names the file and the tensor, what was expected and what was found."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; its bytes are [begin, end) of the file."""

    file: Path
    name: str
    dtype: str  # as the file spells it: F32, BF16, ...
    shape: tuple[int, ...]
    begin: int
    end: int

    def chunks(self, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(piece of `target`, the stored values of it in their own dtype, on the host), front to back.

        target  contiguous, of this tensor's shape, any floating dtype and device
        raises  WeightsError for another shape, or a dtype that holds no plain floating-point numbers
        """
        if tuple(target.shape) != self.shape:
            raise WeightsError(f"{self.file}: {self.name}: expected shape {list(target.shape)}, got {list(self.shape)}")
        dtype = self._plain_dtype(target)
        flat = target.view(-1)
        step = BUFFER_BYTES // dtype.itemsize
        buffer = torch.empty(min(step, flat.numel()), dtype=dtype, device="cpu")
        with self.file.open("rb") as f:
            f.seek(self.begin)
            for start in range(0, flat.numel(), step):
                piece = flat[start : start + step]
                values = buffer[: piece.numel()]
                self._read(f, values)
                yield piece, values

    def load(self, target: Tensor) -> None:
        """Fills `target`, converting to its dtype; requirements as for `chunks`."""
        if target.device.type == "cpu" and target.dtype == DTYPES.get(self.dtype) and tuple(target.shape) == self.shape:
            with self.file.open("rb", buffering=0) as f:
                f.seek(self.begin)
                self._read(f, target)
        else:
            for piece, values in self.chunks(target):
                piece.copy_(values)

    def equals(self, target: Tensor) -> bool:
        """Whether `target` holds what `load` would put there."""
        return all(torch.equal(piece, values.to(piece)) for piece, values in self.chunks(target))

    def _plain_dtype(self, target: Tensor) -> torch.dtype:
        """FP8 is read as such, where there are scales for it, and nothing else is."""
        fp8 = target.dtype == torch.float8_e4m3fn
        accepted = ["F8_E4M3"] if fp8 else [name for name in DTYPES if name != "F8_E4M3"]
        if self.dtype not in accepted:
            hint = "config.json's quantization_config says FP8" if fp8 else (
                "config.json has no quantization_config that says so" if self.dtype in DTYPES else
                "such weights are not served")
            raise WeightsError(f"{self.file}: {self.name}: expected dtype {', '.join(accepted)}, got {self.dtype}; "
                               f"{hint}")
        return DTYPES[self.dtype]

    def _read(self, f, target: Tensor) -> None:
        if target.numel() == 0:
            return
        raw = memoryview(target.view(-1).view(torch.uint8).numpy())
        while len(raw):
            count = f.readinto(raw)
            if not count:
                raise WeightsError(f"{self.file}: {self.name}: the file ended {len(raw)} bytes early; fetch it again")
            raw = raw[count:]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder` by name, after checking that its files are all there and whole.

    Raises WeightsError for a folder without safetensors, a file that is missing, truncated or not safetensors, and a
    tensor that the index places in a file that does not have it.
    """
    index = folder / INDEX
    if index.exists():
        placed = _read_index(index)
        files = sorted({folder / file for file in placed.values()})
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise WeightsError(f"{folder}: {len(missing)} of {len(files)} weight files named in {INDEX} are missing: "
                               f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; fetch them again")
        tensors = {name: tensor for file in files for name, tensor in read_header(file).items()}
        for name, file in placed.items():
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
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if odd := [file for file in placed.values() if not _is_file_name(file)]:
            raise ValueError(f"weight_map has a value that is not the name of a file of this folder: {odd[0]!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise WeightsError(f"{index}: expected JSON with a weight_map of tensor names to files: {e!r}") from None
    return placed


def _is_file_name(name: object) -> bool:
    """Whether a name stays within its folder, on every system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises WeightsError unless the header is sound and the file has the very
    length the header asks for."""
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
            begin, end = (data + int(offset) for offset in entry["data_offsets"])
            tensors[name] = StoredTensor(file, name, str(entry["dtype"]), tuple(map(int, entry["shape"])), begin, end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise WeightsError(f"{file}: the safetensors header is damaged: {e!r}") from None
    for t in tensors.values():
        itemsize = DTYPES[t.dtype].itemsize if t.dtype in DTYPES else None
        if not data <= t.begin <= t.end or (itemsize and t.end - t.begin != itemsize * torch.Size(t.shape).numel()):
            raise WeightsError(f"{file}: {t.name}: the header is damaged: {t.end - t.begin} bytes for "
                               f"{t.dtype} {list(t.shape)}")
    end = max((t.end for t in tensors.values()), default=data)
    if size != end:
        last = max(tensors.values(), key=lambda t: t.end).name if tensors else "the header"
        raise WeightsError(f"{file}: expected {end} bytes up to the end of {last}, got {size}; "
                           f"{'it is truncated, fetch it again' if size < end else 'something was appended'}")
    return tensors
