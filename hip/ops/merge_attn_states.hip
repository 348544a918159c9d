// Merge of two attention states: out = (e^lse_a a + e^lse_b b) / (e^lse_a + e^lse_b), lse its logarithm.
//
// The trick: both sides are loaded without waiting for their lse, and a side that saw no key is dropped in registers,
// so that all loads of a lane are in flight at once. Bound by memory: two rows in, one out, 16 bytes per lane and
// access, four loads in flight.
#include "wave64/rows.h"

namespace wave64 {

// out = (e^lse_a a + e^lse_b b) / (e^lse_a + e^lse_b), lse = log(e^lse_a + e^lse_b). A side whose lse is -inf or +inf
// is absent: its values are ignored.
struct MergeAttnStatesArgs {
    const void* a;       // [num_tokens, num_heads, head_dim]
    const float* lse_a;  // [num_tokens, num_heads]
    const void* b;       // as a
    const float* lse_b;
    void* out;   // [num_tokens, num_heads, head_dim], contiguous
    float* lse;  // [num_tokens, num_heads], contiguous
    int64_t a_stride;
    int64_t a_head_stride;
    int64_t lse_a_stride;
    int64_t lse_a_head_stride;
    int64_t b_stride;
    int64_t b_head_stride;
    int64_t lse_b_stride;
    int64_t lse_b_head_stride;
    int64_t num_tokens;
    int32_t num_heads;
    int32_t head_dim;
    Dtype dtype;  // of a, b and out
    // set by the launcher
    IntDivider by_heads;
    RowPartition partition;
    int64_t num_rows;  // num_tokens * num_heads
};

constexpr int kMergedRows = 2;  // that a lane holds

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

WAVE64_DEVICE float absent() { return -__builtin_huge_valf(); }

// Other libraries write +inf where no key was seen.
WAVE64_DEVICE float seen(float lse) { return lse == -absent() ? absent() : lse; }

// The weights of the sides, and the lse of both. If neither saw a key: 0, 0 and -inf.
struct Weights {
    float a, b, lse;

    WAVE64_DEVICE Weights(float lse_a, float lse_b) {
        const float lse_max = max(lse_a, lse_b), base = lse_max == absent() ? 0 : lse_max;
        a = exp2((lse_a - base) * kLog2E), b = exp2((lse_b - base) * kLog2E);
        const float sum = a + b, divisor = sum == 0 ? 1 : sum, inverse = reciprocal(divisor);
        a *= inverse, b *= inverse, lse = lse_max + log2(divisor) * kLn2;
    }
};

template <typename T, int N>
WAVE64_DEVICE Pack<T, N> merged(const Pack<T, N>& a, const Pack<T, N>& b, const Weights& weights) {
    const auto values = a.values(), others = b.values();
    float sum[N];
    for (int i = 0; i < N; i++) sum[i] = float(values.at[i]) * weights.a + float(others.at[i]) * weights.b;
    return Pack<T, N>::rounded(sum);
}

// Where a token's head begins. A product of 32-bit factors takes one instruction, of 64-bit ones four.
WAVE64_DEVICE uint64_t offset_of(uint32_t token, int64_t stride, uint32_t head, int64_t head_stride) {
    return uint64_t(token) * uint32_t(stride) + uint64_t(head) * uint32_t(head_stride);
}

// A row is a token's head.
template <typename T, int N>
WAVE64_DEVICE void merge_attn_states(const MergeAttnStatesArgs& args) {
    const LaneRows rows = lane_rows(args.partition);
    const int column = rows.pack * N;
    const bool some = column < args.head_dim;  // a head without columns still has an lse
    for (int64_t first = rows.first; first < args.num_rows; first += kMergedRows * rows.step) {
        float lse_a[kMergedRows], lse_b[kMergedRows];
        Pack<T, N> a[kMergedRows], b[kMergedRows];
#pragma unroll
        for (int i = 0; i < kMergedRows; i++) {
            const int64_t row = first + i * rows.step;
            if (row >= args.num_rows) break;
            const uint32_t token = uint32_t(row) / args.by_heads, head = uint32_t(row) - token * args.num_heads;
            lse_a[i] = args.lse_a[offset_of(token, args.lse_a_stride, head, args.lse_a_head_stride)];
            lse_b[i] = args.lse_b[offset_of(token, args.lse_b_stride, head, args.lse_b_head_stride)];
            if (!some) continue;
            a[i] = load_pack<T, N>(static_cast<const T*>(args.a) + column +
                                   offset_of(token, args.a_stride, head, args.a_head_stride));
            b[i] = load_pack<T, N>(static_cast<const T*>(args.b) + column +
                                   offset_of(token, args.b_stride, head, args.b_head_stride));
        }
#pragma unroll
        for (int i = 0; i < kMergedRows; i++) {
            const int64_t row = first + i * rows.step;
            if (row >= args.num_rows) break;
            const float seen_a = seen(lse_a[i]), seen_b = seen(lse_b[i]);
            const Weights weights(seen_a, seen_b);
            if (seen_a == absent()) a[i].bits = {};  // 0 times the values of an absent side could be NaN
            if (seen_b == absent()) b[i].bits = {};
            if (some)
                store_pack(static_cast<T*>(args.out) + offset_of(uint32_t(row), args.head_dim, 0, 0) + column,
                           merged(a[i], b[i], weights));
            if (column == 0) args.lse[row] = weights.lse;
        }
    }
}

}  // namespace wave64

