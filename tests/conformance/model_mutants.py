"""Faults planted in Llama, each of which ModelSuite must catch: what an author of an architecture gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from octavo.builtin.llama import Llama, LlamaLayer
from octavo.interfaces import ForwardContext, LayerFactory, ModelArchitecture
from octavo.model_config import ModelConfig

MakeModel = Callable[[ModelConfig, LayerFactory], ModelArchitecture]


# ------------------------------------------------------------------------------------------ layers that compute wrongly


class ForgetsTheResidual(LlamaLayer):
    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        return super().__call__(hidden, None, context)


class SwapsGateAndUp(LlamaLayer):
    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        query, key, value = self.qkv(hidden)
        hidden, residual = self.mlp_norm(self.output(self.attention(query, key, value, context)), residual)
        gate, up = self.gate_up(hidden)
        return self.down(gate * functional.silu(up)), residual


class IgnoresPositions(LlamaLayer):
    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        ((cos, sin),) = context.rotary
        return super().__call__(hidden, residual, replace(context, rotary=[(torch.ones_like(cos), 0 * sin)]))


class ScalesScoresWrongly(LlamaLayer):
    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        query, key, value = self.qkv(hidden)
        attended = self.attention(query / 2, key, value, context)
        hidden, residual = self.mlp_norm(self.output(attended), residual)
        gate, up = self.gate_up(hidden)
        return self.down(functional.silu(gate) * up), residual


class UsesTheKeyAsValue(LlamaLayer):
    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        query, key, _ = self.qkv(hidden)
        hidden, residual = self.mlp_norm(self.output(self.attention(query, key, key, context)), residual)
        gate, up = self.gate_up(hidden)
        return self.down(functional.silu(gate) * up), residual


class CountsHeadsAsTheWholeModelHas(LlamaLayer):
    """Normalises each head's query, and takes the number of heads from the configuration: a rank has fewer."""

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        query, key, value = self.qkv(hidden)
        heads = query.reshape(len(query), 4, -1)
        query = functional.rms_norm(heads, heads.shape[-1:]).flatten(1)
        hidden, residual = self.mlp_norm(self.output(self.attention(query, key, value, context)), residual)
        gate, up = self.gate_up(hidden)
        return self.down(functional.silu(gate) * up), residual


class SkipsTheNormBeforeTheMlp(LlamaLayer):
    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        query, key, value = self.qkv(hidden)
        hidden = residual = residual + self.output(self.attention(query, key, value, context))
        gate, up = self.gate_up(hidden)
        return self.down(functional.silu(gate) * up), residual


class SeesTheWholeStep(LlamaLayer):
    """Adds to every token what only the end of the prompt knows."""

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        return super().__call__(hidden + hidden.mean(dim=0), residual, context)


class RemembersTheLastStep(LlamaLayer):
    last: Tensor | None = None

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        before, self.last = self.last, hidden.mean()
        return super().__call__(hidden if before is None else hidden + before, residual, context)


class RoundsALoneToken(LlamaLayer):
    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        return super().__call__(hidden if len(hidden) > 1 else hidden.bfloat16().to(hidden), residual, context)


class AnswersInFloat32(LlamaLayer):
    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = super().__call__(hidden, residual, context)
        return hidden.float(), residual.float()


# --------------------------------------------------------------------------------- models that are put together wrongly


class ForgetsTheFinalNorm(Llama):
    def head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.lm_head(hidden + residual)


class CentresTheRowsOfTheHead(Llama):
    def head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return super().head(hidden - hidden.mean(dim=0), residual)


class IgnoresTheLastLayer(Llama):
    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        super().__init__(config, factory)
        self.layers = self.layers[:-1]


class KeepsTheEmbeddingForItsHead(Llama):
    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        super().__init__(config, factory)
        embed, self.embedded = self.embed, torch.zeros(())

        def embed_and_keep(token_ids: Tensor) -> Tensor:
            self.embedded = embed(token_ids)
            return self.embedded

        self.embed = embed_and_keep

    def head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return super().head(hidden, residual + self.embedded.mean())


class ReadsATensorItNeverUses(Llama):
    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        super().__init__(config, factory)
        self.unused = factory.norm("model.embed_norm", config.hidden_size, config.rms_norm_eps)


class IgnoresWhatItReads(Llama):
    def ignored_names(self) -> Sequence[str]:
        return (*super().ignored_names(), "*.bias", "*_layernorm.weight")


# -------------------------------------------------------------------------- models that ask for the wrong kind of layer


class Detour:
    """A factory that does something else in one method; everything else reaches the factory behind it."""

    def __init__(self, factory: LayerFactory) -> None:
        self.factory = factory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.factory, name)


class OneCacheForAllLayers(Detour):
    def attention(self, layer_index: int, *sizes: Any, **parameters: Any) -> Any:
        return self.factory.attention(0, *sizes, **parameters)


