from collections.abc import Callable
from typing import cast

from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, launch


@bind(ops.transfer_kv, supports=None)
def transfer_kv(src: Tensor, dst: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    size = src.element_size()
    device_of = cast(Callable, ops.transfer_kv.device_of)  # this operator has one
    launch("transfer_kv", device_of(src, dst, src_slots, dst_slots), src=src, dst=dst, src_slots=src_slots,
           dst_slots=dst_slots, src_stride=src.stride(0) * size, dst_stride=dst.stride(0) * size,
           num_src_slots=src.shape[0], num_dst_slots=dst.shape[0], num_pairs=src_slots.numel(),
           row_bytes=src[:1].numel() * size)
