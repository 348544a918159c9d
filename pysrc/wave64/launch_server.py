"""`python -m wave64.launch_server --model-path ...`: serve a model over HTTP (wave64/serve/http/launch.py)."""

import sys
from importlib.util import find_spec

SERVER = ("fastapi", "huggingface_hub", "jinja2", "msgspec", "pydantic", "safetensors", "tokenizers", "transformers",
          "uvicorn", "zmq")

if __name__ == "__main__":
    if missing := [name for name in SERVER if find_spec(name) is None]:
        sys.exit(f"wave64.launch_server: error: {', '.join(missing)}: not installed, and needed by the server: "
                 "pip install 'wave64[serve]', or python3 setup_rocm.py install in a clone")
    from wave64.serve.http.launch import main

    sys.exit(main())
