"""The engine over a tiny random Llama, next to transformers' own forward pass of it; then as a process."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zmq
from helpers_parallel import collect
from helpers_server import eventually, is_alive
from transformers import LlamaConfig, LlamaForCausalLM

from wave64.serve.args import ArgsError, ServerArgs
from wave64.serve.engine.engine import Engine, Throughput, run_engine
from wave64.serve.engine.rank import PREFILL_CHUNK
from wave64.serve.messages import (
    Abort,
    Failed,
    FlushCache,
    Flushed,
    Ready,
    Request,
    SamplingParams,
    ToApi,
    decode_to_api,
    encode,
)
from wave64.serve.model.config import ConfigError

VOCAB, CONTEXT, EOS = 97, 160, 2
GREEDY = SamplingParams(max_new_tokens=64, temperature=0, ignore_eos=True)
PROMPTS = [[5, 6, 7], [9] * 21, [1], [4, 8, 15, 16, 23, 42] * 8, [3, 3]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[LlamaForCausalLM, Path]:
    """A tiny Llama with weights wide enough that its next tokens differ clearly, and its folder."""
    torch.set_num_threads(1)  # a second thread costs such a model more than it gives
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=EOS, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def make(llama, device):
    """make(flag=value, ...) -> an Engine of the tiny Llama in fp32, with capacity for five whole contexts."""

    def build(**flags) -> Engine:
        if "mem_fraction_static" not in flags:  # on a GPU the default takes nearly all there is
            flags.setdefault("max_total_tokens", 5 * CONTEXT)
        return Engine(ServerArgs(**{"model_path": str(llama[1]), "device": device, "dtype": "float32", **flags}))

    return build


def request(rid, prompt, params=GREEDY, **rest) -> Request:
    return Request(str(rid), prompt, params, **rest)


@torch.no_grad()
def logprobs_of(model, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)


def greedy(model, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logprobs_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(llama) -> list[list[int]]:
    """transformers' greedy continuation of each prompt, without its cache."""
    return [greedy(llama[0], prompt, 64) for prompt in PROMPTS]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_greedy_in_flight_equals_transformers(make, expected, chunk):
    got = collect(make(chunked_prefill_size=chunk), *(request(i, p) for i, p in enumerate(PROMPTS)))
    assert [got[str(i)].token_ids for i in range(5)] == expected
    assert {output.finish_reason for output in got.values()} == {"length"}


