"""HIP kernels of the targets that nothing executes here: what each takes of a compute unit is in targets.json, and may
not grow. gfx942 and gfx950 are looked at closer, in test_budgets.py.

`pytest tests/gfx942/test_targets.py --renew-golden` records what is meant.
"""

import json
from pathlib import Path

import pytest
from budgets import ARCHS as CLOSER

from wave64.arch import HIP_TARGETS
from wave64.backends import hip
from wave64.testing import isa

GOLDEN = Path(__file__).with_name("targets.json")
FIGURES = ("vgpr", "sgpr", "lds_bytes")
TARGETS = [arch for arch in HIP_TARGETS if arch not in CLOSER]


def figures(arch: str) -> dict[str, dict[str, list[int]]]:
    """Operator -> kernel -> its FIGURES."""
    return {op: {k.name: [getattr(k, figure) for figure in FIGURES]
                 for k in sorted(isa.read_elf(hip.code_object(arch, op)), key=lambda k: k.name)}
            for op in hip.code_objects()[arch]}


@pytest.fixture(scope="module")
def golden(request):
    if request.config.getoption("renew_golden", default=False):
        lines = [f'"compiler": "{isa.compiler(hip.code_object(TARGETS[0], "rms_norm"))}"',
                 *(f'"{arch} {op} {kernel}": {json.dumps(row)}' for arch in TARGETS
                   for op, rows in figures(arch).items() for kernel, row in rows.items())]
        GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("arch", TARGETS)
def test_kernels_take_no_more_than_golden(arch, golden):
    if arch not in hip.code_objects():
        pytest.skip(f"the package was built without {arch} code objects")
    if golden["compiler"] != (used := isa.compiler(hip.code_object(arch, "rms_norm"))):
        pytest.skip(f"golden figures are of {golden['compiler']}, these kernels of {used}")
    now = {f"{arch} {op} {kernel}": row for op, rows in figures(arch).items() for kernel, row in rows.items()}
    then = {name: row for name, row in golden.items() if name.startswith(f"{arch} ")}
    assert now.keys() == then.keys()
    grown = [f"{name}: {figure} {old} -> {new}" for name in now
             for figure, old, new in zip(FIGURES, then[name], now[name], strict=True) if new > old]
    assert not grown, "\n".join(grown)
