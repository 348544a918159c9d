// DeepSeek's gate: the top_k best experts of each token, out of its topk_group best groups of experts.
//
// The trick: a wave has a token's logits in registers, each group in a run of lanes of its own: the group's score is
// a maximum over the run, its rank the count of better groups, one broadcast each. topk.h chooses the experts.
// Bound by latency: a load, the scores, the groups' ranks, top_k rounds, a store.
#include "wave64/topk.h"

namespace wave64 {

// As topk_softmax, out of the topk_group best of num_groups groups of experts; then num_shared experts of weight 1.
struct GroupedTopkArgs {
    const void* gating;  // [num_tokens, num_experts]
    const float* bias;   // [num_experts], or null
    float* weights;      // [num_tokens, top_k + num_shared]
    int32_t* ids;        // [num_tokens, top_k + num_shared]
    int64_t gating_stride;
    int64_t num_tokens;
    int32_t num_experts;
    int32_t top_k;
    int32_t num_groups;
    int32_t topk_group;
    int32_t num_shared;
    int32_t renormalize;  // 1: weights are divided by their sum
    int32_t sigmoid;      // 1: scores are sigmoid(gating); 0: softmax
    float factor;         // that weights are multiplied by
    Dtype dtype;          // of gating
    // set by the launcher
    int32_t grid;       // waves
    int32_t in_group;   // experts of a group
    int32_t lane_bits;  // 2^lane_bits lanes hold a group
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// A logit's softmax, or its logistic function: without a branch, since each lane has several logits.
struct Score {
    bool sigmoid;
    float largest = 0, scale = 1;

    WAVE64_DEVICE float operator()(float logit) const {
        const float power = exp2((logit - largest) * (sigmoid ? -kLog2E : kLog2E)), logistic = reciprocal(1 + power);
        return sigmoid ? logistic : power * scale;
    }
};

template <int SLOTS>
WAVE64_DEVICE Score score_of(bool sigmoid, const float (&logits)[SLOTS]) {
    Score score{sigmoid};
    if (sigmoid) return score;
    score.largest = logits[0];
#pragma unroll
    for (int i = 1; i < SLOTS; i++) score.largest = max(score.largest, logits[i]);
    score.largest = wave_max(score.largest);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < SLOTS; i++) sum += score(logits[i]);
    score.scale = 1 / wave_sum(sum);
    return score;
}

struct LargestTwo {
    float first = kNowhere, second = kNowhere;