def test_preemption_loses_nothing(make, expected, monkeypatch):
    """The pool holds one long request and a bit: whoever came late is thrown out again and again."""
    engine, released = make(max_total_tokens=160), []
    release = engine.scheduler._release
    monkeypatch.setattr(engine.scheduler, "_release", lambda seq: (released.append(seq), release(seq)))
    asked = [request(i, p, top_logprobs=2, prompt_logprobs=True) for i, p in enumerate(PROMPTS)]
    got = collect(engine, *asked)
    assert len(released) > len(PROMPTS)
    assert engine.statistics().preemptions == len(released) - len(PROMPTS)
    roomy = collect(make(), *asked)
    for i, tokens in enumerate(expected):
        assert got[str(i)].token_ids == tokens
        assert [entry.id for entry in got[str(i)].logprobs] == tokens
        assert len(got[str(i)].prompt_logprobs) == len(PROMPTS[i])
        for ours, theirs in zip(got[str(i)].logprobs, roomy[str(i)].logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


@pytest.mark.parametrize("chunk", [3, 1000])
def test_tokens_do_not_depend_on_company(make, chunk):
    kinds = [
        GREEDY,
        SamplingParams(max_new_tokens=30, seed=11, ignore_eos=True),
        SamplingParams(max_new_tokens=30, temperature=0.7, top_p=0.8, seed=12),
        SamplingParams(max_new_tokens=30, temperature=1.5, top_k=5, min_p=0.1, seed=13),
        SamplingParams(max_new_tokens=30, temperature=0, repetition_penalty=1.5),
        SamplingParams(max_new_tokens=30, presence_penalty=0.5, frequency_penalty=0.7, seed=14),
        SamplingParams(max_new_tokens=30, min_new_tokens=25, seed=15),
        SamplingParams(max_new_tokens=5, stop_token_ids=list(range(20)), seed=16),
    ]
    asked = [request(i, [3 + i] * (1 + 5 * i), params) for i, params in enumerate(kinds)]
    together = collect(make(chunked_prefill_size=chunk), *asked)
    preempted = collect(make(chunked_prefill_size=chunk, max_total_tokens=112), *asked)
    one_by_one = make()
    for each in asked:
        alone = collect(one_by_one, each)[each.rid]
        assert alone.token_ids == together[each.rid].token_ids == preempted[each.rid].token_ids
        assert alone.finish_reason == together[each.rid].finish_reason


def test_seeds(make):
    params = [SamplingParams(max_new_tokens=40, seed=seed, ignore_eos=True) for seed in (0, 0, 2, None, None)]
    got = collect(make(random_seed=5), *(request(i, [8, 9], each) for i, each in enumerate(params)))
    tokens = [got[str(i)].token_ids for i in range(5)]
    assert tokens[0] == tokens[1]
    assert len({tuple(each) for each in tokens}) == 4
    again = collect(make(random_seed=5), *(request(i, [8, 9], each) for i, each in enumerate(params)))
    assert [again[str(i)].token_ids for i in range(5)] == tokens


@pytest.mark.parametrize("chunk", [3, 1000])
def test_logprobs_are_those_of_transformers(make, llama, chunk):
    """Of the raw distribution, whatever temperature and penalties do to the choice."""
    params = SamplingParams(max_new_tokens=12, temperature=2.0, repetition_penalty=1.3, seed=3, ignore_eos=True)
    prompt = PROMPTS[3]
    others = [request("none", [7, 8]), request("chosen", [1, 5], params, top_logprobs=0)]
    wanted = request("all", prompt, params, top_logprobs=4, prompt_logprobs=True, top_prompt_logprobs=4)
    got = collect(make(chunked_prefill_size=chunk), *others, wanted)
    assert got["none"].logprobs == []
    assert got["none"].prompt_logprobs is None
    assert all(entry.top == [] for entry in got["chosen"].logprobs)
    whole = got["all"]
    truth = logprobs_of(llama[0], prompt + whole.token_ids)
    assert whole.prompt_logprobs[0] is None
    entries = [*whole.prompt_logprobs[1:], *whole.logprobs]
    assert [entry.id for entry in entries] == (prompt + whole.token_ids)[1:]
    for entry, row in zip(entries, truth, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.id]), abs=1e-4)
        best = row.topk(4)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    truth = logprobs_of(llama[0], [1, 5] + got["chosen"].token_ids)[1:]
    for entry, row in zip(got["chosen"].logprobs, truth, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.id]), abs=1e-4)


def test_each_filter_reaches_its_request(make, expected):
    """A filter that leaves one token makes a hot request greedy, and leaves the one next to it alone."""
    hot = dict(max_new_tokens=30, temperature=3.0, seed=1, ignore_eos=True)
    filters = {"top_k": 1, "top_p": 1e-6, "min_p": 1.0}
    asked = [request(name, PROMPTS[0], SamplingParams(**hot, **{name: value})) for name, value in filters.items()]
    got = collect(make(), request("none", PROMPTS[0], SamplingParams(**hot)), *asked)
    for name in filters:
        assert got[name].token_ids == expected[0][:30]
    assert got["none"].token_ids != expected[0][:30]


def test_penalties(make, llama):
    """Repetition counts prompt and output, frequency and presence the output; next to one without any."""
    prompt, params = [5, 6, 5, 7], SamplingParams(max_new_tokens=40, temperature=0, ignore_eos=True)
    params.repetition_penalty, params.frequency_penalty, params.presence_penalty = 1.7, 0.4, 0.9
    got = collect(make(), request("a", prompt, params), request("plain", prompt))
    with torch.no_grad():
        ids = list(prompt)
        for _ in range(40):
            logits = llama[0](torch.tensor([ids])).logits[0, -1]
            for token in set(ids):
                logits[token] *= 1 / 1.7 if logits[token] > 0 else 1.7
                count = ids[len(prompt) :].count(token)
                logits[token] -= 0.4 * count + 0.9 * (count > 0)
            ids.append(int(logits.argmax()))
    assert got["a"].token_ids == ids[len(prompt) :]
    assert got["plain"].token_ids == greedy(llama[0], prompt, 64)


