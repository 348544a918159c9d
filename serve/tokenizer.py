"""Text to token ids and back, and chat messages to text, from the files of a Hugging Face folder. No torch.

Read: tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja. A folder that has only a
SentencePiece model goes through transformers, which converts it (and which imports torch, hence not first).
"""

import json
import re
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or a chat that its template refuses; names the file or the template's reason."""


class Tokenizer:
    """encode, decode and apply_chat_template of one model. Safe to call from several threads.

    Whether a text begins with bos and ends with eos is what tokenizer_config.json says under add_bos_token and
    add_eos_token; where it does not, what tokenizer.json's post-processor does.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        """`chat_template` is a Jinja file to use in place of the folder's. Raises TokenizerError."""
        config = _read_json(folder / "tokenizer_config.json")
        self._backend = _load_backend(folder, config)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special = {**_special_tokens(_read_json(folder / "special_tokens_map.json")), **_special_tokens(config)}
        self._add_missing_special_tokens()
        self.vocab_size = self._backend.get_vocab_size()
        self.longest_token = max(map(len, self._backend.get_vocab()), default=1)
        self._template = _load_template(folder, config, chat_template)
        self.added_ids = self._added_ids()
        self._before, self._after = self._surroundings(config)
        self.end_ids = self._end_ids()
        self._is_byte_level = "ByteLevel" in repr(self._backend.decoder)
        self.token_text = lru_cache(maxsize=1 << 16)(self._token_text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with the tokenizer's own bos and eos where it adds them; a bos that the text begins with,
        as one that a chat template made does, is not doubled. Raises TokenizerError if `text` holds half a surrogate
        pair, which no UTF-8 has."""
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizerError(f"the text is not valid Unicode: {error}") from None
        if not add_special_tokens:
            return ids
        before = self._before
        if before and ids[: len(before)] == before:
            before = []
        return before + ids + self._after

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; an incomplete UTF-8 character becomes U+FFFD, an id without a token nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _token_text(self, token_id: int) -> str:
        """What this token adds to a text that it stands in the middle of: with its leading space, where it has one."""
        once = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token, exact also where it is a part of a character."""
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text.encode()
        name = self._backend.id_to_token(token_id)
        if match := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(match[1])
        if self._is_byte_level:
            return bytes(_BYTE_OF[c] for c in name)
        return text.encode()

    def apply_chat_template(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The prompt text of a conversation, up to where the assistant begins to speak. Raises TokenizerError."""
        if self._template is None:
            raise TokenizerError("this model has no chat template: start the server with --chat-template FILE, "
                                 "or use /v1/completions")
        values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self._template.render({**values, **self.special, **variables})
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TokenizerError(f"the chat template refuses these messages: {error}") from None

    def _added_ids(self) -> dict[str, int]:
        """text -> id of the tokens that no text is split for: the special ones, and markers that are not marked so"""
        added = self._backend.get_added_tokens_decoder()
        named = {text: self._backend.token_to_id(text) for text in self.special.values()}
        return named | {token.content: token_id for token_id, token in added.items()}

    def _surroundings(self, config: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The ids that are put before and behind every text."""
        text = "a"
        inner = self._backend.encode(text, add_special_tokens=False).ids
        whole = self._backend.encode(text, add_special_tokens=True).ids
        at = next((i for i in range(len(whole)) if inner and whole[i : i + len(inner)] == inner), len(whole))
        sides = [whole[:at], whole[at + len(inner) :]]
        for side, (flag, name) in enumerate((("add_bos_token", "bos_token"), ("add_eos_token", "eos_token"))):
            if isinstance(config.get(flag), bool):
                own = self.added_ids.get(self.special.get(name, ""))
                others = [i for i in sides[side] if i != own]
                added = [own] if config[flag] and own is not None else []
                sides[side] = others + added if side else added + others
        return sides[0], sides[1]

    def _end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: eos, and the added token that the chat template puts behind an assistant's
        message, which is another one in many chat models (and not marked as special in some)."""
        found = [self.added_ids.get(self.special.get("eos_token", ""))]
        if self._template is not None:
            said = "answered"
            turns = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": said}]
            try:
                text = self.apply_chat_template(turns, add_generation_prompt=False)
            except Exception:  # it wants other conversations than this one, and says so in whatever way
                text = ""
            behind = text.rpartition(said)[2].lstrip() if said in text else ""
            ends = [name for name in self.added_ids if name and behind.startswith(name)]
            ends = [name for name in ends if name != self.special.get("bos_token")]
            found.append(self.added_ids[max(ends, key=len)] if ends else None)
        return frozenset(i for i in found if i is not None)

    def _add_missing_special_tokens(self) -> None:
        known = self._backend.get_vocab()
        missing = [name for name in self.special.values() if name not in known]
        self._backend.add_special_tokens(missing)


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is no such file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(f"{file}: expected JSON: {error}") from None


def _load_backend(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise TokenizerError(f"{file}: not a tokenizer: {error}") from None
    if not any(folder.glob("*.model")):
        raise TokenizerError(f"{folder}: no tokenizer.json and no tokenizer.model; give one with --tokenizer-path")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # whatever transformers could not convert
        raise TokenizerError(f"{folder}: transformers cannot read this tokenizer: {error}") from None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; the files hold either the text or an object around it."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _load_template(folder: Path, config: dict[str, Any], chosen: str | None) -> jinja2.Template | None:
    """The chat template, compiled in the environment that templates are written for (transformers' documented one)."""
    file = Path(chosen) if chosen else folder / "chat_template.jinja"
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    elif chosen:
        raise TokenizerError(f"--chat-template: {chosen}: no such file")
    else:
        source = config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {item["name"]: item["template"] for item in source}.get("default")
    if not source:
        return None
    extensions = [loopcontrols, _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"{file}: not a Jinja template: {error}") from None


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %} marks what a model is trained on; to a prompt it makes no difference."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})  # Jinja's own escapes HTML


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _byte_of() -> dict[str, int]:
    """The alphabet of byte-level tokenizers, inverted: printable Latin-1 stands for itself, the rest are moved up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(moved)}


_BYTE_OF = _byte_of()
