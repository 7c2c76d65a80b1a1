"""The kernels in plain torch: the reference of every other set."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from octavo.interfaces.kernels import Activation, Kernels, SamplingInputs

# Odd 32-bit constants of MurmurHash3's finaliser (Appleby, public domain) and the golden ratio's fraction,
# written as signed so that int32 tensors take them.
_MIX_1 = 0x85EBCA6B - 2**32
_MIX_2 = 0xC2B2AE35 - 2**32
_GOLDEN = 0x9E3779B9 - 2**32

# The smallest that divides: below it quotients overflow, and infinities are all alike. Here already the noise decides
# only between logits less than 3e-4 apart.
_MIN_TEMPERATURE = 1e-5


class TorchKernels(Kernels):
    """Norms, gated activations and sampling in plain torch, each vectorised over the batch."""

    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = hidden if residual is None else hidden + residual
        if total.dtype == weight.dtype:
            return functional.rms_norm(total, weight.shape, weight, eps), total
        return functional.rms_norm(total.float(), weight.shape, weight, eps).to(total.dtype), total

    def gated_activation(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        activated = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
        return activated * up

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        greedy = _argmax(logits)
        if inputs.all_greedy:
            return greedy
        is_greedy = inputs.temperature == 0
        scores = logits.float() / inputs.temperature.clamp(min=_MIN_TEMPERATURE).unsqueeze(1)
        if inputs.any_min_p:
            # p < min_p * max p is score < max score + log(min_p); where min_p is 0, below -inf: never.
            lowest = scores.amax(dim=-1, keepdim=True) + inputs.min_p.log().unsqueeze(1)
            scores.masked_fill_(scores < lowest, float("-inf"))
        if inputs.any_top_k or inputs.any_top_p:
            _keep_top(scores, inputs)
        scores += gumbel_noise(inputs, scores.shape[1])
        return torch.where(is_greedy, greedy, _argmax(scores))


def gumbel_noise(inputs: SamplingInputs, vocab_size: int, first_token_id: int = 0) -> Tensor:
    """-log(-log(1 - u)) with u in (0, 1) hashed from each row's key and each token id: [num_samples, vocab_size].

    `first_token_id` is the id of column 0, so that a shard of the vocabulary draws what the whole would.
    """
    low, high = inputs.seed.int(), (inputs.seed >> 32).int()
    key = _mix(low ^ _mix(high + _GOLDEN))
    key = _mix(key ^ _mix(inputs.sample_index * _GOLDEN + 1))
    key = _mix(key ^ _mix(inputs.position * _GOLDEN + 2))
    second_key = _mix(key + _GOLDEN)
    token_ids = torch.arange(first_token_id, first_token_id + vocab_size, dtype=torch.int32, device=key.device)
    bits = _mix(_mix(token_ids * _GOLDEN ^ key.unsqueeze(1)) + second_key.unsqueeze(1))
    # As float32 the lowest bits of a large hash are rounded, those of a small one are not: the noise is finest
    # where it is largest. Half a step keeps u above 0; the clamp keeps it below 1, else the only token that top-k
    # left could get -inf and lose to those left out.
    uniform = (((bits.long() & 0xFFFFFFFF).float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _argmax(scores: Tensor) -> Tensor:
    """[rows, vocab_size] -> [rows] int64. On a CPU by numpy: 8 times as fast as torch, in bfloat16 15 times."""
    if scores.device.type != "cpu":
        return scores.argmax(dim=-1)
    return torch.from_numpy(scores.float().numpy().argmax(axis=-1))


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser over int32; shifts are made logical by masking the copied sign bits."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MIX_1
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * _MIX_2
    return x ^ ((x >> 16) & 0xFFFF)


def _keep_top(scores: Tensor, inputs: SamplingInputs) -> None:
    """Set to -inf, in place, what top-k and then top-p leave out. Ties at the border are kept."""
    vocab_size = scores.shape[1]
    ordered = scores.sort(dim=-1, descending=True).values
    top_k = torch.where(inputs.top_k > 0, inputs.top_k, vocab_size).clamp(max=vocab_size).long().unsqueeze(1)
    threshold = ordered.gather(1, top_k - 1)
    if inputs.any_top_p:
        ordered = ordered.masked_fill(ordered < threshold, float("-inf"))
        probabilities = ordered.softmax(dim=-1)
        mass_before = probabilities.cumsum(dim=-1) - probabilities
        num_kept = (mass_before < inputs.top_p.unsqueeze(1)).sum(dim=-1, keepdim=True).clamp(min=1)
        nucleus = ordered.gather(1, num_kept - 1)
        threshold = torch.where(inputs.top_p.unsqueeze(1) < 1, torch.maximum(threshold, nucleus), threshold)
    scores.masked_fill_(scores < threshold, float("-inf"))