def test_what_ends_a_request(make, expected):
    tokens = expected[0]
    stop = next(i for i in range(3, 64) if tokens[i] not in tokens[:i])

    def run(**params):
        return collect(make(), request("a", PROMPTS[0], SamplingParams(temperature=0, **params)))["a"]

    stopped = run(max_new_tokens=64, stop_token_ids=[tokens[stop]], ignore_eos=True)
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[: stop + 1], "stop")
    assert stopped.matched_stop == tokens[stop]
    full = run(max_new_tokens=stop, stop_token_ids=[tokens[stop]], ignore_eos=True)
    assert (full.token_ids, full.finish_reason, full.matched_stop) == (tokens[:stop], "length", None)
    later = run(max_new_tokens=64, stop_token_ids=list(range(3, VOCAB)), min_new_tokens=10)
    assert set(later.token_ids[:10]) <= {0, 1}  # 2 is the model's own
    assert (len(later.token_ids), later.finish_reason) == (11, "stop")
    scored = request("a", PROMPTS[0], SamplingParams(max_new_tokens=0), top_logprobs=0, prompt_logprobs=True)
    nothing = collect(make(), scored)["a"]
    assert (nothing.token_ids, nothing.logprobs, nothing.finish_reason) == ([], [], "length")
    assert [entry and entry.id for entry in nothing.prompt_logprobs] == [None, *PROMPTS[0][1:]]


def test_the_models_own_end_token(make, llama):
    """eos is taken from the checkpoint; ignore_eos goes on past it."""
    params = SamplingParams(max_new_tokens=100, temperature=3.0, seed=1)
    stopped = collect(make(), request("a", [5], params))["a"]
    assert stopped.token_ids[-1] == stopped.matched_stop == EOS
    params.ignore_eos = True
    longer = collect(make(), request("a", [5], params))["a"]
    assert longer.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert len(longer.token_ids) == 100


def test_an_end_token_beyond_the_vocabulary_is_none(make, llama, tmp_path):
    """The configuration of another model's tokenizer: no index beyond the logits where ends are forbidden."""
    folder = shutil.copytree(llama[1], tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, VOCAB, VOCAB + 900]}))
    params = SamplingParams(max_new_tokens=5, min_new_tokens=5, temperature=0)
    got = collect(make(model_path=str(folder)), request("a", [5], params))["a"]
    assert (len(got.token_ids), got.finish_reason) == (5, "length")


def test_refusals_name_the_reason_and_harm_nobody(make, expected):
    bad = {
        "input_ids: empty, expected at least one token": request("0", []),
        f"token ids from 0 to {VOCAB - 1}, got {VOCAB}": request("1", [1, VOCAB]),
        f"token ids from 0 to {VOCAB - 1}, got -1": request("2", [-1]),
        "you requested 164 tokens (100 in the input_ids, 64 in max_new_tokens)": request("3", [1] * 100),
        f"128 tokens on this server, whose KV pool (--max-total-tokens) is smaller than the model's {CONTEXT}": request(
            "4", [1] * 80
        ),
        "temperature: expected at least 0, got nan": request("5", [1], SamplingParams(temperature=float("nan"))),
        "top_p: expected more than 0 and at most 1, got 0": request("6", [1], SamplingParams(top_p=0)),
        "stop_token_ids: expected token ids from 0": request("7", [1], SamplingParams(stop_token_ids=[10**9])),
    }
    got = collect(make(max_total_tokens=128), request("good", PROMPTS[0]), *bad.values())
    assert got["good"].token_ids == expected[0]
    for reason, each in bad.items():
        assert got[each.rid].finish_reason == "error"
        assert reason in str(got[each.rid].error)


def test_extreme_values_harm_nobody(make, expected):
    """Numbers that are legal and overflow what tensors hold."""
    extremes = [
        SamplingParams(max_new_tokens=5, top_k=-(10**15), temperature=1e300),
        SamplingParams(max_new_tokens=5, top_k=10**15, temperature=1e-300, seed=2**63),
        SamplingParams(max_new_tokens=5, frequency_penalty=1e300, presence_penalty=-1e300, repetition_penalty=1e-300),
    ]
    got = collect(make(), request("good", PROMPTS[0]), *(request(i, [5, 6], each) for i, each in enumerate(extremes)))
    assert got["good"].token_ids == expected[0]
    assert all(output.error is None for output in got.values())


@pytest.mark.parametrize(("chunk", "prefill", "budget"), [
    (50, 20, 20), (20, 50, 20), (None, 7, 7), (-1, 7, CONTEXT), (-1, 3 * CONTEXT, 3 * CONTEXT), (None, 10**6, None),
])  # fmt: skip
def test_prompt_tokens_per_step(make, device, chunk, prefill, budget):
    """Both flags hold; whole prompts are whole, whatever the other says."""
    engine = make(chunked_prefill_size=chunk, max_prefill_tokens=prefill)
    assert engine.scheduler.prefill_budget == (budget or PREFILL_CHUNK[device])


