// Writes new latents and rotated keys into the paged cache of latent attention: kv_cache[slot_mapping[t]] =
// [kv_c[t], k_pe[t]], converted where it is FP8.
//
// The trick, and what bounds it, is in cache_write.h.
#include "wave64/cache_write.h"

namespace wave64 {

// kv_cache[slot] = [kv_c, k_pe]; in FP8 caches, divided by scale.
struct ConcatAndCacheMlaArgs {
    const void* kv_c;             // [num_tokens, kv_lora_rank]
    const void* k_pe;             // [num_tokens, rope_dim]
    void* kv_cache;               // [slots, kv_lora_rank + rope_dim], contiguous
    const int64_t* slot_mapping;  // [num_tokens]; -1: not written
    const float* scale;           // one number, or null: 1
    int64_t kv_c_stride;
    int64_t k_pe_stride;
    int64_t num_tokens;
    int32_t kv_lora_rank;
    int32_t rope_dim;
    Dtype dtype;        // of kv_c and k_pe
    Dtype cache_dtype;  // dtype, or FP8
    // set by the launcher
    RowPartition partition;
};

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <typename In, typename Out, int N>
WAVE64_DEVICE void concat_and_cache_mla(const ConcatAndCacheMlaArgs& args) {
    const int row = args.kv_lora_rank + args.rope_dim;
    Out* cache = static_cast<Out*>(args.kv_cache);
    const CachePart<In, Out> latents{
        static_cast<const In*>(args.kv_c), args.kv_c_stride, 0, args.kv_lora_rank, cache, row, args.scale, 0};
    const CachePart<In, Out> keys{static_cast<const In*>(args.k_pe),
                                  args.k_pe_stride,
                                  0,
                                  args.rope_dim,
                                  cache + args.kv_lora_rank,
                                  row,
                                  args.scale,
                                  0};
    write_cache<N>(args.partition, args.num_tokens, args.slot_mapping, args.kv_lora_rank / N, latents, keys);
}

}  // namespace wave64

WAVE64_CACHE_WRITE(concat_and_cache_mla, ConcatAndCacheMlaArgs)

#else
namespace wave64 {
namespace {

constexpr CacheKernels kKernels[] = WAVE64_CACHE_KERNELS(concat_and_cache_mla);

void concat_and_cache_mla(ConcatAndCacheMlaArgs args, const Call& call) {
    call.expect_float("dtype", args.dtype);
    call.expect_cache_dtype(args.cache_dtype, args.dtype);
    call.expect_min("num_tokens", args.num_tokens, 0);
    call.expect_range("kv_lora_rank", args.kv_lora_rank, 1, 1 << 27);
    call.expect_range("rope_dim", args.rope_dim, 1, 1 << 27);
    if (args.num_tokens == 0) return;
    call.expect_tensors(
        {{"kv_c", args.kv_c}, {"k_pe", args.k_pe}, {"kv_cache", args.kv_cache}, {"slot_mapping", args.slot_mapping}});

    const int64_t bytes = element_bytes(args.dtype);
    const bool aligned = is_16_aligned(
        {args.kv_c, args.k_pe, args.kv_cache},
        {args.kv_c_stride * bytes, args.k_pe_stride * bytes, args.kv_lora_rank * bytes, args.rope_dim * bytes});
    launch_cache_write(call, kKernels, aligned, args.kv_lora_rank + args.rope_dim, args);
}

WAVE64_OP(concat_and_cache_mla, ConcatAndCacheMlaArgs, kv_c, k_pe, kv_cache, slot_mapping, scale, kv_c_stride,
          k_pe_stride, num_tokens, kv_lora_rank, rope_dim, dtype, cache_dtype)

}  // namespace
}  // namespace wave64
#endif
