"""ServerArgs: every setting of the server, one field per command line flag, named as SGLang names it.

`ServerArgs(model_path=...)` in Python and `ServerArgs.from_cli([...])` give the same object; both check it.
Nothing here imports torch: the api process, the tests and `--help` read this file before anything heavy.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from os import PathLike, fspath
from typing import Any, NoReturn

from wave64.arch import EMULATED

#: What the server imports in addition to what wave64 itself needs.
PACKAGES = ("fastapi", "huggingface_hub", "jinja2", "msgspec", "pydantic", "safetensors", "tokenizers", "transformers",
            "uvicorn", "zmq")
LEVELS = ("debug", "info", "warning", "error")
BACKENDS = ("auto", "triton", "aiter", "hip")
#: Fields that name a backend -> the operators that it is to serve; later ones win.
SERVED_BY: dict[str, tuple[str, ...]] = {
    "attention_backend": ("paged_attention", "mla_decode", "mla_decode_rope", "prefill_attention", "varlen_attention"),
    "prefill_attention_backend": ("prefill_attention", "varlen_attention"),
    "decode_attention_backend": ("paged_attention", "mla_decode", "mla_decode_rope"),
    "moe_runner_backend": ("fused_moe",),
    "fp8_gemm_backend": ("fp8_block_scaled_mm", "fp8_scaled_mm"),
}


class ArgsError(ValueError):
    """A setting that cannot be; the message is one line that names the flag, what was expected and what was given."""


#: Fields, what is expected of them where they are not None, and whether a value is that; a NaN is none of it.
BOUNDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("port",), "1 to 65535", lambda value: 1 <= value <= 65535),
    (("mem_fraction_static",), "more than 0 and less than 1", lambda value: 0 < value < 1),
    (("chunked_prefill_size",), "at least 1", lambda value: value >= 1 or value == -1),
    (("tp_size", "ep_size", "dp_size", "nnodes", "context_length", "max_total_tokens", "max_running_requests",
      "page_size", "max_prefill_tokens", "stream_interval", "timeout_keep_alive", "max_queued_requests",
      "cuda_graph_max_bs"), "at least 1", lambda value: value >= 1),
    (("max_prefill_ms", "piecewise_cuda_graph_max_tokens", "base_gpu_id"), "at least 0", lambda value: value >= 0),
    (("hicache_ratio", "watchdog_timeout", "rank_timeout", "request_timeout"), "more than 0", lambda value: value > 0),
)  # fmt: skip


def _flag(default: Any, text: str, *aliases: str, choices: tuple[str, ...] = (), kind: type | None = None) -> Any:
    """A field with a default, and what argparse needs to know about it. `kind` is needed where the default is None; a
    default of () makes a flag that may be given several times."""
    about = {"help": text, "aliases": aliases, "choices": choices, "kind": kind or type(default)}
    return field(default=default, metadata=about)


@dataclass
class ServerArgs:
    """The server's settings. Sizes are in tokens unless said otherwise. Raises ArgsError for a value out of range."""

    model_path: str = _flag("demo-llama", "a Hugging Face folder, a hub name, or a demo, such as demo-llama", "--model")
    tokenizer_path: str | None = _flag(None, "folder or hub name of the tokenizer; default: the model's", kind=str)
    revision: str | None = _flag(None, "branch, tag or commit, when the model is a hub name", kind=str)
    host: str = _flag("127.0.0.1", "address to listen on")
    port: int = _flag(30000, "port to listen on")
    cors_allow_origins: Sequence[str] = _flag(
        (), "an origin whose pages may ask, or *; may be given several times", kind=str)  # fmt: skip
    ssl_keyfile: str | None = _flag(None, "the key of --ssl-certfile, if that does not hold it", kind=str)
    ssl_certfile: str | None = _flag(None, "the server's certificate: speak HTTPS", kind=str)
    ssl_ca_certs: str | None = _flag(None, "certificates by which clients' own are checked", kind=str)
    ssl_keyfile_password: str | None = _flag(None, "what --ssl-keyfile is encrypted with", kind=str)
    api_key: str | None = _flag(None, "if given, requests must carry it as a bearer token", kind=str)
    served_model_name: str | None = _flag(None, "name in /v1/models; default: the model path", kind=str)
    chat_template: str | None = _flag(None, "a Jinja chat template file, in place of the tokenizer's", kind=str)

    load_format: str = _flag("auto", "dummy: random weights from config.json alone", choices=("auto", "dummy"))
    dtype: str = _flag(
        "auto", "auto: the checkpoint's", choices=("auto", "half", "float16", "bfloat16", "float32", "float")
    )
    quantization: str | None = _flag(
        None, "fp8: quantize plain weights while they are loaded; else what the checkpoint says of itself anyway",
        choices=("fp8", "quark", "compressed-tensors", "fbgemm_fp8", "modelopt"), kind=str)
    device: str = _flag("auto", "auto: a GPU where there is one; gfx942, gfx950: an emulated MI300X, MI355X",
                        choices=("auto", "cuda", "cpu", *EMULATED))  # fmt: skip
    ignore_config_key: Sequence[str] = _flag(
        (), "a key of config.json to read as if it were not there; may be given several times", kind=str
    )
    context_length: int | None = _flag(None, "longest prompt plus completion; default: the model's", kind=int)
    tp_size: int = _flag(1, "ranks that hold the model together, a device each", "--tp", "--tensor-parallel-size")
    ep_size: int | None = _flag(
        None, "parts of the set of experts, over the ranks; default: 1, with --enable-dp-attention as many as ranks",
        "--ep", "--expert-parallel-size", kind=int)  # fmt: skip
    dp_size: int = _flag(1, "engines of --tp-size ranks each; with --enable-dp-attention groups of one engine's ranks",
                         "--dp", "--data-parallel-size")  # fmt: skip
    base_gpu_id: int = _flag(0, "number of the first GPU on this host that is used")
    nnodes: int = _flag(1, "hosts; each has as many of the ranks")
    node_rank: int = _flag(0, "number of this host; that of 0 speaks HTTP")
    dist_init_addr: str | None = _flag(None, "with --nnodes: host:port of host 0, where the ranks meet",
                                       "--nccl-init-addr", kind=str)  # fmt: skip
    enable_dp_attention: bool = _flag(False, "requests are divided among --dp-size groups of the ranks, each with a KV "
                                             "pool of its own; all hold experts for all")  # fmt: skip

    mem_fraction_static: float | None = _flag(
        None, "fraction of device memory for weights and KV pool, 0 to 1; default: by device", kind=float
    )
    max_total_tokens: int | None = _flag(None, "size of the KV pool; default: from --mem-fraction-static", kind=int)
    max_running_requests: int = _flag(256, "requests in one batch")
    max_queued_requests: int | None = _flag(None, "requests that may wait; more are answered with status 429; default: "
                                                  "any number", kind=int)  # fmt: skip
    page_size: int = _flag(16, "tokens per KV page")
    kv_cache_dtype: str = _flag(
        "auto", "auto: the model's, FP8 where the checkpoint has scales for it; fp8_e4m3: the device's",
        choices=("auto", "bf16", "fp8_e4m3"))
    chunked_prefill_size: int | None = _flag(
        None, "prompt tokens per step; -1: whole prompts; default: 256 on a CPU, 8192 on a GPU", kind=int
    )
    max_prefill_tokens: int = _flag(16384, "prompt tokens of all requests per step")
    max_prefill_ms: float | None = _flag(
        None, "milliseconds by which prompts may prolong a step in which other requests decode: their chunks are as "
              "long as that takes, by what steps before took, and shorter where few tokens wait; 0: any; default: 100 "
              "on a GPU, else any",
        kind=float)  # fmt: skip
    schedule_policy: str = _flag("fcfs", "order of waiting requests; lpm: longest match with the prefix cache first",
                                 choices=("fcfs", "lpm"))  # fmt: skip
    disable_radix_cache: bool = _flag(False, "compute every prompt whole, whatever was computed before")
    enable_hierarchical_cache: bool = _flag(
        False, "keep what the prefix cache evicts in host memory, from where it is copied back when it is wanted")
    hicache_ratio: float = _flag(2.0, "with --enable-hierarchical-cache: host memory for it, as so many KV pools")
    disable_overlap_schedule: bool = _flag(False, "schedule a step when the one before has ended, not while it runs")
    prebuilt_kernels: str | None = _flag(
        None, "folder or tar of Triton kernels that `python -m wave64 prebuild` has compiled; default: the "
              "architecture's folder in ~/.cache/wave64/prebuilt, where there is one", kind=str)  # fmt: skip
    disable_cuda_graph: bool = _flag(False, "launch every decode step kernel by kernel")
    cuda_graph_max_bs: int | None = _flag(
        None, "requests of the largest batch whose decode step is captured as a graph; larger ones are launched kernel "
              "by kernel; default: --max-running-requests", kind=int)  # fmt: skip
    cuda_graph_bs: Sequence[int] = _flag(
        (), "the batch sizes to capture, one behind the other; default: a ladder up to --cuda-graph-max-bs", kind=int
    )
    piecewise_cuda_graph_max_tokens: int | None = _flag(
        None, "prompt tokens of the longest step with prompts that is captured as a graph, whole, its decodes "
              "included; longer ones are launched kernel by kernel; 0: none; default: 512, on an emulated device 0",
        kind=int)  # fmt: skip
    enable_deterministic_inference: bool = _flag(
        False, "a request has the same logits, to the bit, alone and in any batch, and with a cached prefix: every "
               "token is computed alone, at what a batch of one costs")  # fmt: skip
    disable_custom_all_reduce: bool = _flag(False, "let torch.distributed (RCCL) exchange all that ranks exchange")
    enable_mscclpp: bool = _flag(
        False, "let the package mscclpp, where there is one, sum what 4 ranks and more exchange, 512 bytes to 8 MiB")
    quick_reduce_quantization: str = _flag(
        "none", "what wave64's kernels send of a sum over ranks of 1 MiB and more, in place of 16-bit numbers",
        choices=("none", "fp8", "int8", "int4"))  # fmt: skip

    attention_backend: str = _flag("auto", "who serves attention, where it has a kernel", choices=BACKENDS)
    prefill_attention_backend: str = _flag("auto", "the same, of prompts alone", choices=BACKENDS)
    decode_attention_backend: str = _flag("auto", "the same, of new tokens alone", choices=BACKENDS)
    moe_runner_backend: str = _flag("auto", "who serves the experts", choices=BACKENDS)
    fp8_gemm_backend: str = _flag("auto", "who serves products in FP8", "--fp8-gemm-runner-backend", choices=BACKENDS)

    tool_call_parser: str | None = _flag(
        None, "how the model writes tool calls; default: what its chat template teaches", kind=str,
        choices=("llama3", "pythonic", "deepseekv3", "deepseekv31", "qwen25"))  # fmt: skip
    reasoning_parser: str | None = _flag(
        None, "how the model marks what it thinks, which is given apart from the answer; default: as part of it",
        choices=("deepseek-r1", "deepseek-v3", "qwen3", "qwen3-thinking", "kimi"), kind=str)  # fmt: skip
    random_seed: int | None = _flag(None, "seed of requests that bring none; default: from the clock", kind=int)
    stream_interval: int = _flag(1, "tokens per streamed event")
    skip_server_warmup: bool = _flag(False, "be ready without having generated one token first")
    log_level: str = _flag("info", "lowest level that is logged", choices=LEVELS)
    log_format: str = _flag("text", "json: an object per line", choices=("text", "json"))
    log_requests: bool = _flag(False, "log each request's prompts, parameters and answers; never the API key")
    log_level_http: str | None = _flag(None, "the same, of the access log; warning: none; default: --log-level",
                                       choices=LEVELS, kind=str)  # fmt: skip
    profile_dir: str | None = _flag(None, "folder for the traces of /start_profile; default: it is refused", kind=str)
    watchdog_timeout: float | None = _flag(
        None, "seconds that a step may take, besides compiling; then stacks are logged and the server ends; default: "
              "300, on an emulated device for ever", kind=float)  # fmt: skip
    request_timeout: float | None = _flag(None, "seconds from a request's arrival to its last token; then it is ended, "
                                                "with status 504; default: any number", kind=float)  # fmt: skip
    rank_timeout: float = _flag(8.0, "seconds that a rank of several may be silent; then the server ends")
    timeout_keep_alive: int = _flag(75, "seconds that an idle connection is kept open for its client's next request")

    def __post_init__(self) -> None:
        self.ignore_config_key = tuple(self.ignore_config_key)
        self.cors_allow_origins = tuple(self.cors_allow_origins)
        self.cuda_graph_bs = tuple(self.cuda_graph_bs)
        if self.cuda_graph_bs and min(self.cuda_graph_bs) < 1:
            raise ArgsError(f"--cuda-graph-bs: expected sizes of at least 1, got {min(self.cuda_graph_bs)}")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ArgsError("--ssl-certfile: expected the certificate that --ssl-keyfile belongs to, got none")
        for names, expected, fits in BOUNDS:
            for name in names:
                if (value := getattr(self, name)) is not None and not fits(value):
                    raise ArgsError(f"{flag_of(name)}: expected {expected}, got {value}")
        if self.enable_hierarchical_cache and self.disable_radix_cache:
            raise ArgsError("--enable-hierarchical-cache: expected the prefix cache, got --disable-radix-cache, too")
        if self.enable_deterministic_inference and self.groups > 1:
            raise ArgsError("--enable-deterministic-inference: expected no --enable-dp-attention: a group's tokens are "
                            "padded to those of the others")  # fmt: skip
        if self.replicas > 1 and self.dist_init_addr is not None:
            raise ArgsError("--dp-size: expected 1 or --enable-dp-attention where hosts are several, or torchrun's, "
                            f"got {self.dp_size}; a router serves several servers as one")  # fmt: skip
        self._check_nodes()
        if self.tp_size % self.groups:
            raise ArgsError(f"--dp-size: expected a divisor of --tp-size, {self.tp_size}, got {self.dp_size}")
        if self.ep_size is None:
            self.ep_size = self.tp_size if self.groups > 1 else 1
        if self.tp_size % self.ep_size:
            raise ArgsError(f"--ep-size: expected a divisor of --tp-size, {self.tp_size}, got {self.ep_size}")
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value not in choices and (value is not None or item.default is not None):
                raise ArgsError(f"{flag_of(item.name)}: expected one of {', '.join(choices)}, got {value!r}")

    def _check_nodes(self) -> None:
        if self.tp_size % self.nnodes:
            raise ArgsError(f"--nnodes: expected a divisor of --tp-size, {self.tp_size}, got {self.nnodes}")
        if not 0 <= self.node_rank < self.nnodes:
            raise ArgsError(f"--node-rank: expected 0 to {self.nnodes - 1}, as --nnodes says, got {self.node_rank}")
        address = self.dist_init_addr
        if address is None and self.nnodes > 1:
            raise ArgsError("--dist-init-addr: expected host:port of host 0, where the ranks meet, got none")
        if address is not None:
            host, _, port = address.rpartition(":")
            if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
                raise ArgsError(f"--dist-init-addr: expected host:port, got {address!r}")

    @property
    def groups(self) -> int:
        """Groups of ranks that attend to requests of their own."""
        return self.dp_size if self.enable_dp_attention else 1

    @property
    def replicas(self) -> int:
        """Engines behind one api process."""
        return 1 if self.enable_dp_attention else self.dp_size

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model_path

    @classmethod
    def from_cli(cls, argv: Sequence[str] | None = None) -> "ServerArgs":
        """Parse `argv` (sys.argv without it), which may begin with a model path. A bad flag ends the process: one line
        on stderr, status 2."""
        parser = _parser()
        argv = [*(sys.argv[1:] if argv is None else argv)]
        if argv and not argv[0].startswith("-"):
            argv.insert(0, "--model-path")
        namespace, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.error("; ".join(_unknown(unknown)))
        given = vars(namespace)
        try:
            return cls(**_taken(given))
        except ArgsError as error:
            parser.error(str(error))

    @classmethod
    def from_names(cls, settings: Mapping[str, Any]) -> "ServerArgs":
        """Settings by the names of the flags, as Python has them: tp_size=2 for --tp-size 2. All that the command line
        takes is taken here, a flag's other names and what changes nothing too; None is not given. Raises ArgsError."""
        names = {name_of(flag): item.name for item in fields(cls) for flag in item.metadata["aliases"]}
        names |= {item.name: item.name for item in fields(cls)}
        given = {names.get(name, name): value for name, value in settings.items() if value is not None}
        known = {*names.values(), *map(name_of, WITHOUT_EFFECT | ONLY)}
        if unknown := _unknown([flag_of(name) for name in given if name not in known]):
            raise ArgsError("; ".join(unknown))
        given = _taken(given)
        kinds = {item.name: item.metadata["kind"] for item in fields(cls) if item.default != ()}
        for name in given.keys() & kinds.keys():
            kind, value = kinds[name], given[name]
            if isinstance(value, PathLike):
                given[name] = value = fspath(value)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ArgsError(f"{flag_of(name)}: expected {kind.__name__}, got {value!r}")
        return cls(**given)


