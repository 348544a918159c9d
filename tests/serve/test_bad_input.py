"""Bad input over HTTP: each request gets an error that names what is wrong, and the one next to it is not disturbed."""

import json
import socket
import threading

import httpx
import pydantic
import pytest
from helpers_server import CONTEXT, VOCAB, eventually

from wave64.serve.http import bodies, schemas
from wave64.serve.http.schemas import ChatRequest, CompletionRequest, GenerateRequest

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/generate"
USER = [{"role": "user", "content": "x"}]
LONG = [5] * (CONTEXT + 1)

# path, body, the field at fault, words of the message
REFUSED = [
    (COMPLETIONS, {"prompt": "x", "n": 0}, "n", "n: expected a value greater than or equal to 1, got 0"),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0, got -1"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}', "temperature", "finite number"),
    (COMPLETIONS, {"prompt": "x", "top_p": 0}, "top_p", "greater than 0, got 0"),
    (COMPLETIONS, {"prompt": "x", "top_k": -2}, "top_k", "got -2"),
    (COMPLETIONS, {"prompt": "x", "presence_penalty": 3}, "presence_penalty", "less than or equal to 2, got 3"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, "max_tokens", 'max_tokens: expected a valid integer, got "5"'),
    (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, "max_tokens", "got -1"),
    (COMPLETIONS, {"prompt": "x", "seed": 2**70}, "seed", "seed: expected"),
    (COMPLETIONS, {"prompt": "x", "stop": ""}, "stop", "at least one character"),
    (COMPLETIONS, {"prompt": "x", "stop": ["y"] * 1025}, "stop", "stop: expected at most 1024 strings, got 1025"),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [1] * 1025}, "stop_token_ids", "expected at most 1024 of them"),
    (COMPLETIONS, {"prompt": ["x"] * 4097}, "prompt", "prompt: expected at most 4096 prompts, got 4097"),
    (COMPLETIONS, {"prompt": "x", "stop": [3]}, "stop", "stop[0]: expected a valid string, got 3"),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [VOCAB]}, "stop_token_ids", f"to {VOCAB - 1}, got {VOCAB}"),
    (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs", "less than or equal to 20"),
    (COMPLETIONS, {"prompt": ["x"] * 33, "n": 128}, "n", "at most 4096"),
    (COMPLETIONS, {"prompt": "x", "best_of": 3}, "best_of", "best_of: not supported"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias", "logit_bias.5: expected"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", 'token ids as keys, got "a"'),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {str(VOCAB): 1}}, "logit_bias", f"got {VOCAB}"),
    (COMPLETIONS, {"prompt": "x", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "got -2"),
    (CHAT, {"messages": USER, "continue_final_message": True}, "continue_final_message", "got one of user"),
    (GENERATE, {"text": "x", "logprob_start_len": -2}, "logprob_start_len", "got -2"),
    (GENERATE, {"text": ["x"], "top_logprobs_num": [21]}, "top_logprobs_num", "less than or equal to 20, got 21"),
    (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix", "suffix: not supported"),
    (COMPLETIONS, {"prompt": "x", "temprature": 0}, "temprature", "unknown field; did you mean temperature?"),
    (COMPLETIONS, {}, "prompt", "prompt: required"),
    (COMPLETIONS, {"prompt": "", "add_special_tokens": False}, "prompt", "prompt: empty"),
    (COMPLETIONS, {"prompt": []}, "prompt", "prompt: empty"),
    (COMPLETIONS, {"prompt": ["x", ""], "add_special_tokens": False}, "prompt[1]", "prompt[1]: empty"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt", "prompt[0]: empty"),
    (COMPLETIONS, {"prompt": {"text": "x"}}, "prompt", "expected a string, token ids, or a list of either"),
    (COMPLETIONS, {"prompt": [1, "x"]}, "prompt", "prompt[0]"),
    (COMPLETIONS, {"prompt": [VOCAB]}, "prompt", f"expected token ids from 0 to {VOCAB - 1}, got {VOCAB}"),
    (COMPLETIONS, {"prompt": [3, -1]}, "prompt", "got -1"),
    (COMPLETIONS, {"prompt": [3, 10**30]}, "prompt", f"got {10**30}"),
    (COMPLETIONS, {"prompt": LONG}, "prompt", f"maximum context length is {CONTEXT} tokens"),
    (COMPLETIONS, {"prompt": "x " * CONTEXT}, "prompt", f"maximum context length is {CONTEXT} tokens"),
    (COMPLETIONS, {"prompt": "x" * 10**6}, "prompt", "1000000 characters"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": CONTEXT}, "max_tokens", f"maximum context length is {CONTEXT} tokens"),
    (COMPLETIONS, b"", None, "the body: expected JSON"),
    (COMPLETIONS, b'{"prompt": "x"', None, "the body: expected JSON: EOF"),
    (COMPLETIONS, b'{"prompt": ' + b"[" * 10**5, None, "recursion limit"),
    (COMPLETIONS, b'{"prompt": "\xff"}', None, "expected JSON in UTF-8, got byte 0xff at position 12"),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', None, "the body: expected JSON"),
    (COMPLETIONS, b"[1]", None, "the body: expected an object, got [1]"),
    (CHAT, {}, "messages", "messages: required"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": USER * 16385}, "messages", "messages: expected at most 16384 of them"),
    (COMPLETIONS, {"prompt": "x", "stop": ["y" * 8192] * 3}, "stop", "at most 16384 characters in all strings"),
    (COMPLETIONS, {"prompt": "x", "y" * 10**6: 1}, "y" * 1997 + "...", "yyy..."),
    (CHAT, {"messages": [{"content": "x"}]}, "messages", "messages[0].role: required"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", "messages[0].content: expected"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", 'got "image_url"'),
    (CHAT, {"messages": USER, "tools": [{"type": "function"}]}, "tools", "tools[0].function: required"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs", "only with logprobs"),
    (CHAT, {"messages": USER, "max_completion_tokens": CONTEXT}, "max_completion_tokens",
     f"maximum context length is {CONTEXT} tokens"),
    (CHAT, {"messages": [{"role": "user", "content": "x " * CONTEXT}]}, "messages",
     f"maximum context length is {CONTEXT} tokens"),
    (GENERATE, {}, "text", "text, input_ids: expected one of the two"),
    (GENERATE, {"text": "x", "input_ids": [1]}, "text", "expected one of the two"),
    (GENERATE, {"text": []}, "text", "text: empty"),
    (GENERATE, {"input_ids": [[1], [VOCAB]]}, "input_ids[1]", "input_ids[1]: expected token ids"),
    (GENERATE, {"text": "x", "sampling_params": {"temperature": -1}}, "sampling_params", "sampling_params.temperature"),
    (GENERATE, {"text": "x", "sampling_params": {"beam_width": 2}}, "beam_width", "beam_width: not supported"),
    (GENERATE, {"text": "x", "sampling_params": {"max_new_tokens": CONTEXT}}, "max_new_tokens",
     f"maximum context length is {CONTEXT} tokens"),
    (GENERATE, {"text": ["x", "y"], "sampling_params": [{}]}, "sampling_params", "for each of 2 prompts, got 1"),
    (GENERATE, {"text": "x", "lora_path": "somewhere"}, "lora_path", "lora_path: not supported"),
]


@pytest.fixture(scope="module", autouse=True)
def bystander(server):
    """A request that runs while the bad ones are made, again and again; its tokens must be those it has alone."""
    body = {"prompt": "Four score", "max_tokens": 100, "seed": 1, "temperature": 0.7, "ignore_eos": True}
    alone = server.complete(**body)["choices"][0]["text"]
    answers, enough = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            while not enough.is_set() or len(answers) < 2:
                answers.append(http.post(COMPLETIONS, json=body).json()["choices"][0]["text"])

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    enough.set()
    thread.join()
    assert len(answers) > 1
    assert set(answers) == {alone}


def refusal(answer: httpx.Response) -> dict:
    """OpenAI's error object, with all it must have."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] in ("invalid_request_error", "not_found_error", "authentication_error")
    return error


@pytest.mark.parametrize(("path", "body", "param", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(server, path, body, param, words):
    raw = [body] if isinstance(body, bytes) else [json.dumps(body), json.dumps({**body, "stream": True})]
    for content in raw:  # a stream that cannot begin is an error like any other, not an event
        answer = server.http.post(path, content=content)
        assert answer.status_code == 400
        error = refusal(answer)
        assert words in error["message"]
        assert error["param"] == param


#: cheap to send, dear to read: (model, beginning, what is repeated, how often, end)
DEAR = {
    "parts": (ChatRequest, '{"messages": [{"role": "user", "content": [', "{}", 1 << 17, "]}]}"),
    "stop": (CompletionRequest, '{"prompt": "x", "stop": [', '"y"', 1 << 17, "]}"),
    "prompts": (CompletionRequest, '{"prompt": [', "[1]", 1 << 17, "]}"),
    "fields": (CompletionRequest, '{"prompt": "x"', ', "y": null', 1 << 17, "}"),
    "backslashes": (CompletionRequest, '{"prompt": [', '"\\\\"', 1 << 17, "]}"),
    "quotes": (CompletionRequest, '{"prompt": [', '"\\\\\\""', 1 << 17, "]}"),
    "ids": (CompletionRequest, '{"prompt": [', "7", (1 << 21) + 1, "]}"),
}


@pytest.mark.parametrize("what", DEAR)
def test_bodies_of_very_many_values_are_refused_before_they_are_read(what, monkeypatch):
    model, begin, piece, count, end = DEAR[what]
    raw = (begin + (piece if piece[0] == "," else piece + ",") * count).rstrip(",") + end
    json.loads(raw)
    monkeypatch.setattr(model, "model_validate_json", lambda raw: pytest.fail("it was read"))
    with pytest.raises(schemas.ApiError, match=r"the body: expected at most \d+ (strings, lists|values)") as e:
        bodies.parse(model, raw.encode())
    assert (e.value.status, e.value.body["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("text", ['a, "b", [{},', "\\" * 9, '"' * 9])
def test_what_stands_in_strings_is_no_value(text):
    """A table, code or JSON as a prompt's text is one string, however long."""
    prompt = text * (1 << 17)
    assert bodies.parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompts == [prompt]
    ids = list(range(1 << 20))
    assert bodies.parse(CompletionRequest, json.dumps({"prompt": ids}).encode()).prompts == [ids]


@pytest.mark.parametrize(("model", "field", "wrong", "where"), [
    (CompletionRequest, "stop", 5, "stop[0]"), (CompletionRequest, "stop_token_ids", "x", "stop_token_ids[0]"),
    (ChatRequest, "messages", {}, "messages[0].role"), (ChatRequest, "messages", {"role": "user", "content": [{}, {}]},
                                                        "messages[0].content[0].type"),
    (GenerateRequest, "text", 5, "text[0]"), (GenerateRequest, "sampling_params", 5, "sampling_params[0]"),
    (GenerateRequest, "return_logprob", "x", "return_logprob[0]"),
    (GenerateRequest, "logprob_start_len", "x", "logprob_start_len[0]"),
    (GenerateRequest, "top_logprobs_num", "x", "top_logprobs_num[0]")])
def test_of_a_list_of_faults_the_first_is_looked_for(model, field, wrong, where):
    """Pydantic keeps a kilobyte of each that it finds."""
    raw = json.dumps({field: [wrong] * 1000}).encode()
    with pytest.raises(pydantic.ValidationError) as found:
        model.model_validate_json(raw)
    assert found.value.error_count() <= 4
    with pytest.raises(schemas.ApiError) as e:
        bodies.parse(model, raw)
    assert str(e.value).startswith(where)


def test_stream_options_are_for_streams(server):
    answer = server.post(COMPLETIONS, prompt="x", stream_options={"include_usage": True})
    assert (answer.status_code, refusal(answer)["param"]) == (400, "stream_options")


def test_fields_without_effect_are_accepted(server):
    body = {"prompt": "x", "user": "me", "metadata": {"a": "b"}, "logit_bias": {}, "best_of": 1, "suffix": None,
            "model": "whatever", "store": False, "temperature": None, "stop": None}  # fmt: skip
    assert server.post(COMPLETIONS, **body).status_code == 200
    body = {"messages": USER, "max_tokens": 2, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    assert server.post(CHAT, **body).status_code == 200


def test_wrong_address_and_wrong_method(server):
    error = refusal(missing := server.http.post("/v1/complete", json={}))
    assert (missing.status_code, error["message"]) == (404, "/v1/complete: no such endpoint")
    error = refusal(wrong := server.http.get(COMPLETIONS))
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert error["message"] == "/v1/completions: method GET not allowed, expected POST"


def test_a_body_of_100_mb_is_refused_by_its_length(server):
    """The answer comes although not one byte of the body was sent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        answer = raw.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"expected at most 16777216 bytes, got 100000000 bytes" in answer


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_100_mb_is_refused_before_it_is_read(server, is_chunked):
    piece, sent = b" " * 10**6, 0

    def pieces():
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield piece

    headers = {} if is_chunked else {"Content-Length": str(10**8)}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        answer = http.post(COMPLETIONS, content=pieces(), headers=headers)
    assert answer.status_code == 413
    assert refusal(answer)["code"] == "body_too_large"
    assert sent < 100


def test_half_a_request_then_silence(server):
    """A client that goes away within its headers, its body, or right after both."""
    body = b'{"prompt": "It", "max_tokens": 1000, "ignore_eos": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    for part in (head, head + b"\r\n" + body[:10], head + b"\r\n" + body, b"\x00\xff nonsense\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
            raw.sendall(part)
    assert eventually(lambda: server.running <= 1), "more than the request that runs goes on"
