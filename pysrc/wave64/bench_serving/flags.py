"""The command's flags: SGLang's names and defaults, and what a load is."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wave64.bench_serving.backends import DEFAULT_PORTS, PATHS
from wave64.bench_serving.datasets import NAMES, BadSetting
from wave64.bench_serving.measures import GOODPUT_KEYS

Json = dict[str, Any]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags. A bad one ends the process: one line on stderr, status 2."""
    parser = argparse.ArgumentParser(prog="python -m wave64.bench_serving", description=__doc__, allow_abbrev=True)
    add = parser.add_argument
    add("--backend", choices=PATHS, default="wave64", help="which endpoint is asked (default: %(default)s)")
    add("--base-url", help="of the server; default: from --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, help="default: 30000, of vLLM 8000")
    add("--ready-check-timeout-sec", type=float, default=60, help="how long to wait for the server; 0: not at all")
    add("--model", help="what requests name; default: what /v1/models names")
    add("--served-model-name", help="the same, where --model is a path")
    add("--tokenizer", help="folder or hub name; default: what /model_info says, else --model")
    add("--header", nargs="+", default=[], metavar="KEY=VALUE", help="of every request")
    add("--api-key", help="sent as a bearer token")

    add("--dataset-name", choices=NAMES, default="sharegpt", help="what is sent (default: %(default)s)")
    add("--dataset-path", default="", help="local file: sharegpt's and random's JSON, custom's JSON lines")
    add("--num-prompts", type=_positive, default=1000, help="requests, or conversations (default: %(default)s)")
    add("--num-turns", type=_positive, default=8, help="of each conversation of multi-turn (default: %(default)s)")
    add("--random-input-len", type=_positive, default=1024, help="tokens of a prompt; of multi-turn, of each turn")
    add("--random-output-len", type=_positive, default=1024, help="tokens to generate")
    add("--random-range-ratio", type=_fraction, default=0.0, help="shortest length, as a fraction of the longest")
    add("--sharegpt-output-len", type=_positive, help="tokens to generate; default: as the dataset's answer has")
    add("--sharegpt-context-len", type=_positive, help="longer conversations are left out")
    add("--prompt-suffix", default="", help="appended to prompts of sharegpt and custom")
    add("--apply-chat-template", action="store_true", help="to prompts of sharegpt and custom")
    add("--tokenize-prompt", action="store_true", help="send token ids, so that lengths are exact")
    add("--gsp-num-groups", type=_positive, default=64, help="of generated-shared-prefix, as the following")
    add("--gsp-prompts-per-group", type=_positive, default=16)
    add("--gsp-system-prompt-len", type=_positive, default=2048)
    add("--gsp-question-len", type=_positive, default=128)
    add("--gsp-output-len", type=_positive, default=256)
    add("--gsp-range-ratio", type=_fraction, default=1.0)
    add("--gsp-num-turns", type=_positive, default=1)
    add("--gsp-ordered", action="store_true", help="do not shuffle")
    add("--seed", type=int, default=42)

    add("--request-rate", type=_rate, nargs="+", default=[float("inf")],
        help="requests per second, at a Poisson process' times; inf: all at once; several: a run each")
    add("--max-concurrency", type=_positive, nargs="+", default=[None],
        help="requests that run at a time; the next is sent when one ends; several: a run each")
    add("--warmup-requests", type=int, default=1)
    add("--flush-cache", action="store_true", help="empty the prefix cache before each run")

    add("--temperature", type=float, default=0.0)
    add("--top-p", type=float, default=1.0)
    add("--disable-ignore-eos", action="store_true", help="let answers end by themselves")
    add("--disable-stream", action="store_true", help="ask for whole answers; there are no times of tokens then")
    add("--return-logprob", action="store_true")
    add("--top-logprobs-num", type=int, default=0)
    add("--token-ids-logprob", type=int, nargs="+")
    add("--logprob-start-len", type=int, default=-1)
    add("--extra-request-body", type=_object, default={}, metavar="JSON", help="fields of every request")

    add("--output-file", type=Path, help="JSON lines are appended; default: backend_date_sizes.jsonl")
    add("--output-details", action="store_true", help="with lengths, times and texts of each request")
    add("--print-requests", action="store_true", help="say what came of each request as it ends")
    add("--cache-report", action="store_true", help="say what of the prompts was cached")
    add("--goodput", nargs="+", type=_limit, metavar="KEY:MS",
        help=f"limits that are to be kept: {', '.join(GOODPUT_KEYS)}")
    add("--profile", action="store_true", help="call /start_profile and /stop_profile")
    add("--plot", type=Path, metavar="PNG", help="draw latency against load, of all lines in the output file")
    add("--summary", action="store_true", help="three loads of 128/128 tokens instead: 1,000 at once; 64 clients that "
                                               "send the next as the last ends; one on an idle server")
    add("--disable-tqdm", action="store_true")
    add("--tag", help="a field of the JSON line")
    args = parser.parse_args(argv)
    if len(args.request_rate) > 1 and len(args.max_concurrency) > 1:
        parser.error("--max-concurrency: expected one value where --request-rate has several")
    args.port = args.port or DEFAULT_PORTS[args.backend]
    args.base_url = (args.base_url or f"http://{args.host}:{args.port}").rstrip("/")
    if not args.base_url.startswith(("http://", "https://")):
        parser.error(f"--base-url: expected http:// or https://, got {args.base_url}")
    pairs = [pair.partition("=") for pair in args.header]
    if bad := [name for name, equals, _ in pairs if not equals]:
        parser.error(f"--header: expected KEY=VALUE, got {bad[0]}")
    args.headers = {name: value for name, _, value in pairs}
    if args.api_key:
        args.headers["Authorization"] = f"Bearer {args.api_key}"
    return args


def loads(args: argparse.Namespace) -> list[tuple[float, int | None]]:
    """(request rate, concurrency) of each run."""
    return [(rate, limit) for rate in args.request_rate for limit in args.max_concurrency]


def needs_text(args: argparse.Namespace) -> bool:
    """Whether a tokenizer has to be there."""
    is_of_ids = args.dataset_name == "random-ids" or (args.dataset_name == "multi-turn" and args.num_turns == 1)
    return not (is_of_ids and args.tokenize_prompt)


def check_ids(args: argparse.Namespace) -> None:
    """Raises BadSetting where token ids cannot be sent."""
    if args.tokenize_prompt and PATHS[args.backend].endswith("chat/completions"):
        raise BadSetting(f"--tokenize-prompt: expected a backend that takes token ids, got {args.backend}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text}")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected more than 0, or inf, got {text}")
    return value


def _object(text: str) -> Json:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


def _limit(text: str) -> tuple[str, float]:
    key, _, limit = text.partition(":")
    if key not in GOODPUT_KEYS or not limit.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"expected {'|'.join(GOODPUT_KEYS)}:milliseconds, got {text}")
    return key, float(limit)
