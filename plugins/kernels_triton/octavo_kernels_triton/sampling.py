"""The draw of a step's tokens: at most three launches, none of which waits for the device or sorts."""

from __future__ import annotations

from torch import Tensor

from octavo.interfaces import SamplingInputs
from octavo_kernels_triton.kernels.sample_draw import sample_draw
from octavo_kernels_triton.kernels.top_threshold import top_threshold


def sample(logits: Tensor, inputs: SamplingInputs) -> Tensor:
    """What `octavo.interfaces.Kernels.sample` says: [num_samples] int64."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    is_limited = inputs.any_top_k or inputs.any_top_p or inputs.any_min_p
    threshold = top_threshold(logits, inputs) if is_limited and not inputs.all_greedy else None
    return sample_draw(logits, inputs, threshold)
