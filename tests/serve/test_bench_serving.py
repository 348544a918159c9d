"""The benchmark's client: what it sends, what it makes of answers, its figures; against servers that go wrong, too."""

import asyncio
import gc
import json
import subprocess
import sys
from argparse import Namespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from wave64.bench_serving import backends, flags, measures, plot, run
from wave64.bench_serving.backends import PATHS, Answer, Target
from wave64.bench_serving.datasets import BadSetting, Row, Words, load

TEXTS = ["A", "A b", "A b c"]  # as /generate gives them
TOKENS = 3


def event(item: object) -> bytes:
    return b"data: " + (item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n\n"


def native(prompt: object) -> list[bytes]:
    return [event({"text": text, "meta_info": {"prompt_tokens": 7, "completion_tokens": i + 1, "cached_tokens": 2}})
            for i, text in enumerate(TEXTS)] + [event(b"[DONE]")]  # fmt: skip


def openai(kind: str) -> list[bytes]:
    parts = [{"text": text} if kind == "text" else {"delta": {"content": text}} for text in ("A", " b", " c")]
    usage = {"prompt_tokens": 7, "completion_tokens": TOKENS, "prompt_tokens_details": {"cached_tokens": 2}}
    return [*(event({"choices": [part], "usage": None}) for part in parts), event({"choices": [{"text": ""}]}),
            event({"choices": [], "usage": usage}), event(b"[DONE]")]  # fmt: skip


class StandIn:
    """An HTTP server that answers as told, and keeps what it was asked."""

    def __init__(self, size: int = 0, status: int = 200, broken: list[bytes] | None = None, gate: int = 0) -> None:
        """size: of the pieces a body is sent in; broken: the events of a stream that breaks off behind them; gate:
        requests that must run at a time before one is answered."""
        self.size, self.status, self.broken, self.gate = size, status, broken, gate
        self.bodies: list[dict] = []
        self.headers: list[str] = []
        self.alive = self.max_alive = 0
        self.is_open = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        self.headers.append(head)
        length = int(head.partition("Content-Length: ")[2].split("\r")[0])
        body = json.loads(await reader.readexactly(length) or b"{}")
        if path == "/v1/models":
            answer = [json.dumps({"data": [{"id": "stand-in"}]}).encode()]
        elif path == "/model_info":
            answer = [json.dumps({"vocab_size": 1 << 40}).encode()]
        elif path in PATHS.values():
            self.bodies.append(body)
            self.alive += 1
            self.max_alive = max(self.max_alive, self.alive)
            if self.alive >= self.gate:
                self.is_open.set()
            await self.is_open.wait()
            await asyncio.sleep(0.02)  # so that others are alive, too, if they may be
            self.alive -= 1
            answer = native(body) if path == "/generate" else openai("chat" if "messages" in body else "text")
            answer = self.broken if self.broken is not None else answer
        else:
            answer = [b"{}"]
        whole = b"".join(answer)
        status = self.status if path in PATHS.values() else 200
        writer.write(f"HTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        size = self.size or len(whole)
        for start in range(0, len(whole), size):
            piece = whole[start : start + size]
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        writer.write(b"" if self.broken is not None and path in PATHS.values() and self.status == 200 else b"0\r\n\r\n")
        writer.close()


def bench(tmp_path, *argv: str, **stand_in) -> tuple[list[dict], StandIn, list[dict]]:
    """(the lines that bench() gave, the server, the lines of the file)."""

    async def scenario() -> tuple[list[dict], StandIn]:
        server = StandIn(**stand_in)
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        args = flags.parse(["--port", str(port), "--dataset-name", "random-ids", "--tokenize-prompt", "--disable-tqdm",
                            "--random-input-len", "5", "--random-output-len", str(TOKENS), "--output-details",
                            "--output-file", str(tmp_path / "lines"), *argv])  # fmt: skip
        async with listener:
            return await run.bench(args), server

    lines, server = asyncio.run(scenario())
    return lines, server, [json.loads(text) for text in (tmp_path / "lines").read_text().splitlines()]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(run, "PAUSE_S", 0.0)


@pytest.fixture
def words(tokenizer_folder) -> Words:
    return Words.open(str(tokenizer_folder))


@pytest.mark.parametrize(("backend", "size"), [("wave64", 1), ("sglang", 7), ("sglang-oai", 1), ("vllm", 0)])
def test_answers_are_read_however_they_are_split(tmp_path, backend, size):
    lines, server, (whole,) = bench(tmp_path, "--backend", backend, "--num-prompts", "2", size=size)
    assert lines[0]["completed"] == 2
    assert whole["output_lens"] == [TOKENS] * 2
    assert whole["generated_texts"] == ["A b c"] * 2
    assert [len(gaps) for gaps in whole["itls"]] == [TOKENS - 1] * 2
    assert whole["cached_tokens"] == [2, 2]
    assert all(first > 0 for first in whole["ttfts"])
    assert len(server.bodies) == 3  # one to warm it up


def test_tokens_that_come_together_share_their_gap(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(backends.time, "perf_counter", lambda: now[0])
    found = Answer(start=4.0)
    reader = backends._Reader(found)
    for seconds, count in ((0.0, 2), (0.5, 3), (0.6, 6)):
        now[0] += seconds
        reader.take(event({"text": "x" * count, "meta_info": {"prompt_tokens": 1, "completion_tokens": count}}))
    assert (found.ttft, found.output_len) == (1.0, 6)
    assert found.itl == pytest.approx([0.5, 0.2, 0.2, 0.2])
    with pytest.raises(ValueError, match="ended without"):
        reader.finish(200, is_stream=True)
    reader.take(event(b"[DONE]"))
    reader.finish(200, is_stream=True)
    assert found.latency == pytest.approx(2.1)


@pytest.mark.parametrize(("stand_in", "reason"), [
    ({"status": 503, "broken": [b"too many"]}, "status 503: too many"),
    ({"broken": native(0)[:2]}, "closed the connection"), ({"broken": [event({"error": {"message": "no"}})]}, "no"),
    ({"broken": [event(b"{...")]}, "malformed")])  # fmt: skip
def test_what_goes_wrong_is_counted_and_told(tmp_path, capsys, stand_in, reason):
    with pytest.raises(run.Unreachable, match=reason):
        bench(tmp_path, "--num-prompts", "2", **stand_in)
    (found,), _, (line,) = bench(tmp_path, "--num-prompts", "2", "--warmup-requests", "0", **stand_in)
    assert (found["completed"], found["total_output_tokens"], found["p99_itl_ms"]) == (0, 0, 0)
    assert all(reason in error for error in line["errors"])
    assert "2 of 2 requests failed" in capsys.readouterr().err


def test_concurrency_is_what_was_asked_for(tmp_path):
    lines, server, _ = bench(tmp_path, "--num-prompts", "9", "--max-concurrency", "3", "--warmup-requests", "3", gate=3)
    assert lines[0]["completed"] == 9
    assert server.max_alive == 3
    lines, server, _ = bench(tmp_path, "--num-prompts", "9", "--warmup-requests", "0", gate=9)
    assert (server.max_alive, lines[0]["max_concurrency"]) == (9, None)


def test_a_run_for_each_load_and_what_requests_hold(tmp_path):
    lines, server, _ = bench(tmp_path, "--num-prompts", "2", "--request-rate", "1000", "inf", "--header", "x-a=b",
                             "--api-key", "k", "--extra-request-body", '{"rid": "r"}', "--goodput", "ttft:60000",
                             "--cache-report", "--tag", "t")  # fmt: skip
    assert [line["request_rate"] for line in lines] == [1000, float("inf")]
    assert all(line["slo_attainment"] == 1 and line["tag"] == "t" for line in lines)
    assert lines[0]["cache_report"]["cache_hit_rate_pct"] == round(100 * 2 / 7, 2)
    assert all("\r\nx-a: b\r\nAuthorization: Bearer k\r\n" in head for head in server.headers)
    assert all(body["rid"] == "r" and body["sampling_params"]["ignore_eos"] for body in server.bodies)
    assert [body["sampling_params"]["temperature"] for body in server.bodies] == [0] * 6


def test_the_summary_is_of_three_loads(tmp_path, monkeypatch):
    loads, seen = [], set()

    async def measured(self, rows, rate, limit):
        asked = {tuple(row.turns[0]) for row in rows}
        assert len(asked) == len(rows)
        assert not asked & seen, "none may be in the server's prefix cache"
        seen.update(asked)
        loads.append((len(rows), rows[0].prompt_len, rows[0].output_len, rate, limit))
        answers = [answer(0.0, 0.01 * (i + 1), [0.002], 2) for i in range(len(rows))]
        return measures.Run(answers, 4.0, 0, rate, limit, 0.5)

    async def scenario() -> list[tuple[str, str]]:
        listener = await asyncio.start_server(StandIn().serve, "127.0.0.1", 0)
        port = str(listener.sockets[0].getsockname()[1])
        async with listener:
            return await run.summary(flags.parse(["--port", port, "--tokenize-prompt"]))

    monkeypatch.setattr(run.Bench, "run", measured)
    table = dict(asyncio.run(scenario()))
    everything = float("inf")
    assert loads[::2] == [(count, 128, 8, everything, limit) for count, limit in ((1000, None), (640, 64), (32, 1))]
    assert loads[1::2] == [(1000, 128, 128, everything, None), (640, 128, 128, everything, 64),
                           (32, 128, 8, everything, 1)]  # fmt: skip
    assert [value for name, value in table.items() if "output tok/s" in name] == ["500", "320"]
    assert [value for name, value in table.items() if "p99" in name] == ["2.00"]
    assert [value for name, value in table.items() if "first token" in name] == ["5005", "3205", "165.00"]


def test_arrivals_are_a_poisson_process(monkeypatch):
    now, slept = [0.0], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds + 0.01  # later than it was to be, which must not add up

    monkeypatch.setattr(run.asyncio, "sleep", sleep)
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])

    async def arrivals() -> int:
        return len([row async for row in run._arrivals([Row([[1]], 1, 1)] * 4000, 50.0, seed=1)])

    assert asyncio.run(arrivals()) == 4000
    assert now[0] == pytest.approx(4000 / 50, rel=0.06)
    gaps = [gap for gap in slept if gap > 0.002]
    assert max(gaps) > 4 * sum(gaps) / len(gaps)  # exponential, not equal


@pytest.mark.parametrize("backend", ["wave64", "sglang-oai", "sglang-oai-chat"])
def test_a_conversation_holds_what_was_said(tmp_path, words, backend):
    async def talk() -> tuple[list[Answer], StandIn]:
        server = StandIn()
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        target = Target(backend, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", "m", {})
        async with listener:
            return await target.talk(Row(["one", " two", " three"], 1, TOKENS)), server

    answers, server = asyncio.run(talk())
    assert [answer.success for answer in answers] == [True] * 3
    if backend == "sglang-oai-chat":
        said = [(message["role"], message["content"]) for message in server.bodies[-1]["messages"]]
        assert said == [("user", "one"), ("assistant", "A b c"), ("user", " two"), ("assistant", "A b c"),
                        ("user", " three")]  # fmt: skip
    else:
        name = "text" if backend == "wave64" else "prompt"
        assert [body[name] for body in server.bodies] == ["one", "oneA b c two", "oneA b c twoA b c three"]


def test_what_collections_left_out_before_they_leave_out_after(tmp_path):
    try:
        for had_frozen in (False, True):
            gc.freeze() if had_frozen else gc.unfreeze()
            bench(tmp_path, "--num-prompts", "1")
            assert (gc.get_freeze_count() > 0) == had_frozen
    finally:
        gc.freeze()  # as tests/conftest.py has it


def made(*argv: str) -> Namespace:
    return flags.parse(["--num-prompts", "4", "--random-input-len", "12", "--random-output-len", "6", *argv])


def test_random_ids_have_their_lengths(words):
    for row in load(made("--dataset-name", "random-ids", "--random-range-ratio", "1", "--tokenize-prompt"), None, 50):
        assert (len(row.turns[0]), row.prompt_len, row.output_len) == (12, 12, 6)
        assert set(row.turns[0]) <= set(range(50))
    rows = load(made("--dataset-name", "random-ids"), words, words.vocab_size)
    assert len({row.output_len for row in rows}) > 1
    assert all(1 <= row.prompt_len <= 11 and isinstance(row.turns[0], str) for row in rows)
    assert rows == load(made("--dataset-name", "random-ids"), words, words.vocab_size)
    assert rows != load(made("--dataset-name", "random-ids", "--seed", "1"), words, words.vocab_size)


def test_files_of_conversations(tmp_path, words):
    talks = [{"conversations": [{"value": f"question {i} of some words"}, {"value": "an answer"}]} for i in range(9)]
    talks.append({"conversations": [{"value": "alone"}]})
    sharegpt, custom = tmp_path / "a.json", tmp_path / "b.jsonl"
    sharegpt.write_text(json.dumps(talks))
    custom.write_text("\n".join(map(json.dumps, talks)))
    for name, path in (("sharegpt", sharegpt), ("custom", custom)):
        rows = load(made("--dataset-name", name, "--dataset-path", str(path), "--prompt-suffix", "!"), words, 50)
        assert len(rows) == 4
        for row in rows:
            assert row.turns[0].endswith("words!")
            assert (row.prompt_len, row.output_len) == (len(words.encode(row.turns[0])), len(words.encode("an answer")))
    args = made("--dataset-name", "sharegpt", "--dataset-path", str(sharegpt), "--apply-chat-template",
                "--sharegpt-output-len", "5")  # fmt: skip
    row = load(args, words, 50)[0]
    assert row.turns[0].startswith("[user] question")
    assert row.output_len == 5
    args = made("--dataset-name", "random", "--dataset-path", str(sharegpt), "--random-range-ratio", "1")
    lengths = [(row.prompt_len, row.output_len) for row in load(args, words, 50)]
    assert lengths == [(11, 6)] * 4  # the server adds a token
    for name, path, reason in (
        ("sharegpt", "", "--dataset-path: expected a local file"), ("sharegpt", custom, "expected a JSON list"),
        ("custom", sharegpt, "expected an object"), ("custom", tmp_path / "absent", "No such file"),
    ):  # fmt: skip
        with pytest.raises(BadSetting, match=reason):
            load(made("--dataset-name", name, "--dataset-path", str(path)), words, 50)


def test_groups_share_a_prefix(words):
    args = made("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "3", "--gsp-prompts-per-group", "2",
                "--gsp-system-prompt-len", "20", "--gsp-question-len", "5", "--gsp-output-len", "4", "--gsp-num-turns",
                "2", "--gsp-ordered")  # fmt: skip
    rows = load(args, words, 50)
    systems = [row.turns[0].partition("\n\n")[0] for row in rows]
    assert [systems.count(system) for system in systems] == [2] * 6
    assert all(len(row.turns) == 2 and row.output_len == 4 for row in rows)
    assert len({row.turns[0] for row in rows}) == 6


def answer(start: float, ttft: float, gaps: list[float], output_len: int, **more) -> Answer:
    return Answer(4, 5, output_len, start, ttft + sum(gaps), ttft, gaps, "x", success=True, **more)


def test_the_figures_are_sglangs():
    answers = [answer(10.0, 0.5, [0.1, 0.3], 3), answer(10.2, 1.0, [0.2], 2), Answer(4, error="no")]
    found = measures.Run(answers, 2.0, 6, float("inf"), None).measures()
    assert (found["completed"], found["total_input_tokens"], found["total_output_tokens"]) == (2, 8, 5)
    assert (found["request_throughput"], found["output_throughput"], found["total_throughput"]) == (1.0, 2.5, 6.5)
    assert found["mean_ttft_ms"] == pytest.approx(750)
    assert found["p99_itl_ms"] == pytest.approx(298)  # of 100, 200 and 300, linear between them
    assert found["mean_tpot_ms"] == pytest.approx((200 + 200) / 2)
    assert found["mean_e2e_latency_ms"] == pytest.approx((900 + 1200) / 2)
    assert found["concurrency"] == pytest.approx(2.1 / 2)
    assert (found["max_output_tokens_per_s"], found["max_concurrent_requests"]) == (3, 2)
    kept = measures.goodput(answers, {"ttft": 600, "e2el": 1300}, 2.0)
    assert kept["slo_attainment_by_metric"] == {"ttft": 1 / 3, "e2el": 2 / 3}
    assert (kept["request_goodput"], kept["slo_attainment"]) == (0.5, 1 / 3)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0.001, 3), st.lists(st.floats(0.001, 2), max_size=5)), max_size=9))
