// Copies rows between KV pools, on one GPU or between it and pinned host memory: dst[dst_slots[i]] = src[src_slots[i]].
//
// The trick: of several pairs all slots are under way together, then all rows, which matters most where rows come over
// PCIe.
// Bound by memory, or by PCIe: the rows in and out, 16 bytes per lane and access.
#include "wave64/rows.h"

namespace wave64 {
constexpr int kPairs = 4;  // that a lane holds
}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <typename T, int N>
WAVE64_DEVICE void transfer_kv(const TransferKvArgs& args) {
    const RowShare share = row_share(args.shares);
    const int64_t column = int64_t(share.pack) * int(sizeof(T)) * N;
    const char* src = static_cast<const char*>(args.src) + column;
    char* dst = static_cast<char*>(args.dst) + column;
    for (int64_t first = share.first; first < args.num_pairs; first += kPairs * share.step) {
        int64_t from[kPairs], to[kPairs];
        bool counts[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            const int64_t pair = first + i * share.step;
            from[i] = pair < args.num_pairs ? args.src_slots[pair] : -1;
            to[i] = pair < args.num_pairs ? args.dst_slots[pair] : -1;
        }
#pragma unroll
        for (int i = 0; i < kPairs; i++)  // as unsigned numbers, negative ones are the largest
            counts[i] =
                uint64_t(from[i]) < uint64_t(args.num_src_slots) && uint64_t(to[i]) < uint64_t(args.num_dst_slots);
        Pack<T, N> row[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; i++)
            if (counts[i]) row[i] = load_pack<T, N>(reinterpret_cast<const T*>(src + from[i] * args.src_stride));
#pragma unroll
        for (int i = 0; i < kPairs; i++)
            if (counts[i]) store_pack(reinterpret_cast<T*>(dst + to[i] * args.dst_stride), row[i]);
    }
}

}  // namespace wave64

WAVE64_KERNEL(512) transfer_kv(wave64::TransferKvArgs args) { wave64::transfer_kv<wave64::Bits32, 4>(args); }
WAVE64_KERNEL(512) transfer_kv_unaligned(wave64::TransferKvArgs args) { wave64::transfer_kv<wave64::Bits8, 1>(args); }

#else
int32_t wave64_transfer_kv(const wave64::TransferKvArgs* caller_args, void* stream) {
    using namespace wave64;
    constexpr const char* op = "transfer_kv";
    TransferKvArgs args = *caller_args;
    for (auto [name, number] : {std::pair{"num_src_slots", args.num_src_slots},
                                {"num_dst_slots", args.num_dst_slots},
                                {"num_pairs", args.num_pairs}})
        if (number < 0) return refuse(op, name, "at least 0", number);
    if (args.row_bytes < 0 || args.row_bytes > 1 << 30) return refuse(op, "row_bytes", "0 to 2^30", args.row_bytes);
    if (args.num_pairs == 0 || args.row_bytes == 0 || args.num_src_slots == 0 || args.num_dst_slots == 0) return kOk;
    for (auto [name, pointer] : {std::pair{"src", args.src},
                                 {"dst", (const void*)args.dst},
                                 {"src_slots", (const void*)args.src_slots},
                                 {"dst_slots", (const void*)args.dst_slots}})
        if (!pointer) return refuse(op, name, "an address", 0);

    const Device* device;
    if (int32_t status = current_device(&device)) return status;
    const bool aligned = is_16_aligned({args.src, args.dst}, {args.src_stride, args.dst_stride, args.row_bytes});
    return launch(over_rows(op, aligned ? "transfer_kv" : "transfer_kv_unaligned", args.num_pairs,
                            aligned ? args.row_bytes / 16 : args.row_bytes, kPairs, *device, args.shares),
                  &args, sizeof args, stream);
}

#define FIELD(NAME) WAVE64_FIELD(wave64::TransferKvArgs, NAME)
static const bool registered = wave64::register_op<wave64::TransferKvArgs, wave64_transfer_kv>(
    "transfer_kv", {FIELD(src), FIELD(dst), FIELD(src_slots), FIELD(dst_slots), FIELD(src_stride), FIELD(dst_stride),
                    FIELD(num_src_slots), FIELD(num_dst_slots), FIELD(num_pairs), FIELD(row_bytes)});

#endif
