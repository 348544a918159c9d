"""A tiny random Llama with a tokenizer, and the real server around it in processes of its own."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
from helpers_processes import children
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXT = (Path(__file__).parents[2] / "serve/demo/gettysburg.txt").read_text()
CONTEXT, POOL, VOCAB = 2048, 8192, 384
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
READY_S = 120  # how long a start, or an end, may take on a machine that is busy


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of VOCAB tokens; id 0 is bos, 1 is eos."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|bos|>", "<|eos|>"], initial_alphabet=alphabet)
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(folder: Path, **changes) -> Path:
    """A checkpoint of two layers with random weights, saved by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1,
        initializer_range=0.6, tie_word_embeddings=False, **changes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def free_port() -> int:
    """A port for a process that is started later: not of those that the system gives to connections meanwhile, nor one
    that another worker of these tests was given."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        port = random.SystemRandom().randrange(min(first // 2, 10_000), first)
        ours = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                ours.bind(f"\0wave64-test-port-{port}")  # a name without a file, and gone with this process
                probe.bind(("127.0.0.1", port))
            except OSError:
                ours.close()
                continue
        ours.detach()  # stays open without an object, which would warn that it was not closed
        return port
    raise RuntimeError(f"no port below {first} is free")


class Server:
    """`python -m wave64.launch_server` with a log file, and who it is."""

    def __init__(self, model: Path | str, log: Path, *flags: str, **variables: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.log = log
        command = [sys.executable, "-m", "wave64.launch_server", "--model-path", str(model), "--port", str(self.port)]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # of these tests only
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", *flags], stdout=sink, stderr=subprocess.STDOUT,
                env={**env, "OMP_NUM_THREADS": "1", **variables},
                preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup has ignored
            )  # fmt: skip

    def wait_ready(self) -> "Server":
        """Until the log says that the server is ready. Raises with the log if it ends first, or never is."""
        return self.wait_for(lambda: "ready to roll!" in self.log.read_text())

    def wait_for(self, condition: Callable[[], object]) -> "Server":
        """Until it has come so far with its start. Raises with the log if it ends first, or never does."""
        until = time.monotonic() + READY_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server is not there, exit status {self.process.poll()}:\n"
                                   f"{self.log.read_text()}")
            time.sleep(0.05)
        return self

    @property
    def engine_pid(self) -> int:
        """The engine process: the only child of the api process."""
        return children(self.process.pid)[0]

    def post(self, path: str, **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the engine process stands still: what was asked for is not answered, however slow the test is, and
        whoever else lets the process go on (a debugger, a script that stops processes at random)."""
        engine, let_go = self.engine_pid, threading.Event()
        os.kill(engine, signal.SIGSTOP)

        def hold() -> None:
            while not let_go.wait(0.002):
                os.kill(engine, signal.SIGSTOP)

        with ThreadPoolExecutor(1) as pool:
            holding = pool.submit(hold)
            try:
                yield
            finally:
                let_go.set()
                holding.result()
                os.kill(engine, signal.SIGCONT)

    @property
    def running(self) -> int:
        """Requests that the api process waits for."""
        return self.get("/health").json()["running"]

    def complete(self, **body) -> dict:
        """A /v1/completions answer; greedy, unless said otherwise."""
        answer = self.post("/v1/completions", **{"temperature": 0, "max_tokens": 24, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stop(self) -> int:
        """End it gracefully; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(READY_S)


@contextmanager
def serve(model: Path | str, log: Path, *flags: str, **variables: str) -> Iterator[Server]:
    """A ready server, which is gone at the end. variables: of its environment."""
    server = Server(model, log, *flags, **variables)
    try:
        yield server.wait_ready()
    finally:
        server.http.close()
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition, seconds: float = READY_S) -> bool:
    """Whether `condition()` comes true within a time that is generous on purpose."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
