"""`python -m wave64.bench_serving`"""

import sys
from importlib.util import find_spec

PACKAGES = ("httptools", "msgspec", "numpy", "tokenizers", "tqdm")

if __name__ == "__main__":
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        sys.exit(f"wave64.bench_serving: error: {', '.join(missing)}: not installed, and needed by the client: "
                 "pip install 'wave64[serve]'")
    from wave64.bench_serving.run import main

    sys.exit(main())