def test_any_answers_have_figures(times):
    answers = [answer(start, ttft, gaps, len(gaps) + 1) for start, ttft, gaps in times]
    found = measures.Run(answers, 1.0, 0, 1.0, 1).measures()
    assert found["max_concurrent_requests"] <= len(answers) <= found["total_output_tokens"]
    assert json.loads(json.dumps(found)) == found
    assert "Max ITL (ms):" in measures.report({"backend": "b", "request_rate": 1.0, "max_concurrency": 1, **found})


def test_a_plot_has_a_curve_per_tag_in_order_of_load(tmp_path):
    path, target = tmp_path / "lines", tmp_path / "out.png"
    for tag, limit, completed in (("a", 8, 2), ("a", 1, 2), ("b", 4, 2), ("b", 2, 0)):
        found = measures.Run([answer(0, 0.1, [0.1], 2)] * completed, 1.0, 0, float("inf"), limit).measures()
        line = {"tag": tag, "backend": "wave64", "dataset_name": "random-ids", "max_concurrency": limit,
                "request_rate": float("inf"), "random_input_len": 1, "random_output_len": 2, **found}  # fmt: skip
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    curves = plot.curves(path)
    assert {name: list(map(plot.load_of, lines)) for name, lines in curves.items()} == {
        "a, random-ids 1/2": ["1", "8"], "b, random-ids 1/2": ["4"]}  # fmt: skip
    pytest.importorskip("matplotlib")
    plot.draw(path, target)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert target.stat().st_size > 20_000


