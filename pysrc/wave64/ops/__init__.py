"""Every operator: contract, reference and cases, one file each."""

from wave64.ops.paged_attention import paged_attention
from wave64.ops.prefill_attention import prefill_attention
from wave64.ops.rms_norm import rms_norm

__all__ = ["paged_attention", "prefill_attention", "rms_norm"]
