"""A decode step of Llama-3.1-70B and DeepSeek-V3 over eight MI300X, on paper: rung 5 of the design, nothing is run.

    python tests/bench/tp8.py [--context N] [--batch N ...]

Three terms, one after another: what one rank reads from memory at AMD's peak bandwidth (weights, of the experts those
that a batch is expected to choose, and the KV cache), its products at AMD's peak rates where those take longer, and the
collectives, interpolated in published times of RCCL inside a graph and of a custom all-reduce. Left out: launches and
what lies between them, norms, routing and sampling, waiting inside kernels, falling clocks, the host. So a step is
slower than the sum; what is published next to it says by how much today's engines are.
"""

import argparse
from dataclasses import dataclass

from wave64.arch import lookup

TP = 8
MI300X = lookup("gfx942")
#: bytes -> microseconds of an all-reduce over eight GPUs, as published: RCCL on MI300X in a graph (AMD's blog on RCCL
#: and xGMI), vLLM's custom one on MI355X (its pull request 39080; nothing of that kind is published for MI300X)
RCCL = {8 << 10: 7.6, 64 << 10: 9.1, 256 << 10: 10.3, 1 << 20: 19.4, 16 << 20: 149.0}
CUSTOM = {24 << 10: 6.4, 192 << 10: 7.0, 384 << 10: 7.5, 1536 << 10: 12.9}


@dataclass(frozen=True)
class Model:
    """Of one rank: bytes of weights that every step reads, and of one expert of all layers together."""

    name: str
    layers: int
    hidden: int
    dense_bytes: float
    kv_bytes: float  # of a token
    expert_bytes: float = 0.0
    experts: int = 0
    top_k: int = 0

    def weights(self, batch: int) -> float:
        """Bytes that a step of `batch` tokens reads; each token chooses its experts evenly, and by itself."""
        chosen = self.experts * (1 - (1 - self.top_k / self.experts) ** batch) if self.experts else 0
        return self.dense_bytes + chosen * self.expert_bytes

    def flops(self, batch: int) -> float:
        """Two for each weight in FP8 that a token meets."""
        return 2 * batch * (self.dense_bytes + self.top_k * self.expert_bytes)


def llama_70b() -> Model:
    """FP8 weights, bf16 head and KV cache; a KV head a rank."""
    hidden, intermediate, layers = 8192, 28672, 80
    layer = 2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * intermediate
    return Model("Llama-3.1-70B FP8", layers, hidden, (layers * layer + 2 * 128256 * hidden) / TP,
                 layers * 2 * 128 * 2)


def deepseek_v3() -> Model:
    """FP8 weights, bf16 head and latents. Every rank has the projections to latents and the latents of all tokens."""
    hidden, layers, sparse, heads = 7168, 61, 58, 128
    shared = hidden * (1536 + 512 + 64)
    split = 1536 * heads * 192 + 512 * heads * 256 + heads * 128 * hidden
    expert = 3 * hidden * 2048 / TP
    dense = layers * (shared + split / TP) + (layers - sparse) * 3 * hidden * 18432 / TP + sparse * expert
    return Model("DeepSeek-V3 FP8", layers, hidden, dense + 2 * 129280 * hidden / TP, layers * 576 * 2, sparse * expert,
                 256, 8)


def interpolate(times: dict[int, float], size: float) -> float:
    """Microseconds for `size` bytes: straight lines between the sizes of a table, and on beyond the last; at least that
    of the smallest."""
    sizes = sorted(times)
    if size <= sizes[0]:
        return times[sizes[0]]
    above = next((i for i in range(1, len(sizes) - 1) if size <= sizes[i]), len(sizes) - 1)
    a, b = sizes[above - 1], sizes[above]
    return times[a] + (times[b] - times[a]) * (size - a) / (b - a)


def step_ms(model: Model, batch: int, context: int, times: dict[int, float]) -> dict[str, float]:
    """Milliseconds of a decode step by term."""
    read = (model.weights(batch) + batch * context * model.kv_bytes) / (MI300X.bandwidth_gbs * 1e6)
    products = model.flops(batch) / (MI300X.fp8_tflops * 1e9)
    exchange = (2 * model.layers + 1) * interpolate(times, batch * model.hidden * 2) / 1e3
    return {"memory": read, "products": max(products - read, 0.0), "all-reduces": exchange}


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1500, help="tokens of each sequence")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 256])
    options = parser.parse_args()
    print("| TP8 on MI300X | B | memory, ms | products beyond it | all-reduces: RCCL, custom | step: RCCL, custom "
          "| largest term | output tok/s, custom |\n|---|---:|---:|---:|---:|---:|---|---:|")
    for model in (llama_70b(), deepseek_v3()):
        for batch in options.batch:
            rccl, custom = (step_ms(model, batch, options.context, times) for times in (RCCL, CUSTOM))
            whole = sum(custom.values())
            print(f"| {model.name} | {batch} | {custom['memory']:.2f} | {custom['products']:.2f} "
                  f"| {rccl['all-reduces']:.2f}, {custom['all-reduces']:.2f} | {sum(rccl.values()):.2f}, {whole:.2f} "
                  f"| {max(custom, key=custom.__getitem__)} | {batch / whole * 1e3:,.0f} |")


if __name__ == "__main__":
    main()