@pytest.mark.parametrize(("argv", "reason"), [
    (["--request-rate", "0"], "expected more than 0"), (["--random-range-ratio", "2"], "expected 0 to 1"),
    (["--num-prompts", "0"], "from 1 on"), (["--goodput", "itl:1"], "ttft"), (["--header", "a"], "KEY=VALUE"),
    (["--extra-request-body", "[]"], "expected a JSON object"), (["--base-url", "localhost:1"], "expected http"),
    (["--request-rate", "1", "2", "--max-concurrency", "1", "2"], "expected one value")])  # fmt: skip
def test_bad_flags_are_refused_in_words(argv, reason, capsys):
    with pytest.raises(SystemExit):
        flags.parse(argv)
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_no_server_and_no_torch():
    """As a user starts it."""
    code = ("import runpy, sys; sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'wave64.bench_serving']\n"
            "import wave64\nfrom wave64.bench_serving.run import main\n"
            "print(main(['--port', '1', '--ready-check-timeout-sec', '0.01']), 'torch' in sys.modules)")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["1", "False"], ended.stderr
    assert ended.stderr.startswith("wave64.bench_serving: error: no server at http://127.0.0.1:1: ")


def test_the_tokenizer_is_the_models(words, tokenizer_folder, tmp_path):
    own = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert words.encode("Four score") == own.encode("Four score").ids
    assert words.num_special == 1
    with pytest.raises(BadSetting, match="expected a folder with tokenizer.json"):
        Words.open(str(tmp_path))