#: Flags of published recipes that change nothing here -> (the type of their value, None for a switch, why).
WITHOUT_EFFECT: dict[str, tuple[type | None, str]] = {
    "--trust-remote-code": (None, "the code of a checkpoint is never run"),
    "--enable-torch-compile": (None, "the operators are compiled already"),
    "--torch-compile-max-bs": (int, "the operators are compiled already"),
    "--enable-mixed-chunk": (None, "prompts and decodes share steps anyway"),
    "--num-continuous-decode-steps": (int, "every step is scheduled"),
    "--schedule-conservativeness": (float, "requests are preempted when pages run out, and lose nothing"),
    "--disable-cuda-graph-padding": (None, "a batch runs in the smallest graph that holds it"),
    "--enable-piecewise-cuda-graph": (None, "steps with few prompt tokens are captured anyway, whole"),
    "--sampling-backend": (str, "WAVE64_BACKEND chooses who serves an operator"),
    "--triton-attention-num-kv-splits": (int, "the tuned tables say how often a sequence is split"),
    "--triton-attention-reduce-in-fp32": (None, "sums are in fp32 anyway"),
    "--disable-shared-experts-fusion": (None, "the sum is the same"),
    "--enable-aiter-allreduce-fusion": (None, "a sum over ranks and the norm of it are one kernel anyway"),
    "--enable-p2p-check": (None, "ranks find out at the start whether they reach each other's memory"),
    "--enable-metrics": (None, "/metrics is served in any case"),
    "--decode-log-interval": (int, "a busy engine logs its throughput every few seconds"),
}
#: Flags that are taken with one value -> (its type, the value, why).
ONLY: dict[str, tuple[type, Any, str]] = {
    "--pp-size": (int, 1, "every rank has all layers"),
    "--grammar-backend": (str, "llguidance", "it says which tokens an answer in a prescribed form may go on with"),
}
_ADAPTERS, _DRAFTS = "adapters are not applied; merge them into the checkpoint", "no tokens are drafted"
#: Flags that ask for what there is not -> why they are refused.
REFUSED: dict[str, str] = {
    "--enable-lora": _ADAPTERS,
    "--lora-paths": _ADAPTERS,
    "--speculative-algorithm": _DRAFTS,
    "--speculative-draft-model-path": _DRAFTS,
    "--speculative-num-steps": _DRAFTS,
    "--disaggregation-mode": "an engine computes prompts and answers",
    "--is-embedding": "models generate; they give no embeddings",
    "--enable-multimodal": "messages are text",
    "--moe-a2a-backend": "experts' tokens are gathered by every rank",
    "--enable-priority-scheduling": "requests have no priorities",
}


