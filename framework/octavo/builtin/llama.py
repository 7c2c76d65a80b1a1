"""Llama and the models that share its layers: Mistral, whose queries see a window; SmolLM3, which rotates in some."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces.model import ForwardContext, LayerFactory, ModelArchitecture
from octavo.model_config import ModelConfig

_EMBEDDING = "model.embed_tokens"
_MISTRAL, _SMOLLM3 = "MistralForCausalLM", "SmolLM3ForCausalLM"


class LlamaLayer:
    """Attention and a gated feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, index: int) -> None:
        prefix, hidden_size, head_dim = f"model.layers.{index}", config.hidden_size, config.head_dim
        attention_bias = bool(config.raw.get("attention_bias", False))
        mlp_bias = bool(config.raw.get("mlp_bias", False))
        self.input_norm = factory.norm(f"{prefix}.input_layernorm", hidden_size, config.rms_norm_eps)
        self.qkv = factory.qkv_linear(
            f"{prefix}.self_attn", hidden_size, config.num_heads, config.num_kv_heads, head_dim, bias=attention_bias
        )
        self.attention = factory.attention(
            index,
            config.num_heads,
            config.num_kv_heads,
            head_dim,
            head_dim**-0.5,
            rope=config.rope if _is_rotated(config, index) else None,
            sliding_window=config.sliding_window if _has_window(config, index) else None,
        )
        self.output = factory.linear(
            f"{prefix}.self_attn.o_proj", config.num_heads * head_dim, hidden_size, bias=attention_bias
        )
        self.mlp_norm = factory.norm(f"{prefix}.post_attention_layernorm", hidden_size, config.rms_norm_eps)
        self.gate_up = factory.stacked_linear(
            f"{prefix}.mlp",
            hidden_size,
            {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
            bias=mlp_bias,
        )
        self.activation = factory.gated_activation("silu")
        self.down = factory.linear(f"{prefix}.mlp.down_proj", config.intermediate_size, hidden_size, bias=mlp_bias)

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        query, key, value = self.qkv(hidden)
        hidden = self.output(self.attention(query, key, value, context))
        hidden, residual = self.mlp_norm(hidden, residual)
        gate, up = self.gate_up(hidden)
        return self.down(self.activation(gate, up)), residual


class Llama(ModelArchitecture):
    """LlamaForCausalLM (Llama 1 to 3, SmolLM2 and their kin), MistralForCausalLM and SmolLM3ForCausalLM.

    Raises:
        CheckpointError: config.json asks for another activation.

    Source: Touvron et al. 2023, arXiv:2302.13971; grouped queries: Ainslie et al. 2023, arXiv:2305.13245; Mistral:
    Jiang et al. 2023, arXiv:2310.06825; layers without rotation: Yang et al. 2025, arXiv:2501.18795.
    """

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        if (activation := config.raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise CheckpointError(
                f"config.json says that hidden_act is {activation!r}; {config.architecture} here computes 'silu' only."
            )
        # What a file leaves out is the architecture's own default: SmolLM3's is a tied head.
        self._tied = bool(config.raw.get("tie_word_embeddings", config.architecture == _SMOLLM3))
        self.embed = factory.embedding(_EMBEDDING, config.vocab_size, config.hidden_size)
        self.layers = [LlamaLayer(config, factory, index) for index in range(config.num_layers)]
        self.norm = factory.norm("model.norm", config.hidden_size, config.rms_norm_eps)
        self.lm_head = factory.head(
            "lm_head", config.vocab_size, config.hidden_size, tied_to=_EMBEDDING if self._tied else None
        )

    def head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        hidden, _ = self.norm(hidden, residual)
        return self.lm_head(hidden)

    def ignored_names(self) -> Sequence[str]:
        return (*(("lm_head.weight",) if self._tied else ()), "*.rotary_emb.inv_freq")


def _is_rotated(config: ModelConfig, index: int) -> bool:
    """Whether a layer has a rotation: config.json lists them, or says that every so manieth has none."""
    if config.architecture != _SMOLLM3:
        return True
    if (listed := config.raw.get("no_rope_layers")) is not None:
        return bool(listed[index])
    return (index + 1) % int(config.raw.get("no_rope_layer_interval", 4)) != 0


def _has_window(config: ModelConfig, index: int) -> bool:
    """Whether a layer has the configuration's window: Mistral's all have, SmolLM3's where the file says so."""
    if config.architecture != _SMOLLM3:
        return config.architecture == _MISTRAL
    if not config.raw.get("use_sliding_window", False):
        return False
    if layer_types := config.raw.get("layer_types"):
        return bool(layer_types[index] == "sliding_attention")
    return not _is_rotated(config, index)
