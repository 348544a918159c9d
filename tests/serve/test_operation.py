"""What operators see and set: /metrics, the access log, request ids, the limit of the queue, CORS, TLS."""

import gzip
import json
import logging
import re
import ssl
from pathlib import Path

import pytest
import torch
from helpers_http import App
from helpers_server import eventually, serve
from prometheus_client.parser import text_string_to_metric_families

from wave64 import OPS, NotSupported
from wave64.serve.args import SERVED_BY, ArgsError, ServerArgs
from wave64.serve.engine.rank import surroundings
from wave64.serve.http.launch import http_config
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.logs import JsonLines
from wave64.serve.messages import Statistics, encode

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


def samples(text: str) -> dict[str, float]:
    """name -> value of what has no labels but the model's."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == "tiny"
            found[sample.name + "".join(f",{value}" for value in sample.labels.values())] = sample.value
    return found


def test_metrics_of_requests(tokenizer):
    app = App(tokenizer, "abcde")
    app.engine.statistics = Statistics(3, 2, 25, 100, 70, 30, 4, steps=8, step_seconds=0.5)
    count = len(app.engine.tokens)
    app.engine.end = "stop"
    app.post(COMPLETIONS, prompt="x", n=2)
    app.post(COMPLETIONS, prompt="x", max_tokens=0)
    app.post(COMPLETIONS, prompt="x", temperature=-1)
    answer = app.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(answer.text)
    for ours, value in {
        "sglang:num_running_reqs": 3, "sglang:num_queue_reqs": 2, "sglang:token_usage": 0.25,
        "sglang:prompt_tokens_total": 70, "sglang:generation_tokens_total": 30, "sglang:num_retracted_reqs_total": 4,
        "vllm:num_requests_running": 3, "vllm:num_requests_waiting": 2, "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prompt_tokens_total": 70, "vllm:generation_tokens_total": 30, "vllm:num_preemptions_total": 4,
        "sglang:num_requests_total": 3, "sglang:num_aborted_requests_total": 0, "sglang:max_total_num_tokens": 2048,
        "vllm:request_success_total,stop": 2, "vllm:request_success_total,length": 1,
        "wave64:step_seconds_count": 8, "wave64:step_seconds_sum": 0.5,
        "wave64:http_responses_total,200": 2, "wave64:http_responses_total,400": 1,
    }.items():  # fmt: skip
        assert found[ours] == value, ours
    for prefix in ("sglang", "vllm"):
        assert found[f"{prefix}:time_to_first_token_seconds_count"] == 2, "one asked for no token"
        assert found[f"{prefix}:inter_token_latency_seconds_count"] == 2 * (count - 1)
        assert found[f"{prefix}:e2e_request_latency_seconds_count"] == 3
        assert found[f"{prefix}:e2e_request_latency_seconds_bucket,+Inf"] == 3
    assert found["sglang:generation_tokens_histogram_sum"] == found["vllm:request_generation_tokens_sum"] == 2 * count


def test_metrics_of_a_server(server):
    server.complete(prompt="Four score")
    text = server.get("/metrics").text
    assert samples(text)["sglang:prompt_tokens_total"] > 0
    assert samples(text)["wave64:step_seconds_sum"] > 0 < samples(text)["wave64:step_seconds_count"]
    assert re.search(r'^wave64:backend{backend="\w+",model_name="tiny",op="rms_norm"} 1.0$', text, re.MULTILINE)


def test_a_request_has_an_id_and_a_line_in_the_log(tokenizer, caplog):
    caplog.set_level(logging.INFO, "wave64.access")
    app = App(tokenizer, "abc")
    count = len(app.engine.tokens)
    for given in ("my-id", "a" * 129, None):
        answer = app.request("POST", COMPLETIONS, json={"prompt": "my secret", "n": 2},
                             headers={} if given is None else {"x-request-id": given})  # fmt: skip
        name = answer.headers["x-request-id"]
        assert (name == given) == (given == "my-id")
        record = caplog.records[-1]
        prompt = 2 * answer.json()["usage"]["prompt_tokens"]
        assert re.search(rf'"POST {COMPLETIONS} HTTP/1.1" 200 in \d+\.\d+ s, {prompt} prompt and {2 * count} generated '
                         rf"tokens, id {name}$", record.getMessage())  # fmt: skip
    line = json.loads(JsonLines().format(record))
    assert line["generated_tokens"] == 2 * count
    assert (line["level"], line["id"], line["status"], line["path"]) == ("info", name, 200, COMPLETIONS)
    assert "secret" not in caplog.text
    seen = len(caplog.records)
    for path in ("/health", "/health?x=1", "/metrics"):
        app.get(path)
    assert len(caplog.records) == seen, "what is polled is not logged"
    app.get("/healthy")
    assert '"GET /healthy HTTP/1.1" 404' in caplog.records[-1].getMessage()


def test_json_lines_have_tracebacks():
    try:
        raise ValueError("so")
    except ValueError as error:
        record = logging.LogRecord("x", 40, "", 0, "a %s", ("b",), (ValueError, error, error.__traceback__))
    line = json.loads(JsonLines().format(record))
    assert (line["level"], line["message"]) == ("error", "a b")
    assert line["traceback"].endswith("ValueError: so")


def test_the_queue_has_a_limit(tokenizer):
    app = App(tokenizer, max_queued_requests=2, max_running_requests=3)
    for live, waiting, status in ((0, 0, 200), (4, 1, 200), (5, 0, 429), (0, 2, 429)):
        app.engine.num_live, app.engine.statistics = live, Statistics(running=live - waiting, waiting=waiting)
        for fields in ({}, {"stream": True}):
            answer = app.post(CHAT, messages=[{"role": "user", "content": "x"}], **fields)
            assert answer.status_code == status
    assert answer.headers["retry-after"] == "1"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    with pytest.raises(ArgsError, match="--max-queued-requests: expected at least 1"):
        ServerArgs(max_queued_requests=0)


def test_pages_of_an_origin_may_ask(tokenizer):
    """The preflight has no key; what follows needs it."""
    app = App(tokenizer, api_key="k", cors_allow_origins=["https://a.example"])
    asked = {"origin": "https://a.example", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization, content-type"}  # fmt: skip
    answer = app.request("OPTIONS", CHAT, headers=asked)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.example")
    assert app.request("OPTIONS", CHAT, headers=asked | {"origin": "https://b.example"}).status_code == 400
    answer = app.request("GET", "/v1/models", headers={"origin": "https://a.example"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://a.example", "the page may read why"
    answer = App(tokenizer).request("GET", "/v1/models", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_https(tmp_path):
    args = ServerArgs(ssl_keyfile="k", ssl_certfile="c", ssl_ca_certs="a")
    config = http_config(args, None)
    assert (config.is_ssl, config.ssl_keyfile, config.ssl_certfile, config.ssl_ca_certs) == (True, "k", "c", "a")
    assert config.ssl_cert_reqs == ssl.CERT_REQUIRED
    assert not http_config(ServerArgs(), None).is_ssl
    with pytest.raises(ArgsError, match="--ssl-certfile: expected the certificate"):
        ServerArgs(ssl_keyfile="k")


def test_requests_are_logged_on_demand(tokenizer, caplog):
    """Each choice on a line of its own, whatever is in it; texts are cut. Not the key."""
    caplog.set_level(logging.INFO, "wave64.access")
    app = App(tokenizer, "abc", log_requests=True, api_key="hidden")
    for prompt in ("my\n\u2028secret", "Four score " * 200):
        app.request("POST", COMPLETIONS, json={"prompt": prompt, "n": 2, "temperature": 0.5, "user": "u"},
                    headers={"authorization": "Bearer hidden", "x-request-id": "mine"})  # fmt: skip
        lines = [record.getMessage() for record in caplog.records[-2:]]
        for line in lines:
            assert line.isprintable()
            said = json.loads(line.removeprefix("id mine: "))
            assert said["prompt"] == f"<|bos|>{prompt}"[:2048]
            assert (said["answer"], said["parameters"]["temperature"]) == ("abc", 0.5)
    assert JsonLines().format(caplog.records[-1]).count('"prompt"') == 1
    assert "hidden" not in caplog.text


@pytest.mark.slow
def test_a_request_has_so_many_seconds(model_folder, tmp_path):
    """One that takes longer is answered with 504, in a stream by an error; the engine forgets it."""
    asked = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True}
    with serve(model_folder, tmp_path / "log", "--request-timeout", "0.3", "--max-total-tokens", "4096",
               "--profile-dir", str(tmp_path / "traces"), "--max-running-requests", "4") as server:  # fmt: skip
        with server.held():
            answers = [server.post(COMPLETIONS, **asked, stream=stream, n=2) for stream in (False, True)]
        assert eventually(lambda: server.get("/server_info").json()["statistics"]["running"] == 0)
        in_time(server, prompt="x", max_tokens=1)
        traced(server, tmp_path / "traces")
    error = answers[0].json()["error"]
    assert (answers[0].status_code, error["code"]) == (504, "request_timeout")
    assert error["message"] == "the request was not done within 0.3 s (--request-timeout)"
    *_, last, done = answers[1].text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"] == error
    assert done == "data: [DONE]"


def in_time(server, **asked) -> None:
    """Ask until it is answered within the server's time, which a busy machine may miss."""
    assert eventually(lambda: server.post(COMPLETIONS, **asked).status_code == 200)


