from torch import Tensor

from wave64 import ops
from wave64.backends.hip import bind, launch


@bind(ops.transfer_kv, supports=None)
def transfer_kv(src: Tensor, dst: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    size = src.element_size()
    row = src[:1].numel() * size
    launch("transfer_kv", ops.transfer_kv.place(src, dst, src_slots, dst_slots), src.data_ptr(), dst.data_ptr(),
           src_slots.data_ptr(), dst_slots.data_ptr(), src.stride(0) * size, dst.stride(0) * size, src.shape[0],
           dst.shape[0], src_slots.numel(), row)
