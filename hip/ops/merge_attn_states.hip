// Merge of two attention states: out = (e^lse_a a + e^lse_b b) / (e^lse_a + e^lse_b), lse its logarithm.
//
// The trick: both sides are loaded without waiting for their logarithms, and a side that saw no key is dropped in
// registers, so that a lane's loads are all under way at once.
// Bound by memory: two rows in, one out, 16 bytes per lane and access, four loads under way.
#include "wave64/rows.h"

namespace wave64 {
constexpr int kMergedRows = 2;  // that a lane holds
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

WAVE64_DEVICE float absent() { return -__builtin_huge_valf(); }

// Other libraries write +inf where no key was seen.
WAVE64_DEVICE float seen(float lse) { return lse == -absent() ? absent() : lse; }

// What the sides count for, and the logarithm of both. Where neither saw a key, nothing and -inf.
struct Weights {
    float a, b, lse;

    WAVE64_DEVICE Weights(float lse_a, float lse_b) {
        const float peak = max(lse_a, lse_b), base = peak == absent() ? 0 : peak;
        a = exp2((lse_a - base) * kLog2E), b = exp2((lse_b - base) * kLog2E);
        const float sum = a + b, total = sum == 0 ? 1 : sum, share = reciprocal(total);
        a *= share, b *= share, lse = peak + log2(total) * kLn2;
    }
};

template <typename T, int N>
WAVE64_DEVICE Pack<T, N> merged(const Pack<T, N>& a, const Pack<T, N>& b, const Weights& weights) {
    const auto values = a.values(), others = b.values();
    float mixed[N];
    for (int i = 0; i < N; i++) mixed[i] = float(values.at[i]) * weights.a + float(others.at[i]) * weights.b;
    return Pack<T, N>::rounded(mixed);
}

// Where a token's head begins. Factors of 32 bits take one instruction, those of 64 four.
WAVE64_DEVICE uint64_t place(uint32_t token, int64_t stride, uint32_t head, int64_t head_stride) {
    return uint64_t(token) * uint32_t(stride) + uint64_t(head) * uint32_t(head_stride);
}

// A row is a token's head.
template <typename T, int N>
WAVE64_DEVICE void merge_attn_states(const MergeAttnStatesArgs& args) {
    const RowShare share = row_share(args.shares);
    const int column = share.pack * N;
    const bool some = column < args.head_dim;  // heads of no columns still have a logarithm
    for (int64_t first = share.first; first < args.num_rows; first += kMergedRows * share.step) {
        float lse_a[kMergedRows], lse_b[kMergedRows];
        Pack<T, N> a[kMergedRows], b[kMergedRows];
#pragma unroll
        for (int i = 0; i < kMergedRows; i++) {
            const int64_t row = first + i * share.step;
            if (row >= args.num_rows) break;
            const uint32_t token = uint32_t(row) / args.by_heads, head = uint32_t(row) - token * args.num_heads;
            lse_a[i] = args.lse_a[place(token, args.lse_a_stride, head, args.lse_a_head_stride)];
            lse_b[i] = args.lse_b[place(token, args.lse_b_stride, head, args.lse_b_head_stride)];
            if (!some) continue;
            a[i] = load_pack<T, N>(static_cast<const T*>(args.a) + column +
                                   place(token, args.a_stride, head, args.a_head_stride));
            b[i] = load_pack<T, N>(static_cast<const T*>(args.b) + column +
                                   place(token, args.b_stride, head, args.b_head_stride));
        }
#pragma unroll
        for (int i = 0; i < kMergedRows; i++) {
            const int64_t row = first + i * share.step;
            if (row >= args.num_rows) break;
            const float seen_a = seen(lse_a[i]), seen_b = seen(lse_b[i]);
            const Weights weights(seen_a, seen_b);
            if (seen_a == absent()) a[i].bits = {};  // 0 times what an absent side holds could be NaN
            if (seen_b == absent()) b[i].bits = {};
            if (some)
                store_pack(static_cast<T*>(args.out) + place(uint32_t(row), args.head_dim, 0, 0) + column,
                           merged(a[i], b[i], weights));
            if (column == 0) args.lse[row] = weights.lse;
        }
    }
}

}  // namespace wave64

#define MERGE_ATTN_STATES(NAME, T, N) \
    WAVE64_KERNEL(512) NAME(wave64::MergeAttnStatesArgs args) { wave64::merge_attn_states<T, N>(args); }