def traced(server, folder) -> None:
    """Traces of that server have the engine's operators; they are written in that folder alone."""
    assert server.post("/stop_profile").json()["error"]["message"] == "no profile is on its way; start one first"
    assert server.http.post("/start_profile").json() == {"success": True, "output_dir": str(folder)}
    assert "stop it first" in server.post("/start_profile").json()["error"]["message"]
    in_time(server, prompt="x", max_tokens=2)
    (file,) = server.get("/stop_profile").json()["files"]
    assert folder in Path(file).parents
    with gzip.open(file) as trace:
        events = json.load(trace)["traceEvents"]
    assert any(event.get("name", "").startswith("aten::") for event in events)
    asked = {"output_dir": "b", "num_steps": 1, "activities": ["CPU"], "record_shapes": True}
    assert server.post("/start_profile", **asked).status_code == 200
    in_time(server, prompt="x", max_tokens=2)
    assert eventually(lambda: len(list((folder / "b").glob("*"))) == 1), "it has ended by itself"
    assert server.post("/stop_profile").status_code == 400
    of_a_gpu = server.post("/start_profile", activities=["GPU"])
    if torch.cuda.is_available():
        assert of_a_gpu.status_code == server.post("/stop_profile").status_code == 200
    else:
        assert "no GPU" in of_a_gpu.json()["error"]["message"]
    for outside in ("../b", "/tmp"):
        error = server.post("/start_profile", output_dir=outside).json()["error"]
        assert error["param"] == "output_dir"


