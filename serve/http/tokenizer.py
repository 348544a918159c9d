"""Text to token ids and back, and chat messages to text, from the files of a Hugging Face folder. No torch.

Read: tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja. A folder that has only a
SentencePiece model goes through transformers, which converts it (and which imports torch, hence not first).
"""

import json
import logging
import re
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from wave64.serve.http import template_process
from wave64.serve.http.templates import Template, TemplateError

log = logging.getLogger("wave64")

TOKEN_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class TokenizerError(ValueError):
    """A tokenizer that cannot be read; names the file."""


class Tokenizer:
    """encode and decode of one model, and the source of its chat template. Safe to call from several threads.

    Whether a text begins with bos and ends with eos is what tokenizer_config.json says under add_bos_token and
    add_eos_token; where it does not, what tokenizer.json's post-processor does.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        """`chat_template` is a Jinja file to use in place of the folder's. Raises TokenizerError, whatever the files
        hold."""
        try:
            self._read(folder, chat_template)
        except TokenizerError:
            raise
        except BaseException as error:  # the library checks its file when it uses it, and panics, which is no Exception
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise TokenizerError(f"{folder}: not a tokenizer: {type(error).__name__}: {error}") from None
            raise

    def _read(self, folder: Path, chat_template: str | None) -> None:
        config = _read_json(folder / "tokenizer_config.json")
        self._backend = _load_backend(folder, config)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special = {**_special_tokens(_read_json(folder / "special_tokens_map.json")), **_special_tokens(config)}
        try:
            self._add_tokens_of_config(config.get("added_tokens_decoder") or {})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TokenizerError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: expected ids with "
                                 f"their tokens: {error!r}") from None  # fmt: skip
        self._add_missing_special_tokens()
        self.vocab_size = self._backend.get_vocab_size()
        self.longest_token = max(map(len, self._backend.get_vocab()), default=1)
        self.added_ids = self._added_ids()
        self._before, self._after = self._surroundings(config)
        self.template_source, file = _read_template(folder, config, chat_template)
        try:
            Template(self.template_source)
        except TemplateError as error:
            raise TokenizerError(f"{file}: {error}") from None
        self._is_byte_level = "ByteLevel" in repr(self._backend.decoder)
        self.token_text = lru_cache(maxsize=1 << 16)(self._token_text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, with the tokenizer's own bos and eos where it adds them; a bos that the text begins with,
        as one that a chat template made does, is not doubled. Raises TokenizerError if `text` holds half a surrogate
        pair, which no UTF-8 has."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of some texts, as encode() gives them, on several cores and without holding up other threads."""
        try:
            found = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError) as error:
            raise TokenizerError(f"the text is not valid Unicode: {error}") from None
        return [self._surround(ids) for ids in found] if add_special_tokens else found

    def _surround(self, ids: list[int]) -> list[int]:
        before = self._before
        if before and ids[: len(before)] == before:
            before = []
        return before + ids + self._after

    @property
    def definition(self) -> str:
        """It all, as in a tokenizer.json."""
        return self._backend.to_str()

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; an incomplete UTF-8 character becomes U+FFFD, an id without a token nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _token_text(self, token_id: int) -> str:
        """The text of a token in the middle of a text: with its leading space, if it has one."""
        once = self.decode([token_id], skip_special_tokens=False)
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(once) :]

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token, exact also where it is a part of a character."""
        text = self.token_text(token_id)
        if "\ufffd" not in text:
            return text.encode()
        name = self._backend.id_to_token(token_id)
        assert name is not None  # an id without a token has no text
        if match := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(match[1])
        if self._is_byte_level:
            return bytes(_BYTE_OF[c] for c in name)
        return text.encode()

    def template_variables(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """The variables of a template, the messages excepted."""
        return {"tools": None, "documents": None, "add_generation_prompt": True, **self.special, **chosen}

    def _add_tokens_of_config(self, declared: dict[str, Any]) -> None:
        """Tokens of tokenizer_config.json's added_tokens_decoder that tokenizer.json lacks, or knows as ordinary ones.
        The library numbers new tokens itself; one that would get another id than declared is left out, with a warning.
        """
        known = self._backend.get_added_tokens_decoder()
        for token_id, spec in sorted((int(key), spec) for key, spec in declared.items()):
            flags = {name: spec[name] for name in TOKEN_FLAGS if name in spec}
            token = tokenizers.AddedToken(spec["content"], **flags)
            had = known.get(token_id)
            if had is not None and (had.content, had.special) == (token.content, token.special):
                continue
            vocab = self._backend.get_vocab()
            given = vocab.get(token.content, max(vocab.values(), default=-1) + 1)
            if given != token_id:
                log.warning("tokenizer_config.json: added_tokens_decoder: %r is declared as id %d and would get %d; it "
                            "is left out", token.content, token_id, given)  # fmt: skip
            elif token.special:
                self._backend.add_special_tokens([token])
            else:
                self._backend.add_tokens([token])

    def _added_ids(self) -> dict[str, int]:
        """text -> id of the tokens that no text is split for: the special ones, and markers that are not marked so"""
        added = self._backend.get_added_tokens_decoder()
        named = {text: self._backend.token_to_id(text) for text in self.special.values()}
        known = {text: token_id for text, token_id in named.items() if token_id is not None}
        return known | {token.content: token_id for token_id, token in added.items()}

    def _surroundings(self, config: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The ids that are added before and after every text."""
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

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: eos, and the added token that the chat template puts behind an assistant's
        message, which is another one in many chat models (and not marked as special in some). Runs the template, in a
        process that is ended where it takes too long."""
        found = [self.added_ids.get(self.special.get("eos_token", ""))]
        if self.template_source:
            said = "answered"
            turns = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": said}]
            variables = self.template_variables({"add_generation_prompt": False})
            try:
                text = template_process.render_once(self.template_source, turns, variables)
            except TemplateError:  # it wants other conversations than this one
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
        value = json.loads(_read_text(file))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: expected JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{file}: expected a JSON object, got {json.dumps(value)[:60]}")
    return value


def _read_text(file: Path) -> str:
    """Raises FileNotFoundError, and TokenizerError for unreadable files."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{file}: cannot be read: {error}") from None


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
    """bos_token, eos_token, ... as text; the files have either the text or an object with it."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _read_template(folder: Path, config: dict[str, Any], chosen: str | None) -> tuple[str, Path]:
    """The source of the chat template, empty without one, and its file."""
    file = Path(chosen) if chosen else folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file), file
    if chosen:
        raise TokenizerError(f"--chat-template: {chosen}: no such file")
    source = config.get("chat_template")
    file = folder / "tokenizer_config.json"
    if isinstance(source, list):  # several, by name
        named = [item for item in source if isinstance(item, dict) and item.get("name") == "default"]
        source = named[-1].get("template") if named else None
    if source is not None and not isinstance(source, str):
        raise TokenizerError(f"{file}: chat_template: expected a text, or a list of them with names, got "
                             f"{json.dumps(source)[:60]}")  # fmt: skip
    return source or "", file


def _byte_of() -> dict[str, int]:
    """The alphabet of byte-level tokenizers, inverted: printable Latin-1 maps to itself, the rest to higher codes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(moved)}


_BYTE_OF = _byte_of()
