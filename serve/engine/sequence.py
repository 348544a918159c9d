"""A live request as the scheduler has it: its tokens, how the next one is chosen, and what goes to its client."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from wave64.serve.engine.grammar import Grammar
from wave64.serve.engine.prefix_cache import Node
from wave64.serve.engine.schedule import Penalties, Sampling
from wave64.serve.messages import Output, Request, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request: its tokens, and which of them have keys and values in which pages of the KV pool."""

    request: Request
    stop_ids: frozenset[int]  # the tokens that end it: the model's, unless ignored, and the request's
    random: random.Random  # its own stream, one number per sampled token
    tokens: list[int] = field(init=False)  # prompt and what was generated
    num_prompt: int = field(init=False)
    max_tokens: int = field(init=False)  # prompt and all that it may generate; one is sampled even where none is wanted
    arrival: int = -1  # its number among all that were added
    computed: int = 0  # tokens whose keys and values the scheduled steps leave in its pages
    pending: int = 0  # tokens that the scheduled steps sample, and which are not in `tokens` yet
    row: int = -1  # of the runner's page table; -1: waiting
    is_noted: bool = False  # whether the sampler has the tokens of this row, for penalties
    pages: list[int] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)  # its first pages, in the prefix cache; while it waits, a guess
    cached_tokens: int = -1  # that it found in the prefix cache when it was first let in
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])  # of tokens[:len(...)]
    grammar: Grammar | None = None  # what the answer has to be, and how far it is
    finish_reason: str | None = None
    matched_stop: int | None = None
    error: str | None = None  # the reason in words, when finish_reason is "error"
    wants_tokens: bool = field(init=False)  # and nothing else, of logits that nothing changes

    def __post_init__(self) -> None:
        self.tokens = list(self.request.input_ids)
        self.num_prompt = len(self.tokens)
        params = self.request.params
        self.max_tokens = self.num_prompt + max(params.max_new_tokens, 1)
        self.wants_tokens = not (
            self.penalized or params.logit_bias or params.bad_words or params.min_new_tokens
            or self.request.prompt_logprobs or self.request.top_logprobs >= 0)  # fmt: skip

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def scores_prompt(self) -> bool:
        """Whether logprobs of prompt tokens are still to be computed."""
        return self.request.prompt_logprobs and len(self.prompt_logprobs) < self.num_prompt

    @property
    def penalized(self) -> bool:
        """Whether its tokens so far change its logits."""
        params = self.request.params
        return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)

    @property
    def is_plain(self) -> bool:
        """Whether its next token is drawn from the logits as they are, and nothing else is wanted of them: which does
        not depend on its tokens so far."""
        return self.wants_tokens and self.grammar is None

    @property
    def reusable(self) -> int:
        """How many of its first tokens need not be computed if the prefix cache has them: logits are of what is."""
        known = len(self.tokens) - 1
        return min(known, len(self.prompt_logprobs) - 1) if self.scores_prompt else known

    def append(self, token: int) -> None:
        """Take the sampled token and see whether it is the last."""
        params = self.request.params
        self.pending -= 1
        if params.max_new_tokens:
            self.tokens.append(token)
        if params.max_new_tokens and token in self.stop_ids:
            self.finish_reason, self.matched_stop = "stop", token
        elif self.grammar is not None and params.max_new_tokens and (wrong := self.grammar.accept(token)):
            self.finish_reason, self.error = "error", f"the answer left its grammar: {wrong}"
        elif self.grammar is not None and self.grammar.is_finished:
            self.finish_reason = "stop"
        elif self.num_generated >= params.max_new_tokens:
            self.finish_reason = "length"


def add_sampling(sampling: Sampling, seq: Sequence, logit_row: int) -> None:
    """Add the column of a sequence that samples from this row of the step's logits."""
    params, index = seq.request.params, len(sampling.rows)
    sampling.rows.append(seq.row)
    sampling.logit_rows.append(logit_row)
    sampling.temperature.append(params.temperature)
    sampling.top_k.append(params.top_k)
    sampling.top_p.append(params.top_p)
    sampling.min_p.append(params.min_p)
    sampling.uniform.append(seq.random.random() if params.temperature else 0.0)
    sampling.top_logprobs.append(seq.request.top_logprobs)
    if seq.penalized:
        sampling.penalties.append(Penalties(
            index, params.presence_penalty, params.frequency_penalty, params.repetition_penalty, seq.num_prompt,
            seq.num_generated, None if seq.is_noted else list(seq.tokens)))  # fmt: skip
        seq.is_noted = True
    if params.logit_bias:
        sampling.biases += [(index, token, bias) for token, bias in params.logit_bias.items()]
    if seq.grammar is not None:
        sampling.grammars.append((index, seq.grammar))
    if seq.request.logprob_ids and seq.request.top_logprobs >= 0:
        sampling.asked[index] = seq.request.logprob_ids
    forbidden = seq.stop_ids if seq.num_generated < params.min_new_tokens else ()
    sampling.forbidden += [(index, token) for token in {*forbidden, *_ends_of_bad_words(seq)}]


def _ends_of_bad_words(seq: Sequence) -> Iterator[int]:
    """The tokens that would end a bad word whose beginning was just generated."""
    for word in seq.request.params.bad_words:
        begin = len(word) - 1
        if begin <= seq.num_generated and seq.tokens[len(seq.tokens) - begin :] == word[:begin]:
            yield word[-1]


def output_of(seq: Sequence, logprob: TokenLogprob | None) -> Output:
    """What the step gave `seq`, whose newest token has this logprob."""
    request = seq.request
    output = Output(request.rid, seq.tokens[-1:] if request.params.max_new_tokens else [], seq.finish_reason,
                    seq.matched_stop, error=seq.error)  # fmt: skip
    if request.top_logprobs >= 0:
        output.logprobs = [logprob] if output.token_ids and logprob is not None else []
    if request.prompt_logprobs and seq.num_generated <= 1:
        output.prompt_logprobs = seq.prompt_logprobs
    if seq.num_generated <= 1:
        output.cached_tokens = seq.cached_tokens
    return output
