"""How many tokens of answers in a prescribed form their grammar leaves no choice for, and the steps that appending them
unsampled (jump-forward) would save: `python tests/bench/forced_tokens.py [TOKENIZER_FOLDER]`.

A run of forced tokens is computed with the token in front of it: it saves a step each, but for the first where steps
overlap, which is on its way when the run is found.
"""

import argparse
import asyncio
import json
from pathlib import Path

from wave64.serve.grammar import compiler
from wave64.serve.http.grammar import Grammars
from wave64.serve.http.schemas import ChatRequest
from wave64.serve.http.tokenizer import Tokenizer
from wave64.serve.http.tools import forced
from wave64.serve.messages import Vocabulary
from wave64.serve.model_path import BUILT_IN

TEXT, NUMBER = {"type": "string"}, {"type": "integer"}


def strict(**properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def tool(name: str, **properties: dict) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": strict(**properties)}}


PERSON = strict(name=TEXT, age=NUMBER, email_address=TEXT, tags={"type": "array", "items": TEXT},
                address=strict(street=TEXT, city=TEXT, postal_code=TEXT, country=TEXT))  # fmt: skip
#: What was asked for -> the answer; the first three are those that demo-tools knows.
ANSWERS: list[tuple[dict, str]] = [
    ({"response_format": strict(country=TEXT, capital=TEXT)}, '{"country": "Norway", "capital": "Oslo"}'),
    ({"response_format": strict(sum=NUMBER)}, '{"sum": 84}'),
    ({"tools": [tool("get_weather", city=TEXT), tool("add", a=NUMBER, b=NUMBER)]},
     '[{"name": "get_weather", "parameters": {"city": "Oslo"}}]'),
    ({"response_format": PERSON}, json.dumps({
        "name": "Ada Lovelace", "age": 36, "email_address": "ada@example.org", "tags": ["mathematics", "engines"],
        "address": {"street": "12 St James's Square", "city": "London", "postal_code": "SW1Y 4JH",
                    "country": "United Kingdom"}})),
]  # fmt: skip


def request(asked: dict) -> ChatRequest:
    fields = dict(asked)
    if "response_format" in asked:
        inner = {"name": "answer", "schema": asked["response_format"]}
        fields["response_format"] = {"type": "json_schema", "json_schema": inner}
    else:
        fields["tool_choice"] = "required"
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "?"}], **fields})


def forced_runs(matcher, ids: list[int]) -> list[int]:
    """The lengths of the runs of tokens that are forced, where the answer is `ids`."""
    runs, at = [], 0
    while at < len(ids):
        run = matcher.compute_ff_tokens()
        count = next((i for i, (ours, token) in enumerate(zip(run, ids[at:], strict=False)) if ours != token),
                     min(len(run), len(ids) - at))  # fmt: skip
        if count:
            runs.append(count)
        for token in ids[at : at + max(count, 1)]:
            assert matcher.consume_token(token), matcher.get_error()
        at += max(count, 1)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=BUILT_IN["demo-tools"])
    args = parser.parse_args()
    tokenizer = Tokenizer(args.folder)
    grammars, vocab = Grammars(tokenizer, lambda vocabulary: None), tokenizer.vocab_size
    compiled = compiler(Vocabulary(tokenizer.definition, sorted(tokenizer.end_ids)), vocab)
    print(f"{'answer':42} tokens  forced, in runs of            steps saved, with overlap")
    for asked, answer in ANSWERS[: 3 if args.folder == BUILT_IN["demo-tools"] else None]:
        body = request(asked)
        source = asyncio.run(grammars.of(body, vocab, forced(body)))
        assert source is not None
        ids = tokenizer.encode(answer, add_special_tokens=False)
        runs = forced_runs(compiled(source).deep_copy(), ids)
        saved, overlapped = sum(runs), sum(run - 1 for run in runs)
        print(f"{answer[:42]:42} {len(ids):6}  {saved:6}  {runs!s:24} {saved:10} {overlapped:6}")


if __name__ == "__main__":
    main()
