// The softmax gate: the top_k likeliest experts of every token, and their weights.
//
// The trick: a wave has a token's logits in registers and chooses by them (topk.h), so the softmax is off the path of
// the rounds; with renormalize only the chosen logits enter it.
// Bound by latency: a load, top_k rounds, a store.
#include "wave64/abi.h"
#include "wave64/topk.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <typename T, int SLOTS>
WAVE64_DEVICE void topk_softmax(const TopkSoftmaxArgs& args) {
    const int lane = lane_in_block();
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid) {
        const Row<T, 1> gating(static_cast<const T*>(args.gating) + token * args.gating_stride, args.num_experts);
        Pack<T, 1> loaded[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++) loaded[i] = gating.load(lane + i * wave_size());
        float logits[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            const bool exists = lane + i * wave_size() < args.num_experts;
            logits[i] = exists ? clean(float(loaded[i].values().at[0])) : kNowhere;
        }

        const Chosen mine = choose<sizeof(T) == 2>(args.top_k, lane, wave_size(), logits);
        const float largest = broadcast(mine.number, 0);
        const float weight = lane < args.top_k ? exp2((mine.number - largest) * kLog2E) : 0;
        float sum = weight;
        if (!args.renormalize) {
            sum = 0;
#pragma unroll
            for (int i = 0; i < SLOTS; i++) sum += exp2((logits[i] - largest) * kLog2E);
        }
        sum = wave_sum(sum);
        if (lane < args.top_k) {
            args.weights[token * args.top_k + lane] = weight / sum;
            args.ids[token * args.top_k + lane] = mine.expert;
        }
    }
}

}  // namespace wave64

WAVE64_GATES(topk_softmax, TopkSoftmaxArgs)

#else

int32_t wave64_topk_softmax(const wave64::TopkSoftmaxArgs* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "topk_softmax";
    TopkSoftmaxArgs args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refuse(op, "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const int wave_size = device->wave_size;
    if (args.num_experts < 1 || args.num_experts > kMostSlots * wave_size)
        return refuse(op, "num_experts", "1 to 16 for each lane of a wave", args.num_experts);
    if (args.top_k < 1 || args.top_k > std::min(args.num_experts, wave_size))
        return refuse(op, "top_k", "1 to num_experts, at most a wave's lanes", args.top_k);
    if (args.num_tokens == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"gating", args.gating}, {"weights", args.weights}, {"ids", args.ids}})
        if (!pointer) return refuse(op, name, "an address", 0);
    constexpr GateKernels kernels = WAVE64_GATE_NAMES(topk_softmax);
    return launch_gate(op, kernels, ceil_div(args.num_experts, wave_size), *device, args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::TopkSoftmaxArgs, NAME)
static const bool registered = wave64::register_op<wave64::TopkSoftmaxArgs, wave64_topk_softmax>(
    "topk_softmax", {FIELD(gating), FIELD(weights), FIELD(ids), FIELD(gating_stride), FIELD(num_tokens),
                     FIELD(num_experts), FIELD(top_k), FIELD(renormalize), FIELD(dtype)});

#endif
