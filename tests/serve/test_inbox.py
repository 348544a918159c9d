"""The api process's side of a stream: what comes while nobody takes it is one Output."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from wave64.serve.http import engine_client
from wave64.serve.http.engine_client import EngineClient, Inbox
from wave64.serve.http.schemas import ApiError
from wave64.serve.messages import Abort, Output, Ready, Request, SamplingParams, TokenLogprob


def test_tokens_of_several_steps_become_one_output_for_each_request():
    async def run():
        inbox, logprobs = Inbox(), [TokenLogprob(i, -1.0) for i in range(4)]
        inbox.put(Output("a", [5], logprobs=[logprobs[0]], prompt_logprobs=[None], cached_tokens=7))
        inbox.put(Output("b", [1]))
        inbox.put(Output("a", [6], logprobs=[logprobs[1]]))
        assert await inbox.get() == Output("a", [5, 6], logprobs=logprobs[:2], prompt_logprobs=[None], cached_tokens=7)
        inbox.put(Output("b", [2], "stop", 2))
        assert await inbox.get() == Output("b", [1, 2], "stop", 2)
        taken = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        assert not taken.done()
        inbox.put(Output("a", [8]))
        inbox.put(Output("a", [9]))
        assert (await taken).token_ids == [8, 9]

    asyncio.run(run())


def test_an_error_ends_the_stream_behind_what_came_before_it():
    async def run():
        inbox = Inbox()
        inbox.put(Output("a", [1]))
        inbox.fail(ApiError("first", status=504))
        inbox.fail(ApiError("second", status=503))
        inbox.put(Output("a", [2]))
        assert (await inbox.get()).token_ids == [1]
        for _ in range(2):
            with pytest.raises(ApiError, match="first"):
                await inbox.get()

    asyncio.run(run())


@pytest.fixture
def client():
    made = EngineClient.__new__(EngineClient)
    sent: list = []
    ready = Ready(9, 9, 9, "cpu", "float32", [], {})
    vars(made).update(lost=None, ready=ready, _inboxes={}, sent=sent, _send=sent.append)
    return made


def test_a_stream_that_falls_behind_says_the_same_tokens(client):
    """Those before an error, too; and a request that is aborted ends with what it has."""
    async def run():
        stream = client.stream([Request(rid, [1], SamplingParams()) for rid in "abc"])
        got = [asyncio.create_task(anext(stream))]
        await asyncio.sleep(0)
        for token in range(3):
            for rid in "abc":
                client._inboxes[rid].put(Output(rid, [token]))
        client.abort("b")
        client._inboxes["c"].put(Output("c", [], "error", error="out of magic"))
        found = [await got[0], await anext(stream), await anext(stream)]
        assert [(each.rid, each.token_ids, each.finish_reason) for each in found] == [
            ("a", [0, 1, 2], None), ("b", [0, 1, 2], "abort"), ("c", [0, 1, 2], None)]
        with pytest.raises(ApiError, match="out of magic"):
            await anext(stream)
        assert [message.rid for message in client.sent if isinstance(message, Abort)] == ["b", "a"]

    asyncio.run(run())


def test_the_last_words_of_an_engine_are_heard_by_a_process_that_was_stopped_for_longer(client, monkeypatch):
    """They are there then, and the loop has to get to them."""
    async def ends() -> int:
        return 1

    async def silence() -> None:
        await asyncio.Event().wait()

    async def receive() -> str:
        for _ in range(9):  # meanwhile it is heard that the process has ended
            await asyncio.sleep(0)
        time.sleep(3 * engine_client.LAST_WORDS_S)
        for _ in range(3):
            await asyncio.sleep(0)
        return "out of magic"

    monkeypatch.setattr(engine_client, "LAST_WORDS_S", 0.02)
    vars(client).update(_process=SimpleNamespace(wait=ends), _receive=receive, _silence=silence,
                        fail_all=lambda why: None)
    assert asyncio.run(client.run()) == "out of magic"
