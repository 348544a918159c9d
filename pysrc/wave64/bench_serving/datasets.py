"""What is sent: rows of prompts, drawn from a seed."""

import json
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

Ids = list[int]
Json = dict[str, Any]

NAMES = ("sharegpt", "custom", "random", "random-ids", "generated-shared-prefix", "multi-turn")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class BadSetting(ValueError):
    """A flag or a file that cannot be used: which, what was expected and what was given."""


@dataclass
class Row:
    """One request, or the turns of one conversation."""

    turns: list[Any]  # text or token ids
    prompt_len: int  # tokens of the first turn, as the server counts them
    output_len: int  # tokens to generate, in each turn
    extra: Json = field(default_factory=dict)  # fields of its body
    encode: Callable[[str], Any] = list  # of a conversation in token ids


class Words:
    """The model's tokenizer, without transformers."""

    def __init__(self, tokenizer: Tokenizer, settings: Json) -> None:
        """settings: of tokenizer_config.json."""
        self._tokenizer, self._settings = tokenizer, settings
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=False)
        self.num_special = tokenizer.num_special_tokens_to_add(False)

    @classmethod
    def open(cls, name: str) -> "Words":
        """name: a folder, a tokenizer.json or a hub name. Raises BadSetting."""
        path = Path(name).expanduser()
        if not path.exists():
            import huggingface_hub  # only here: a local tokenizer needs no hub client

            try:
                path = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
            except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
                raise BadSetting(f"--tokenizer: expected a folder or a hub name, got {name}: {error}") from None
        file = path if path.is_file() else path / TOKENIZER_FILES[0]
        if not file.is_file():
            raise BadSetting(f"--tokenizer: expected a folder with {TOKENIZER_FILES[0]}, got {name}; "
                             "--dataset-name random-ids --tokenize-prompt needs none")  # fmt: skip
        settings = file.with_name(TOKENIZER_FILES[1])
        return cls(Tokenizer.from_file(str(file)), json.loads(settings.read_text()) if settings.is_file() else {})

    def encode(self, text: str, special: bool = True) -> Ids:
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def chat(self, text: str) -> str:
        """The prompt of a chat's first message, without what the tokenizer puts in front. Raises BadSetting."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        source = self._settings.get("chat_template")
        if not isinstance(source, str):
            raise BadSetting("--apply-chat-template: expected a chat_template in tokenizer_config.json, got none")
        tokens = {name: self._settings.get(name) or "" for name in ("bos_token", "eos_token")}
        names = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        made = environment.from_string(source).render(messages=[{"role": "user", "content": text}],
                                                      add_generation_prompt=True, **names)  # fmt: skip
        return made.removeprefix(names["bos_token"])


def lengths(rng: np.random.Generator, full: int, ratio: float, count: int) -> Ids:
    """`count` lengths, uniform from ratio * full, at least 1, to full."""
    return rng.integers(max(int(full * ratio), 1), full + 1, size=count).tolist()


def load(args: Namespace, words: Words | None, vocab_size: int) -> list[Row]:
    """The rows that the flags name. words: None where no tokenizer was found, and ids are sent. Raises BadSetting."""
    rng = np.random.default_rng(args.seed)
    name = args.dataset_name
    if name == "random-ids":
        return list(_random_ids(args, words, vocab_size, rng))
    if name == "multi-turn":
        return list(_multi_turn(args, words, vocab_size, rng))
    if words is None:
        raise BadSetting(f"--tokenizer: expected one for --dataset-name {name}, got none")
    if name == "generated-shared-prefix":
        return list(_shared_prefix(args, words, rng))
    if not args.dataset_path:
        raise BadSetting(f"--dataset-path: expected a local file for --dataset-name {name}, got none; random-ids and "
                         "generated-shared-prefix need none")  # fmt: skip
    pairs = _pairs(Path(args.dataset_path).expanduser(), is_jsonl=name == "custom")
    random.Random(args.seed).shuffle(pairs)
    rows = list(_random(args, words, pairs, rng) if name == "random" else _conversations(args, words, pairs))
    if not rows:
        raise BadSetting(f"--dataset-path: expected conversations of two turns, none in {args.dataset_path} fits")
    return rows


def _ids(rng: np.random.Generator, count: int, vocab_size: int) -> Ids:
    """`count` successive ids from anywhere in the vocabulary."""
    return [int(i) for i in (int(rng.integers(vocab_size)) + np.arange(count)) % vocab_size]


def _sent(args: Namespace, words: Words | None, ids: Ids) -> str | Ids:
    """Token ids as they are sent."""
    if args.tokenize_prompt:
        return ids
    if words is None:
        raise BadSetting("--tokenizer: expected one where text is sent, got none; --tokenize-prompt sends ids")
    return words.decode(ids)


def _random_ids(args: Namespace, words: Words | None, vocab_size: int, rng: np.random.Generator) -> Iterator[Row]:
    inputs = lengths(rng, args.random_input_len, args.random_range_ratio, args.num_prompts)
    outputs = lengths(rng, args.random_output_len, args.random_range_ratio, args.num_prompts)
    added = 0 if args.tokenize_prompt or words is None else words.num_special
    for input_len, output_len in zip(inputs, outputs, strict=True):
        count = max(1, input_len - added)
        yield Row([_sent(args, words, _ids(rng, count, vocab_size))], count, output_len)


def _random(args: Namespace, words: Words, pairs: list[tuple[str, str]], rng: np.random.Generator) -> Iterator[Row]:
    """Prompts of conversations, repeated or cut to random lengths."""
    inputs = lengths(rng, args.random_input_len, args.random_range_ratio, args.num_prompts)
    outputs = lengths(rng, args.random_output_len, args.random_range_ratio, args.num_prompts)
    texts = [ids for prompt, _ in pairs if (ids := words.encode(prompt))]
    for i, (input_len, output_len) in enumerate(zip(inputs, outputs, strict=True) if texts else ()):
        count, ids = max(1, input_len - words.num_special), texts[i % len(texts)]
        yield Row([_sent(args, words, (ids * -(-count // len(ids)))[:count])], count, output_len)


def _pairs(path: Path, is_jsonl: bool) -> list[tuple[str, str]]:
    """The first message and its answer of every conversation of a file: ShareGPT's JSON, or an object per line."""
    try:
        text = path.read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.splitlines() if line.strip()] if is_jsonl else json.loads(text)
        turns = [item.get("conversations", item.get("conversation", [])) for item in found]
        return [(_said(said[0]), _said(said[1])) for said in turns if len(said) >= 2]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        form = "an object with conversations per line" if is_jsonl else "a JSON list of objects with conversations"
        raise BadSetting(f"--dataset-path: expected {form}, got {path}: {type(error).__name__}: {error}") from None


