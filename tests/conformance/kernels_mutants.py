"""What can go wrong in a kernel set: plain torch's, with one fault each."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from octavo.builtin.torch_kernels import TorchKernels, gumbel_noise
from octavo.interfaces import Activation, SamplingInputs

# ------------------------------------------------------------------------------------------------------- the norm


class ForgetsResidual(TorchKernels):
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, _ = super().add_rms_norm(hidden, None, weight, eps)
        return out, hidden if residual is None else hidden + residual


class ReturnsResidualUnchanged(TorchKernels):
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, total = super().add_rms_norm(hidden, residual, weight, eps)
        return out, total if residual is None else residual


class AddsInPlace(TorchKernels):
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return super().add_rms_norm(hidden if residual is None else hidden.add_(residual), None, weight, eps)


class ForgetsEps(TorchKernels):
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return super().add_rms_norm(hidden, residual, weight, 1e-30)


class SquaresInModelsDtype(TorchKernels):
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = hidden if residual is None else hidden + residual
        mean = total.square().mean(dim=-1, keepdim=True)
        return (total.float() * (mean.float() + eps).rsqrt() * weight.float()).to(total.dtype), total


class NormalisesAllHeadsAtOnce(TorchKernels):
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = hidden if residual is None else hidden + residual
        exact = total.float()
        mean = exact.square().mean(dim=tuple(range(1, exact.dim())), keepdim=True)
        return (exact * (mean + eps).rsqrt() * weight.float()).to(total.dtype), total


class TakesRowsForContiguous(TorchKernels):
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        dense = torch.empty(hidden.shape).stride()
        return super().add_rms_norm(hidden.as_strided(hidden.shape, dense), residual, weight, eps)

    def gated_activation(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        dense = torch.empty(gate.shape).stride()
        return super().gated_activation(activation, gate.as_strided(gate.shape, dense), up)


class AnswersInWeightsDtype(TorchKernels):
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, total = super().add_rms_norm(hidden, residual, weight, eps)
        return out.to(weight.dtype), total


class NeedsTokens(TorchKernels):
    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        hidden.abs().max()  # of nothing, torch raises
        return super().add_rms_norm(hidden, residual, weight, eps)


# ------------------------------------------------------------------------------------------------- the activation


class SwapsGateAndUp(TorchKernels):
    def gated_activation(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        return super().gated_activation(activation, up, gate)


class TakesGeluExactly(TorchKernels):
    """By the error function, where the model was trained with the approximation by tanh."""

    def gated_activation(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        return functional.gelu(gate) * up if activation == "gelu_tanh" else super().gated_activation("silu", gate, up)


class OverflowsInExp(TorchKernels):
    def gated_activation(self, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        power = gate.float().exp()
        activated = gate.float() * power / (1 + power)
        return (
            (activated * up).to(up.dtype) if activation == "silu" else super().gated_activation("gelu_tanh", gate, up)
        )


# ---------------------------------------------------------------------------------------------------- the sampling


class TakesLastOfEquals(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        last = logits.shape[1] - 1 - logits.flip(1).argmax(dim=1)
        return torch.where(inputs.temperature == 0, last, super().sample(logits, inputs))


class DividesLogitsInPlace(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        drawn = super().sample(logits, inputs)
        if not inputs.all_greedy:
            logits /= inputs.temperature.clamp(min=1e-5).unsqueeze(1).to(logits.dtype)
        return drawn


class DrawsForGreedyRows(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        if inputs.all_greedy:
            return super().sample(logits, inputs)
        return super().sample(logits, replace(inputs, temperature=inputs.temperature.masked_fill(_greedy(inputs), 1.0)))


class ForgetsSampleIndex(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        return super().sample(logits, replace(inputs, sample_index=torch.zeros_like(inputs.sample_index)))


class HalvesSeed(TorchKernels):
    """Only its lower 32 bits count."""

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        return super().sample(logits, replace(inputs, seed=inputs.seed & 0xFFFFFFFF))


class KeysNoiseByRow(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        return super().sample(logits, replace(inputs, seed=inputs.seed + rows))


class ScoresInLogitsDtype(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        if logits.dtype == torch.float32:
            return super().sample(logits, inputs)
        temperature = inputs.temperature.clamp(min=1e-5).to(logits.dtype).unsqueeze(1)
        drawn = (logits / temperature + gumbel_noise(inputs, logits.shape[1]).to(logits.dtype)).argmax(dim=1)
        return torch.where(_greedy(inputs), logits.argmax(dim=1), drawn)


class KeepsOneMore(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        return super().sample(logits, replace(inputs, top_k=inputs.top_k + (inputs.top_k > 0).int()))


class KeepsExactlyK(TorchKernels):
    """Of tokens as probable as the last one kept, only the first stays."""

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        if not inputs.any_top_k:
            return super().sample(logits, inputs)
        kept = logits.float().clone()
        for row, top_k in zip(kept, inputs.top_k.tolist(), strict=True):
            if top_k:
                row[row.argsort(descending=True, stable=True)[top_k:]] = float("-inf")
        return super().sample(kept, inputs)


class LeavesOutTheTokenThatCrosses(TorchKernels):
    """Top-p keeps what fits below its mass, instead of the first set that reaches it."""

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        ordered = (
            (logits.float() / inputs.temperature.clamp(min=1e-5).unsqueeze(1)).softmax(dim=1).sort(descending=True)
        )
        fits = (ordered.values.cumsum(dim=1) <= inputs.top_p.unsqueeze(1)).sum(dim=1).clamp(min=1)
        top_k = torch.where(inputs.top_p < 1, fits.int(), inputs.top_k)
        inputs = replace(inputs, top_p=torch.ones_like(inputs.top_p), top_k=top_k, any_top_k=True, any_top_p=False)
        return super().sample(logits, inputs)


class TakesTopPFirst(TorchKernels):
    """Top-p of the whole distribution, then top-k of what is left."""

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        if not (inputs.any_top_k and inputs.any_top_p):
            return super().sample(logits, inputs)
        scores = logits.float() / inputs.temperature.clamp(min=1e-5).unsqueeze(1)
        ordered = scores.softmax(dim=1).sort(descending=True)
        before = ordered.values.cumsum(dim=1) - ordered.values
        dropped = torch.zeros_like(before, dtype=torch.bool)
        dropped.scatter_(1, ordered.indices, before >= inputs.top_p.unsqueeze(1))
        inputs = replace(inputs, top_p=torch.ones_like(inputs.top_p), any_top_p=False)
        return super().sample(logits.float().masked_fill(dropped, float("-inf")), inputs)


class TakesMinPBeforeTemperature(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        if not inputs.any_min_p:
            return super().sample(logits, inputs)
        lowest = logits.float().amax(dim=1, keepdim=True) + inputs.min_p.log().unsqueeze(1)
        inputs = replace(inputs, min_p=torch.zeros_like(inputs.min_p), any_min_p=False)
        return super().sample(logits.float().masked_fill(logits < lowest, float("-inf")), inputs)


class MasksWithAFiniteNumber(TorchKernels):
    """What the rules left out is only very improbable, and a high temperature brings it back."""

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        return super().sample(logits.clamp(min=-2.0), inputs)


class SharesLimitsOfTheFirstRow(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        return super().sample(logits, replace(inputs, top_k=inputs.top_k[:1].expand_as(inputs.top_k)))


class AnswersInInt32(TorchKernels):
    def sample(self, logits: Tensor, inputs: SamplingInputs) -> Tensor:
        return super().sample(logits, inputs).int()


def _greedy(inputs: SamplingInputs) -> Tensor:
    return inputs.temperature == 0


MUTANTS: dict[type[TorchKernels], str] = {
    ForgetsResidual: "norm_equals_the_formula[with residual]",
    ReturnsResidualUnchanged: "norm_equals_the_formula[with residual]",
    AddsInPlace: "norm_equals_the_formula[with residual]",
    ForgetsEps: "eps_keeps_small_rows_small",
    SquaresInModelsDtype: "squares_are_summed_in_float32",
    NormalisesAllHeadsAtOnce: "norm_equals_the_formula[without residual]",
    TakesRowsForContiguous: "norm_of_slices_of_a_stacked_output_equals_the_formula",
    AnswersInWeightsDtype: "norm_with_float32_weights_answers_in_the_model_s_dtype",
    NeedsTokens: "norm_of_no_tokens_is_of_no_tokens",
    SwapsGateAndUp: "activation_equals_the_formula[silu]",
    TakesGeluExactly: "activation_equals_the_formula[gelu_tanh]",
    OverflowsInExp: "activation_of_large_values_is_finite[silu]",
    TakesLastOfEquals: "greedy_takes_the_largest_logit_and_the_first_of_equals",
    DividesLogitsInPlace: "draws_equal_the_formula",
    DrawsForGreedyRows: "rows_of_temperature_0_stand_beside_others",
    ForgetsSampleIndex: "draws_equal_the_formula",
    HalvesSeed: "draws_equal_the_formula",
    KeysNoiseByRow: "a_row_draws_the_same_alone_and_in_any_batch",
    ScoresInLogitsDtype: "draws_equal_the_formula",
    KeepsOneMore: "limits_keep_exactly_the_right_tokens[top_k=10]",
    KeepsExactlyK: "tokens_as_probable_as_the_last_one_kept_are_kept",
    LeavesOutTheTokenThatCrosses: "limits_keep_exactly_the_right_tokens[top_p=0.6]",
    TakesTopPFirst: "limits_keep_exactly_the_right_tokens[top_k=12 top_p=0.7]",
    TakesMinPBeforeTemperature: "min_p_is_of_the_tempered_distribution",
    MasksWithAFiniteNumber: "masked_tokens_are_never_drawn",
    SharesLimitsOfTheFirstRow: "draws_equal_the_formula",
    AnswersInInt32: "greedy_takes_the_largest_logit_and_the_first_of_equals",
}
"""Each mutant, and the test of the suite that names its fault (others may fail too)."""
