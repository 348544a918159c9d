"""What HTTP clients send and get, in one process over an engine that always says the same: forms, fields, encodings."""

import asyncio
import gzip
import json
import logging
import threading

import pytest
from helpers_http import CONTEXT, App, hang_up
from helpers_server import VOCAB
from transformers import AutoTokenizer

from wave64.serve.http import guard
from wave64.serve.http import schemas as protocol
from wave64.serve.http.detokenizer import Detokenizer
from wave64.serve.http.tokenizer import Tokenizer, TokenizerError

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
USER = [{"role": "user", "content": "x"}]
WAIT_S = 60  # for what must happen; only a defect waits so long


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


@pytest.fixture
def app(tokenizer):
    return App(tokenizer)


def body_of(path: str, **fields) -> dict:
    return {COMPLETIONS: {"prompt": "x"}, CHAT: {"messages": USER}, GENERATE: {"text": "x"}}[path] | fields


# ---- fields

# What the clients of vLLM and SGLang send at its neutral value.
NEUTRAL = {
    "use_beam_search": False, "length_penalty": 1.0, "include_stop_str_in_output": False, "min_tokens": 0,
    "spaces_between_special_tokens": True, "prompt_logprobs": None, "allowed_token_ids": None, "bad_words": [],
    "truncate_prompt_tokens": None, "guided_json": None, "guided_regex": None, "guided_choice": None,
    "guided_grammar": None, "structured_outputs": None, "guided_decoding_backend": None, "logits_processors": None,
    "return_tokens_as_token_ids": None, "return_token_ids": None, "cache_salt": None, "kv_transfer_params": None,
    "vllm_xargs": None, "priority": 0, "request_id": "r", "prompt_embeds": None, "detokenize": True,
    "add_special_tokens": None, "documents": None, "chat_template": None, "include_reasoning": True,
    "mm_processor_kwargs": None, "thinking_token_budget": None, "data_parallel_rank": 0, "session_id": "s",
    "return_routed_experts": False, "routed_experts_start_len": 0, "return_cached_tokens_details": False,
    "return_spec_tokens_details": False, "return_hidden_states": False, "return_meta_info": False,
    "return_prompt_token_ids": False, "return_sampling_mask": False, "sampling_logprobs_mode": None,
    "return_flat_raw_top_logprobs": False, "return_flat_raw_top_logprobs_b64": True, "return_indexer_topk": False,
    "watermark": None, "stop_regex": None, "custom_params": None, "custom_logit_processor": "", "lora_path": None,
    "bootstrap_host": None, "bootstrap_port": None, "bootstrap_room": None, "input_embeds": None, "task": None,
    "image_data": None, "mm_hashes": None, "modalities": None, "require_reasoning": False, "max_thinking_tokens": None,
    "reasoning_effort": None, "tools": None, "tool_choice": "auto", "functions": [], "response_format": None,
    "regex": "", "ebnf": None, "thinking": None, "enable_thinking": None, "a_field_of_tomorrow": None,
    "max_tool_calls": 4, "reasoning": {"effort": "low"}, "best_of": 1, "include_obfuscation": True,
    "another": False, "yet_another": [], "and_one": {}, "the_last": "", "logit_bias": {}, "suffix": "",
}  # fmt: skip

# The same, where they ask for something.
ASKING = {
    "use_beam_search": True, "allowed_token_ids": [5], "return_token_ids": True,
    "detokenize": False, "documents": [{"text": "x"}], "chat_template": "{{ 1 }}", "data_parallel_rank": 1,
    "return_routed_experts": True, "routed_experts_start_len": 1, "stop_regex": "a", "lora_path": "a",
    "bootstrap_host": "h", "tool_choice": "required", "thinking": False,
    "enable_thinking": False, "a_field_of_tomorrow": 0, "another": True, "suffix": "y",
    "return_meta_info": True, "modalities": ["audio"], "beam_width": 2, "prompt_embeds": "x",
}  # fmt: skip


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, GENERATE])
def test_fields_that_ask_for_nothing_are_accepted(app, path):
    known = ("add_special_tokens", "min_tokens")
    fields = {name: value for name, value in NEUTRAL.items() if path != GENERATE or name not in known}
    answer = app.post(path, **body_of(path, **fields))
    assert answer.status_code == 200, answer.text
    sampling = {"sampling_params": {"regex": None, "json_schema": None, "beam_width": 1, "stop_regex": []}}
    assert app.post(GENERATE, text="x", **sampling, model="tiny", lora_path=[None], rid="a").status_code == 200


