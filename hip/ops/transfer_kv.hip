// Copies rows between KV pools, on one GPU or between it and pinned host memory: dst[dst_slots[i]] = src[src_slots[i]].
//
// The trick: a lane has the slots of several pairs in flight together, then all their rows, which matters most where
// rows come over PCIe.
// Bound by memory, or by PCIe: the rows in and out, 16 bytes per lane and access.
#include "wave64/rows.h"

namespace wave64 {

// dst[dst_slots[i]] = src[src_slots[i]], byte by byte; strides are in bytes, too. A pair with a slot outside its pool
// is skipped.
struct TransferKvArgs {
    const void* src;           // [num_src_slots, row_bytes]
    void* dst;                 // [num_dst_slots, row_bytes]
    const int64_t* src_slots;  // [num_pairs]
    const int64_t* dst_slots;  // [num_pairs]
    int64_t src_stride;
    int64_t dst_stride;
    int64_t num_src_slots;
    int64_t num_dst_slots;
    int64_t num_pairs;
    int64_t row_bytes;
    // set by the launcher
    RowPartition partition;
};

constexpr int kPairs = 4;  // that a lane holds

}  // namespace wave64

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

template <typename T, int N>
WAVE64_DEVICE void transfer_kv(const TransferKvArgs& args) {
    const LaneRows rows = lane_rows(args.partition);
    const int64_t column = int64_t(rows.pack) * int(sizeof(T)) * N;
    const char* src = static_cast<const char*>(args.src) + column;
    char* dst = static_cast<char*>(args.dst) + column;
    for (int64_t first = rows.first; first < args.num_pairs; first += kPairs * rows.step) {
        int64_t from[kPairs], to[kPairs];
        bool counts[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; i++) {
            const int64_t pair = first + i * rows.step;
            from[i] = pair < args.num_pairs ? args.src_slots[pair] : -1;
            to[i] = pair < args.num_pairs ? args.dst_slots[pair] : -1;
        }
#pragma unroll
        for (int i = 0; i < kPairs; i++)  // as unsigned integers, negative ones are the largest
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
namespace wave64 {
namespace {

void transfer_kv(TransferKvArgs args, const Call& call) {
    call.expect_min("num_src_slots", args.num_src_slots, 0);
    call.expect_min("num_dst_slots", args.num_dst_slots, 0);
    call.expect_min("num_pairs", args.num_pairs, 0);
    call.expect_range("row_bytes", args.row_bytes, 0, 1 << 30);
    if (args.num_pairs == 0 || args.row_bytes == 0 || args.num_src_slots == 0 || args.num_dst_slots == 0) return;
    call.expect_tensors(
        {{"src", args.src}, {"dst", args.dst}, {"src_slots", args.src_slots}, {"dst_slots", args.dst_slots}});

    const bool aligned = is_16_aligned({args.src, args.dst}, {args.src_stride, args.dst_stride, args.row_bytes});
    launch_over_rows(call, aligned ? "transfer_kv" : "transfer_kv_unaligned", args.num_pairs,
                     aligned ? args.row_bytes / 16 : args.row_bytes, kPairs, args);
}

WAVE64_OP(transfer_kv, TransferKvArgs, src, dst, src_slots, dst_slots, src_stride, dst_stride, num_src_slots,
          num_dst_slots, num_pairs, row_bytes)

}  // namespace
}  // namespace wave64
#endif
