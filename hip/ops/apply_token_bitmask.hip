// Keeps the tokens that a grammar allows: logits whose bit is 0 become -inf, in place.
//
// The trick: logits are decided on by packs of 16 bytes. One without a forbidden token is left alone, one without an
// allowed token is written, only a mixed one is read before. Packs begin where 16 divides the address, which need not
// be where the row begins: what of its first and last pack is not the row's counts as allowed and is not touched.
// Bound by memory: a bit per token in, the forbidden logits out.
#include "wave64/abi.h"

namespace wave64 {
constexpr int kMaxLanes = 256;
constexpr int kHeld = 4;  // packs of a lane
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

// A bit for each of the N tokens from `token` on that is of the row and forbidden. The bits of a pack lie in one word,
// or, where the row begins `lead` tokens within a pack, in two.
template <int N>
WAVE64_DEVICE unsigned forbidden_from(const Row<Bits32, 1>& words, int num_words, int token, int vocab, int lead) {
    constexpr unsigned all = (1u << N) - 1;
    const int word = token >> 5, shift = token & 31;
    unsigned forbidden;
    if (lead == 0) {
        forbidden = ~words.load(word).bits >> shift & all;
    } else {
        const Bits32 low = words.load(word < 0 ? num_words : word).bits, high = words.load(word + 1).bits;
        forbidden = ~unsigned((uint64_t(high) << 32 | low) >> shift) & (token < 0 ? all << -token : all);
    }
    if (token + N > vocab) forbidden &= token < vocab ? all >> (token + N - vocab) : 0;
    return forbidden;
}

// ALIGNED: all rows begin with a pack.
template <typename T, int N, bool ALIGNED>
WAVE64_DEVICE void apply_token_bitmask(const ApplyTokenBitmaskArgs& args) {
    constexpr unsigned all = (1u << N) - 1;
    const T never = T(-__builtin_inff());
    const int first = block_id() * args.block * kHeld + lane_in_block();
    const int vocab = args.vocab_size, num_words = (vocab + 31) / 32;

    for (int64_t seq = block_id_y(); seq < args.num_seqs; seq += args.grid) {
        T* const logits = static_cast<T*>(args.logits) + seq * args.logits_stride;
        const int lead = ALIGNED ? 0 : int(reinterpret_cast<uint64_t>(logits) / sizeof(T) % N);
        const int num_packs = (lead + vocab + N - 1) / N;
        const Row<T, N> row(logits - lead, num_packs);
        const Row<Bits32, 1> words(args.bitmask + seq * args.bitmask_stride, num_words);

        unsigned forbidden[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++)
            forbidden[i] = forbidden_from<N>(words, num_words, (first + i * args.block) * N - lead, vocab, lead);
        // A pack that shares its 16 bytes with what is not the row's is written token by token. Of the others, those to
        // be left alone are read from and written to past the end: nowhere.
        bool whole[kHeld];
        Pack<T, N> packs[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int pack = first + i * args.block, token = pack * N - lead;
            whole[i] = token >= 0 && token + N <= vocab;
            packs[i] = row.load(whole[i] && forbidden[i] && forbidden[i] != all ? pack : num_packs);
        }
#pragma unroll
        for (int i = 0; i < kHeld; i++) {
            const int pack = first + i * args.block, token = pack * N - lead;
            auto values = packs[i].values();
            for (int j = 0; j < N; j++)
                if (forbidden[i] >> j & 1) values.at[j] = never;
            row.store(whole[i] && forbidden[i] ? pack : num_packs, Pack<T, N>::of(values));
            if (!whole[i] && forbidden[i]) {
                for (int j = 0; j < N; j++)
                    if (forbidden[i] >> j & 1) logits[token + j] = never;
            }
        }
    }
}

}  // namespace wave64

#define APPLY_TOKEN_BITMASK(NAME, T, N)                                                     \
    WAVE64_KERNEL(wave64::kMaxLanes) NAME(wave64::ApplyTokenBitmaskArgs args) {             \
        wave64::apply_token_bitmask<T, N, true>(args);                                      \
    }                                                                                       \
    WAVE64_KERNEL(wave64::kMaxLanes) NAME##_unaligned(wave64::ApplyTokenBitmaskArgs args) { \
        wave64::apply_token_bitmask<T, N, false>(args);                                     \
    }

APPLY_TOKEN_BITMASK(apply_token_bitmask_bf16, wave64::bf16, 8)
APPLY_TOKEN_BITMASK(apply_token_bitmask_fp16, wave64::fp16, 8)
APPLY_TOKEN_BITMASK(apply_token_bitmask_fp32, float, 4)

#else
#include <algorithm>

#include "wave64/host.h"

namespace wave64 {
namespace {

struct Kernels {
    int64_t element_bytes;
    const char* aligned;
    const char* unaligned;
};
constexpr Kernels kKernels[] = {{2, "apply_token_bitmask_bf16", "apply_token_bitmask_bf16_unaligned"},
                                {2, "apply_token_bitmask_fp16", "apply_token_bitmask_fp16_unaligned"},
                                {4, "apply_token_bitmask_fp32", "apply_token_bitmask_fp32_unaligned"}};
constexpr int64_t kMaxGrid = 65535;

}  // namespace
}  // namespace wave64

int32_t wave64_apply_token_bitmask(const wave64::ApplyTokenBitmaskArgs* caller_args, void* stream) {
    using namespace wave64;
    const auto refused = [](const char* argument, const char* expected, int64_t got) {
        return refuse("apply_token_bitmask", argument, expected, got);
    };
    ApplyTokenBitmaskArgs args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32) return refused("dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_seqs < 0) return refused("num_seqs", "at least 0", args.num_seqs);
    if (args.vocab_size < 0 || args.vocab_size > 1 << 28) return refused("vocab_size", "0 to 2^28", args.vocab_size);
    if (args.num_seqs == 0 || args.vocab_size == 0) return kOk;
    if (!args.logits) return refused("logits", "an address", 0);
    if (!args.bitmask) return refused("bitmask", "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const Kernels& kernels = kKernels[args.dtype];
    const bool aligned = is_16_aligned({args.logits}, {args.logits_stride * kernels.element_bytes});
    const int64_t packs = ceil_div(args.vocab_size * kernels.element_bytes, 16) + !aligned;
    args.block = kMaxLanes;
    while (args.block > device->wave_size &&
           args.num_seqs * ceil_div(packs, args.block * kHeld) < device->compute_units)
        args.block /= 2;
    args.grid = int32_t(std::min(args.num_seqs, kMaxGrid));

    const uint32_t pieces = ceil_div(packs, args.block * kHeld), grid = args.grid, block = args.block;
    return launch(
        {"apply_token_bitmask", aligned ? kernels.aligned : kernels.unaligned, {pieces, grid, 1}, {block, 1, 1}, 0},
        &args, sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::ApplyTokenBitmaskArgs, NAME)
static const bool registered = wave64::register_op<wave64::ApplyTokenBitmaskArgs, wave64_apply_token_bitmask>(
    "apply_token_bitmask", {FIELD(logits), FIELD(bitmask), FIELD(logits_stride), FIELD(bitmask_stride), FIELD(num_seqs),
                            FIELD(vocab_size), FIELD(dtype)});

#endif