def exit_unless_installed() -> None:
    """Ends the process with one line on stderr where packages are missing that the server imports."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        sys.exit(f"wave64.launch_server: error: {', '.join(missing)}: not installed, and needed by the server: "
                 "pip install 'wave64[serve]', or python3 setup_rocm.py install in a clone")  # fmt: skip


def without_effect(argv: Sequence[str] | None = None) -> list[str]:
    """For the log: each flag in `argv` (sys.argv without it) that was taken and changes nothing, and why."""
    given = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    return [f"{flag}: changes nothing here, {why}" for flag, (_, why) in WITHOUT_EFFECT.items() if flag in given]


def name_of(flag: str) -> str:
    """--model-path -> model_path"""
    return flag.removeprefix("--").replace("-", "_")


def flag_of(name: str) -> str:
    """model_path -> --model-path"""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line; argparse would print the whole usage first


def _parser() -> _Parser:
    parser = _Parser(prog="wave64.launch_server", description="Serve a model over HTTP.", allow_abbrev=False)
    for item in fields(ServerArgs):
        assert item.default is not MISSING
        about = item.metadata
        how: dict[str, Any] = {"dest": item.name, "default": item.default, "help": about["help"]}
        if about["kind"] is bool:
            how["action"] = "store_true"
        elif item.default == () and about["kind"] is int:
            how |= {"nargs": "+", "default": [], "type": int, "metavar": "SIZE"}
        elif item.default == ():
            how |= {"action": "append", "default": [], "metavar": "NAME"}
        else:
            how |= {"type": about["kind"], "choices": about["choices"] or None}
            how["metavar"] = None if about["choices"] else about["kind"].__name__.upper()
            if item.default is not None:
                how["help"] += " (default: %(default)s)"
        parser.add_argument(flag_of(item.name), *about["aliases"], **how)
    for flag, (kind, *_) in (WITHOUT_EFFECT | ONLY).items():
        how = {"action": "store_true"} if kind is None else {"type": kind}
        parser.add_argument(flag, **how, help=argparse.SUPPRESS)
    return parser


def _taken(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of ServerArgs among flags that are known. Raises ArgsError where a flag of ONLY has another value."""
    for flag, (_, value, why) in ONLY.items():
        if (got := given.get(name_of(flag))) not in (None, value):
            raise ArgsError(f"{flag}: expected {value}, got {got}: {why}")
    return {name: value for name, value in given.items() if flag_of(name) not in WITHOUT_EFFECT | ONLY}


def _unknown(words: list[str]) -> list[str]:
    """What to say of words that are no flags of ours (SGLang has some 300, wave64 these few), all at once. What follows
    an unknown flag is taken for its value."""
    said: list[str] = []
    known = [flag for item in fields(ServerArgs) for flag in (flag_of(item.name), *item.metadata["aliases"])]
    for i, word in enumerate(words):
        if word.startswith("-"):
            name = word.split("=")[0]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help for those it has"
            said.append(f"{name}: {REFUSED.get(name, f'wave64 has no such flag; {hint}')}")
        elif i == 0 or not words[i - 1].startswith("-") or "=" in words[i - 1]:
            said.append(f"expected a flag, got {word!r}")
    return said
