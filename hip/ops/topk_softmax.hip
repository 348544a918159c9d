// The softmax gate: the top_k most likely experts of each token, and their weights.
//
// The trick: a wave has a token's logits in registers and chooses by them (topk.h), so the rounds do not wait for the
// softmax; with renormalize it is taken of the chosen logits only.
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
namespace wave64 {
namespace {

constexpr GateKernels kKernels = WAVE64_GATE_NAMES(topk_softmax);

void topk_softmax(TopkSoftmaxArgs args, const Call& call) {
    check_gate(call, args);
    const int wave_size = call.device.wave_size;
    call.expect(args.top_k >= 1 && args.top_k <= std::min(args.num_experts, wave_size), "top_k",
                "1 to num_experts, at most the lanes of a wave", args.top_k);
    launch_gate(call, kKernels, ceil_div(args.num_experts, wave_size), args);
}

WAVE64_OP_AND_CONSTANTS(topk_softmax, TopkSoftmaxArgs, ({{"MAX_SLOTS", kMaxSlots}}), gating, weights, ids,
                        gating_stride, num_tokens, num_experts, top_k, renormalize, dtype)

}  // namespace
}  // namespace wave64
#endif
