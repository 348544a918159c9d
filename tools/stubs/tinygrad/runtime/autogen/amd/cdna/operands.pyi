# A table of thousands of rows, whose type would be inferred of all of them.
from typing import Any

OPERANDS: dict[Any, Any]
