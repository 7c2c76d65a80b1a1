"""Gemma 2 and Gemma 3 for text: norms on both sides of each block, and layers behind a window among full ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import ForwardContext, LayerFactory, ModelArchitecture
from octavo.model_config import ModelConfig, RopeConfig

_EMBEDDING = "model.embed_tokens"
_NORM_OFFSET = 1.0  # a checkpoint's norm weights say how far from one the factor is

_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA_2, _GEMMA_3 = "Gemma2ForCausalLM", "Gemma3ForCausalLM"

_STATED = {
    _GEMMA_2: ("head_dim", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    _GEMMA_3: ("head_dim", "sliding_window"),
}
"""Keys of config.json that have no neutral default; every published checkpoint has them."""


class GemmaAttention:
    """Grouped-query attention of one layer; Gemma 3 normalises each query and key head before its rotation."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, index: int) -> None:
        prefix, head_dim = f"model.layers.{index}.self_attn", config.head_dim
        bias = bool(config.raw.get("attention_bias", False))
        layer_type = layer_types(config)[index]
        self.head_dim = head_dim
        self.qkv = factory.qkv_linear(
            prefix, config.hidden_size, config.num_heads, config.num_kv_heads, head_dim, bias=bias
        )
        self.normalises_heads = config.architecture == _GEMMA_3
        if self.normalises_heads:
            eps = config.rms_norm_eps
            self.query_norm = factory.norm(f"{prefix}.q_norm", head_dim, eps, weight_offset=_NORM_OFFSET)
            self.key_norm = factory.norm(f"{prefix}.k_norm", head_dim, eps, weight_offset=_NORM_OFFSET)
        self.attention = factory.attention(
            index,
            config.num_heads,
            config.num_kv_heads,
            head_dim,
            float(config.raw.get("query_pre_attn_scalar", 256)) ** -0.5,
            rope=rope_of(config, layer_type),
            sliding_window=config.sliding_window if layer_type == _SLIDING else None,
            logit_softcap=config.attn_logit_softcapping,
        )
        self.output = factory.linear(f"{prefix}.o_proj", config.num_heads * head_dim, config.hidden_size, bias=bias)

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        query, key, value = self.qkv(hidden)
        if self.normalises_heads:
            query, _ = self.query_norm(self._heads(query), None)
            key, _ = self.key_norm(self._heads(key), None)
            query, key = query.flatten(1), key.flatten(1)
        return self.output(self.attention(query, key, value, context))

    def _heads(self, x: Tensor) -> Tensor:
        # A rank of several holds fewer heads than the configuration says: the tensor tells how many.
        return x.view(x.shape[0], -1, self.head_dim)