def test_a_request_may_fill_context_and_pool_to_the_last_token(make):
    params = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)
    got = collect(make(), request("fits", [5] * 100, params), request("not", [5] * 101, params))
    assert (len(got["fits"].token_ids), got["fits"].finish_reason, got["not"].finish_reason) == (60, "length", "error")
    got = collect(make(max_total_tokens=80), request("fits", [5] * 20, params), request("not", [5] * 21, params))
    assert (len(got["fits"].token_ids), got["fits"].finish_reason, got["not"].finish_reason) == (60, "length", "error")


def test_abort_frees_at_once(make, expected):
    engine = make(max_running_requests=2)
    for i, prompt in enumerate(PROMPTS):
        engine.add(request(i, prompt))
    engine.step()
    for rid in ("1", "4", "nobody"):  # one that runs, one that waits, one that is not there
        engine.abort(rid)
    got = collect(engine)
    assert set(got) == {"0", "2", "3"}
    assert got["2"].token_ids == expected[2]


def test_a_failing_step_fails_only_its_requests(make, expected, monkeypatch):
    engine = make(max_running_requests=2)
    model = engine.runner.model
    for i, prompt in enumerate(PROMPTS[:3]):
        engine.add(request(i, prompt))

    def broken(batch, kv_cache):
        raise RuntimeError("out of magic")

    monkeypatch.setattr(engine.runner, "model", broken)
    for captured in ("_graphs", "_prompt_graphs"):  # they would replay the model that is whole
        monkeypatch.setattr(engine.runner, captured, None)
    failed = engine.step()
    assert [(each.rid, each.finish_reason) for each in failed] == [("0", "error"), ("1", "error")]
    assert "out of magic" in failed[0].error
    monkeypatch.setattr(engine.runner, "model", model)
    assert collect(engine)["2"].token_ids == expected[2]


def test_a_rid_in_use_is_refused(make):
    engine = make()
    engine.add(request("a", [1]))
    with pytest.raises(ValueError, match="'a' is already there"):
        engine.add(request("a", [2]))


def test_what_cannot_start_says_why(make):
    with pytest.raises(ArgsError, match="--context-length: expected at most 160, the model's own, got 161"):
        make(context_length=CONTEXT + 1)
    with pytest.raises(ConfigError, match="one page of 16 tokens takes 6144 bytes"):
        make(mem_fraction_static=1e-9)


def test_ready_tells_the_limits(make):
    ready = make(context_length=100, max_total_tokens=50).ready()
    assert (ready.context_length, ready.max_total_num_tokens, ready.vocab_size) == (100, 64, VOCAB)
    assert ready.dtype == "float32"
    assert {"op", "backend", "status", "reason"} <= set(ready.backends[0])
    assert ready.sampling_defaults == {}


def test_a_busy_engine_says_how_fast_it_is(make, monkeypatch, caplog):
    monkeypatch.setattr("wave64.serve.engine.engine.REPORT_S", 0.0)
    engine = make(max_running_requests=1, disable_overlap_schedule=True)
    engine.add(request("a", [5] * 20, SamplingParams(max_new_tokens=2, temperature=0, ignore_eos=True)))
    engine.add(request("b", [5]))
    monkeypatch.setattr(engine, "_throughput", Throughput(itertools.count().__next__))
    with caplog.at_level("INFO", logger="wave64"):
        engine.step()
        engine.step()
    said = [record.getMessage() for record in caplog.records if "throughput" in record.getMessage()]
    assert said == ["throughput: 20.0 prompt and 1.0 generated tokens/s; 1 running, 1 waiting, 2 of 50 KV pages in use",
                    "throughput: 0.0 prompt and 1.0 generated tokens/s; 0 running, 1 waiting, 0 of 50 KV pages in use"]


class Process:
    """An engine process and the api's end of its pipes."""

    def __init__(self, args: ServerArgs, folder: Path):
        self.context = zmq.Context()
        self.outputs = self.context.socket(zmq.PULL)
        self.outputs.bind(f"ipc://{folder}/outputs")
        self.requests = self.context.socket(zmq.PUSH)
        self.requests.connect(f"ipc://{folder}/requests")
        ends = (f"ipc://{folder}/requests", f"ipc://{folder}/outputs")
        self.process = multiprocessing.get_context("spawn").Process(target=run_engine, args=(args, *ends), daemon=True)
        self.process.start()

    def receive(self) -> ToApi:
        assert self.outputs.poll(60_000), "the engine process said nothing for a minute"
        return decode_to_api(self.outputs.recv())

    def send_together(self, *messages: bytes) -> None:
        """The engine takes no step between these."""
        os.kill(self.process.pid, signal.SIGSTOP)
        for message in messages:
            self.requests.send(message)
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self):
        self.process.kill()
        self.process.join()
        self.context.destroy(linger=0)


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(**flags) -> Process:
        started.append(Process(ServerArgs(**flags), tmp_path))
        return started[-1]

    yield begin
    for each in started:
        each.close()


