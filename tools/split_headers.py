"""For `setup_rocm.py wheel`: the part of Python's headers that Debian keeps in /usr/include/<architecture>."""

import sysconfig
from pathlib import Path


def link(folder: str) -> str:
    """The flag by which zig finds that part through `folder`, which is made: told a target, zig looks at none of the
    system's. "" where headers are in one place."""
    headers, multiarch = Path(sysconfig.get_path("include")), sysconfig.get_config_var("MULTIARCH") or ""
    part = headers.parent / multiarch / headers.name
    if not multiarch or not part.is_dir():
        return ""
    Path(folder, multiarch).mkdir(parents=True)
    Path(folder, multiarch, part.name).symlink_to(part)
    return f" -I{folder}"