@pytest.mark.parametrize("name", ASKING)
def test_fields_that_would_change_the_answer_are_refused_by_name(app, name):
    for path in (COMPLETIONS, CHAT, GENERATE):
        answer = app.post(path, **body_of(path, **{name: ASKING[name]}))
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name)
        assert error["message"].startswith(f"{name}: ")


def test_a_switch_that_is_on_by_default_says_where_it_belongs(app):
    for value in (False, True):
        error = app.post(CHAT, messages=USER, enable_thinking=value).json()["error"]
        assert error["message"] == 'enable_thinking: not a field of wave64; put it into chat_template_kwargs: ' \
                                   '{"enable_thinking": ...}'  # fmt: skip


def test_numbers_and_switches_in_the_forms_that_clients_have(app, tokenizer):
    app.engine.tokens = tokenizer.encode("one two three", add_special_tokens=False)
    asked = app.post(COMPLETIONS, prompt="x", max_tokens=3.0, n=2.0, seed=5.0, top_k=4.0, echo=1, stream=0,
                     stop_token_ids=[7.0], min_tokens=1.0, logprobs=True, ignore_eos=1)  # fmt: skip
    assert asked.status_code == 200, asked.text
    assert [choice["text"][0] for choice in asked.json()["choices"]] == ["x", "x"]
    assert len(asked.json()["choices"][0]["logprobs"]["tokens"]) == 2 + 3
    params = app.engine.requests[0].params
    assert (params.max_new_tokens, params.seed, params.top_k, params.stop_token_ids) == (3, 5, 4, [7])
    assert (params.min_new_tokens, params.ignore_eos, app.engine.requests[0].top_logprobs) == (1, True, 1)
    assert [request.params.seed for request in app.engine.requests] == [5, 6]
    assert app.post(COMPLETIONS, prompt="x", logprobs=False, seed=0, n=2).status_code == 200
    assert [request.params.seed for request in app.engine.requests[2:]] == [0, 1]
    assert app.post(COMPLETIONS, prompt="x", logprobs=False).json()["choices"][0]["logprobs"] is None
    for given, temperature in ((1e-7, 0), (1e-3, 1e-3)):  # dividing by less would overflow
        app.post(COMPLETIONS, prompt="x", temperature=given)
        assert app.engine.requests[-1].params.temperature == temperature
    assert app.post(COMPLETIONS, prompt=[5.0, 6]).status_code == 200
    assert app.engine.requests[-1].input_ids == [5, 6]
    assert app.post(GENERATE, input_ids=[[5, 6.0]], top_logprobs_num=[1.0], return_logprob=[1]).status_code == 200
    for name, value in (("max_tokens", 5.5), ("max_tokens", "5"), ("max_tokens", True), ("echo", 2), ("echo", "true")):
        error = app.post(COMPLETIONS, prompt="x", **{name: value}).json()["error"]
        assert error["param"] == name
        assert f"got {json.dumps(value)}" in error["message"]
    assert "got 5.5" in app.post(COMPLETIONS, prompt=[5, 5.5]).json()["error"]["message"]


def test_stream_options_that_ask_for_nothing_need_no_stream(app):
    for options in ({}, {"include_usage": False}, None):
        assert app.post(COMPLETIONS, prompt="x", stream_options=options).status_code == 200


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "chat_template", "bos_token"])
def test_template_variables_of_the_servers_own_are_refused(app, name):
    answer = app.post(CHAT, messages=USER, chat_template_kwargs={name: []})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"chat_template_kwargs.{name}: set by the server")
    assert answer.json()["error"]["param"] == "chat_template_kwargs"
    assert app.post(CHAT, messages=USER, chat_template_kwargs={"enable_thinking": False}).status_code == 200


