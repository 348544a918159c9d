"""The tokenizer equals transformers'; text that arrives in pieces equals the text decoded at once."""

import json
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from wave64.serve.http import tokenizer as serving
from wave64.serve.http.detokenizer import Detokenizer, StopStrings
from wave64.serve.http.templates import Template, TemplateError

TEXT = (Path(__file__).parents[2] / "serve/demo/gettysburg.txt").read_text()
SAMPLES = ["Four score", " leading and  double  spaces", "你好世界" * 30, "naïve café — 你好, мир! 👩‍👩‍👧",
           "a\n\n\tb", "<|eos|> in text"]  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n{% if m.role not in ('user', 'assistant', 'system') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}{% if loop.index > 9 %}{% break %}{% endif %}"
    "<{{ m.role }}>{% generation %}{{ m.content | trim }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ {'é<': 1} | tojson }}"
)


def byte_level() -> Tokenizer:
    """Like Llama 3's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|bos|>", "<|eos|>"], initial_alphabet=alphabet)
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return made


def byte_fallback() -> Tokenizer:
    """Like Llama 2's: SentencePiece with bytes for what the vocabulary lacks."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(pieces)
    special = ["<unk>", "<|bos|>", "<|eos|>", *(AddedToken(f"<0x{b:02X}>", special=False) for b in range(256))]
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    spec = json.loads(made.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the bytes are ordinary tokens of the vocabulary
    made = Tokenizer.from_str(json.dumps(spec))
    made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return made


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda make: make.__name__)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param.__name__)
    request.param().save(str(path / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "<|eos|>", "lstrip": False, "rstrip": False}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": eos}
    config["chat_template"] = TEMPLATE
    if request.param is byte_fallback:
        config |= {"add_bos_token": True, "add_eos_token": False, "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return serving.Tokenizer(folder)


def rendered(ours: serving.Tokenizer, messages: list[dict]) -> str:
    """The prompt of a conversation."""
    return Template(ours.template_source).render(messages, ours.template_variables({}))


def test_ids_and_chat_equal_transformers(folder, ours):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*SAMPLES, TEXT]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert ids[0] == theirs.bos_token_id
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.encode(text, add_special_tokens=False) == ids[1:]
    messages = [{"role": "system", "content": " s "}, {"role": "user", "content": "hé"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered(ours, messages) == expected


BARE = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}  # DeepSeek-V3's
BOTH = {"type": "TemplateProcessing", "pair": [], "special_tokens": {
    "<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]},
    "<|eos|>": {"id": "<|eos|>", "ids": [1], "tokens": ["<|eos|>"]}}, "single": [
    {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "<|eos|>", "type_id": 0}}]}  # fmt: skip


@pytest.mark.parametrize(("processor", "config", "before", "after"), [
    (BARE, {}, [], []), (BARE, {"add_bos_token": True, "add_eos_token": False}, [0], []),
    (BARE, {"add_bos_token": True, "add_eos_token": True}, [0], [1]), (None, {"add_bos_token": True}, [0], []),
    (BOTH, {}, [0], [1]), (BOTH, {"add_bos_token": True}, [0], [1]), (BOTH, {"add_bos_token": False}, [], [1]),
    (BOTH, {"add_bos_token": None, "add_eos_token": False}, [0], []), (BARE, {"bos_token": None}, [], []),
    (BARE, {"bos_token": None, "add_bos_token": True}, [], []),
    ({"type": "Sequence", "processors": [BARE, BOTH]}, {"add_eos_token": True}, [0], [1]),
])  # fmt: skip
def test_bos_and_eos_are_added_as_the_config_says(tmp_path, processor, config, before, after):
    """Where it says nothing, as the post-processor does. Each at most once, also where the text begins with bos."""
    made = json.loads(byte_level().to_str()) | {"post_processor": processor}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"} | config
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = serving.Tokenizer(tmp_path)
    inner = ours.encode("Hello", add_special_tokens=False)
    assert inner
    assert not {0, 1} & {*inner}
    assert ours.encode("Hello") == before + inner + after
    assert ours.encode("") == before + after
    rendered = ours.encode("<|bos|>Hello")
    assert rendered == [0, *inner, *after], "a text that has its bos gets no second one"


def test_chat_errors_name_the_reason(folder, ours, tmp_path):
    with pytest.raises(TemplateError, match="no role robot"):
        rendered(ours, [{"role": "robot", "content": "x"}])
    with pytest.raises(serving.TokenizerError, match=r"--chat-template: nowhere\.jinja: no such file"):
        serving.Tokenizer(folder, "nowhere.jinja")
    file = tmp_path / "mine.jinja"
    file.write_text("just {{ messages[0].content }}")
    assert rendered(serving.Tokenizer(folder, str(file)), [{"role": "x", "content": "this"}]) == "just this"
    file.write_text("{% if %}")
    with pytest.raises(serving.TokenizerError, match="not a Jinja template"):
        serving.Tokenizer(folder, str(file))


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(serving.TokenizerError, match="no tokenizer.json"):
        serving.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(serving.TokenizerError, match=r"tokenizer\.json: not a tokenizer"):
        serving.Tokenizer(tmp_path)


@pytest.mark.parametrize("prompt", ["", "Four score", "é"])
@pytest.mark.parametrize("text", [*SAMPLES, TEXT[:300]])
def test_pieces_add_up(ours, prompt, text):
    prompt_ids, ids = ours.encode(prompt), ours.encode(text, add_special_tokens=False)
    for at_once in (1, 3):
        stream = Detokenizer(ours, list(prompt_ids))
        pieces = [stream.push(ids[i : i + at_once]) for i in range(0, len(ids), at_once)]
        assert not any("\ufffd" in piece for piece in pieces)
        whole = ours.decode(prompt_ids + ids)
        assert "".join(pieces) + stream.flush() == whole[len(ours.decode(prompt_ids)) :]


def test_bytes_that_are_no_text_are_not_waited_for(ours):
    """Token ids at random: incomplete and impossible characters, special tokens. Nothing waits long or is lost."""
    draw = random.Random(0)
    for _ in range(20):
        ids = [draw.randrange(ours.vocab_size) for _ in range(300)]
        stream, seen = Detokenizer(ours, []), ""
        for i, token in enumerate(ids):
            seen += stream.push([token])
            assert len(stream._window) < 100
            if i > 50:
                assert len(seen) > 0.5 * len(ours.decode(ids[: i - 20]))
        seen += stream.flush()
        if ours._is_byte_level:  # a byte-fallback decoder changes its mind about a run of bytes as the run goes on
            assert seen == ours.decode(ids)


def test_a_token_that_ends_one_character_and_begins_the_next_holds_back_only_the_next():
    name = {byte: char for char, byte in serving._BYTE_OF.items()}
    parts = [b"\xe4", b"\xbd\xa0\xe4", b"\xbd\xa0"]
    made = Tokenizer(models.BPE(vocab={"".join(name[b] for b in part): i for i, part in enumerate(parts)}, merges=[]))
    made.decoder = decoders.ByteLevel()
    holder = serving.Tokenizer.__new__(serving.Tokenizer)
    holder._backend = made
    stream = Detokenizer(holder, [])
    ids = [0, *[1] * 60, 2]
    assert made.decode(ids) == "你" * 61, "the tokens are not what this test means"
    assert [stream.push([i]) for i in ids] == ["", *["你"] * 61]


def test_token_bytes_are_exact(ours):
    for text in ["你", "é", "👩"]:
        ids = ours.encode(text, add_special_tokens=False)
        assert b"".join(map(ours.token_bytes, ids)).decode().strip() == text


@pytest.mark.parametrize(("name", "change", "words"), [
    ("tokenizer_config.json", '{"a":' * 100_000, r"tokenizer_config\.json: expected JSON: maximum recursion"),
    ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object, got \[\]"),
    ("tokenizer_config.json", b"\xff\xfe", r"tokenizer_config\.json: cannot be read"),
    ("tokenizer_config.json", None, r"tokenizer_config\.json: cannot be read: .*directory"),
    ("tokenizer_config.json", {"chat_template": 5}, "chat_template: expected a text, or a list of them"),
    ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 5}]}, "chat_template: expected"),
    ("tokenizer_config.json", {"bos_token": "\ud800"}, "not a tokenizer: TypeError"),
    ("special_tokens_map.json", "null", r"special_tokens_map\.json: expected a JSON object, got null"),
    ("chat_template.jinja", b"\xff", r"chat_template\.jinja: cannot be read"),
    ("tokenizer.json", {"post_processor": {
        "type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}]}}, "not a tokenizer"),
])  # fmt: skip
def test_whatever_a_file_holds_is_a_refusal_in_words(folder, tmp_path, name, change, words):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    file = copied / name
    if isinstance(change, dict):
        changed = {**(json.loads(file.read_text()) if file.exists() else {}), **change}
        file.write_text(json.dumps(changed))
    elif change is None:
        file.unlink(missing_ok=True)
        file.mkdir()
    else:
        file.write_bytes(change if isinstance(change, bytes) else change.encode())
    with pytest.raises(serving.TokenizerError, match=words):
        serving.Tokenizer(copied)


@pytest.mark.parametrize("templates", [[], [1], [{}], [{"name": [], "template": "x"}],
                                       [{"name": "other", "template": "x"}]])  # fmt: skip
def test_of_named_templates_only_the_default_one_counts(folder, tmp_path, templates):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    file = copied / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": templates}))
    assert serving.Tokenizer(copied).template_source == ""
    file.write_text(json.dumps({"chat_template": [*templates, {"name": "default", "template": "mine"}]}))
    assert serving.Tokenizer(copied).template_source == "mine"


def test_half_a_surrogate_is_refused(ours):
    with pytest.raises(serving.TokenizerError, match="not valid Unicode"):
        ours.encode("a\ud800b")


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        (["END"], "one ENtwo END three", "one ENtwo ", "END"),
        (["aab"], "aaaab", "aa", "aab"),
        (["\n\n", "."], "a\nb.c\n\n", "a\nb", "."),
        (["abc", "b"], "xabc", "xa", "b"),
        (["xyz"], "ends in xy", "ends in xy", None),
        ([], "all of it", "all of it", None),
    ],
)
def test_stop_strings(stops, text, shown, matched, size):
    stop, seen = StopStrings(stops), ""
    for i in range(0, len(text), size):
        seen += stop.push(text[i : i + size])
        assert shown.startswith(seen), "a part of a stop string leaked"
        if stop.matched:
            break
    assert (seen + stop.flush(), stop.matched) == (shown, matched)
    kept = StopStrings(stops, keep=True)
    assert kept.push(text) + kept.flush() == shown + (matched or "")
