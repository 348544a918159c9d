"""Draws docs/doctor.svg, the doctor's table of a machine with faults: `python tests/doctor_picture.py` (needs rich)."""

import io
import re
import tempfile
from pathlib import Path

from test_doctor import GIB, SOFTWARE, gpu_files, host, machine

from wave64.tools.doctor import cli
from wave64.tools.doctor.gpus import gpu_rows, link_rows
from wave64.tools.doctor.host import host_rows
from wave64.tools.doctor.software import software_rows

FILE = Path(__file__).parents[1] / "docs" / "doctor.svg"


def lines() -> list[str]:
    """Eight MI300X with a CUDA build of torch, NUMA balancing, a lowered power cap and an error in memory."""
    files = host(proc__sys__kernel__numa_balancing="1") | gpu_files(["gfx942"] * 8) | {
        "/sys/class/drm/renderD131/device/hwmon/hwmon3/power1_cap": 550_000_000,
        "/sys/class/drm/renderD129/device/ras/umc_err_count": "ue: 2\nce: 0"}
    with tempfile.TemporaryDirectory() as root:
        box = machine(Path(root), files, shm_bytes=64 * GIB)
        software = SOFTWARE._replace(rocm=None, cuda="12.8", torch="2.9.1+cu128", sees_gpu=False, kernel=None)
        return cli.shown([*gpu_rows(box), *software_rows(box, software), *host_rows(box), *link_rows(box)], color=True)


def main() -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=132, file=io.StringIO())
    console.print(Text.from_ansi("\n".join(lines())))
    drawn = console.export_svg(title="python -m wave64 doctor --multi", unique_id="doctor")
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # a picture asks no other host for a font
    FILE.write_text("\n".join(line.rstrip() for line in drawn.splitlines()) + "\n")


if __name__ == "__main__":
    main()