def test_messages_reach_the_template_in_its_own_form(app):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "user", "content": [{"type": "input_text", "text": "Who"}, {"type": "text", "text": "?"}]},
    ]
    assert app.prompt(messages) == "[system] Be brief.\n[assistant] \n[user] Who?\n[assistant] "
    assert app.prompt(messages, add_special_tokens=True).startswith("<|bos|>[system]")
    call["function"]["arguments"] = "{"
    answer = app.post(CHAT, messages=messages)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "messages[1].tool_calls[0].function.arguments" in answer.json()["error"]["message"]


def test_of_a_part_a_template_gets_its_text_alone():
    part = {"type": "output_text", "text": "x", "cache_control": {"type": "ephemeral"}, "annotations": []}
    wire = protocol.Message.model_validate({"role": "user", "name": "n", "content": [part]}).on_the_wire()
    assert wire == {"role": "user", "name": "n", "content": [{"type": "text", "text": "x"}]}


def test_special_tokens_of_a_completion_can_be_left_out(app, tokenizer):
    for wanted, bos in ((None, [0]), (True, [0]), (False, [])):
        assert app.post(COMPLETIONS, prompt="It", add_special_tokens=wanted).status_code == 200
        assert app.engine.requests[-1].input_ids == bos + tokenizer.encode("It", add_special_tokens=False)


def test_an_empty_prompt_is_bos_where_the_tokenizer_adds_one(app):
    for path, fields in ((COMPLETIONS, {"prompt": ""}), (COMPLETIONS, {"prompt": [""]}), (GENERATE, {"text": ""})):
        assert app.post(path, **body_of(path, **fields)).status_code == 200
        assert app.engine.requests[-1].input_ids == [0]
    echo = app.post(COMPLETIONS, prompt="", echo=True, logprobs=0, max_tokens=1).json()["choices"][0]["logprobs"]
    assert echo["text_offset"] == [0, 0]


# ---- what answers say

def test_too_long_is_said_in_openais_words(app):
    for path, fields, words in (
        (COMPLETIONS, {"prompt": [5] * CONTEXT}, f"your prompt resulted in {CONTEXT} tokens"),
        (COMPLETIONS, {"max_tokens": CONTEXT}, f"you requested {CONTEXT + 2} tokens (2 in the prompt, {CONTEXT} in"),
        (COMPLETIONS, {"prompt": ["x", "x" * 10**6]}, "your prompt[1] of 1000000 characters is more than that"),
        (CHAT, {"messages": [{"role": "user", "content": "x " * CONTEXT}]}, "your messages resulted in"),
        (GENERATE, {"text": None, "input_ids": [5] * CONTEXT}, "your input_ids resulted in"),
    ):
        error = app.post(path, **body_of(path, **fields)).json()["error"]
        assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. However, {words}")
        assert (error["code"], error["type"]) == ("context_length_exceeded", "invalid_request_error")
    app.engine.ready.max_total_num_tokens = 128
    error = app.post(COMPLETIONS, prompt=[5] * 200).json()["error"]
    words = "This model's maximum context length is 128 tokens on this server, whose KV pool (--max-total-tokens)"
    assert error["message"].startswith(words)


def test_a_model_name_that_is_one_slip_away_is_asked_about(app):
    for name in ("tin", "tinyy", "tony", "tiyn", "itny"):
        for path in (COMPLETIONS, CHAT, GENERATE):
            answer = app.post(path, **body_of(path, model=name))
            assert answer.status_code == 404
            error = answer.json()["error"]
            assert error["message"] == f"model: {name}: no such model; did you mean tiny?"
            assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "did you mean tiny?" in app.get(f"/v1/models/{name}").json()["error"]["message"]
    for name in ("tiny", "Tiny", "TINY", "gpt-4", "default", "", "tinytiny", "ynit", None):
        assert app.post(COMPLETIONS, prompt="x", model=name).status_code == 200


def test_usage_is_null_in_chunks_before_the_one_that_has_it(app):
    def usages(**options) -> list:
        answer = app.post(COMPLETIONS, prompt="x", stream=True, stream_options=options)
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        return [json.loads(line).get("usage", "absent") for line in lines[:-1]]

    *chunks, last = usages(include_usage=True)
    assert chunks
    assert set(map(str, chunks)) == {"None"}
    assert last["completion_tokens"] == len(app.engine.tokens)
    assert set(usages(include_usage=False)) == {"absent"}
    counts = [usage["completion_tokens"] for usage in usages(continuous_usage_stats=True)]
    assert counts == sorted({*counts})
    assert counts[-1] == len(app.engine.tokens)


