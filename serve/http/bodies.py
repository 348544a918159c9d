"""From the bytes of a body to its model in `schemas`, or to a sentence on what is wrong with it and where."""

from codecs import BOM_UTF8
from typing import Any, TypeVar

from pydantic import ValidationError

from wave64.serve.http.schemas import ApiError, Body, short

MAX_PARTS = 1 << 17  # strings, lists and objects of a body
MAX_VALUES = 1 << 21  # of a body, token ids among them

T = TypeVar("T", bound=Body)


def parse(model: type[T], raw: bytes) -> T:
    """The body of a request. Raises ApiError that says what is wrong with it and where."""
    raw = raw.removeprefix(BOM_UTF8)
    _check_amounts(raw)
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        got = f"byte 0x{raw[error.start]:02x} at position {error.start}"
        raise ApiError(f"the body: expected JSON in UTF-8, got {got}", code="invalid_utf8") from None
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise in_words(error) from None


def _check_amounts(raw: bytes) -> None:
    """Raises ApiError for a body of so many values that reading it would hold up what else is served, or take all
    memory: each byte of it may become a hundred. Counts without making any of them."""
    if raw.count(b'"') + sum(map(raw.count, (b"[", b"{", b","))) <= MAX_PARTS:
        return  # there is no more of anything
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # quotes that are left begin and end strings
    parts, values = bare.count(b'"') // 2, 0
    if parts <= MAX_PARTS:
        outside = b"".join(bare.split(b'"')[::2])
        parts, values = parts + outside.count(b"[") + outside.count(b"{"), outside.count(b",") + 1
    for limit, got, of in ((MAX_PARTS, parts, "strings, lists and objects"), (MAX_VALUES, values, "values")):
        if got > limit:
            raise ApiError(f"the body: expected at most {limit} {of}, got {got}", code="body_too_large", status=413)


def in_words(error: ValidationError) -> ApiError:
    """The fault that pydantic found deepest in the body; of a union's branches there, all in one sentence."""
    faults = [(_path(fault["loc"]), fault) for fault in error.errors(include_url=False)]
    path, first = max(faults, key=lambda found: len(found[0]))  # the first of the deepest
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".") or "the body"
    param = str(path[0]) if path else None
    if first["type"] == "json_invalid" and "ctx" in first:
        return ApiError(f"the body: expected JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "missing":
        return ApiError(f"{where}: required", param, "missing")
    wanted = ", or ".join(dict.fromkeys(_wanted(fault) for at, fault in faults if at == path))
    return ApiError(f"{where}: expected {wanted}, got {short(first['input'])}", param, first["type"])


def _path(loc: tuple[int | str, ...]) -> list[int | str]:
    """The fields and indices of pydantic's path, without the names of the types it tried."""
    types = ("str", "int", "bool", "float")
    return [p for p in loc if isinstance(p, int) or not (p[:1].isupper() or "[" in p or "-" in p or p in types)]


def _wanted(fault: Any) -> str:
    if fault["type"] == "too_short":
        return f"at least {fault['ctx']['min_length']} of them"
    if fault["type"] == "too_long":
        return f"at most {fault['ctx']['max_length']} of them"
    text = fault["msg"].removeprefix("Input should be ")
    return f"a value {text}" if text.startswith(("greater", "less")) else text