@pytest.mark.slow
def test_engine_process(start, llama, device, expected):
    engine = start(model_path=str(llama[1]), device=device, dtype="float32")
    ready = engine.receive()
    assert isinstance(ready, Ready)
    assert ready.context_length == CONTEXT
    engine.send_together(
        b"\xc1 not msgpack", *(encode(request(i, prompt)) for i, prompt in enumerate(PROMPTS)),
        encode(request("gone", [1], SamplingParams(max_new_tokens=150, ignore_eos=True))), encode(Abort("gone")))
    tokens: dict[str, list[int]] = {}
    done = set()
    statistics = []
    while len(done) < len(PROMPTS):
        message = engine.receive()
        statistics.append(message.statistics)
        for output in message.outputs:
            tokens.setdefault(output.rid, []).extend(output.token_ids)
            if output.finish_reason:
                done.add(output.rid)
    assert [tokens[str(i)] for i in range(5)] == expected
    assert "gone" not in done
    assert max(each.running for each in statistics) >= 1
    last = statistics[-1]
    assert (last.running, last.waiting, last.pages_used, last.preemptions) == (0, 0, 0, 0)
    assert last.prompt_tokens >= sum(map(len, PROMPTS))
    assert last.generated_tokens >= 64 * len(PROMPTS)
    assert statistics == sorted(statistics, key=lambda each: each.generated_tokens)
    assert last.pages_cached > 0
    engine.requests.send(encode(FlushCache()))
    assert engine.receive() == Flushed(True)
    engine.send_together(encode(request("runs", [1])), encode(FlushCache()))
    while not isinstance(flushed := engine.receive(), Flushed):
        pass
    assert not flushed.done
    engine.process.terminate()
    engine.process.join()
    assert engine.process.exitcode == 0


@pytest.mark.slow
def test_engine_process_that_cannot_start(start, tmp_path):
    engine = start(model_path=str(tmp_path / "nowhere"))
    failed = engine.receive()
    assert isinstance(failed, Failed)
    assert "nowhere" in failed.error
    assert "\n" not in failed.error
    engine.process.join()
    assert engine.process.exitcode == 1


PARENT = """
import multiprocessing, sys
from wave64.serve.args import ServerArgs
from wave64.serve.engine.engine import run_engine

if __name__ == "__main__":
    model, folder = sys.argv[1:]
    ends = (f"ipc://{folder}/requests", f"ipc://{folder}/outputs")
    args = ServerArgs(model, max_total_tokens=512)
    engine = multiprocessing.get_context("spawn").Process(target=run_engine, args=(args, *ends))
    engine.start()
    print(engine.pid, flush=True)
    engine.join()
"""


@pytest.mark.slow
def test_engine_process_ends_with_its_parent(llama, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with zmq.Context() as context, context.socket(zmq.PULL) as outputs:
        outputs.bind(f"ipc://{tmp_path}/outputs")
        command = [sys.executable, str(script), str(llama[1]), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            engine = Path("/proc") / parent.stdout.readline().strip()
            assert outputs.poll(60_000), "the engine process said nothing for a minute"
            assert isinstance(decode_to_api(outputs.recv()), Ready)
            parent.kill()
        assert eventually(lambda: not is_alive(int(engine.name))), "the engine process outlives its parent"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs of decode steps are captured on a GPU")
def test_graph_replay_equals_eager(make, expected, monkeypatch):
    """Batches of 1 to 5 in graphs of 1 to 8: the tokens are those of kernel by kernel launches, and of transformers."""
    asked = [request(i, p, top_logprobs=3) for i, p in enumerate(PROMPTS)]
    asked[1].params = SamplingParams(max_new_tokens=9, temperature=0, ignore_eos=True)
    graphed, eager = make(max_running_requests=8), make(max_running_requests=8, disable_cuda_graph=True)
    replays, replay = [], graphed.runner._graphs.replay
    monkeypatch.setattr(graphed.runner._graphs, "replay", lambda *given: (replays.append(given), replay(*given))[1])
    got, truth = collect(graphed, *asked), collect(eager, *asked)
    assert len(replays) >= 60
    for i, tokens in enumerate(expected):
        assert got[str(i)].token_ids == truth[str(i)].token_ids == tokens[: len(got[str(i)].token_ids)]
        for ours, theirs in zip(got[str(i)].logprobs, truth[str(i)].logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
