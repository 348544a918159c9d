// Presence, frequency and repetition penalties on the logits, in place.
//
// The trick: tokens are counted in LDS. The ids of a row go to a hash table there, and the lane that was first with a
// token changes its logit. If they do not fit, several blocks read a row's ids, and each counts those in its slice of
// the vocabulary.
// Bound by latency: of the ids, 8 bytes each, then of the logits of the tokens seen, a sector each, all in flight at
// once.
#include "wave64/types.h"

namespace wave64 {

// Lowers the logits of tokens that occur among the ids, in place; ids outside the vocabulary are skipped.
struct ApplyPenaltiesArgs {
    void* logits;                   // [num_seqs, vocab_size]
    const int64_t* prompt_ids;      // [num_seqs, prompt_width]
    const int64_t* output_ids;      // [num_seqs, output_width]
    const float* presence_penalty;  // [num_seqs], as the next two
    const float* frequency_penalty;
    const float* repetition_penalty;
    int64_t logits_stride;
    int64_t num_seqs;
    int32_t vocab_size;
    int32_t prompt_width;
    int32_t output_width;
    Dtype dtype;  // of logits
    // set by the launcher
    int32_t slice;  // tokens of a block, if the ids do not fit the hash table
    int32_t grid;   // blocks from sequence to sequence; the grid's other dimension, if any, goes along the vocabulary
};

constexpr int kLanes = 1024;
constexpr int kTable = 8192;         // slots of the hash table
constexpr int kFew = 6 * kLanes;     // capacity for ids of a row
constexpr int kCountBits = 14;       // of a slot; the token is in the bits above
constexpr int kFewTokens = 1 << 18;  // capacity for tokens of a vocabulary
constexpr int kSlice = 8192;         // tokens that a block counts, if either is exceeded

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

struct Penalties {
    float presence, frequency, repetition;

    WAVE64_DEVICE Penalties(const ApplyPenaltiesArgs& args, int64_t seq)
        : presence(args.presence_penalty[seq]),
          frequency(args.frequency_penalty[seq]),
          repetition(args.repetition_penalty[seq]) {}
    // The penalized logit of a token that was seen, `in_output` times in the output.
    WAVE64_DEVICE float of(float logit, int in_output) const {
        logit = logit > 0 ? logit / repetition : logit * repetition;
        return in_output ? logit - (frequency * float(in_output) + presence) : logit;
    }
};

template <typename T>
WAVE64_DEVICE void apply_penalties_few(const ApplyPenaltiesArgs& args) {
    WAVE64_LDS static int table[kTable];
    constexpr int held = kFew / kLanes, empty = -1;
    static_assert(int64_t(kFewTokens) << kCountBits == int64_t(1) << 32);
    static_assert(kFew < (1 << kCountBits) - 1);  // so that no slot in use looks empty
    const int lane = lane_in_block(), vocab = args.vocab_size;

    for (int64_t seq = block_id(); seq < args.num_seqs; seq += args.grid) {
        const Penalties penalties(args, seq);
        const Row<int64_t, 1> prompt(args.prompt_ids + seq * args.prompt_width, args.prompt_width);
        const Row<int64_t, 1> output(args.output_ids + seq * args.output_width, args.output_width);
        const Row<T, 1> logits(static_cast<T*>(args.logits) + seq * args.logits_stride, vocab);
        Pack<int64_t, 1> in_prompt[held], in_output[held];  // a lane's ids: element i comes from one or the other
#pragma unroll
        for (int i = 0; i < held; i++) {
            const int at = lane + i * kLanes, behind = at - args.prompt_width;
            in_prompt[i] = prompt.load(at);
            in_output[i] = output.load(behind < 0 ? args.output_width : behind);
        }
        for (int slot = lane; slot < kTable; slot += kLanes) table[slot] = empty;
        block_barrier();

        int slots[held], targets[held];
        Pack<T, 1> first[held];
#pragma unroll
        for (int i = 0; i < held; i++) {
            const int at = lane + i * kLanes, behind = at - args.prompt_width;
            const int64_t of_prompt = in_prompt[i].values().at[0], of_output = in_output[i].values().at[0];
            const int64_t id = behind < 0 ? of_prompt : of_output;
            targets[i] = vocab;  // past the end nothing is read or written
            if (behind < args.output_width && id >= 0 && id < vocab) {
                const int token = int(id), taken = int(unsigned(token) << kCountBits);
                int slot = int(unsigned(token) * 0x9e3779b1u / (0xffffffffu / kTable + 1)), there;
                while ((there = atomic_swap_if(&table[slot], empty, taken)) != empty &&
                       (there ^ taken) >> kCountBits != 0)
                    slot = (slot + 1) % kTable;
                if (behind >= 0) atomic_add(&table[slot], 1);
                if (there == empty) targets[i] = token;
                slots[i] = slot;
            }
            first[i] = logits.load(targets[i]);
        }
        block_barrier();
#pragma unroll
        for (int i = 0; i < held; i++) {
            const int in_output = targets[i] < vocab ? table[slots[i]] & ((1 << kCountBits) - 1) : 0;
            logits.store(targets[i], Pack<T, 1>::of({{T(penalties.of(float(first[i].values().at[0]), in_output))}}));
        }
        block_barrier();  // before the table is cleared
    }
}

constexpr int kHeld = 8;            // ids, or logits, that a lane has in flight
constexpr int kInPrompt = 1 << 30;  // set for a token of the prompt; the bits below count it in the output

// Calls count(at) for each of a row's ids in the slice; `at` is its offset there.
template <typename Count>
WAVE64_DEVICE void for_each_in_slice(const int64_t* ids, int width, int slice_begin, int slice_size, Count count) {
    const Row<int64_t, 1> row(ids, width);
    for (int begin = lane_in_block(); begin < width; begin += kHeld * kLanes) {
        Pack<int64_t, 1> held[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++) held[i] = row.load(begin + i * kLanes);
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const uint64_t at = uint64_t(held[i].values().at[0] - slice_begin);
            if (begin + i * kLanes < width && at < uint64_t(slice_size)) count(int(at));
        }
    }
}

