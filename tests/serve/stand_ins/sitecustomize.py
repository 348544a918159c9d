"""Lets SGLang's benchmark client run where SGLang itself could not: without its GPU packages, and without what the
datasets of images need. The client's own files are untouched; these modules replace the others that it imports.
"""

import importlib.machinery
import sys
import types


def stand_in(name: str, path: str | None = None, **content: object) -> None:
    """Replaces a module by one with this content; with a path, its submodules are the real ones there."""
    module = types.ModuleType(name)
    module.__path__ = [] if path is None else [path]
    module.__dict__.update(content)
    sys.modules[name] = module


spec = importlib.machinery.PathFinder.find_spec("sglang")
if spec is not None:
    root = spec.submodule_search_locations[0]
    stand_in("sglang", root)  # whose __init__ patches transformers and imports the runtime
    stand_in("sglang.srt", f"{root}/srt")
    stand_in("sglang.srt.utils", f"{root}/srt/utils")
    stand_in("sglang.srt.disaggregation")
    stand_in("sglang.srt.disaggregation.utils", FAKE_BOOTSTRAP_HOST="2.2.2.2")
    stand_in("psutil")
    stand_in("pybase64")
    stand_in("datasets", load_dataset=None)
    stand_in("PIL", Image=None)
