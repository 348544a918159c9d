"""Which of the documents' commands tests/test_docs_run.py runs, and why the others are not run."""

import re

from docs_commands import DOCUMENTS, ROOT, commands

#: What a command has -> why it is not run here. The first that fits counts.
REASONS = {
    r"^(docker|drun|drun_rdma|NCCL_\w+=\S+ .*drun)": "wants a Docker engine",
    r"<\w+>|\bMODEL\b|\bOP\b|\bWHEEL\b|bench_peers\.py": "has a word that a reader replaces",
    r"--nnodes|torchrun": "wants two hosts",
    r"/models/": "wants a checkpoint of many gigabytes, and GPUs for it",
    r"amd/Llama": "wants checkpoints that a hub has",
    r"sglang_router": "is another package's",
    r"setup_rocm\.py (?!doctor)": "makes an environment, in minutes: the workflow runs it",
    r"--renew-|flags_table\.py": "writes files of the repository",
    r"(tune|testing\.tune) .*--write": "writes tuned tables into the package",
    r"doctor --fix": "asks before it changes the machine",
    r"tests/bench/|^python -m wave64 tune |bench_serving": "takes minutes, or wants a GPU; has short forms elsewhere",
    r"tests/\w+_picture\.py": "draws a picture of the documents anew",
    r"wave64 check$|wave64 check #|--tier|AMD_SERIALIZE": "is the contract of all operators: tests/ops",
    r"emulator\.check gfx942( rms_norm)?$": "is the contract on the emulator: tests/gfx942",
}


def reason(command: str) -> str | None:
    """Why a command is not run; None for one that is."""
    return next((why for pattern, why in REASONS.items() if re.search(pattern, command)), None)


def plain(line: str) -> str:
    """Without the remark behind it."""
    return re.sub(r"\s+#\s.*$", "", line).strip()


def documented() -> list[str]:
    """Every command of the documents, once, in their order."""
    pages = [*DOCUMENTS, ROOT / "docs" / "hooks.py"]  # which has the page of the composed decode loop
    lines = [plain(line) for page in pages for line in commands(page.read_text())]
    return list(dict.fromkeys(line for line in lines if not line.endswith("--help --help")))
