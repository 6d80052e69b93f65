"""The project's operators: one module, one record each."""

from __future__ import annotations

from llmapi._kernels import gated_activation, norm, paged_attention, rotary
from llmapi._kernels.op import Op, Sample, relative_error

OPS: dict[str, Op] = {
    op.target: op
    for op in (
        norm.RMS_NORM,
        norm.ADD_RMS_NORM,
        norm.ADD_LAYER_NORM,
        gated_activation.GATED_ACTIVATION,
        rotary.ROTARY_COS_SIN,
        rotary.ROTARY_KV_WRITE,
        paged_attention.PAGED_ATTENTION,
    )
}
"""Every operator by the name that graphs call it by."""

__all__ = ["OPS", "Op", "Sample", "relative_error"]
