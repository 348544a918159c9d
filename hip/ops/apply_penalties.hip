// Presence, frequency and repetition penalties on the logits, in place.
//
// The trick: tokens are counted in LDS. A row's few ids go to a hash table there, and the lane that was first with a
// token changes its logit. Where they are too many for that, several blocks read a row's ids, and each counts those of
// its slice of the vocabulary.
// Bound by latency: of the ids, 8 bytes each, then of the logits that were seen, a sector each, all asked for at once.
#include "wave64/abi.h"

namespace wave64 {
constexpr int kLanes = 1024;
constexpr int kTable = 8192;         // slots of the hash table
constexpr int kFew = 6 * kLanes;     // ids of a row that go there
constexpr int kCountBits = 14;       // of a slot; above them is the token
constexpr int kFewTokens = 1 << 18;  // of a vocabulary whose tokens go there
constexpr int kSlice = 8192;         // tokens whose counts a block holds, where these are too many
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
    // The logit of a token that was seen, `in_output` times in the output.
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
        Pack<int64_t, 1> in_prompt[held], in_output[held];  // a lane's ids, at the same place one or the other
#pragma unroll
        for (int i = 0; i < held; i++) {
            const int at = lane + i * kLanes, behind = at - args.prompt_width;
            in_prompt[i] = prompt.load(at);
            in_output[i] = output.load(behind < 0 ? args.output_width : behind);
        }
        for (int slot = lane; slot < kTable; slot += kLanes) table[slot] = empty;
        block_barrier();

        int slots[held], places[held];
        Pack<T, 1> first[held];
#pragma unroll
        for (int i = 0; i < held; i++) {
            const int at = lane + i * kLanes, behind = at - args.prompt_width;
            const int64_t of_prompt = in_prompt[i].values().at[0], of_output = in_output[i].values().at[0];
            const int64_t id = behind < 0 ? of_prompt : of_output;
            places[i] = vocab;  // past the end nothing is read or written
            if (behind < args.output_width && id >= 0 && id < vocab) {
                const int token = int(id), taken = int(unsigned(token) << kCountBits);
                int slot = int(unsigned(token) * 0x9e3779b1u / (0xffffffffu / kTable + 1)), there;
                while ((there = atomic_swap_if(&table[slot], empty, taken)) != empty &&
                       (there ^ taken) >> kCountBits != 0)
                    slot = (slot + 1) % kTable;
                if (behind >= 0) atomic_add(&table[slot], 1);
                if (there == empty) places[i] = token;
                slots[i] = slot;
            }
            first[i] = logits.load(places[i]);
        }
        block_barrier();
#pragma unroll
        for (int i = 0; i < held; i++) {
            const int in_output = places[i] < vocab ? table[slots[i]] & ((1 << kCountBits) - 1) : 0;
            logits.store(places[i], Pack<T, 1>::of({{T(penalties.of(float(first[i].values().at[0]), in_output))}}));
        }
        block_barrier();  // before the table is cleared
    }
}

constexpr int kHeld = 8;            // ids, or logits, that a lane has under way
constexpr int kInPrompt = 1 << 30;  // the bit of a token of the prompt; below it, times in the output

// Calls count(at) for each of a row's ids that lies in the slice; `at` is its place there.
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
            int counts[kHeld], places[kHeld];
            Pack<T, 1> held[kHeld];
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                const int at = begin + i * kLanes;
                counts[i] = at < slice_size ? seen[at] : 0;
                places[i] = counts[i] ? at : slice_size;  // past the end nothing is read or written
                held[i] = logits.load(places[i]);
                if (counts[i]) seen[at] = 0;  // for the next sequence
            }
#pragma unroll
            for (int i = 0; i < kHeld; i++) {
                const float logit = penalties.of(float(held[i].values().at[0]), counts[i] & (kInPrompt - 1));
                logits.store(places[i], Pack<T, 1>::of({{T(logit)}}));
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
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {
namespace {

struct Kernels {
    const char* many;
    const char* few;
};
constexpr Kernels kKernels[] = {{"apply_penalties_bf16", "apply_penalties_bf16_few"},
                                {"apply_penalties_fp16", "apply_penalties_fp16_few"},
                                {"apply_penalties_fp32", "apply_penalties_fp32_few"}};
constexpr int kMinSlice = 1024;
constexpr int64_t kMaxGrid = 65535;

}  // namespace
}  // namespace wave64

int32_t wave64_apply_penalties(const wave64::ApplyPenaltiesArgs* caller_args, void* stream) {
    using namespace wave64;
    const auto refused = [](const char* argument, const char* expected, int64_t got) {
        return refuse("apply_penalties", argument, expected, got);
    };
    ApplyPenaltiesArgs args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32) return refused("dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_seqs < 0) return refused("num_seqs", "at least 0", args.num_seqs);
    if (args.vocab_size < 0 || args.vocab_size > 1 << 28) return refused("vocab_size", "0 to 2^28", args.vocab_size);
    for (auto [name, width] : {std::pair{"prompt_width", args.prompt_width}, {"output_width", args.output_width}})
        if (width < 0 || width > 1 << 27) return refused(name, "0 to 2^27", width);
    if (args.num_seqs == 0 || args.vocab_size == 0 || args.prompt_width + args.output_width == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"logits", (const void*)args.logits},
                                 {"presence_penalty", args.presence_penalty},
                                 {"frequency_penalty", args.frequency_penalty},
                                 {"repetition_penalty", args.repetition_penalty}})
        if (!pointer) return refused(name, "an address", 0);
    if (args.prompt_width > 0 && !args.prompt_ids) return refused("prompt_ids", "an address", 0);
    if (args.output_width > 0 && !args.output_ids) return refused("output_ids", "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const Kernels& kernels = kKernels[args.dtype];
    args.grid = int32_t(std::min(args.num_seqs, kMaxGrid));
    const uint32_t grid = args.grid;
    if (args.prompt_width + args.output_width <= kFew && args.vocab_size <= kFewTokens)
        return launch({"apply_penalties", kernels.few, {grid, 1, 1}, {kLanes, 1, 1}, 0}, &args, sizeof args, stream);
    // Every slice reads all ids of its row: no more of them than there are compute units for.
    args.slice = kSlice;
    while (args.slice > kMinSlice && args.num_seqs * ceil_div(args.vocab_size, args.slice / 2) <= device->compute_units)
        args.slice /= 2;
    const uint32_t slices = ceil_div(args.vocab_size, args.slice);
    return launch({"apply_penalties", kernels.many, {slices, grid, 1}, {kLanes, 1, 1}, 0}, &args, sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::ApplyPenaltiesArgs, NAME)
static const bool registered = wave64::register_op<wave64::ApplyPenaltiesArgs, wave64_apply_penalties>(
    "apply_penalties", {FIELD(logits), FIELD(prompt_ids), FIELD(output_ids), FIELD(presence_penalty),
                        FIELD(frequency_penalty), FIELD(repetition_penalty), FIELD(logits_stride), FIELD(num_seqs),
                        FIELD(vocab_size), FIELD(prompt_width), FIELD(output_width), FIELD(dtype)});

#endif
