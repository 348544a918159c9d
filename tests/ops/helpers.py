"""What the tests of several operators share."""

import pytest

from wave64 import platform
from wave64.op import Op


def run(op: Op, backend: str, *args, **kwargs):
    """The operator by that backend. What a GPU's architecture cannot serve is skipped; the interpreter serves all."""
    chosen = op.backends[backend]
    if chosen.supports is not None and (why := chosen.supports(*args, **kwargs)):
        assert platform.arch() is not None, why
        pytest.skip(why)
    return chosen.run(*args, **kwargs)
