"""Kernels socket: the small operations around the linears and attention, and the draw of a token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from octavo.plugins.specs import Need

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingInputs:
    """How each sample is drawn, all [num_samples], on the device unless said otherwise.

    Attributes:
        temperature, top_p, min_p: float32.
        top_k: int32, 0 is off.
        seed: int64; sample_index, position: int32; together with the token id they key the noise.
        all_greedy, any_top_k, any_top_p, any_min_p: known on the host, so that what nobody asked for is not computed.
    """

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seed: Tensor
    sample_index: Tensor
    position: Tensor
    all_greedy: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool


class Kernels(ABC):
    """Constructed once with the need it was chosen for (device and dtype). None of its methods waits for the device
    or changes its arguments.

    `add_rms_norm` and `gated_activation` may be captured in a CUDA graph.
    """

    def __init__(self, need: Need) -> None:
        self.need = need

    @abstractmethod
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(y, total): total = hidden + residual, y = total / sqrt(mean(total^2) + eps) * weight, over the last axis.

        Args:
            hidden, residual: [..., size], the model's dtype; without a residual the total is `hidden` itself.
            weight: [size], the model's dtype, or float32: the product is then rounded once.

        Source: Zhang and Sennrich 2019, arXiv:1910.07467.
        """

    @abstractmethod
    def gated_activation(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        """activation(gate) * up, [num_tokens, size] each; both may be slices of one stacked linear's output.

        Source: Shazeer 2020, GLU variants improve Transformer, arXiv:2002.05202.
        """

    @abstractmethod
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        """Draw one token for each row: the same on every device, but for the last bits of a logarithm.

        Greedy rows take the arg-max. The others take arg-max(logits / temperature + Gumbel noise) over the tokens
        that min-p, top-k and top-p leave, which is a draw from the softmax (the Gumbel-max trick). The noise is a hash
        of (seed, sample index, position, token id): the same request draws the same in any batch. The order and each
        formula are those of `octavo.builtin.torch_kernels`, the reference.

        Args:
            logits: [num_samples, vocab_size], any float dtype, after the logits rules; not changed.

        Returns:
            [num_samples] int64.

        Source: Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030.
        """