def _said(turn: Json) -> str:
    return str(turn["content"] if "content" in turn else turn["value"])


def _conversations(args: Namespace, words: Words, pairs: list[tuple[str, str]]) -> Iterator[Row]:
    """First messages as they are, with as many tokens to generate as their answers have, or as a flag says."""
    count = 0
    for prompt, answer in pairs:
        if count == args.num_prompts:
            return
        prompt += args.prompt_suffix
        if args.apply_chat_template:
            prompt = words.chat(prompt)
        prompt_len = len(words.encode(prompt))
        output_len = args.sharegpt_output_len or len(words.encode(answer))
        limit = args.sharegpt_context_len
        if prompt_len < 2 or output_len < 2 or (limit and prompt_len + output_len > limit):
            continue
        count += 1
        yield Row([prompt], prompt_len, output_len)


def _shared_prefix(args: Namespace, words: Words, rng: np.random.Generator) -> Iterator[Row]:
    """Groups of prompts with a system prompt in common; several turns if asked for."""

    def text(length: int) -> str:
        return words.decode(rng.integers(words.vocab_size, size=length).tolist())

    groups, each, ratio = args.gsp_num_groups, args.gsp_prompts_per_group, args.gsp_range_ratio
    systems = [text(length) for length in lengths(rng, args.gsp_system_prompt_len, ratio, groups)]
    rows = []
    for system in systems:
        for output_len in lengths(rng, args.gsp_output_len, ratio, each):
            asked = [text(length) for length in lengths(rng, args.gsp_question_len, ratio, args.gsp_num_turns)]
            first = f"{system}\n\n{asked[0]}"
            rows.append(Row([first, *asked[1:]], len(words.encode(first)), output_len))
    if not args.gsp_ordered:
        random.Random(args.seed).shuffle(rows)
    yield from rows


def _multi_turn(args: Namespace, words: Words | None, vocab_size: int, rng: np.random.Generator) -> Iterator[Row]:
    """--num-prompts conversations of --num-turns turns; each adds --random-input-len tokens to what was said."""
    for output_len in lengths(rng, args.random_output_len, args.random_range_ratio, args.num_prompts):
        counts = lengths(rng, args.random_input_len, args.random_range_ratio, args.num_turns)
        turns = [_sent(args, words, _ids(rng, count, vocab_size)) for count in counts]
        if args.tokenize_prompt and words is None and args.num_turns > 1:
            raise BadSetting("--tokenizer: expected one, by which answers become ids of the next turn, got none")
        encode = (lambda text: words.encode(text, special=False)) if words is not None else list
        yield Row(turns, counts[0], output_len, encode=encode)