def test_traces_need_a_folder(tokenizer):
    answer = App(tokenizer).post("/start_profile")
    assert answer.status_code == 400
    assert "--profile-dir FOLDER" in answer.json()["error"]["message"]


def test_a_number_of_steps_fits_into_a_message(tokenizer, tmp_path):
    app = App(tokenizer, profile_dir=str(tmp_path))
    for steps, status in ((2**31 - 1, 200), (2**31, 400), (0, 400)):
        assert app.post("/start_profile", num_steps=steps).status_code == status
    encode(app.engine.told)


def test_flags_name_backends(device):
    """They serve what they have a kernel of, of the operators that the flag is about; or it is said why not."""
    def bound(**flags) -> dict[str, str]:
        with surroundings(ServerArgs(**flags)):
            return {name: op.bound[device][0].name for name, op in OPS.items()}

    plain = bound()
    chosen = bound(attention_backend="triton", fp8_gemm_backend="triton")
    wanted = dict.fromkeys((*SERVED_BY["attention_backend"], *SERVED_BY["fp8_gemm_backend"]), "triton")
    assert chosen == plain | wanted
    assert bound(decode_attention_backend="triton") == plain | dict.fromkeys(SERVED_BY["decode_attention_backend"],
                                                                            "triton")
    assert bound() == plain
    with pytest.raises(NotSupported, match="^--moe-runner-backend: aiter cannot serve fused_moe: AITER's kernels want"):
        bound(moe_runner_backend="aiter")
    with pytest.raises(NotSupported, match="^--fp8-gemm-backend: hip cannot serve fp8_block_scaled_mm: "):
        bound(fp8_gemm_backend="hip", device="cpu")
    for operators in SERVED_BY.values():
        assert {*operators} <= {*OPS}