WAVE64_KERNELS(merge_attn_states, 512, MergeAttnStatesArgs)

#else
namespace wave64 {
namespace {

constexpr KernelPairs kKernels = WAVE64_KERNEL_PAIRS(merge_attn_states);

void merge_attn_states(MergeAttnStatesArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_min("num_heads", args.num_heads, 0);
    call.expect_range("head_dim", args.head_dim, 0, 1 << 28);
    if (args.num_tokens == 0 || args.num_heads == 0) return;
    call.expect(args.num_tokens <= (int64_t(1) << 31) / args.num_heads, "num_tokens", "at most 2^31 heads in all",
                args.num_tokens);
    args.num_rows = args.num_tokens * args.num_heads, args.by_heads = divider(args.num_heads);
    for (auto [field, stride] : {std::pair{"a_stride", args.a_stride},
                                 {"a_head_stride", args.a_head_stride},
                                 {"b_stride", args.b_stride},
                                 {"b_head_stride", args.b_head_stride},
                                 {"lse_a_stride", args.lse_a_stride},
                                 {"lse_a_head_stride", args.lse_a_head_stride},
                                 {"lse_b_stride", args.lse_b_stride},
                                 {"lse_b_head_stride", args.lse_b_head_stride}})
        call.expect_range(field, stride, 0, UINT32_MAX);
    call.expect_tensors({{"lse_a", args.lse_a}, {"lse_b", args.lse_b}, {"lse", args.lse}});
    if (args.head_dim) call.expect_tensors({{"a", args.a}, {"b", args.b}, {"out", args.out}});

    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned = is_16_aligned({args.a, args.b, args.out},
                                       {args.a_stride * bytes, args.a_head_stride * bytes, args.b_stride * bytes,
                                        args.b_head_stride * bytes, args.head_dim * bytes});
    const int64_t packs = std::max<int64_t>(1, aligned ? args.head_dim * bytes / 16 : args.head_dim);
    launch_over_rows(call, kKernels[args.dtype].of(aligned), args.num_rows, packs, kMergedRows, args);
}

WAVE64_OP(merge_attn_states, MergeAttnStatesArgs, a, lse_a, b, lse_b, out, lse, a_stride, a_head_stride, lse_a_stride,
          lse_a_head_stride, b_stride, b_head_stride, lse_b_stride, lse_b_head_stride, num_tokens, num_heads, head_dim,
          dtype)

}  // namespace
}  // namespace wave64
#endif
