"""The code objects of AITER's hand-written assembly, as PyPI's wheel `amd-aiter` has them, and how many of them the
emulator decodes and binds. They are read where the user's pip put them, and never shipped."""

import collections
import hashlib
import importlib.metadata
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from wave64.testing.emulator import code_object, forms
from wave64.testing.emulator.binding import Binding
from wave64.testing.emulator.decode import decode
from wave64.testing.emulator.machine import Machine, Program, Shape

VERSION = "0.1.7.post2.dev18"
SHA256 = "2d227046075bdf6b3b9fa0d6693c8c8654a36ec85d930f9767fc4fa06254d712"  # of the objects, see Objects.digest
HOW = (f"python -m pip download --no-deps amd-aiter=={VERSION}, and --hsa WHEEL; or pip install it, or give --hsa the "
       "hsa folder that is in it")
#: objects that only AITER's repository has, as of a commit, in its own hsa folder -> their SHA-256
COMMIT = "e4048607"
NEWER = {
    "gfx942/fp8gemm_blockscale/fp8gemm_bf16_blockscale_BpreShuffle_32x128.co":
        "3d1acfd1e5bf6f16816334d8aede37f93af0cbb3f0d6030dddb1deacf7e38d8f",
    "gfx942/fp8gemm_blockscale/fp8gemm_bf16_blockscale_BpreShuffle_64x128.co":
        "b3b0814cdfc6be1cc838ba7e9065aa763dc2dcd72eb0c26afda31efab2884736",
    "gfx942/fp8gemm_blockscale/fp8gemm_bf16_blockscale_BpreShuffle_128x128.co":
        "de905e406509c62f78d0760a36e762f7de89ded5d39fd3f98062eb58a8078b99",
    "gfx942/mla/mla_a8w8_qh64_qseqlen1_gqaratio64_v3_ps.co":
        "f3bd626a1bc04d9849f39610d009b7e45b8bb07c9cebe4882d6e294039fb066b",
}
END = bytes.fromhex("000081bf")  # s_endpgm


class Objects:
    """Names, as "gfx942/mla/name.co", and bytes. Raises FileNotFoundError where there are none."""

    def __init__(self, source: Path | None = None, repository: Path | None = None):
        """source: an hsa folder, or the wheel; else that of the installed wheel. repository: the hsa folder of AITER's
        repository, for objects that are newer."""
        self.repository = repository
        source = source or installed()
        if source is None or not source.exists():
            raise FileNotFoundError(f"expected AITER's code objects, got {source or 'no installed amd-aiter'}: {HOW}")
        self.wheel = zipfile.ZipFile(source) if source.is_file() else None
        if self.wheel:
            paths = {name.partition("/hsa/")[2]: name for name in self.wheel.namelist() if "/hsa/" in name}
        else:
            paths = {str(path.relative_to(source)): str(path) for path in source.rglob("*.co")}
        self.paths = {name: paths[name] for name in sorted(paths) if name.endswith(".co")}

    def lacks(self, name: str) -> str | None:
        """None, or why the object is not there."""
        if name in self.paths or self.repository is not None and name in NEWER:
            return None
        return f"not in the wheel; --repository, hsa of AITER's repository at {COMMIT}, has {name}"

    def read(self, name: str) -> bytes:
        """Raises ValueError where a newer object is another one than COMMIT's."""
        if name not in self.paths and self.repository is not None:
            found = (self.repository / name).read_bytes()
            if hashlib.sha256(found).hexdigest() != NEWER[name]:
                raise ValueError(f"repository: expected the {name} of {COMMIT}, got another one")
            return found
        return self.wheel.read(self.paths[name]) if self.wheel else Path(self.paths[name]).read_bytes()

    def of(self, arch: str) -> list[str]:
        return [name for name in self.paths if name.startswith(f"{arch}/")]

    def digest(self) -> str:
        """SHA-256 over name, a zero, and SHA-256 of each object, in order of names."""
        whole = hashlib.sha256()
        for name in self.paths:
            whole.update(name.encode() + b"\0" + hashlib.sha256(self.read(name)).digest())
        return whole.hexdigest()

    def verify(self) -> None:
        """Raises ValueError where these are not the objects of VERSION."""
        if (got := self.digest()) != SHA256:
            raise ValueError(f"hsa: expected the {VERSION} objects (SHA-256 {SHA256[:12]}), got {got[:12]}: {HOW}")


