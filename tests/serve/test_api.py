"""What clients get over HTTP from the real server: OpenAI's endpoints through its client, SGLang's by httpx."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from helpers_server import CONTEXT, POOL, TEXT, VOCAB, eventually
from transformers import AutoModelForCausalLM

from wave64.serve.http import tokenizer as serving
from wave64.serve.http.schemas import CompletionRequest, NativeSampling

GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 40}
PROMPTS = ["Four score", "Now we are engaged in a great civil war", "é 你好", "It is"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return serving.Tokenizer(model_folder)


@pytest.fixture(scope="module")
def reference(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder).eval()


def events(server, path, body) -> list[dict]:
    """The events of a stream, of which the last must be [DONE]."""
    with server.http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def test_models(client):
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == CONTEXT
    with pytest.raises(openai.NotFoundError, match="no such model, expected tiny"):
        client.models.retrieve("another")


def test_greedy_tokens_are_those_of_transformers(server, reference, tokenizer):
    for prompt in PROMPTS[:2]:
        ids = tokenizer.encode(prompt)
        body = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
        ours = server.post("/generate", text=prompt, sampling_params=body).json()["output_ids"]
        with torch.no_grad():
            theirs = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24, eos_token_id=None)
        assert ours == theirs[0, len(ids) :].tolist()


def test_prompt_forms_and_usage(client, tokenizer):
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    lone = [client.completions.create(prompt=prompt, **GREEDY) for prompt in PROMPTS]
    for prompt in (PROMPTS, ids):
        batch = client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in batch.choices] == [answer.choices[0].text for answer in lone]
        assert batch.usage.prompt_tokens == sum(map(len, ids))
        assert batch.usage.completion_tokens == sum(answer.usage.completion_tokens for answer in lone)
        assert batch.usage.total_tokens == batch.usage.prompt_tokens + batch.usage.completion_tokens
    assert client.completions.create(prompt=ids[0], **GREEDY).choices[0].text == lone[0].choices[0].text
    assert len(client.completions.create(prompt="It", model="tiny").choices[0].text) > 0
    short = client.completions.create(prompt="It", model="tiny", temperature=0, extra_body={"ignore_eos": True})
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (16, "length")


@pytest.mark.parametrize("extra", [{}, {"temperature": 1, "seed": 3, "n": 3}, {"stop": ["th", "e "]}])
def test_streams_add_up_to_the_whole(client, extra):
    body = {**GREEDY, **extra}
    for prompt in PROMPTS:
        whole = client.completions.create(prompt=prompt, **body)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        texts, reasons, usage = {}, {}, None
        for chunk in client.completions.create(prompt=prompt, **options, **body):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        assert texts == {choice.index: choice.text for choice in whole.choices}
        assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
        assert usage == whole.usage


def test_chat_whole_and_streamed(client, tokenizer):
    whole = client.chat.completions.create(messages=CHAT, **GREEDY)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    prompt = tokenizer.encode("[system] Be brief.\n[user] Who?\n[assistant] ", add_special_tokens=False)
    assert whole.usage.prompt_tokens == len(prompt)
    assert whole.choices[0].message.content == client.completions.create(prompt=prompt, **GREEDY).choices[0].text
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}]
    in_parts = [CHAT[0], {"role": "user", "content": parts}]
    chunks = list(client.chat.completions.create(messages=in_parts, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, whole.choices[0].finish_reason]
    body = {"model": "tiny", "temperature": 0, "messages": CHAT}
    assert client.chat.completions.create(max_completion_tokens=3, **body).usage.completion_tokens <= 3
    body["messages"] = [{"role": "user", "content": TEXT * 3}]
    to_the_end = client.chat.completions.create(extra_body={"ignore_eos": True}, **body)
    assert to_the_end.usage.total_tokens == CONTEXT


def test_seeds(client):
    body = {"prompt": "Four score", "model": "tiny", "temperature": 1.5, "max_tokens": 20}
    three = [choice.text for choice in client.completions.create(n=3, seed=7, **body).choices]
    assert len(set(three)) == 3
    lone = [client.completions.create(seed=7 + i, **body).choices[0].text for i in range(3)]
    assert three == lone
    assert len({client.completions.create(**body).choices[0].text for _ in range(3)}) == 3


def test_requests_side_by_side_get_what_they_get_alone(server):
    bodies = [
        {"prompt": TEXT[start : start + 7 * length], "max_tokens": 8 + 7 * length, "temperature": length % 3 / 2,
         "seed": length, "n": 1 + length % 2, "presence_penalty": float(length % 2)}
        for length, start in enumerate(range(0, 600, 50), start=1)
    ]  # fmt: skip
    alone = [[choice["text"] for choice in server.complete(**body)["choices"]] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: server.complete(**body)["choices"], bodies * 2))
        streams = list(pool.map(lambda body: events(server, "/v1/completions", body), bodies))
    assert [[choice["text"] for choice in choices] for choices in together] == alone * 2
    for chunks, texts in zip(streams, alone, strict=True):
        for index, text in enumerate(texts):
            parts = [choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            assert "".join(parts) == text


def test_stop_strings_are_cut_and_never_shown(server):
    text = server.complete(prompt="Four score", max_tokens=60)["choices"][0]["text"]
    stop = text[25:28]
    end = text.index(stop)
    for body in ({"stop": stop}, {"stop": ["never to be seen", stop]}):
        choice = server.complete(prompt="Four score", max_tokens=60, **body)["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == (text[:end], "stop", stop)
        seen = ""
        body = {"prompt": "Four score", "temperature": 0, "max_tokens": 60, **body}
        for event in events(server, "/v1/completions", body):
            seen += event["choices"][0]["text"]
            assert text[:end].startswith(seen)
        assert seen == text[:end]
    sampling = {"temperature": 0, "max_new_tokens": 60, "stop": stop, "no_stop_trim": True}
    kept = server.post("/generate", text="Four score", sampling_params=sampling).json()
    assert kept["text"] == text[: end + len(stop)]
    assert kept["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert eventually(lambda: server.running == 0)


def test_stop_tokens_and_minimum(server):
    def ask(**sampling):
        body = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True, **sampling}
        return server.post("/generate", text="Four score", sampling_params=body).json()

    ids = ask()["output_ids"]
    stop = ids[5]
    ended = ask(stop_token_ids=[stop])
    first = ids.index(stop)
    assert ended["output_ids"] == ids[: first + 1]
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert ended["text"] == ask(max_new_tokens=first)["text"], "the stop token's text does not belong to the text"
    assert len(ask(stop_token_ids=[stop], min_new_tokens=12)["output_ids"]) >= 12


def test_sampling_parameters_reach_the_engine(server):
    greedy = server.complete(prompt="Four score")["choices"][0]["text"]
    for only_the_best in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-7}):
        body = {"temperature": 1.5, "prompt": "Four score", **only_the_best}
        assert server.complete(**body)["choices"][0]["text"] == greedy
    penalties = ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 2})
    texts = {server.complete(prompt="Four score", **one)["choices"][0]["text"] for one in penalties}
    assert greedy not in texts


def test_special_tokens_are_shown_on_demand(server, tokenizer):
    sampling = {"temperature": 100, "max_new_tokens": 200, "n": 8, "sampling_seed": 1, "ignore_eos": True}
    for skip in (True, False):
        body = {**sampling, "skip_special_tokens": skip}
        answers = server.post("/generate", text="It", sampling_params=body).json()
        assert any(0 in answer["output_ids"] for answer in answers)
        assert any("<|bos|>" in answer["text"] for answer in answers) != skip
        prompt = tokenizer.encode("It")
        for answer in answers:
            assert "It" + answer["text"] == tokenizer.decode(prompt[1:] + answer["output_ids"], skip)


def test_completion_logprobs_and_echo(server, reference, tokenizer):
    ids = tokenizer.encode("Four score and")
    whole = server.complete(prompt="Four score and", echo=True, logprobs=2, max_tokens=5, ignore_eos=True)["choices"][0]
    lone = server.complete(prompt="Four score and", max_tokens=5, ignore_eos=True)["choices"][0]["text"]
    assert whole["text"] == "Four score and" + lone
    found = whole["logprobs"]
    generated = server.post(
        "/generate", input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}
    ).json()["output_ids"]
    everything = ids + generated
    with torch.no_grad():
        expected = reference(torch.tensor([everything])).logits[0].log_softmax(-1)
    assert found["tokens"] == [tokenizer.token_text(i) for i in everything]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    best = expected.topk(2).values
    for at in range(1, len(everything)):
        assert found["token_logprobs"][at] == pytest.approx(expected[at - 1, everything[at]].item(), abs=1e-3)
        values = sorted(found["top_logprobs"][at].values(), reverse=True)
        assert values[0] == pytest.approx(best[at - 1, 0].item(), abs=1e-3)
    assert found["text_offset"][:3] == [0, 0, len(tokenizer.token_text(ids[1]))]
    only = server.complete(prompt="Four score and", echo=True, logprobs=0, max_tokens=0)
    assert only["choices"][0]["text"] == "Four score and"
    assert only["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(found["token_logprobs"][: len(ids)])
    assert only["usage"]["completion_tokens"] == 0
    parts = events(server, "/v1/completions", {"prompt": "Four score and", "echo": True, "logprobs": 2,
                                               "max_tokens": 5, "temperature": 0, "ignore_eos": True})  # fmt: skip
    for name in ("tokens", "text_offset"):
        assert [x for part in parts for x in part["choices"][0]["logprobs"][name]] == found[name]


def test_chat_logprobs(client, tokenizer):
    body = {"messages": CHAT, "logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True}, **GREEDY}
    whole = client.chat.completions.create(**body).choices[0]
    content = whole.logprobs.content
    assert len(content) == 40
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == whole.message.content
    for token in content:
        assert token.logprob == max(other.logprob for other in token.top_logprobs)
        assert len(token.top_logprobs) == 3
    streamed = []
    for chunk in client.chat.completions.create(stream=True, **body):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == content


def test_generate(server, tokenizer):
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    one = server.post("/generate", text="Four score", sampling_params=sampling).json()
    ids = tokenizer.encode("Four score")
    assert one["text"] == server.complete(prompt="Four score", max_tokens=12, ignore_eos=True)["choices"][0]["text"]
    meta = one["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 12}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (len(ids), 12, 0)
    assert meta["e2e_latency"] > 0
    assert server.post("/generate", input_ids=ids, sampling_params=sampling).json()["output_ids"] == one["output_ids"]
    both = server.post("/generate", text=["Four score", "It is"], sampling_params=[sampling, {"temperature": 0}]).json()
    assert both[0]["output_ids"] == one["output_ids"]
    assert len(both) == 2
    two = server.post("/generate", text="Four score", sampling_params={**sampling, "n": 2}).json()
    assert [answer["text"] for answer in two] == [one["text"]] * 2
    chunks = events(server, "/generate", {"text": "Four score", "sampling_params": sampling})
    texts = [chunk["text"] for chunk in chunks]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))
    assert (texts[-1], chunks[-1]["output_ids"]) == (one["text"], one["output_ids"])
    assert {chunk["meta_info"]["finish_reason"] for chunk in chunks[:-1]} <= {None}, "an event has a token or several"
    scored = server.post(
        "/generate", text="Four score", sampling_params=sampling, return_logprob=True, top_logprobs_num=2,
        logprob_start_len=0,
    ).json()["meta_info"]  # fmt: skip
    assert [i for _, i, _ in scored["output_token_logprobs"]] == one["output_ids"]
    assert [top[0][1] for top in scored["output_top_logprobs"]] == one["output_ids"]
    assert [i for _, i, _ in scored["input_token_logprobs"]] == ids
    assert scored["input_token_logprobs"][0][0] is None


def test_what_operators_ask(server, model_folder):
    health = server.get("/health")
    assert health.status_code == 200
    told = health.json()
    assert (told["status"], told["model"], told["vocab_size"]) == ("ok", "tiny", VOCAB)
    assert {row["status"] for row in told["backends"] if row["op"] == "rms_norm"} >= {"bound", "off"}
    for path in ("/get_model_info", "/model_info"):
        told = server.get(path).json()
        assert (told["model_path"], told["tokenizer_path"]) == (str(model_folder), str(model_folder))
    assert server.get("/v1/models").json()["data"][0]["root"] == str(model_folder)
    for path in ("/get_server_info", "/server_info"):
        assert server.get(path).json()["engine"]["max_total_num_tokens"] == POOL
    assert server.get("/health_generate").status_code == 200
    log = server.log.read_text()
    assert '"GET /model_info HTTP/1.1" 200' in log
    assert "GET /health" not in log, "polls are not worth a line"


def test_a_client_that_goes_away_frees_its_slot(server):
    # more than the pool holds at once, so it goes on for long
    body = {"prompt": "It", "max_tokens": CONTEXT - 10, "ignore_eos": True, "n": 24}
    with httpx.stream("POST", server.url + "/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()  # the connection lasts as long as this does
        next(lines)
        assert server.running == 24
    assert eventually(lambda: server.running == 0), "a stream went on without its client"
    text = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                       b"content-length: %d\r\n\r\n%s" % (len(text), text))
        assert eventually(lambda: server.running == 24)
    assert eventually(lambda: server.running == 0), "a request went on without its client"


def test_the_request_overrides_the_model_which_overrides_the_neutral_value():
    defaults = {"temperature": 0.3, "top_k": 5}
    body = NativeSampling(top_k=7)
    params = body.sampling_params(defaults, max_new_tokens=9)
    assert (params.temperature, params.top_k, params.top_p, params.max_new_tokens) == (0.3, 7, 1.0, 9)
    params = CompletionRequest(prompt="x", temperature=0.0, min_tokens=3, seed=5).sampling_params(defaults)
    assert (params.temperature, params.min_new_tokens, params.seed) == (0.0, 3, 5)
