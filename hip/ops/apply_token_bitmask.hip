// Keeps the tokens that a grammar allows: logits whose bit is 0 become -inf, in place.
//
// The trick: logits are handled in packs of 16 bytes. A pack without a forbidden token is left alone, one without an
// allowed token is written without being read. Packs begin where 16 divides the address, so the first and last pack of
// a row may reach into its neighbors: tokens outside the row count as allowed and are not touched. Bound by memory: a
// bit per token in, the forbidden logits out.
#include "wave64/types.h"

namespace wave64 {

// Logits of tokens whose bit is 0 become -inf: the bit of token i is bit i % 32 of word i / 32.
struct ApplyTokenBitmaskArgs {
    void* logits;             // [num_seqs, vocab_size]
    const uint32_t* bitmask;  // [num_seqs, ceil(vocab_size / 32)]
    int64_t logits_stride;
    int64_t bitmask_stride;
    int64_t num_seqs;
    int32_t vocab_size;
    Dtype dtype;  // of logits
    // set by the launcher
    int32_t block;  // lanes of a block
    int32_t grid;   // blocks from sequence to sequence; the grid's other dimension goes along the vocabulary
};

constexpr int kMaxLanes = 256;
constexpr int kHeld = 4;  // packs of a lane

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
#include "wave64/device.h"

namespace wave64 {

// A bit for each of the N tokens from `token` on: set if the row has the token and it is forbidden. The bits of a pack
// lie in one word or, if the row begins `lead` tokens into a pack, in two.
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
        // A pack that reaches out of the row is written token by token. Packs to be left alone are read from and
        // written to past the end: nowhere.
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
#include "wave64/host.h"

namespace wave64 {
namespace {

constexpr KernelPairs kKernels = WAVE64_KERNEL_PAIRS(apply_token_bitmask);

void apply_token_bitmask(ApplyTokenBitmaskArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_seqs", args.num_seqs, 0);
    call.expect_range("vocab_size", args.vocab_size, 0, 1 << 28);
    if (args.num_seqs == 0 || args.vocab_size == 0) return;
    call.expect_tensors({{"logits", args.logits}, {"bitmask", args.bitmask}});

    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned = is_16_aligned({args.logits}, {args.logits_stride * bytes});
    const int64_t packs = ceil_div(args.vocab_size * bytes, 16) + !aligned;
    args.block = kMaxLanes;
    while (args.block > call.device.wave_size &&
           args.num_seqs * ceil_div(packs, args.block * kHeld) < call.device.compute_units)
        args.block /= 2;
    args.grid = int32_t(std::min(args.num_seqs, kMaxGridY));
    call.launch(kKernels[args.dtype].of(aligned), {ceil_div(packs, args.block * kHeld), args.grid}, args.block, args);
}

WAVE64_OP(apply_token_bitmask, ApplyTokenBitmaskArgs, logits, bitmask, logits_stride, bitmask_stride, num_seqs,
          vocab_size, dtype)

}  // namespace
}  // namespace wave64
#endif
