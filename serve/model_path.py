"""Which folder a model path stands for. Imports no torch: the api process asks, to find the tokenizer."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from wave64.serve.args import ArgsError

DEMO = Path(__file__).parent / "demo"
BUILT_IN = {f"demo-{name}": DEMO / name for name in ("llama", "deepseek", "deepseek-fp8", "tools")}
TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
CONFIG_FILES = ("config.json", "generation_config.json")
HUB_FILES = (*TOKENIZER_FILES, "*.safetensors")


def resolve_model_path(model_path: str, revision: str | None = None, files: Sequence[str] = HUB_FILES) -> Path:
    """The folder of `model_path`: a folder, a built-in name, or a hub name, from which `files` (patterns) are
    downloaded.

    Raises ArgsError in one line if it is none of these or cannot be fetched.
    """
    folder = Path(model_path).expanduser()
    if model_path and folder.is_dir():
        return folder
    if model_path in BUILT_IN:
        folder = BUILT_IN[model_path]
        if not folder.is_dir():
            raise ArgsError(f"{model_path}: {folder} is missing from this installation of wave64; install it again")
        return folder
    built_in = ", ".join(BUILT_IN)
    hint = _did_you_mean(model_path, folder)
    if "demo-" in hint:
        raise ArgsError(f"{model_path}: neither a folder nor a built-in name ({built_in}){hint}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model_path) or folder.exists():
        raise ArgsError(f"{model_path}: expected a folder, a built-in name ({built_in}) or a hub name (owner/name), "
                        f"got {'a file' if folder.exists() else 'a path that does not exist'}{hint}")
    import huggingface_hub  # only here: a local model needs no hub client

    try:
        return Path(huggingface_hub.snapshot_download(model_path, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as e:
        reason = " ".join(str(e).split())[:200]
        raise ArgsError(f"{model_path}: neither a folder nor a built-in name ({built_in}), and the Hugging Face Hub "
                        f"did not give it: {type(e).__name__}: {reason}{hint}") from None


def _did_you_mean(model_path: str, folder: Path) -> str:
    """The end of an error about `model_path`: the demo or neighboring folder that may have been meant."""
    try:
        siblings = {entry.name: entry for entry in folder.parent.iterdir() if entry.is_dir()}
    except OSError:
        siblings = {}
    names = [*BUILT_IN, *siblings] if model_path == folder.name else [*siblings]
    near = difflib.get_close_matches(folder.name, names, n=1, cutoff=0.8)
    return f"; did you mean {siblings.get(near[0], near[0])}?" if near else ""