class AttentionWithoutGroups(Detour):
    def attention(self, layer_index: int, num_heads: int, num_kv_heads: int, *sizes: Any, **parameters: Any) -> Any:
        return self.factory.attention(layer_index, num_heads, num_heads, *sizes, **parameters)


class GateAndUpApart(Detour):
    def stacked_linear(self, prefix: str, in_features: int, parts: Mapping[str, int], *, bias: bool) -> Any:
        linears = [self.factory.linear(f"{prefix}.{name}", in_features, size) for name, size in parts.items()]
        return lambda x: tuple(linear(x) for linear in linears)


class QueryKeyValueAsAnyStack(Detour):
    def qkv_linear(
        self, prefix: str, in_features: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool
    ) -> Any:
        heads = {"q_proj": num_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
        return self.factory.stacked_linear(
            prefix, in_features, {name: number * head_dim for name, number in heads.items()}, bias=bias
        )


class OneTensorInTwoShapes(Detour):
    def head(self, prefix: str, vocab_size: int, hidden_size: int, *, tied_to: str | None) -> Any:
        return self.factory.head(prefix, vocab_size + 1, hidden_size, tied_to="model.embed_tokens")


# ------------------------------------------------------------------------------------------------------------- the list


def _of_layer(layer: type[LlamaLayer]) -> MakeModel:
    def make(config: ModelConfig, factory: LayerFactory) -> ModelArchitecture:
        model = Llama(config, factory)
        for each in model.layers:
            each.__class__ = layer
        return model

    return make


def _of_factory(detour: type[Detour]) -> MakeModel:
    return lambda config, factory: Llama(config, cast(LayerFactory, detour(factory)))


MUTANTS: dict[str, tuple[MakeModel, str]] = {
    "forgets the residual": (_of_layer(ForgetsTheResidual), "test_sum_of_hidden_and_residual_is_what_counts"),
    "ignores positions": (_of_layer(IgnoresPositions), "test_positions_matter"),
    "uses the key as value": (_of_layer(UsesTheKeyAsValue), "test_every_tensor_it_asks_for_is_used"),
    "counts heads as the whole model has": (
        _of_layer(CountsHeadsAsTheWholeModelHas),
        "test_one_rank_computes_its_share_from_what_it_has",
    ),
    "skips the norm before the mlp": (_of_layer(SkipsTheNormBeforeTheMlp), "test_every_tensor_it_asks_for_is_used"),
    "sees the whole step": (_of_layer(SeesTheWholeStep), "test_later_tokens_do_not_change_earlier_logits"),
    "remembers the last step": (_of_layer(RemembersTheLastStep), "test_same_input_gives_the_same_bits"),
    "rounds a lone token": (_of_layer(RoundsALoneToken), "test_one_token_alone_equals_the_first_of_many"),
    "answers in float32": (_of_layer(AnswersInFloat32), "test_bfloat16_stays_close_to_float32"),
    "forgets the final norm": (ForgetsTheFinalNorm, "test_every_tensor_it_asks_for_is_used"),
    "centres the rows of the head": (CentresTheRowsOfTheHead, "test_head_on_some_rows_equals_head_on_all"),
    "ignores the last layer": (IgnoresTheLastLayer, "test_builds_as_many_layers_as_the_configuration_says"),
    "keeps the embedding for its head": (KeepsTheEmbeddingForItsHead, "test_layers_may_lie_on_several_ranks"),
    "reads a tensor it never uses": (ReadsATensorItNeverUses, "test_every_tensor_it_asks_for_is_used"),
    "ignores what it reads": (IgnoresWhatItReads, "test_ignored_names_are_not_expected_ones"),
    "one cache for all layers": (_of_factory(OneCacheForAllLayers), "test_token_by_token_equals_prompt_at_once"),
    "attention without groups": (
        _of_factory(AttentionWithoutGroups),
        "test_attention_has_the_heads_that_the_cache_is_made_for",
    ),
    "gate and up apart": (
        _of_factory(GateAndUpApart),
        "test_linears_that_read_one_input_are_one_stacked_linear",
    ),
    "query, key and value as any stack": (
        _of_factory(QueryKeyValueAsAnyStack),
        "test_queries_keys_and_values_come_from_qkv_linear",
    ),
    "one tensor in two shapes": (_of_factory(OneTensorInTwoShapes), "test_each_tensor_is_asked_for_in_one_shape"),
}
"""Of each fault, how to build the model that has it and the test made to catch it, with no other program to compare."""

WRONG_FORMULAS: dict[str, MakeModel] = {
    "swaps gate and up": _of_layer(SwapsGateAndUp),
    "scales scores wrongly": _of_layer(ScalesScoresWrongly),
}
"""Faults of models that are models all the same: only a reference tells them from the one that was meant."""
