"""What a step of one layer of a production model costs on MI300X or MI355X at least, by operator, once its logits are
as near to the CPU's as two evaluations in bf16 are. Its machine code is executed, so it takes minutes.

    python tests/bench/layer_steps.py deepseek-v3-tp8 --arch gfx942 --batch 4 --context 4096
    python tests/bench/layer_steps.py llama-3.1-8b --chunk 128
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from wave64.arch import EMULATED, lookup
from wave64.testing.step_cost import table

sys.path.append(str(Path(__file__).parents[1] / "gfx942"))
from device_layers import LAYERS, Work, layer  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layer", choices=LAYERS)
    parser.add_argument("--arch", choices=EMULATED, default="gfx942")
    parser.add_argument("--batch", type=int, default=1, help="sequences that decode")
    parser.add_argument("--context", type=int, default=0, help="tokens that each has in the cache")
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a prompt, instead of decoding")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    saw = layer(args.layer, args.arch, Work(args.batch, args.context, args.chunk))
    what = f"a chunk of {args.chunk}" if args.chunk else f"{args.batch} decoding behind {args.context}"
    print(f"{args.layer} on {args.arch}: logits {saw['distance']:.4f} from the CPU's, {saw['instructions']:,} wave "
          f"instructions in {time.monotonic() - began:.0f} s, with the CPU's part\n")
    print(table({what: saw["step"]}, lookup(args.arch).product))
    return int(not saw["distance"] < saw["close"])


if __name__ == "__main__":
    sys.exit(main())
