"""Whether a checkpoint, as it is served here, still says what a trained model says: perplexity and recitation.

    python -m wave64 accuracy --model-path amd/Llama-3.1-8B-Instruct-FP8-KV --against meta-llama/Llama-3.1-8B-Instruct

Perplexity is that of two texts in the public domain, which models have read: the Gettysburg Address and the beginning
of the Declaration of Independence. Recitation counts phrases that everybody knows whose every token is the most likely
one. Exit status 1 if that says that the weights are read wrongly (an FP8 flavor, a scale): with --against, a perplexity
far above that checkpoint's, or several phrases fewer; alone, no text that it knows. Further flags are the server's,
such as --tp 8: each checkpoint is loaded as it would be served, one after the other.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from transformers import AutoTokenizer

import wave64.serve.demo
from wave64.serve.args import LEVELS, ArgsError, ServerArgs
from wave64.serve.http.offline import Engine
from wave64.serve.model_path import resolve_model_path

TEXTS = ("gettysburg.txt", "declaration.txt")
#: What is given, and what has to follow.
PHRASES = (
    ("Four score and seven years ago our fathers brought forth", " on this continent, a new nation"),
    ("government of the people, by the people, for the", " people"),
    ("we can not dedicate -- we can not consecrate -- we can not", " hallow"),
    ("We hold these truths to be self-evident, that all men are created", " equal"),
    ("To be, or not to be, that is the", " question"),
    ("It was the best of times, it was the worst of", " times"),
    ("The quick brown fox jumps over the lazy", " dog"),
    ("one, two, three, four, five, six, seven,", " eight"),
)
MAX_TOKENS = 1024  # of a text
#: Sound FP8 raises the perplexity of a trained model by a few percent; a wrong scale or flavor multiplies it.
MAX_RATIO = 1.25
MAX_LOST = 2  # phrases
MAX_ALONE = 20.0  # a model that has learned anything knows one of the texts better; one without weights is at thousands


@dataclass(frozen=True)
class Found:
    """tokens and perplexity of each text, and how many phrases were recited."""

    perplexities: dict[str, tuple[int, float]]
    recited: int


def measure(flags: Sequence[str], model_path: str) -> Found:
    """Raises what Engine and its generate() raise."""
    args = ServerArgs.from_cli(["--model-path", model_path, "--max-running-requests", "1", *flags])
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(args.model_path, args.revision))
    with Engine(**{each.name: getattr(args, each.name) for each in fields(args)}) as engine:
        perplexities = {}
        for name in TEXTS:
            text = (Path(next(iter(wave64.serve.demo.__path__))) / name).read_text(encoding="utf-8").strip()
            chosen = [logprob for logprob, _ in of_prompt(engine, tokenizer(text).input_ids[:MAX_TOKENS])]
            perplexities[name] = len(chosen), math.exp(-sum(chosen) / len(chosen))
        recited = 0
        for given, rest in PHRASES:
            count, ids = len(tokenizer(given).input_ids), tokenizer(given + rest).input_ids
            recited += all(is_likeliest for _, is_likeliest in of_prompt(engine, ids)[count - 1 :])
    return Found(perplexities, recited)


def of_prompt(engine: Engine, ids: list[int]) -> list[tuple[float, bool]]:
    """Of each token behind the first, its logprob and whether none was likelier."""
    said = engine.generate(input_ids=ids, sampling_params=dict(max_new_tokens=1, temperature=0), return_logprob=True,
                           logprob_start_len=0, top_logprobs_num=1)["meta_info"]
    return [(logprob, top[0][1] == token) for (logprob, token, _), top in
            zip(said["input_token_logprobs"][1:], said["input_top_logprobs"][1:], strict=True)]


def verdict(found: Found, against: Found | None) -> str | None:
    """Why the checkpoint is read wrongly, in words; None: it is not."""
    if against is None:
        best = min(perplexity for _, perplexity in found.perplexities.values())
        return None if best <= MAX_ALONE else (f"the best perplexity is {best:.3g}, of a model that knows one of the "
                                               f"texts at most {MAX_ALONE:g}")
    for name, (_, perplexity) in found.perplexities.items():
        other = against.perplexities[name][1]
        if other > MAX_ALONE:  # a text that neither knows
            continue
        if not perplexity <= MAX_RATIO * other:
            return f"the perplexity of {name} is {perplexity:.4g}, expected at most {MAX_RATIO:g} times {other:.4g}"
    if found.recited < against.recited - MAX_LOST:
        return f"{found.recited} phrases are recited, expected at least {against.recited - MAX_LOST}"
    return None


def report(found: Found, against: Found | None) -> str:
    lines = [f"{'':20} {'tokens':>8} {'perplexity':>12}" + (f" {'against':>12} {'change':>8}" if against else "")]
    for name, (count, perplexity) in found.perplexities.items():
        other = against.perplexities[name][1] if against else 0
        lines.append(f"{name:20} {count:8} {perplexity:12.5g}"
                     + (f" {other:12.5g} {100 * (perplexity / other - 1):+7.2f}%" if against else ""))
    lines.append(f"{'recited':20} {len(PHRASES):8} {found.recited:12}" + (f" {against.recited:12}" if against else ""))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wave64 accuracy", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--against", metavar="MODEL", help="a checkpoint to compare with, such as the original")
    parser.add_argument("--log-level", default="warning", choices=LEVELS,
                        help="lowest level that is logged (default: %(default)s)")
    own, flags = parser.parse_known_args(argv)
    flags = ["--log-level", own.log_level, *flags]
    try:
        # what plain weights are quantized to is in question, not in what they are compared with
        plain = [word for i, word in enumerate(flags) if "--quantization" not in (word, flags[i - 1] if i else "")]
        against = measure(plain, own.against) if own.against else None
        found = measure(flags, own.model_path)
    except (ArgsError, OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"wave64 accuracy: error: {' '.join(str(error).split())}\n")
    print(report(found, against))
    wrong = verdict(found, against)
    print(f"WRONG: {wrong}" if wrong else "as expected")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
