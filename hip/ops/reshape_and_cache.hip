// Writes new keys and values into the paged KV cache: cache[slot_mapping[t]] = new[t], converted where it is FP8.
//
// The trick, and what bounds it, is in cache_write.h.
#include "wave64/cache_write.h"

namespace wave64 {

// cache[slot] = new, for a token's keys and values, each in a cache of its own. In FP8 caches, new / scale.
struct ReshapeAndCacheArgs {
    const void* key;    // [num_tokens, num_heads, head_dim]
    const void* value;  // as key
    void* key_cache;    // [slots, num_heads, head_dim], contiguous
    void* value_cache;
    const int64_t* slot_mapping;  // [num_tokens]; -1: not written
    const float* k_scale;         // that of a head at head * scale_stride; null: 1
    const float* v_scale;
    int64_t key_stride;
    int64_t key_head_stride;
    int64_t value_stride;
    int64_t value_head_stride;
    int64_t num_tokens;
    int32_t num_heads;
    int32_t head_dim;
    int32_t scale_stride;  // of k_scale and v_scale: 1, or 0 for one number
    Dtype dtype;           // of key and value
    Dtype cache_dtype;     // dtype, or FP8
    // set by the launcher
    RowPartition partition;
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <typename In, typename Out, int N>
WAVE64_DEVICE void reshape_and_cache(const ReshapeAndCacheArgs& args) {
    const int row = args.num_heads * args.head_dim;
    const CachePart<In, Out> keys{static_cast<const In*>(args.key),
                                  args.key_stride,
                                  args.key_head_stride,
                                  args.head_dim,
                                  static_cast<Out*>(args.key_cache),
                                  row,
                                  args.k_scale,
                                  args.scale_stride};
    const CachePart<In, Out> values{static_cast<const In*>(args.value),
                                    args.value_stride,
                                    args.value_head_stride,
                                    args.head_dim,
                                    static_cast<Out*>(args.value_cache),
                                    row,
                                    args.v_scale,
                                    args.scale_stride};
    write_cache<N>(args.partition, args.num_tokens, args.slot_mapping, row / N, keys, values);
}

}  // namespace wave64

WAVE64_CACHE_WRITE(reshape_and_cache, ReshapeAndCacheArgs)

#else
namespace wave64 {
namespace {

constexpr CacheKernels kKernels[] = WAVE64_CACHE_KERNELS(reshape_and_cache);

void reshape_and_cache(ReshapeAndCacheArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_cache_dtype(args.cache_dtype, args.dtype);
    call.expect_range("scale_stride", args.scale_stride, 0, 1);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_min("num_heads", args.num_heads, 0);
    call.expect_min("head_dim", args.head_dim, 0);
    const int64_t row = int64_t(args.num_heads) * args.head_dim;
    call.expect_range("num_heads * head_dim", row, 0, 1 << 28);
    if (args.num_tokens == 0 || row == 0) return;
    call.expect_tensors({{"key", args.key},
                         {"value", args.value},
                         {"key_cache", args.key_cache},
                         {"value_cache", args.value_cache},
                         {"slot_mapping", args.slot_mapping}});

    const bool dense = args.key_head_stride == args.head_dim && args.value_head_stride == args.head_dim;
    if (dense && args.scale_stride == 0) {  // one wide head
        args.head_dim = int32_t(row);
        args.num_heads = 1;
        args.key_head_stride = args.value_head_stride = 0;
    }
    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned =
        is_16_aligned({args.key, args.value, args.key_cache, args.value_cache},
                      {args.key_stride * bytes, args.key_head_stride * bytes, args.value_stride * bytes,
                       args.value_head_stride * bytes, args.head_dim * bytes});
    launch_cache_write(call, kKernels, aligned, 2 * row, args);
}

WAVE64_OP(reshape_and_cache, ReshapeAndCacheArgs, key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale,
          key_stride, key_head_stride, value_stride, value_head_stride, num_tokens, num_heads, head_dim,
          scale_stride, dtype, cache_dtype)

}  // namespace
}  // namespace wave64
#endif