template <typename T>
WAVE64_DEVICE void apply_penalties(const ApplyPenaltiesArgs& args) {
    WAVE64_LDS static int seen[kSlice];
    const int slice_begin = block_id() * args.slice, vocab = args.vocab_size;
    const int slice_size = vocab - slice_begin < args.slice ? vocab - slice_begin : args.slice;
    for (int at = lane_in_block(); at < slice_size; at += kLanes) seen[at] = 0;

    for (int64_t seq = block_id_y(); seq < args.num_seqs; seq += args.grid) {
        const Penalties penalties(args, seq);
        block_barrier();
        for_each_in_slice(args.prompt_ids + seq * args.prompt_width, args.prompt_width, slice_begin, slice_size,
                          [&](int at) { seen[at] = kInPrompt; });
        block_barrier();
        for_each_in_slice(args.output_ids + seq * args.output_width, args.output_width, slice_begin, slice_size,
                          [&](int at) { atomic_add(&seen[at], 1); });
        block_barrier();

        const Row<T, 1> logits(static_cast<T*>(args.logits) + seq * args.logits_stride + slice_begin, slice_size);
        for (int begin = lane_in_block(); begin < slice_size; begin += kHeld * kLanes) {
            int counts[kHeld], targets[kHeld];
            Pack<T, 1> held[kHeld];
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                const int at = begin + i * kLanes;
                counts[i] = at < slice_size ? seen[at] : 0;
                targets[i] = counts[i] ? at : slice_size;  // past the end nothing is read or written
                held[i] = logits.load(targets[i]);
                if (counts[i]) seen[at] = 0;  // for the next sequence
            }
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                const float logit = penalties.of(float(held[i].values().at[0]), counts[i] & (kInPrompt - 1));
                logits.store(targets[i], Pack<T, 1>::of({{T(logit)}}));
            }
        }
    }
}

}  // namespace wave64

#define APPLY_PENALTIES(NAME, T)                                                                              \
    WAVE64_KERNEL(wave64::kLanes) NAME(wave64::ApplyPenaltiesArgs args) { wave64::apply_penalties<T>(args); } \
    WAVE64_KERNEL(wave64::kLanes) NAME##_few(wave64::ApplyPenaltiesArgs args) { wave64::apply_penalties_few<T>(args); }

APPLY_PENALTIES(apply_penalties_bf16, wave64::bf16)
APPLY_PENALTIES(apply_penalties_fp16, wave64::fp16)
APPLY_PENALTIES(apply_penalties_fp32, float)

#else
#include "wave64/host.h"

namespace wave64 {
namespace {

struct Kernels {
    const char *many, *few;
};
constexpr Kernels kKernels[] = {{"apply_penalties_bf16", "apply_penalties_bf16_few"},
                                {"apply_penalties_fp16", "apply_penalties_fp16_few"},
                                {"apply_penalties_fp32", "apply_penalties_fp32_few"}};
constexpr int kMinSlice = 1024;

void apply_penalties(ApplyPenaltiesArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_seqs", args.num_seqs, 0);
    call.expect_range("vocab_size", args.vocab_size, 0, 1 << 28);
    call.expect_range("prompt_width", args.prompt_width, 0, 1 << 27);
    call.expect_range("output_width", args.output_width, 0, 1 << 27);
    const int width = args.prompt_width + args.output_width;
    if (args.num_seqs == 0 || args.vocab_size == 0 || width == 0) return;
    call.expect_tensors({{"logits", args.logits},
                         {"presence_penalty", args.presence_penalty},
                         {"frequency_penalty", args.frequency_penalty},
                         {"repetition_penalty", args.repetition_penalty}});
    if (args.prompt_width) call.expect_tensors({{"prompt_ids", args.prompt_ids}});
    if (args.output_width) call.expect_tensors({{"output_ids", args.output_ids}});

    args.grid = int32_t(std::min(args.num_seqs, kMaxGridY));
    if (width <= kFew && args.vocab_size <= kFewTokens)
        return call.launch(kKernels[args.dtype].few, {args.grid}, kLanes, args);
    // Each slice reads all ids of its row: not more slices than compute units.
    args.slice = kSlice;
    while (args.slice > kMinSlice &&
           args.num_seqs * ceil_div(args.vocab_size, args.slice / 2) <= call.device.compute_units)
        args.slice /= 2;
    call.launch(kKernels[args.dtype].many, {ceil_div(args.vocab_size, args.slice), args.grid}, kLanes, args);
}

WAVE64_OP(apply_penalties, ApplyPenaltiesArgs, logits, prompt_ids, output_ids, presence_penalty, frequency_penalty,
          repetition_penalty, logits_stride, num_seqs, vocab_size, prompt_width, output_width, dtype)

}  // namespace
}  // namespace wave64
#endif
