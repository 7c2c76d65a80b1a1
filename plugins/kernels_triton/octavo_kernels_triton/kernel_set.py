"""TritonKernels: each operation of the socket is one launcher."""

from __future__ import annotations

from torch import Tensor

from octavo.interfaces import Activation, Kernels, SamplingInputs
from octavo_kernels_triton.kernels.add_rms_norm import add_rms_norm
from octavo_kernels_triton.kernels.gated_activation import gated_activation
from octavo_kernels_triton.sampling import sample


class TritonKernels(Kernels):
    """Norms, gated activations and sampling in Triton; without state, so it may serve many models."""

    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(hidden, residual, weight, eps)

    def gated_activation(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        return gated_activation(activation, gate, up)

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        return sample(logits, inputs)
