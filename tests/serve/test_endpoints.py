"""Endpoints next to those that generate."""

import contextlib
import threading

import pytest
from fastapi.routing import APIRoute
from helpers_http import App
from helpers_server import eventually

from wave64.serve.http.tokenizer import Tokenizer

USER = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


def test_tokens_and_back(tokenizer):
    app = App(tokenizer)
    ids = tokenizer.encode("Four score")
    answer = app.post("/tokenize", prompt="Four score", model="tiny").json()
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 2048}
    bare = app.post("/v1/tokenize", prompt=["Four score", "x"], add_special_tokens=False, return_token_strs=True).json()
    assert bare["tokens"] == [ids[1:], tokenizer.encode("x", add_special_tokens=False)]
    assert bare["count"] == [len(ids) - 1, 1]
    assert "".join(bare["token_strs"][0]) == "Four score"
    asked = app.post("/tokenize", messages=USER).json()["tokens"]
    app.post("/v1/chat/completions", messages=USER)
    assert asked == app.engine.requests[-1].input_ids
    for name in ("text", "prompt"):
        assert app.post("/detokenize", tokens=ids).json()[name] == "Four score"
        assert app.post("/v1/detokenize", tokens=[ids, [70]]).json()[name] == ["Four score", tokenizer.decode([70])]
    assert app.post("/detokenize", tokens=ids, skip_special_tokens=False).json()["text"] == "<|bos|>Four score"
    for path, body, param in (("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "x", "messages": USER}, "prompt"),
                              ("/detokenize", {"tokens": "x"}, "tokens"), ("/detokenize", {}, "tokens")):  # fmt: skip
        answer = app.post(path, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_version_ping_and_secrets(tokenizer):
    app = App(tokenizer, api_key="k", ssl_certfile="c", ssl_keyfile_password="hidden")
    assert set(app.get("/version").json()) == {"version"}
    assert app.get("/ping").status_code == 200, "asked without a key"
    info = app.request("GET", "/server_info", headers={"authorization": "Bearer k"})
    assert info.json()["ssl_keyfile_password"] == "***"
    assert "hidden" not in info.text


def test_openapi_names_every_endpoint_and_what_it_takes(tokenizer):
    app = App(tokenizer)
    said = app.get("/openapi.json").json()
    paths = {route.path for route in app.asgi.routes if isinstance(route, APIRoute) and route.include_in_schema}
    assert set(said["paths"]) == {path.replace(":path", "") for path in paths}
    names = [method["operationId"] for path in said["paths"].values() for method in path.values()]
    assert len(set(names)) == len(names)
    refs = []

    def look(node) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            refs.extend([value] if key == "$ref" else ())
            look(value)

    look(said)
    assert len(refs) > 6
    for ref in refs:
        assert ref.removeprefix("#/components/schemas/") in said["components"]["schemas"], ref
    chat = said["components"]["schemas"]["ChatRequest"]
    assert {"messages", "tools", "response_format"} <= set(chat["properties"])
    typed = (("CompletionRequest", "prompt"), ("GenerateRequest", "input_ids"), ("DetokenizeRequest", "tokens"))
    for model, field in typed:
        assert said["components"]["schemas"][model]["properties"][field]["anyOf"], field


def test_a_request_is_aborted_by_its_name(server):
    """Before the engine has taken it, and, of more than the pool holds, which goes on for long, while they run."""
    sampling = {"max_new_tokens": 2000, "ignore_eos": True}
    for n, abort in ((1, {"rid": "mine"}), (24, {"abort_all": True})):
        answers, body = [], {"input_ids": [5] * 4, "sampling_params": sampling | {"n": n}}
        body |= {"rid": "mine"} if n == 1 else {}
        thread = threading.Thread(target=lambda got, body: got.append(server.post("/generate", **body).json()),
                                  args=(answers, body))  # fmt: skip
        with server.held() if n == 1 else contextlib.nullcontext():
            thread.start()
            assert eventually(lambda n=n: server.running == n)
            if n == 1:
                assert server.post("/generate", text="x", rid="mine").json()["error"]["param"] == "rid"
            server.post("/abort_request", rid="another")
            assert server.running == n
            assert server.post("/abort_request", **abort).status_code == 200
        thread.join()
        for meta in (answer["meta_info"] for answer in (answers if n == 1 else answers[0])):
            assert meta["finish_reason"]["type"] == "abort"
            assert meta["completion_tokens"] < 2000
    assert eventually(lambda: not server.running)


def test_the_prefix_cache_is_flushed(server):
    server.complete(prompt="Four score and seven years ago our fathers brought forth")
    assert eventually(lambda: server.get("/flush_cache").status_code == 200)
    assert server.post("/flush_cache").json() == {"success": True}
    assert server.get("/server_info").json()["statistics"]["pages_used"] == 0
