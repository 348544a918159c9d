// Writes new keys and values into the paged KV cache: cache[slot_mapping[t]] = new[t], converted where it is FP8.
//
// How, and what bounds it, is in cache_write.h.
#include "wave64/cache_write.h"

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
                                  args.k_scale};
    const CachePart<In, Out> values{static_cast<const In*>(args.value),
                                    args.value_stride,
                                    args.value_head_stride,
                                    args.head_dim,
                                    static_cast<Out*>(args.value_cache),
                                    row,
                                    args.v_scale};
    write_cache<N>(args.shares, args.num_tokens, args.slot_mapping, row / N, keys, values);
}

}  // namespace wave64

WAVE64_CACHE_WRITE(reshape_and_cache, ReshapeAndCacheArgs)

#else
namespace wave64 {
namespace {

constexpr CacheKernels kKernels[] = WAVE64_CACHE_KERNELS(reshape_and_cache);

}  // namespace
}  // namespace wave64

int32_t wave64_reshape_and_cache(const wave64::ReshapeAndCacheArgs* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "reshape_and_cache";
    ReshapeAndCacheArgs args = *caller_args;
    if (int32_t status = check_cache_dtypes(op, args.dtype, args.cache_dtype)) return status;
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.num_heads < 0) return refuse(op, "num_heads", "at least 0", args.num_heads);
    if (args.head_dim < 0) return refuse(op, "head_dim", "at least 0", args.head_dim);
    const int64_t row = int64_t(args.num_heads) * args.head_dim;
    if (row > 1 << 28) return refuse(op, "num_heads * head_dim", "at most 2^28", row);
    if (args.num_tokens == 0 || row == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"key", args.key},
                                 {"value", args.value},
                                 {"key_cache", (const void*)args.key_cache},
                                 {"value_cache", (const void*)args.value_cache},
                                 {"slot_mapping", (const void*)args.slot_mapping}})
        if (!pointer) return refuse(op, name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    if (args.key_head_stride == args.head_dim && args.value_head_stride == args.head_dim) {  // one wide head
        args.head_dim = int32_t(row);
        args.num_heads = 1;
        args.key_head_stride = args.value_head_stride = 0;
    }
    const CacheKernels& kernels = kKernels[args.dtype];
    const int64_t bytes = kernels.element_bytes;
    const bool aligned =
        is_16_aligned({args.key, args.value, args.key_cache, args.value_cache},
                      {args.key_stride * bytes, args.key_head_stride * bytes, args.value_stride * bytes,
                       args.value_head_stride * bytes, args.head_dim * bytes});
    const char* const* names = args.cache_dtype == kFp8 ? kernels.to_fp8 : kernels.copy;
    return launch(over_rows(op, names[!aligned], args.num_tokens, 2 * (aligned ? row * bytes / 16 : row), kCacheRows,
                            *device, args.shares),
                  &args, sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::ReshapeAndCacheArgs, NAME)
static const bool registered = wave64::register_op<wave64::ReshapeAndCacheArgs, wave64_reshape_and_cache>(
    "reshape_and_cache",
    {FIELD(key), FIELD(value), FIELD(key_cache), FIELD(value_cache), FIELD(slot_mapping), FIELD(k_scale),
     FIELD(v_scale), FIELD(key_stride), FIELD(key_head_stride), FIELD(value_stride), FIELD(value_head_stride),
     FIELD(num_tokens), FIELD(num_heads), FIELD(head_dim), FIELD(dtype), FIELD(cache_dtype)});

#endif
