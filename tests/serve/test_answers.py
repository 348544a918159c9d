"""What answers are made of, from tokens given by hand: texts, logprobs, usage and limits; no server, no engine."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from helpers_server import VOCAB, make_tokenizer

from wave64.serve.args import ServerArgs
from wave64.serve.http.bodies import parse
from wave64.serve.http.generation import Generator, Logprobs
from wave64.serve.http.guard import json_response
from wave64.serve.http.native import Generate
from wave64.serve.http.openai import Completion, usage
from wave64.serve.http.schemas import ApiError, CompletionRequest, GenerateRequest
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.messages import Output, Ready, TokenLogprob

CONTEXT = 64
PROMPTS = ["Four", "score and", "seven"]


class Engine:
    """Answers each request with the tokens of the next of `texts`, one at a time, and a logprob for each."""

    def __init__(self, texts: list[list[int]], logprob: float):
        self.ready, self.lost = Ready(CONTEXT, 1000, VOCAB, "cpu", "float32", [], {}), None
        self.texts, self.logprob = texts, logprob

    async def stream(self, requests):
        for request, tokens in zip(requests, self.texts, strict=True):
            scored = [None, *(TokenLogprob(i, self.logprob, [(i, self.logprob)]) for i in request.input_ids[1:])]
            for n, token in enumerate(tokens):
                entry = TokenLogprob(token, self.logprob, [(token, self.logprob), (7, self.logprob)])
                reason = "length" if n == len(tokens) - 1 else None
                yield Output(request.rid, [token], reason, None, [entry], scored if n == 0 else None)

    def abort(self, rid):
        pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer(folder)


def ask(kind, tokenizer, texts: list[str], logprob: float = -1.5, **body):
    """The whole answer, as its JSON is read by one who takes no NaN and no Infinity."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    generator = Generator(ServerArgs(), Engine(encoded, logprob), tokenizer)

    async def run():
        job = (Completion if kind is CompletionRequest else Generate)(parse(kind, json.dumps(body).encode()), generator)
        await job.prepare()
        return await job.answer()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(json_response(asyncio.run(run())).body, parse_constant=refuse)


def test_each_choice_echoes_its_own_prompt_and_usage_counts_it_once(tokenizer):
    texts = [f" {i}." for i in range(6)]
    got = ask(CompletionRequest, tokenizer, texts, prompt=PROMPTS, n=2, echo=True, logprobs=0, max_tokens=9)
    assert [choice["text"] for choice in got["choices"]] == [PROMPTS[i // 2] + text for i, text in enumerate(texts)]
    for i, choice in enumerate(got["choices"]):
        ids = tokenizer.encode(PROMPTS[i // 2])
        assert choice["logprobs"]["tokens"][: len(ids)] == [tokenizer.token_text(token) for token in ids]
        first = len(ids)
        assert choice["logprobs"]["text_offset"][first] == len(PROMPTS[i // 2]), "what follows begins behind the prompt"
    prompt = sum(len(tokenizer.encode(text)) for text in PROMPTS)
    completion = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert got["usage"]["prompt_tokens"] == prompt
    assert got["usage"]["completion_tokens"] == completion
    assert got["usage"]["total_tokens"] == prompt + completion


def test_usage_of_a_stream_that_has_only_begun():
    choices = [SimpleNamespace(prompt_ids=[1] * n, all=SimpleNamespace(token_ids=[2] * k), cached_tokens=n - 1)
               for n, k in ((3, 1), (3, 0), (5, 4), (5, 2))]  # fmt: skip
    told = usage(choices, 2)
    assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (8, 7, 15)
    assert told["prompt_tokens_details"] == {"cached_tokens": 6}


def test_a_logprob_of_minus_infinity_is_json(tokenizer):
    body = dict(prompt="It", echo=True, logprobs=2, max_tokens=4)
    logprobs = ask(CompletionRequest, tokenizer, [" is"], float("-inf"), **body)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None] + [-9999.0] * (len(logprobs["tokens"]) - 1)
    assert {value for tops in logprobs["top_logprobs"][1:] for value in tops.values()} == {-9999.0}
    meta = ask(GenerateRequest, tokenizer, [" is"], float("-inf"), text="It", return_logprob=True, logprob_start_len=0,
               top_logprobs_num=2)["meta_info"]  # fmt: skip
    assert len(meta["output_token_logprobs"]) == len(tokenizer.encode(" is", add_special_tokens=False))


def test_logprobs_come_with_the_text_they_belong_to(tokenizer):
    """Of tokens within what could be a stop string, none is known while it is held back; of the stop string, never."""
    generator = Generator(ServerArgs(), Engine([], 0.0), tokenizer)
    body = parse(CompletionRequest, b'{"stop": ["b!c"]}')
    choice = generator.choices([5], body, 20, ("prompt", "max_tokens"), logprobs=Logprobs(top=0))[0]
    seen = []
    for char in "ab!xb!c":
        (token,) = tokenizer.encode(char, add_special_tokens=False)
        choice.feed(Output(choice.request.rid, [token], None, None, [TokenLogprob(token, -1.0)]))
        new = choice.take_new()
        seen.append((new.text, "".join(tokenizer.token_text(entry.id) for _, entry in new.logprobs)))
    assert seen == [("a", "a"), ("", ""), ("", ""), ("b!x", "b!x"), ("", ""), ("", ""), ("", "")]
    assert choice.matched == "b!c"
    assert [start for start, _ in choice.all.logprobs] == [0, 1, 2, 3]


@pytest.mark.parametrize(("prompt", "asked", "default", "new"), [
    (CONTEXT - 1, None, None, 1), (CONTEXT - 1, 1, None, 1), (CONTEXT - 1, None, 16, 1), (CONTEXT, 0, None, 0),
    (1, None, None, CONTEXT - 1), (1, None, 16, 16), (4, CONTEXT - 4, 16, CONTEXT - 4), (CONTEXT - 16, None, 16, 16),
    (CONTEXT, None, None, None), (CONTEXT, 1, None, None), (4, CONTEXT - 3, None, None), (CONTEXT + 1, 0, None, None),
])  # fmt: skip
def test_a_prompt_and_its_completion_fill_the_context_to_the_last_token(tokenizer, prompt, asked, default, new):
    generator = Generator(ServerArgs(), Engine([], 0.0), tokenizer)
    tokens = generator.new_tokens(prompt, asked, default)
    if new is None:
        with pytest.raises(ApiError, match=f"{CONTEXT}"):
            generator.choices([5] * prompt, parse(CompletionRequest, b"{}"), tokens, ("prompt", "max_tokens"))
    else:
        assert tokens == new
        generator.choices([5] * prompt, parse(CompletionRequest, b"{}"), tokens, ("prompt", "max_tokens"))
