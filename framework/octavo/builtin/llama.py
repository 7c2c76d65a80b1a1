"""Llama and the models that share its shape."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from octavo.interfaces.model import ForwardContext, LayerFactory, ModelArchitecture
from octavo.model_config import ModelConfig

_EMBEDDING = "model.embed_tokens"


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
            rope=config.rope,
            sliding_window=config.sliding_window,
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
        self.down = factory.linear(f"{prefix}.mlp.down_proj", config.intermediate_size, hidden_size, bias=mlp_bias)

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        query, key, value = self.qkv(hidden)
        hidden = self.output(self.attention(query, key, value, context))
        hidden, residual = self.mlp_norm(hidden, residual)
        gate, up = self.gate_up(hidden)
        return self.down(functional.silu(gate) * up), residual


class Llama(ModelArchitecture):
    """LlamaForCausalLM: Llama 1 to 3, SmolLM2 and their kin.

    Source: Touvron et al. 2023, arXiv:2302.13971; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        self._tied = config.tie_word_embeddings
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
