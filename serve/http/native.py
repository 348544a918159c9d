"""SGLang's own endpoint, /generate: the form of its answers, whole and streamed."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from wave64.serve.http.generation import NO_LOGPROBS, Choice, Generator, Logprobs
from wave64.serve.http.schemas import ApiError, GenerateRequest, NativeSampling
from wave64.serve.messages import TokenLogprob

NEW_TOKENS = 128  # SGLang's default of max_new_tokens

Json = dict[str, Any]


class Generate:
    """One /generate request: prompts times n choices, answered in that order."""

    def __init__(self, body: GenerateRequest, generator: Generator) -> None:
        self.body = body
        self.generator = generator
        self.choices: list[Choice] = []
        self._started = time.perf_counter()
        self._has_logprobs: list[bool] = []  # per choice, as is the next
        self._starts: list[int] = []  # from where the prompt is scored; -1: not at all

    async def prepare(self) -> None:
        """Check the prompts and make the choices. Raises ApiError."""
        body, prompts = self.body, self.body.prompts
        name = "text" if body.text is not None else "input_ids"
        samplings = body.per_prompt("sampling_params", NativeSampling())
        wanted = body.per_prompt("return_logprob", False)
        starts = body.per_prompt("logprob_start_len", -1)
        tops = body.per_prompt("top_logprobs_num", 0)
        asked = body.logprob_ids
        rids = body.per_prompt("rid", None)
        if not body.is_batch and isinstance(body.rid, list):
            raise ApiError("rid: expected a string for one prompt, got a list", "rid")
        names = [f"{name}[{i}]" if body.is_batch else name for i in range(len(prompts))]
        for i, ids in enumerate(await self.generator.encode(prompts, names)):
            sampling = samplings[i]
            new = self.generator.new_tokens(len(ids), sampling.max_new_tokens, NEW_TOKENS)
            scored = wanted[i] and 0 <= starts[i] < len(ids)
            logprobs = Logprobs(tops[i], tops[i] if scored else -1, asked[i]) if wanted[i] else NO_LOGPROBS
            made = self.generator.choices(ids, sampling, new, (names[i], "max_new_tokens"), len(self.choices),
                                          logprobs, grammar=await self.generator.grammar(sampling))  # fmt: skip
            for k, choice in enumerate(made if rids[i] else ()):
                choice.request.rid = rids[i] if len(made) == 1 else f"{rids[i]}_{k}"
            self.choices += made
            self._has_logprobs += [wanted[i]] * len(made)
            self._starts += [starts[i] if scored else -1] * len(made)

    @property
    def is_list(self) -> bool:
        """Whether the answer is a list of choices."""
        return self.body.is_batch or len(self.choices) > 1

    async def answer(self) -> Json | list[Json]:
        """The whole answer."""
        async for _ in self.generator.run(self.choices):
            pass
        done = [self._result(choice) for choice in self.choices]
        return done if self.is_list else done[0]

    async def stream(self) -> AsyncGenerator[Json, None]:
        """The answer as a stream: each event has all of a choice's text so far."""
        async with aclosing(self.generator.run(self.choices)) as grown:
            async for choice in grown:
                choice.take_new()
                yield self._result(choice) | ({"index": choice.index} if self.is_list else {})

    def _result(self, choice: Choice) -> Json:
        meta: Json = {
            "id": choice.request.rid,
            "finish_reason": _finish(choice),
            "prompt_tokens": len(choice.prompt_ids),
            "completion_tokens": len(choice.all.token_ids),
            "cached_tokens": choice.cached_tokens,
            "e2e_latency": time.perf_counter() - self._started,
        }
        if self._has_logprobs[choice.index]:
            entries = [entry for _, entry in choice.all.logprobs]
            meta |= self._logprobs("output", entries, [entry.id for entry in entries], choice)
        if (start := self._starts[choice.index]) >= 0:
            meta |= self._logprobs("input", choice.prompt_logprobs[start:], choice.prompt_ids[start:], choice)
        return {"text": choice.all.text, "output_ids": choice.all.token_ids, "meta_info": meta}

    def _logprobs(self, side: str, entries: Sequence[TokenLogprob | None], ids: list[int], choice: Choice) -> Json:
        text = self.generator.tokenizer.token_text
        tokens = [(entry.logprob if entry else None, i, text(i)) for entry, i in zip(entries, ids, strict=True)]
        found: Json = {f"{side}_token_logprobs": tokens}
        if choice.request.top_logprobs > 0:
            tops = [[(logprob, i, text(i)) for i, logprob in entry.top] if entry else None for entry in entries]
            found[f"{side}_top_logprobs"] = tops
        if asked := choice.request.logprob_ids:
            found[f"{side}_token_ids_logprobs"] = [
                [(logprob, i, text(i)) for i, logprob in zip(asked, entry.asked, strict=True)] if entry else None
                for entry in entries]  # fmt: skip
        return found


def _finish(choice: Choice) -> Json | None:
    if choice.finish_reason is None:
        return None
    if choice.finish_reason == "length":
        return {"type": "length", "length": len(choice.all.token_ids)}
    return {"type": choice.finish_reason, "matched": choice.matched}