MERGE_ATTN_STATES(merge_attn_states_bf16, wave64::bf16, 8)
MERGE_ATTN_STATES(merge_attn_states_fp16, wave64::fp16, 8)
MERGE_ATTN_STATES(merge_attn_states_fp32, float, 4)
MERGE_ATTN_STATES(merge_attn_states_bf16_unaligned, wave64::bf16, 1)
MERGE_ATTN_STATES(merge_attn_states_fp16_unaligned, wave64::fp16, 1)
MERGE_ATTN_STATES(merge_attn_states_fp32_unaligned, float, 1)

#else
namespace wave64 {
namespace {

struct Kernels {
    int element_bytes;
    const char* aligned;
    const char* unaligned;
};
constexpr Kernels kKernels[] = {{2, "merge_attn_states_bf16", "merge_attn_states_bf16_unaligned"},
                                {2, "merge_attn_states_fp16", "merge_attn_states_fp16_unaligned"},
                                {4, "merge_attn_states_fp32", "merge_attn_states_fp32_unaligned"}};

}  // namespace
}  // namespace wave64

int32_t wave64_merge_attn_states(const wave64::MergeAttnStatesArgs* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "merge_attn_states";
    MergeAttnStatesArgs args = *caller_args;
    if (args.dtype < kBf16 || args.dtype > kFp32)
        return refuse(op, "dtype", "0 (bf16), 1 (fp16) or 2 (fp32)", args.dtype);
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.num_heads < 0) return refuse(op, "num_heads", "at least 0", args.num_heads);
    if (args.head_dim < 0 || args.head_dim > 1 << 28) return refuse(op, "head_dim", "0 to 2^28", args.head_dim);
    if (args.num_tokens == 0 || args.num_heads == 0) return kOk;
    if (args.num_tokens > (int64_t(1) << 31) / args.num_heads)
        return refuse(op, "num_tokens", "at most 2^31 heads in all", args.num_tokens);
    args.num_rows = args.num_tokens * args.num_heads, args.by_heads = divider(args.num_heads);
    for (auto [name, stride] : {std::pair{"a_stride", args.a_stride}, {"a_head_stride", args.a_head_stride},
                                {"b_stride", args.b_stride}, {"b_head_stride", args.b_head_stride},
                                {"lse_a_stride", args.lse_a_stride}, {"lse_a_head_stride", args.lse_a_head_stride},
                                {"lse_b_stride", args.lse_b_stride}, {"lse_b_head_stride", args.lse_b_head_stride}})
        if (stride < 0 || stride >= int64_t(1) << 32) return refuse(op, name, "0 to 2^32 - 1", stride);
    for (auto [name, pointer] : {std::pair{"lse_a", args.lse_a}, {"lse_b", args.lse_b}, {"lse", args.lse}})
        if (!pointer) return refuse(op, name, "an address", 0);
    for (auto [name, pointer] : {std::pair{"a", args.a}, {"b", args.b}, {"out", (const void*)args.out}})
        if (!pointer && args.head_dim) return refuse(op, name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const auto& [bytes, aligned_kernel, unaligned_kernel] = kKernels[args.dtype];
    const bool aligned = is_16_aligned({args.a, args.b, args.out},
                                       {args.a_stride * bytes, args.a_head_stride * bytes, args.b_stride * bytes,
                                        args.b_head_stride * bytes, int64_t(args.head_dim) * bytes});
    const int64_t packs = std::max<int64_t>(1, aligned ? args.head_dim * bytes / 16 : args.head_dim);
    const Launch over_heads = over_rows(op, aligned ? aligned_kernel : unaligned_kernel, args.num_rows, packs,
                                        kMergedRows, *device, args.shares);
    return launch(over_heads, &args, sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::MergeAttnStatesArgs, NAME)
static const bool registered = wave64::register_op<wave64::MergeAttnStatesArgs, wave64_merge_attn_states>(
    "merge_attn_states",
    {FIELD(a), FIELD(lse_a), FIELD(b), FIELD(lse_b), FIELD(out), FIELD(lse), FIELD(a_stride), FIELD(a_head_stride),
     FIELD(lse_a_stride), FIELD(lse_a_head_stride), FIELD(b_stride), FIELD(b_head_stride), FIELD(lse_b_stride),
     FIELD(lse_b_head_stride), FIELD(num_tokens), FIELD(num_heads), FIELD(head_dim), FIELD(dtype)});

#endif
