"""RMSNorm of few rows with what comes right before and after it in a decode step."""

from kernels_pallas.row_norm.api import Routed, add_norm_route, row_norm, why_not_fused

__all__ = ["Routed", "add_norm_route", "row_norm", "why_not_fused"]