@pytest.mark.parametrize("text", ["naïve ☃ 👩‍👩‍👧 x", "plain", "é" * 9, " <|eos|>a ☃"])
def test_offsets_of_tokens_are_where_their_characters_begin(app, tokenizer, text):
    app.engine.tokens = tokenizer.encode("☃ é", add_special_tokens=False)
    ids = tokenizer.encode(text)
    for prompt, shown in ((text, text), (ids, tokenizer.decode(ids, skip_special_tokens=False))):
        whole = app.post(COMPLETIONS, prompt=prompt, echo=True, logprobs=0, n=2)
        for choice in whole.json()["choices"]:
            assert choice["text"] == shown + "☃ é"
            offsets, pieces = choice["logprobs"]["text_offset"], [*ids, *app.engine.tokens]
            assert len(offsets) == len(pieces)
            at = b"" if prompt is ids else None  # the bytes up to each token; bos is not in a text
            for token, offset in zip(pieces, offsets, strict=True):
                if at is None:
                    assert (token, offset) == (0, 0)
                    at = b""
                    continue
                assert offset == len(at.decode(errors="ignore"))
                at += tokenizer.token_bytes(token)
            assert at.decode() == shown + "☃ é"


# ---- the event loop

class Held:
    """A tokenizer that takes a text only when it is let."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.may_go_on, self.has_begun, self.batches = threading.Event(), threading.Event(), []

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        self.batches.append(len(texts))
        self.has_begun.set()
        assert self.may_go_on.wait(WAIT_S), "nothing else was served meanwhile"
        return [self._tokenizer.encode(text, add_special_tokens) for text in texts]


@pytest.mark.parametrize(
    ("path", "fields"),
    [(COMPLETIONS, {"prompt": ["Four score " * 40] * 400}), (COMPLETIONS, {"prompt": ["x"] * 400}),
     (CHAT, {"messages": [{"role": "user", "content": "Four score " * 200}]}), (GENERATE, {"text": ["x" * 500] * 9})],
    ids=["long", "short", "chat", "native"],
)  # fmt: skip
def test_health_answers_while_prompts_are_tokenized(app, tokenizer, path, fields):
    async def both() -> None:
        asked = asyncio.create_task(app.ask("POST", path, json=body_of(path, **fields)))
        while not held.has_begun.is_set():
            await asyncio.sleep(0)
        assert (await app.ask("GET", "/health")).status_code == 200
        assert not asked.done()
        held.may_go_on.set()
        assert (await asked).status_code == 200
        await app.generator.close()

    app.generator.tokenizer = held = Held(tokenizer)
    asyncio.run(both())


def test_health_answers_while_a_long_body_is_checked(app, monkeypatch):
    has_begun, may_go_on, original = threading.Event(), threading.Event(), guard.parse

    def held(model, raw):
        has_begun.set()
        assert may_go_on.wait(WAIT_S), "nothing else was served meanwhile"
        return original(model, raw)

    async def both() -> None:
        asked = asyncio.create_task(app.ask("POST", COMPLETIONS, json={"prompt": [5] * guard.SHORT_BODY}))
        while not has_begun.is_set():
            await asyncio.sleep(0)
        assert (await app.ask("GET", "/health")).status_code == 200
        may_go_on.set()
        assert "maximum context length" in (await asked).text

    monkeypatch.setattr(guard, "parse", held)
    asyncio.run(both())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_tokenizing(app, tokenizer, stream):
    async def ask_and_leave() -> int:
        leave = asyncio.Event()
        asked = asyncio.create_task(hang_up(app, COMPLETIONS, {"prompt": ["x" * 4096] * 400, "stream": stream}, leave))
        while not held.has_begun.is_set():
            await asyncio.sleep(0)
        leave.set()
        status = await asyncio.wait_for(asked, WAIT_S)
        held.may_go_on.set()
        return status

    app.generator.tokenizer = held = Held(tokenizer)
    assert asyncio.run(ask_and_leave()) == 499
    assert len(held.batches) == 1
    assert held.batches[0] < 400
    assert app.engine.requests == []


def test_prompts_are_checked_once_however_many_choices(app, monkeypatch):
    checked, original = [], protocol.prompts_of
    monkeypatch.setattr(protocol, "prompts_of", lambda value, param: checked.append(param) or original(value, param))
    assert app.post(COMPLETIONS, prompt=["x"] * 30, n=4, echo=True, logprobs=1, stream=True).status_code == 200
    assert app.post(GENERATE, text=["x"] * 30).status_code == 200
    assert checked == ["prompt", "text"]


def test_a_token_is_decoded_once(tokenizer, monkeypatch):
    ids = tokenizer.encode("Four score and seven years ago " * 20, add_special_tokens=False)
    decoded, stream = [], Detokenizer(tokenizer, [])
    monkeypatch.setattr(tokenizer, "decode", lambda *asked: decoded.append(1) or Tokenizer.decode(tokenizer, *asked))
    assert "".join(stream.push([i]) for i in ids) == tokenizer.decode(ids)
    assert len(decoded) - 1 <= len(ids) * (1 + 1 / 12) + 1  # once more for each twelve that are dropped


# ---- what the socket carries

def test_a_body_may_begin_with_a_byte_order_mark(app):
    """As PowerShell and some editors write it."""
    raw = b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}'
    assert app.request("POST", COMPLETIONS, content=raw).status_code == 200
    assert app.request("POST", COMPLETIONS, content=gzip.compress(raw),
                       headers={"Content-Encoding": "gzip"}).status_code == 200  # fmt: skip


def test_a_body_may_be_gzip(app):
    raw = json.dumps({"prompt": "x"}).encode()

    def send(content: bytes, coding: str = "gzip"):
        return app.request("POST", COMPLETIONS, content=content, headers={"Content-Encoding": coding})

    assert send(gzip.compress(raw)).status_code == 200
    assert send(gzip.compress(raw), "x-GZIP").status_code == 200
    assert send(raw, "identity").status_code == 200
    for content, words in ((raw, "expected gzip"), (gzip.compress(raw)[:-9], "ends early"),
                           (gzip.compress(raw) * 2, "one gzip member"), (b"", "ends early")):  # fmt: skip
        answer = send(content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_gzip")
        assert words in answer.json()["error"]["message"]
    answer = send(raw, "br")
    assert answer.status_code == 415
    assert "Content-Encoding: expected gzip or none, got br" in answer.json()["error"]["message"]
    assert send(gzip.compress(b" " * (guard.MAX_BODY - len(raw)) + raw)).status_code == 200


def test_a_body_that_does_not_end_is_not_waited_for(app, monkeypatch):
    async def pieces():
        yield b'{"prompt": '
        await asyncio.sleep(WAIT_S)

    monkeypatch.setattr(guard, "BODY_S", 0.01)
    answer = app.request("POST", COMPLETIONS, content=pieces())
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_timeout")
    assert answer.headers["connection"] == "close"


def test_a_gzip_body_is_never_unpacked_beyond_the_limit(app):
    bomb = gzip.compress(b" " * (4 * guard.MAX_BODY))
    assert len(bomb) < guard.MAX_BODY / 100
    answer = app.request("POST", COMPLETIONS, content=bomb, headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    unpacking = guard._Gunzip()
    assert len(unpacking.push(bomb, 1000)) == 1000


@pytest.mark.parametrize(("path", "near"), [("/chat/completions", "; did you mean /v1/chat/completions?"),
                                            ("/v1/v1/models", "; did you mean /v1/models?"), ("/v1/messages", ""),
                                            ("/v1/embeddings", "")])  # fmt: skip
def test_a_base_url_with_a_v1_too_few_or_too_many_is_told_the_endpoint(app, path, near):
    answer = app.post(path)
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, f"{path}: no such endpoint{near}")


@pytest.mark.parametrize(("method", "path", "body"), [
    ("POST", "/v1/chat/completions/", {"messages": USER}), ("GET", "/v1/models//", None), ("GET", "//", None)])
def test_slashes_at_the_end_change_nothing(app, method, path, body):
    assert app.request(method, path, json=body).status_code == 200


def test_head_is_answered_like_get(app):
    for path in ("/health", "/v1/models", "/v1/models/", "/v1/models/tiny", "/model_info", "/get_model_info",
                 "/server_info", "/get_server_info", "/health_generate"):  # fmt: skip
        got, head = app.get(path), app.request("HEAD", path)
        assert (head.status_code, head.headers["content-type"]) == (200, got.headers["content-type"])
    assert app.request("HEAD", COMPLETIONS).status_code == 405


def test_the_api_key_in_each_spelling_of_bearer(tokenizer):
    app = App(tokenizer, api_key="sécret".encode().decode("latin-1"))
    key = app.generator.args.api_key.encode()
    for scheme in (b"Bearer ", b"bearer ", b"BEARER ", b"Bearer  "):
        headers = [(b"Authorization", scheme + key)]
        assert app.request("GET", "/v1/models", headers=headers).status_code == 200
    for value in (key, b"Basic " + key, b"Bearer", b"Bearer " + key[:-1], b"Bearer" + key, b""):
        assert app.request("GET", "/v1/models", headers=[(b"Authorization", value)]).status_code == 401


def test_the_log_says_why_a_request_was_refused(app, tokenizer, caplog):
    caplog.set_level(logging.INFO, "wave64")
    app.post(COMPLETIONS, prompt="x", suffix="y")
    app.post(CHAT, messages=USER, **{"evil\n2026 fake line": 1})
    app.post(COMPLETIONS, prompt="x", stop=["x" * 5000, 5])
    app.get("/nowhere%0Aline")
    app.get(COMPLETIONS)
    locked = App(tokenizer, api_key="secret")
    locked.request("GET", "/v1/models", headers={"Authorization": "Bearer guess"})
    assert [record.getMessage() for record in caplog.records if record.name == "wave64"] == [
        "POST /v1/completions: 400: suffix: not supported by wave64; leave it out",
        "POST /v1/chat/completions: 400: evil�2026 fake line: not supported by wave64; leave it out",
        "POST /v1/completions: 400: stop[1]: expected a valid string, got 5",
        "GET /nowhere�line: 404: /nowhereline: no such endpoint",
        "GET /v1/completions: 405: /v1/completions: method GET not allowed, expected POST",
        "GET /v1/models: 401: Authorization: expected 'Bearer ' and the API key of this server, got the wrong one",
    ]


# ---- tokens that only tokenizer_config.json declares

def test_tokens_of_tokenizer_config_alone_are_known(tokenizer_folder, tmp_path, caplog):
    declared = {
        str(VOCAB): {"content": "<|tool|>", "special": True},
        str(VOCAB + 1): {"content": "<think>", "special": False, "lstrip": True},
        "0": {"content": "<|bos|>", "special": True},
        str(VOCAB + 5): {"content": "<|far|>", "special": True},
        "5": {"content": "$", "special": True},
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": declared}))
    ours = Tokenizer(tmp_path)
    assert ours.encode("a<|tool|>b <think>", False)[1] == VOCAB
    assert ours.encode("x <think>", False)[-1] == VOCAB + 1
    assert ours.decode([VOCAB, VOCAB + 1]) == "<think>"
    assert ours.decode([VOCAB, VOCAB + 1], skip_special_tokens=False).startswith("<|tool|>")
    assert ours.encode("<|bos|>", False) == [0]
    assert ours.decode([5]) == "", "a token of the vocabulary that the config makes special"
    assert ours.vocab_size == VOCAB + 2
    assert "'<|far|>' is declared as id 389 and would get 386; it is left out" in caplog.text
    del declared[str(VOCAB + 5)], declared["5"]
    file.write_text(json.dumps({**json.loads(file.read_text()), "added_tokens_decoder": declared}))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    for text in ("a<|tool|>b <think>c", "<|tool|>", "no such token"):
        assert ours.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("declared", [{"x": {"content": "y"}}, {"5": {}}, {"5": "y"}, ["y"]])
def test_a_damaged_declaration_is_one_line(tokenizer_folder, tmp_path, declared):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": declared}))
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: added_tokens_decoder: expected ids"):
        Tokenizer(tmp_path)
