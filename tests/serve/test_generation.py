"""What becomes of a request on its way to the engine and of tokens on their way back, without either process."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from helpers_server import VOCAB, make_tokenizer

from wave64.serve.args import ServerArgs
from wave64.serve.http.bodies import parse
from wave64.serve.http.generation import Generator
from wave64.serve.http.schemas import CompletionRequest, NativeSampling
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Output, Ready

NAMES = ("prompt", "max_tokens")
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer whose template ends turns by a token that is neither eos nor marked as special in all files."""
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    made = json.loads((path / "tokenizer.json").read_text())
    common = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    made["added_tokens"] += [dict(id=VOCAB, content="<|im_start|>", special=True, **common),
                             dict(id=VOCAB + 1, content="<|im_end|>", special=False, **common)]
    (path / "tokenizer.json").write_text(json.dumps(made))
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def generator(tokenizer, vocab_size=VOCAB + 2) -> Generator:
    ready = Ready(2048, 8192, vocab_size, "cpu", "float32", [], {})
    client = SimpleNamespace(ready=ready, lost=None)
    return Generator(ServerArgs(), client, tokenizer)


def choice(tokenizer, **body):
    made = generator(tokenizer).choices([5, 6], parse(CompletionRequest, json.dumps(body).encode()), 100, NAMES)
    return made[0]


def feed(choice, tokenizer, text: str, stop: int | None = None) -> list[int]:
    """Gives the tokens of `text` one by one, until the choice has ended, then `stop` as the engine's stop token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    for n, token in enumerate(ids):
        choice.feed(Output(choice.request.rid, [token]))
        if choice.finish_reason:
            return ids[: n + 1]
    if stop is not None:
        choice.feed(Output(choice.request.rid, [stop], "stop", stop))
    return ids


def test_a_chat_ends_at_eos_and_where_the_template_ends_a_turn(tokenizer):
    assert tokenizer.end_ids == {1, VOCAB + 1}
    assert choice(tokenizer).request.params.stop_token_ids == [1, VOCAB + 1]
    assert choice(tokenizer, stop_token_ids=[9, 1]).request.params.stop_token_ids == [1, 9, VOCAB + 1]
    assert choice(tokenizer, ignore_eos=True, stop_token_ids=[9]).request.params.stop_token_ids == [9]
    ended = choice(tokenizer)
    feed(ended, tokenizer, "so be it", VOCAB + 1)
    assert (ended.all.text, ended.finish_reason, ended.matched) == ("so be it", "stop", VOCAB + 1)


def test_ends_that_the_model_does_not_have_are_left_out(tokenizer):
    made = generator(tokenizer, VOCAB).choices([5], parse(CompletionRequest, b'{"stop": "<|im_end|>"}'), 9, NAMES)[0]
    assert made.request.params.stop_token_ids == [1]


@pytest.mark.parametrize("template", [
    "{{ raise_exception('only one turn') }}", "{{ messages[0].nothing.at.all }}", "{{ messages[2].content }}",
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}", None, "{{ messages[-1].content }}<|bos|>",
])  # fmt: skip
def test_a_template_that_tells_no_end_leaves_eos(folder, tmp_path, template):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).end_ids == {1}


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_stop_string_that_is_a_special_token_stops_at_it(tokenizer, shown, keep):
    """Whether or not special tokens are shown; <|im_start|> is no end of its own."""
    body = {"stop": ["never", "<|im_start|>"], "skip_special_tokens": not shown, "no_stop_trim": keep}
    ended = choice(tokenizer, ignore_eos=True, **body)
    assert ended.request.params.stop_token_ids == [VOCAB]
    feed(ended, tokenizer, "so be it", VOCAB)
    assert (ended.finish_reason, ended.matched) == ("stop", "<|im_start|>")
    assert ended.all.text == "so be it" + "<|im_start|>" * keep


def test_the_request_names_the_token_as_well_as_the_models_end(tokenizer):
    """The stop string is reported as the request wrote it."""
    ended = choice(tokenizer, stop="<|im_end|>")
    feed(ended, tokenizer, "so", VOCAB + 1)
    assert ended.matched == "<|im_end|>"


@pytest.mark.parametrize(("minimum", "text", "shown"), [
    (0, "a.b.c.d", "a"), (2, "a.b.c.d", "a.b"), (3, "a.b.c.d", "a.b"), (4, "a.b.c.d", "a.b.c"),
    (7, "a.b.c.d", "a.b.c.d"),
])  # fmt: skip
def test_stop_strings_wait_for_min_tokens(tokenizer, minimum, text, shown):
    """Every character is a token here; a stop string may end in the first token after the minimum."""
    ended = choice(tokenizer, stop=".", min_tokens=minimum)
    assert len(tokenizer.encode(text, add_special_tokens=False)) == len(text)
    used = feed(ended, tokenizer, text)
    if shown == text:
        ended.feed(Output(ended.request.rid, [], "length"))
    assert (ended.all.text, ended.matched) == (shown, None if shown == text else ".")
    assert len(used) > minimum or shown == text


def test_a_stop_string_may_begin_before_min_tokens(tokenizer):
    ended = choice(tokenizer, stop=["xyz", "y"], min_tokens=2)
    feed(ended, tokenizer, "xyz!")
    assert (ended.all.text, ended.matched) == ("", "xyz")


def test_sampling_of_the_native_endpoint_has_the_same_ends(tokenizer):
    made = generator(tokenizer).choices([5], NativeSampling(stop="<|im_start|>", ignore_eos=True), 9, NAMES)
    assert made[0].request.params.stop_token_ids == [VOCAB]


def test_an_empty_prompt_is_the_tokenizers_bos(tokenizer):
    assert asyncio.run(generator(tokenizer).encode([""], ["prompt"])) == [[0]]
