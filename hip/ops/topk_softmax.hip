// The softmax gate: the top_k most likely experts of each token, and their weights.
//
// The trick: 16 lanes have a token's logits in registers, or, where there are many experts, a wave has, and they choose
// by them (topk.h), so the rounds do not wait for the softmax; with renormalize it is taken of the chosen logits only.
// Bound by latency: a load, top_k rounds, a store.
#include "wave64/topk.h"

namespace wave64 {

// The top_k largest of softmax(gating[t]), the largest first, and their experts.
struct TopkSoftmaxArgs {
    const void* gating;  // [num_tokens, num_experts]
    float* weights;      // [num_tokens, top_k]
    int32_t* ids;        // [num_tokens, top_k]
    int64_t gating_stride;
    int64_t num_tokens;
    int32_t num_experts;
    int32_t top_k;
    int32_t renormalize;  // 1: weights are divided by their sum
    Dtype dtype;          // of gating
    // set by the launcher
    int32_t grid;  // waves
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// LANES of them have a token, each SLOTS of its logits.
template <typename T, int SLOTS, int LANES>
WAVE64_DEVICE void topk_softmax(const TopkSoftmaxArgs& args) {
    const int lanes = LANES ? LANES : wave_size(), tokens = wave_size() / lanes;
    const int lane = lane_in_block() % lanes, row = lane_in_block() / lanes;
    const int stride = tokens == 1 ? 0 : int(args.gating_stride);
    for (int64_t first = int64_t(block_id()) * tokens; first < args.num_tokens; first += int64_t(args.grid) * tokens) {
        const int64_t left = args.num_tokens - first;
        const int rows = left < tokens ? int(left) : tokens, numbers = (rows - 1) * stride + args.num_experts;
        const Row<T, 1> gating(static_cast<const T*>(args.gating) + first * args.gating_stride, numbers);
        Pack<T, 1> loaded[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++) loaded[i] = gating.load(row * stride + lane + i * lanes);
        float logits[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            const bool exists = lane + i * lanes < args.num_experts;
            logits[i] = exists ? clean(float(loaded[i].values().at[0])) : kNowhere;
        }

        float largest;
        const Chosen mine = choose<sizeof(T) == 2, LANES>(args.top_k, lane, lanes, logits, largest);
        const float weight = lane < args.top_k ? exp2((mine.number - largest) * kLog2E) : 0;
        float sum = weight;
        if (!args.renormalize) {
            sum = 0;
#pragma unroll
            for (int i = 0; i < SLOTS; i++) sum += exp2((logits[i] - largest) * kLog2E);
        }
        sum = sum_over<LANES>(sum);
        if (lane < args.top_k && row < rows) {
            const int64_t at = (first + row) * args.top_k + lane;
            args.weights[at] = weight / sum;
            args.ids[at] = mine.expert;
        }
    }
}

}  // namespace wave64

// Of few experts, and of many.
#define WAVE64_SOFTMAX_GATES(DTYPE, T)                                                                     \
    WAVE64_GATE_OF(topk_softmax_##DTYPE##_run_2, TopkSoftmaxArgs, topk_softmax<T, 2, wave64::kRunLanes>)   \
    WAVE64_GATE_OF(topk_softmax_##DTYPE##_run_8, TopkSoftmaxArgs, topk_softmax<T, 8, wave64::kRunLanes>)   \
    WAVE64_GATE_OF(topk_softmax_##DTYPE##_run_16, TopkSoftmaxArgs, topk_softmax<T, 16, wave64::kRunLanes>) \
    WAVE64_GATE_OF(topk_softmax_##DTYPE##_8, TopkSoftmaxArgs, topk_softmax<T, 8, 0>)                       \
    WAVE64_GATE_OF(topk_softmax_##DTYPE##_16, TopkSoftmaxArgs, topk_softmax<T, 16, 0>)
WAVE64_SOFTMAX_GATES(bf16, wave64::bf16)
WAVE64_SOFTMAX_GATES(fp16, wave64::fp16)
WAVE64_SOFTMAX_GATES(fp32, float)

#else
namespace wave64 {
namespace {

#define WAVE64_SOFTMAX_GATE_NAMES(DTYPE)                                                              \
    {"topk_softmax_" DTYPE "_run_2", "topk_softmax_" DTYPE "_run_8", "topk_softmax_" DTYPE "_run_16", \
     "topk_softmax_" DTYPE "_8", "topk_softmax_" DTYPE "_16"}
constexpr const char* kKernels[][5] = {WAVE64_SOFTMAX_GATE_NAMES("bf16"), WAVE64_SOFTMAX_GATE_NAMES("fp16"),
                                       WAVE64_SOFTMAX_GATE_NAMES("fp32")};

void topk_softmax(TopkSoftmaxArgs args, const Call& call) {
    check_gate(call, args);
    const int wave_size = call.device.wave_size, tokens = wave_size / kRunLanes;
    call.expect(args.top_k >= 1 && args.top_k <= std::min(args.num_experts, wave_size), "top_k",
                "1 to num_experts, at most the lanes of a wave", args.top_k);
    // A wave's rows are accessed by 32-bit offsets from the first.
    const bool runs =
        args.num_experts <= kMaxSlots * kRunLanes && args.top_k <= kRunLanes && args.gating_stride < int64_t(1) << 24;
    const int64_t slots = ceil_div(args.num_experts, runs ? kRunLanes : wave_size);
    const int kernel = runs ? (slots > 8 ? 2 : slots > 2 ? 1 : 0) : slots > 8 ? 4 : 3;
    launch_gate(call, kKernels[args.dtype][kernel], runs ? tokens : 1, args);
}

WAVE64_OP_AND_CONSTANTS(topk_softmax, TopkSoftmaxArgs, ({{"MAX_SLOTS", kMaxSlots}}), gating, weights, ids,
                        gating_stride, num_tokens, num_experts, top_k, renormalize, dtype)

}  // namespace
}  // namespace wave64
#endif
