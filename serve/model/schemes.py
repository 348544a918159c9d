"""How the linear layers of a checkpoint are stored in FP8: a scheme for each, found by its name."""

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Scheme:
    """One linear layer's weight in FP8 (e4m3fn), and how its input is quantized.

    weight       what has a stored scale: "tensor", "channel" (each output feature) or "block"
    activations  "static": one stored scale; "token": each token gets one at run time; "group": each token's groups of
                 a block's columns do
    block        rows and columns of a block
    scale_name   of the stored scales, next to `weight`
    ue8m0        activations' scales are powers of two (groups only)
    bound        activations count as at most this large; None: as they are
    """

    weight: str
    activations: str
    block: tuple[int, int] | None = None
    scale_name: str = "weight_scale"
    ue8m0: bool = False
    bound: float | None = None


@dataclass(frozen=True)
class CacheScheme:
    """Stored names, within a layer, of the scales of keys and values; per_head: one for each KV head, not for all."""

    k_scale: str
    v_scale: str
    per_head: bool = False


@dataclass(frozen=True)
class Schemes:
    """The scheme of each linear layer; a layer without one is stored in a dtype of 16 or 32 bits.

    plain      patterns of the names of layers without one
    by_name    (pattern, scheme), the first that matches
    default    of all others
    kv_scales  of keys and values; None: there are none
    online     weights are stored plain, and quantized while they are loaded
    prefix     of the names that `of` is asked for
    method     as quantization_config calls it
    """

    plain: tuple[str, ...] = ()
    by_name: tuple[tuple[str, Scheme | None], ...] = ()
    default: Scheme | None = None
    kv_scales: CacheScheme | None = None
    online: bool = False
    prefix: str = ""
    method: str = "fp8"

    def of(self, name: str) -> Scheme | None:
        name = self.prefix + name
        if any(matches(pattern, name) for pattern in self.plain):
            return None
        return next((scheme for pattern, scheme in self.by_name if matches(pattern, name)), self.default)

    def within(self, prefix: str) -> "Schemes":
        return replace(self, prefix=self.prefix + prefix)


#: `--quantization fp8`: of a checkpoint with plain weights
ONLINE = Schemes(plain=("lm_head",), default=Scheme("channel", "token"), online=True)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a quantization_config means the layer `name`: "re:" and a regular expression of its
    beginning, a shell's pattern, or whole components of the name at its end or beginning. Tools differ in which of
    these they write; no pattern of one means something else to another."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatchcase(name, pattern) or name.endswith(f".{pattern}") or name.startswith(f"{pattern}.")
