# The names at the top of transformers, of which each pulls in hundreds of models, are of no known type.
from typing import Any

def __getattr__(name: str) -> Any: ...
