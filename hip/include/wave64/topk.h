// The largest numbers of a row in the registers of a wave, or of a run of 16 of its lanes, as the gates of experts
// choose them: rounds of maxima over integers that are in the order of the numbers.
//
// The trick: with 16-bit numbers the integer holds the expert as well, and a round is one maximum; else it is two. Four
// runs of a wave choose for four rows at once, by exchanges that are part of an instruction.
#pragma once

#include "wave64/types.h"

namespace wave64 {
constexpr int kMaxSlots = 16;  // experts of a lane
constexpr int kRunLanes = 16;  // of a run
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

constexpr float kLargestLogit = 0x1p126f;  // so that differences of two stay finite
constexpr float kLog2E = 1.44269504f;
constexpr float kNowhere = -__builtin_inff();  // the number of a slot without an expert: never chosen

// x clamped to the limit; NaN (also a signaling one, which max returns) becomes the lowest.
WAVE64_DEVICE float clean(float x) { return x == x ? min(max(x, -kLargestLogit), kLargestLogit) : -kLargestLogit; }

// Integers in the order of the numbers; zeros of both signs are equal.
WAVE64_DEVICE int order_of(float x) {
    const int bits = __builtin_bit_cast(int, x + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
WAVE64_DEVICE float number_of(int order) { return __builtin_bit_cast(float, order ^ ((order >> 31) & 0x7fffffff)); }

struct Chosen {
    float number;
    int expert;
};

// x reduced by `join` over the LANES lanes, those of a run or of the wave, in each of them.
template <int LANES, typename T, typename Join>
WAVE64_DEVICE T run_joined(T x, Join join) {
    static_assert(LANES == kRunLanes);
    x = join(x, from_other_half<1>(x));
    x = join(x, from_other_half<2>(x));
    x = join(x, from_other_half<4>(x));
    return join(x, from_other_half<8>(x));
}
template <int LANES>
WAVE64_DEVICE int max_over(int x) {
    if constexpr (LANES == 0)
        return wave_max(x);
    else
        return run_joined<LANES>(x, [](int a, int b) { return a > b ? a : b; });
}
template <int LANES>
WAVE64_DEVICE float sum_over(float x) {
    if constexpr (LANES == 0)
        return wave_sum(x);
    else
        return run_joined<LANES>(x, [](float a, float b) { return a + b; });
}

// The experts that the lanes choose among: SLOTS per lane, slot i is expert first + i * step. NARROW: the numbers were
// of 16 bits, so the lowest 13 of 32 are zeros; they hold the expert, the first one as the largest. LANES: of a run; 0:
// the wave's.
template <int SLOTS, bool NARROW, int LANES>
class Candidates {
    static constexpr int kExpertMask = (1 << 13) - 1, kTaken = -2147483647 - 1;
    int first, step, key[SLOTS];

public:
    WAVE64_DEVICE Candidates(int first, int step, const float (&numbers)[SLOTS]) : first(first), step(step) {
#pragma unroll
        for (int i = 0; i < SLOTS; i++) {
            key[i] = order_of(numbers[i]);
            if (NARROW) key[i] = (key[i] & ~kExpertMask) | (kExpertMask - (first + i * step));
        }
    }

    struct Taken {
        int key, expert;  // NARROW: the key has it

        WAVE64_DEVICE Chosen chosen() const {
            if (!NARROW) return {number_of(key), expert};
            return {number_of((key & ~kExpertMask) | ((key >> 31) & kExpertMask)), kExpertMask - (key & kExpertMask)};
        }
    };

    // The largest that was not taken before, and of equals the lowest expert: the same in all lanes.
    WAVE64_DEVICE Taken take() {
        int best = key[0];
#pragma unroll
        for (int i = 1; i < SLOTS; i++) best = key[i] > best ? key[i] : best;
        best = max_over<LANES>(best);
        if (NARROW) {
#pragma unroll
            for (int i = 0; i < SLOTS; i++) key[i] = key[i] == best ? kTaken : key[i];
            return {best, 0};
        }
        int lowest = kTaken;  // the largest ~expert
#pragma unroll
        for (int i = SLOTS - 1; i >= 0; i--) lowest = key[i] == best ? ~(first + i * step) : lowest;
        const int expert = ~(LANES == 0 ? wave_max_of_rare(lowest, kTaken) : max_over<LANES>(lowest));
#pragma unroll
        for (int i = 0; i < SLOTS; i++) key[i] = expert == first + i * step ? kTaken : key[i];
        return {best, expert};
    }
};

// The `count` largest, at most one for each of the lanes: the j-th in lane j. `largest` is the first number of them.
template <bool NARROW, int LANES = 0, int SLOTS>
WAVE64_DEVICE Chosen choose(int count, int first, int step, const float (&numbers)[SLOTS], float& largest) {
    Candidates<SLOTS, NARROW, LANES> candidates(first, step, numbers);
    const int lane = lane_in_block() % (LANES ? LANES : wave_size());
    auto mine = candidates.take();
    largest = mine.chosen().number;
    for (int j = 1; j < count; j++) {
        const auto best = candidates.take();
        if (j == lane) mine = best;
    }
    return mine.chosen();
}

}  // namespace wave64

// The kernels that OP<T, SLOTS>(args) makes for each dtype, and OP<T, SLOTS, LANES>(args) for runs of LANES lanes.
#define WAVE64_GATE_OF(NAME, ARGS, ...) \
    WAVE64_KERNEL(64) NAME(wave64::ARGS args) { wave64::__VA_ARGS__(args); }
#define WAVE64_GATES_OF(OP, DTYPE, T, ARGS)          \
    WAVE64_GATE_OF(OP##_##DTYPE##_2, ARGS, OP<T, 2>) \
    WAVE64_GATE_OF(OP##_##DTYPE##_4, ARGS, OP<T, 4>) \
    WAVE64_GATE_OF(OP##_##DTYPE##_8, ARGS, OP<T, 8>) \
    WAVE64_GATE_OF(OP##_##DTYPE##_16, ARGS, OP<T, 16>)
#define WAVE64_GATES(OP, ARGS)                    \
    WAVE64_GATES_OF(OP, bf16, wave64::bf16, ARGS) \
    WAVE64_GATES_OF(OP, fp16, wave64::fp16, ARGS) \
    WAVE64_GATES_OF(OP, fp32, float, ARGS)

#else
#include "wave64/host.h"

namespace wave64 {

constexpr int kWavesPerUnit = 32;  // enough to fill a compute unit; with more tokens, waves take several

// By dtype and by slots: 2, 4, 8, 16.
using GateKernels = const char* [3][4];
#define WAVE64_GATE_NAMES(OP)                                       \
    {{#OP "_bf16_2", #OP "_bf16_4", #OP "_bf16_8", #OP "_bf16_16"}, \
     {#OP "_fp16_2", #OP "_fp16_4", #OP "_fp16_8", #OP "_fp16_16"}, \
     {#OP "_fp32_2", #OP "_fp32_4", #OP "_fp32_8", #OP "_fp32_16"}}

// The checks that all gates share.
template <typename Args>
void check_gate(const Call& call, const Args& args) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect(args.num_experts >= 1 && args.num_experts <= kMaxSlots * call.device.wave_size, "num_experts",
                "1 to 16 for each lane of a wave", args.num_experts);
}

// A wave for `tokens` tokens.
template <typename Args>
void launch_gate(const Call& call, const char* kernel, int64_t tokens, Args& args) {
    if (args.num_tokens == 0) return;
    call.expect_tensors({{"gating", args.gating}, {"weights", args.weights}, {"ids", args.ids}});
    args.grid =
        int32_t(std::min(ceil_div(args.num_tokens, tokens), int64_t(call.device.compute_units) * kWavesPerUnit));
    call.launch(kernel, {args.grid}, call.device.wave_size, args);
}

// A wave per token; `slots` is at most kMaxSlots.
template <typename Args>
void launch_gate(const Call& call, const GateKernels& kernels, int64_t slots, Args& args) {
    launch_gate(call, kernels[args.dtype][slots > 8 ? 3 : slots > 4 ? 2 : slots > 2 ? 1 : 0], 1, args);
}

}  // namespace wave64
#endif
