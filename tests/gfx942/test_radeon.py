"""On a Radeon the tuned launch configurations fit its LDS: what does not fit is refused at the first request."""

import json
import os
import subprocess
import sys

import pytest

from wave64 import OPS
from wave64.arch import lookup
from wave64.testing import tune

SCRIPT = """
import json, sys
from wave64 import OPS
from wave64.testing.compile import compile_case

found = {}
for name in sys.argv[2:]:
    case = next(case for case in OPS[name].cases() if case.large)
    for launch in compile_case(OPS[name], case, sys.argv[1]):
        found[f"{name} {case.id} {launch.kernel.name}"] = launch.kernel.metadata.shared
print(json.dumps(found))
"""


@pytest.mark.parametrize("arch", ["gfx1100", pytest.param("gfx1151", marks=pytest.mark.long)])  # of the same tables
def test_the_first_large_case_of_each_tuned_operator_fits(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    names = [name for name in tune.tunable() if "fp8" not in name]  # gfx11 has no FP8
    done = subprocess.run([sys.executable, "-c", SCRIPT, arch, *names], env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    lds_bytes = json.loads(done.stdout)
    assert {name.split()[0] for name in lds_bytes} == set(names) <= set(OPS)
    limit = lookup(arch).lds_bytes
    assert not {name: used for name, used in lds_bytes.items() if used > limit}