def installed() -> Path | None:
    """The hsa folder of the installed wheel."""
    try:
        found = importlib.metadata.distribution("amd-aiter")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(found.locate_file("aiter_meta/hsa")))


# ---- coverage

@dataclass
class Coverage:
    """Of one family of objects. missing: why, -> how many objects."""

    objects: int = 0
    bound: int = 0
    missing: collections.Counter[str] = field(default_factory=collections.Counter)


def family_of(name: str) -> str:
    """The folder of an object, and of those in none what their names begin with."""
    parts = name.split("/")
    if len(parts) > 2:
        return parts[1]
    known = ("allreduce", "all_reduce", "fmoe", "pa_", "gemm", "flatmm", "layer_norm", "f8_block_scale")
    return next((each.strip("_") for each in known if parts[1].startswith(each)), parts[1])


class Scan:
    """Decodes and binds each instruction of code objects of an architecture, every encoding once."""

    def __init__(self):
        self.party = None
        self.seen: dict[bytes, tuple[int, str]] = {}  # bytes -> (dwords, what is missing)

    def missing(self, code: bytes) -> set[str]:
        """What the emulator lacks for an object."""
        try:
            loaded = code_object.CodeObject(code)
            if self.party is None:
                kernel = replace(next(iter(loaded.kernels.values())), vgprs=512, agpr_offset=256, lds_bytes=65536)
                machine = Machine(Program(loaded), kernel, Shape(1, 1, 65536), core="numpy")
                machine.start(1)
                self.party = machine.party(0, 1, 1)
        except NotImplementedError as e:
            return {str(e)}
        text, found, at = loaded.image[slice(*loaded.text)].tobytes(), set(), 0
        end = text.rfind(END)  # what lies behind the last one is padding
        while at <= end:
            words, lacks = self._one(text[at:at + 16])
            found.add(lacks)
            at += 4 * words
        return found - {""}

    def _one(self, code: bytes) -> tuple[int, str]:
        got = self.seen.get(code[:4]) or self.seen.get(code[:8]) or self.seen.get(code)
        if got is None:
            try:
                instruction = decode(code)
                words, lacks = instruction.words, ""
                try:
                    forms.lookup(instruction)(Binding(self.party, instruction, 0))
                except NotImplementedError as e:
                    lacks = f"{instruction.name}: {e}"
            except NotImplementedError as e:
                words, lacks = 1, str(e)
            got = self.seen[code[:4 * words]] = words, lacks
        return got


def coverage(objects: Objects, arch: str) -> dict[str, Coverage]:
    """Family -> how many of its objects decode and bind."""
    found: dict[str, Coverage] = {}
    scan = Scan()
    for name in objects.of(arch):
        each, missing = found.setdefault(family_of(name), Coverage()), scan.missing(objects.read(name))
        each.objects += 1
        each.bound += not missing
        each.missing.update(missing)
    return found


def table(found: dict[str, Coverage]) -> str:
    lines = ["| objects | decode and bind | of | missing |", "|---|---:|---:|---|"]
    for name, each in sorted(found.items()):
        missing = ", ".join(f"{why} ({count})" for why, count in each.missing.most_common(3))
        lines.append(f"| {name} | {each.bound} | {each.objects} | {missing} |")
    bound, objects = (sum(getattr(each, field) for each in found.values()) for field in ("bound", "objects"))
    return "\n".join([*lines, f"| all | {bound} | {objects} | {100 * bound / max(1, objects):.1f} % |"])