    WAVE64_DEVICE void add(float x) {
        second = max(second, min(first, x));
        first = max(first, x);
    }
    template <int HALF>
    WAVE64_DEVICE void join_other_half() {
        const float other = from_other_half<HALF>(first);
        second = max(max(second, from_other_half<HALF>(second)), min(first, other));
        first = max(first, other);
    }
    // Over each run of `lanes` lanes: at most half a wave, since there are at least two groups.
    WAVE64_DEVICE void join_run(int lanes) {
        if (lanes > 1) join_other_half<1>();
        if (lanes > 2) join_other_half<2>();
        if (lanes > 4) join_other_half<4>();
        if (lanes > 8) join_other_half<8>();
        if (lanes > 16) join_other_half<16>();
    }
};

// Whether the lane's group is among the best: by its largest number, or by the sum of its two largest.
template <int SLOTS>
WAVE64_DEVICE bool in_best_groups(const GroupedTopkArgs& args, int group, const float (&numbers)[SLOTS]) {
    LargestTwo two;
#pragma unroll
    for (int i = 0; i < SLOTS; i++) two.add(numbers[i]);
    int order;
    if (args.bias) {
        two.join_run(1 << args.lane_bits);
        order = order_of(two.first + two.second);
    } else {
        order = run_max(order_of(two.first), 1 << args.lane_bits);
    }
    int ahead = 0;
    for (int other = 0; other < args.num_groups; other++) {
        const int its_order = broadcast(order, other << args.lane_bits);
        ahead += its_order > order || (its_order == order && other < group);
    }
    return ahead < args.topk_group;
}

template <typename T, int SLOTS>
WAVE64_DEVICE void grouped_topk(const GroupedTopkArgs& args) {
    const int lane = lane_in_block(), lanes = 1 << args.lane_bits, group = lane >> args.lane_bits;
    const int member = lane & (lanes - 1), members = group < args.num_groups ? args.in_group : 0;
    const int first = group * args.in_group + member, width = args.top_k + args.num_shared;
    const Row<float, 1> bias(args.bias, args.bias ? args.num_experts : 0);
    for (int64_t token = block_id(); token < args.num_tokens; token += args.grid) {
        const Row<T, 1> gating(static_cast<const T*>(args.gating) + token * args.gating_stride, args.num_experts);
        Pack<T, 1> loaded[SLOTS];
        Pack<float, 1> biases[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++) loaded[i] = gating.load(first + i * lanes);
#pragma unroll
        for (int i = 0; i < SLOTS; i++) biases[i] = bias.load(first + i * lanes);
        float logits[SLOTS], choice[SLOTS];
#pragma unroll
        for (int i = 0; i < SLOTS; i++)
            logits[i] = member + i * lanes < members ? clean(float(loaded[i].values().at[0])) : kNowhere;

        const Score score = score_of(args.sigmoid, logits);
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            const float biased = clean(score(logits[i]) + biases[i].values().at[0]);
            choice[i] = args.bias && logits[i] != kNowhere ? biased : logits[i];
        }
        if (args.topk_group < args.num_groups && !in_best_groups(args, group, choice)) {
#pragma unroll
            for (int i = 0; i < SLOTS; i++) choice[i] = kNowhere;
        }

        const bool narrow = sizeof(T) == 2 && !args.bias;
        float largest;
        const Chosen mine = narrow ? choose<true>(args.top_k, first, lanes, choice, largest)
                                   : choose<false>(args.top_k, first, lanes, choice, largest);
        // With a bias the number is not the logit. Loading it again is faster than getting it from its lane.
        const float logit = args.bias ? clean(float(gating.load(mine.expert).values().at[0])) : mine.number;
        float weight = lane < args.top_k ? score(logit) : 0, factor = args.factor;
        if (args.renormalize) factor /= wave_sum(weight) + 1e-20f;
        if (lane < width) {
            const bool shared = lane >= args.top_k;
            args.weights[token * width + lane] = shared ? 1 : weight * factor;
            args.ids[token * width + lane] = shared ? args.num_experts + lane - args.top_k : mine.expert;
        }
    }
}

}  // namespace wave64

WAVE64_GATES(grouped_topk, GroupedTopkArgs)

#else
namespace wave64 {
namespace {

constexpr GateKernels kKernels = WAVE64_GATE_NAMES(grouped_topk);

void grouped_topk(GroupedTopkArgs args, const Call& call) {
    check_gate(call, args);
    const int wave_size = call.device.wave_size;
    call.expect(args.num_groups >= 1 && args.num_experts % args.num_groups == 0, "num_groups",
                "a divisor of num_experts", args.num_groups);
    call.expect(args.topk_group >= 1 && args.topk_group <= args.num_groups, "topk_group", "1 to num_groups",
                args.topk_group);
    args.in_group = args.num_experts / args.num_groups;
    call.expect(args.top_k >= 1 && args.top_k <= args.topk_group * args.in_group, "top_k",
                "1 to the experts of topk_group groups", args.top_k);
    call.expect(args.num_shared >= 0 && args.num_shared <= wave_size - args.top_k, "num_shared",
                "at least 0, with top_k at most the lanes of a wave", args.num_shared);
    if (args.topk_group == args.num_groups) {  // no limit
        args.num_groups = args.topk_group = 1;
        args.in_group = args.num_experts;
    } else {
        call.expect(!args.bias || args.in_group >= 2, "num_groups", "two experts or more in each, with a bias",
                    args.num_groups);
    }
    call.expect(args.num_groups <= wave_size, "num_groups", "at most the lanes of a wave", args.num_groups);
    // As many lanes for each group as fit the wave, a power of two.
    args.lane_bits = 0;
    while (args.num_groups << (args.lane_bits + 1) <= wave_size) args.lane_bits++;
    const int64_t slots = ceil_div(args.in_group, 1 << args.lane_bits);
    call.expect(slots <= kMaxSlots, "num_groups", "enough for 16 experts a lane", args.num_groups);
    launch_gate(call, kKernels, slots, args);
}

WAVE64_OP(grouped_topk, GroupedTopkArgs, gating, bias, weights, ids, gating_stride, num_tokens, num_experts, top_k,
          num_groups, topk_group, num_shared, renormalize, sigmoid, factor, dtype)

}  // namespace
}  // namespace wave64
#endif