class GemmaLayer:
    """Attention and a gated feed-forward network, each between two norms; the second is not of the stream."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, index: int) -> None:
        prefix, hidden_size, intermediate_size = f"model.layers.{index}", config.hidden_size, config.intermediate_size
        self.input_norm, self.attention_norm, self.mlp_norm, self.output_norm = (
            factory.norm(f"{prefix}.{name}", hidden_size, config.rms_norm_eps, weight_offset=_NORM_OFFSET)
            for name in (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            )
        )
        self.attention = GemmaAttention(config, factory, index)
        self.gate_up = factory.stacked_linear(
            f"{prefix}.mlp", hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        )
        self.activation = factory.gated_activation("gelu_tanh")
        self.down = factory.linear(f"{prefix}.mlp.down_proj", intermediate_size, hidden_size)

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        hidden, _ = self.attention_norm(self.attention(hidden, context), None)
        hidden, residual = self.mlp_norm(hidden, residual)
        gate, up = self.gate_up(hidden)
        hidden, _ = self.output_norm(self.down(self.activation(gate, up)), None)
        return hidden, residual


class Gemma(ModelArchitecture):
    """Gemma2ForCausalLM and Gemma3ForCausalLM.

    Raises:
        CheckpointError: config.json asks for a computation that is not this one.

    Source: Gemma 2: arXiv:2408.00118; Gemma 3: arXiv:2503.19786.
    """

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        if faults := _faults(config):
            raise CheckpointError(
                f"config.json asks for what {config.architecture} here cannot do: {'; '.join(faults)}."
            )
        # Gemma's config.json leaves the key out where the head is tied; elsewhere that means it is not.
        self._tied = bool(config.raw.get("tie_word_embeddings", True))
        self._embedding = factory.embedding(_EMBEDDING, config.vocab_size, config.hidden_size)
        self._embedding_scale = config.hidden_size**0.5
        self.layers = [GemmaLayer(config, factory, index) for index in range(config.num_layers)]
        self.norm = factory.norm("model.norm", config.hidden_size, config.rms_norm_eps, weight_offset=_NORM_OFFSET)
        self.lm_head = factory.head(
            "lm_head", config.vocab_size, config.hidden_size, tied_to=_EMBEDDING if self._tied else None
        )
        self._softcap: float | None = config.raw.get("final_logit_softcapping")

    def embed(self, token_ids: Tensor) -> Tensor:
        hidden = self._embedding(token_ids)
        # The factor is rounded to the model's dtype, as in training: 55.5, not 55.4, for 3072 in bfloat16.
        return hidden * torch.tensor(self._embedding_scale, dtype=hidden.dtype)

    def head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        hidden, _ = self.norm(hidden, residual)
        logits = self.lm_head(hidden)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def ignored_names(self) -> Sequence[str]:
        return ("lm_head.weight",) if self._tied else ()


def layer_types(config: ModelConfig) -> list[str]:
    """Of each layer, whether it sees a window or its whole context; by their pattern where they are not listed."""
    if listed := config.raw.get("layer_types"):
        return list(listed)
    pattern = 2 if config.architecture == _GEMMA_2 else int(config.raw.get("sliding_window_pattern", 6))
    return [_SLIDING if (index + 1) % pattern else _FULL for index in range(config.num_layers)]


def rope_of(config: ModelConfig, layer_type: str) -> RopeConfig:
    """The rotation of a layer of this type; Gemma 3's layers behind a window have another than its full ones.

    Both spellings: rope_parameters by layer type (transformers 5); rope_theta with rope_scaling for the full layers
    and rope_local_base_freq for the others (before).
    """
    if config.architecture == _GEMMA_2:
        return config.rope
    raw = config.raw
    entries = raw.get("rope_parameters") or {_FULL: raw.get("rope_scaling")}
    thetas = {_SLIDING: raw.get("rope_local_base_freq", 10_000.0), _FULL: raw.get("rope_theta", 1_000_000.0)}
    return RopeConfig.from_dict({"rope_theta": thetas[layer_type], **(entries.get(layer_type) or {})}, raw)


def _faults(config: ModelConfig) -> list[str]:
    """What config.json states, or leaves open, and these layers would silently compute otherwise."""
    raw = config.raw
    faults = [f"{key} is missing" for key in _STATED[config.architecture] if key not in raw]
    if (activation := raw.get("hidden_activation") or "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        faults.append(f"hidden_activation is {activation!r}; only 'gelu_pytorch_tanh' is computed")
    if raw.get("use_bidirectional_attention"):
        faults.append("use_bidirectional_attention is set; attention is causal")
    if config.architecture == _GEMMA_3 and config.attn_logit_softcapping is not None:
        faults.append("attn_logit_softcapping is set; Gemma 3's scores have no soft-cap")
    types = layer_types(config)
    if unknown := sorted(set(types) - {_SLIDING, _FULL}):
        faults.append(f"layer_types has {', '.join(map(repr, unknown))}; known: {_FULL!r}, {_SLIDING!r}")
    if len(types) != config.num_layers:
        faults.append(f"layer_types has {len(types)} entries for {config.num_layers} layers")
    if _SLIDING in types and config.sliding_window is None:
        faults.append("layers are behind a window and sliding_window does not say of what length")
    return faults
