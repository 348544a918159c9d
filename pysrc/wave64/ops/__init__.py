"""Every operator: contract, reference and cases, one file each."""

from wave64.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
