// Writes new latents and rotated keys into the paged cache of latent attention: kv_cache[slot_mapping[t]] =
// [kv_c[t], k_pe[t]], converted where it is FP8.
//
// How, and what bounds it, is in cache_write.h.
#include "wave64/cache_write.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <typename In, typename Out, int N>
WAVE64_DEVICE void concat_and_cache_mla(const ConcatAndCacheMlaArgs& args) {
    const int row = args.kv_lora_rank + args.rope_dim;
    Out* cache = static_cast<Out*>(args.kv_cache);
    const CachePart<In, Out> latents{
        static_cast<const In*>(args.kv_c), args.kv_c_stride, 0, args.kv_lora_rank, cache, row, args.scale};
    const CachePart<In, Out> keys{static_cast<const In*>(args.k_pe),
                                  args.k_pe_stride,
                                  0,
                                  args.rope_dim,
                                  cache + args.kv_lora_rank,
                                  row,
                                  args.scale};
    write_cache<N>(args.shares, args.num_tokens, args.slot_mapping, args.kv_lora_rank / N, latents, keys);
}

}  // namespace wave64

WAVE64_CACHE_WRITE(concat_and_cache_mla, ConcatAndCacheMlaArgs)

#else
namespace wave64 {
namespace {

constexpr CacheKernels kKernels[] = WAVE64_CACHE_KERNELS(concat_and_cache_mla);

}  // namespace
}  // namespace wave64

int32_t wave64_concat_and_cache_mla(const wave64::ConcatAndCacheMlaArgs* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "concat_and_cache_mla";
    ConcatAndCacheMlaArgs args = *caller_args;
    if (int32_t status = check_cache_dtypes(op, args.dtype, args.cache_dtype)) return status;
    if (args.num_tokens < 0) return refuse(op, "num_tokens", "at least 0", args.num_tokens);
    if (args.kv_lora_rank < 1 || args.kv_lora_rank > 1 << 27)
        return refuse(op, "kv_lora_rank", "1 to 2^27", args.kv_lora_rank);
    if (args.rope_dim < 1 || args.rope_dim > 1 << 27) return refuse(op, "rope_dim", "1 to 2^27", args.rope_dim);
    if (args.num_tokens == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"kv_c", args.kv_c},
                                 {"k_pe", args.k_pe},
                                 {"kv_cache", (const void*)args.kv_cache},
                                 {"slot_mapping", (const void*)args.slot_mapping}})
        if (!pointer) return refuse(op, name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const CacheKernels& kernels = kKernels[args.dtype];
    const int64_t bytes = kernels.element_bytes, row = args.kv_lora_rank + args.rope_dim;
    const bool aligned = is_16_aligned(
        {args.kv_c, args.k_pe, args.kv_cache},
        {args.kv_c_stride * bytes, args.k_pe_stride * bytes, args.kv_lora_rank * bytes, args.rope_dim * bytes});
    const char* const* names = args.cache_dtype == kFp8 ? kernels.to_fp8 : kernels.copy;
    return launch(over_rows(op, names[!aligned], args.num_tokens, aligned ? row * bytes / 16 : row, kCacheRows, *device,
                            args.shares),
                  &args, sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::ConcatAndCacheMlaArgs, NAME)
static const bool registered = wave64::register_op<wave64::ConcatAndCacheMlaArgs, wave64_concat_and_cache_mla>(
    "concat_and_cache_mla",
    {FIELD(kv_c), FIELD(k_pe), FIELD(kv_cache), FIELD(slot_mapping), FIELD(scale), FIELD(kv_c_stride),
     FIELD(k_pe_stride), FIELD(num_tokens), FIELD(kv_lora_rank), FIELD(rope_dim), FIELD(dtype), FIELD(cache_dtype)});

#endif
