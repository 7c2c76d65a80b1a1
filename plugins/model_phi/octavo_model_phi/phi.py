"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's layers, their projections stored as one tensor a block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import ForwardContext, LayerFactory, ModelArchitecture
from octavo.model_config import ModelConfig

_EMBEDDING = "model.embed_tokens"
_BIASES = ("attention_bias", "mlp_bias", "lm_head_bias")
_ROPE_TYPES = ("default", "longrope")


class PhiLayer:
    """Attention and a gated feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, index: int) -> None:
        prefix, hidden_size, head_dim = f"model.layers.{index}", config.hidden_size, config.head_dim
        num_heads, num_kv_heads, intermediate_size = config.num_heads, config.num_kv_heads, config.intermediate_size
        self.input_norm = factory.norm(f"{prefix}.input_layernorm", hidden_size, config.rms_norm_eps)
        self.qkv = factory.qkv_linear(
            f"{prefix}.self_attn", hidden_size, num_heads, num_kv_heads, head_dim, stored_as="qkv_proj"
        )
        self.attention = factory.attention(
            index,
            num_heads,
            num_kv_heads,
            head_dim,
            head_dim**-0.5,
            rope=config.rope,
            sliding_window=config.sliding_window,
        )
        self.output = factory.linear(f"{prefix}.self_attn.o_proj", num_heads * head_dim, hidden_size)
        self.mlp_norm = factory.norm(f"{prefix}.post_attention_layernorm", hidden_size, config.rms_norm_eps)
        self.gate_up = factory.stacked_linear(
            f"{prefix}.mlp",
            hidden_size,
            {"gate_proj": intermediate_size, "up_proj": intermediate_size},
            stored_as="gate_up_proj",
        )
        self.activation = factory.gated_activation("silu")
        self.down = factory.linear(f"{prefix}.mlp.down_proj", intermediate_size, hidden_size)

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        query, key, value = self.qkv(hidden)
        hidden = self.output(self.attention(query, key, value, context))
        hidden, residual = self.mlp_norm(hidden, residual)
        gate, up = self.gate_up(hidden)
        return self.down(self.activation(gate, up)), residual


class Phi(ModelArchitecture):
    """Phi3ForCausalLM.

    Raises:
        CheckpointError: config.json asks for a computation that is not this one.

    Source: Phi-3: arXiv:2404.14219; Phi-4: arXiv:2412.08905; Phi-4-mini: arXiv:2503.01743.
    """

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        if faults := _faults(config):
            raise CheckpointError(
                f"config.json asks for what {config.architecture} here cannot do: {'; '.join(faults)}."
            )
        self._tied = config.tie_word_embeddings
        self.embed = factory.embedding(_EMBEDDING, config.vocab_size, config.hidden_size)
        self.layers = [PhiLayer(config, factory, index) for index in range(config.num_layers)]
        self.norm = factory.norm("model.norm", config.hidden_size, config.rms_norm_eps)
        self.lm_head = factory.head(
            "lm_head", config.vocab_size, config.hidden_size, tied_to=_EMBEDDING if self._tied else None
        )

    def head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        hidden, _ = self.norm(hidden, residual)
        return self.lm_head(hidden)

    def ignored_names(self) -> Sequence[str]:
        return ("lm_head.weight",) if self._tied else ()


def _faults(config: ModelConfig) -> list[str]:
    """What config.json states and these layers would silently compute otherwise."""
    raw, faults = config.raw, []
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        faults.append(f"hidden_act is {activation!r}; only 'silu' is computed")
    faults += [f"{key} is set; no projection has a bias" for key in _BIASES if raw.get(key)]
    if (rope_type := config.rope.rope_type) not in _ROPE_TYPES:
        faults.append(f"the rope type is {rope_type!r}; known: {', '.join(map(repr, _ROPE_TYPES))}")
    # Without it the core takes the longest context for the original one, and the short factors for any length.
    if rope_type == "longrope" and not _states_original_length(config):
        faults.append("original_max_position_embeddings is missing; 'longrope' goes by it")
    if len(types := sorted(set(raw.get("layer_types") or ()))) > 1:
        faults.append(f"layer_types has {', '.join(map(repr, types))}; the layers do not differ")
    return faults


def _states_original_length(config: ModelConfig) -> bool:
    raw = config.raw
    entries = (raw, raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {})
    return any(entry.get("original_max_position_embeddings") for entry in entries)
