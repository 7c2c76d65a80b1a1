"""Qwen2, Qwen2.5 and Qwen3: one frame of layers, two attentions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from octavo.errors import CheckpointError
from octavo.interfaces import ForwardContext, LayerFactory, ModelArchitecture
from octavo.model_config import ModelConfig

_EMBEDDING = "model.embed_tokens"


class Qwen2Attention:
    """Grouped-query attention; query, key and value have biases, the output has none."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, index: int) -> None:
        prefix, head_dim = f"model.layers.{index}.self_attn", config.head_dim
        self.qkv = factory.qkv_linear(
            prefix, config.hidden_size, config.num_heads, config.num_kv_heads, head_dim, bias=True
        )
        self.attention = factory.attention(
            index,
            config.num_heads,
            config.num_kv_heads,
            head_dim,
            head_dim**-0.5,
            rope=config.rope,
            sliding_window=_window(config, index),
        )
        self.output = factory.linear(f"{prefix}.o_proj", config.num_heads * head_dim, config.hidden_size)

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        query, key, value = self.qkv(hidden)
        return self.output(self.attention(query, key, value, context))


class Qwen3Attention:
    """Grouped-query attention whose queries and keys are normalised head by head before their rotation."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, index: int) -> None:
        prefix, head_dim = f"model.layers.{index}.self_attn", config.head_dim
        bias = bool(config.raw.get("attention_bias", False))
        self.head_dim = head_dim
        self.qkv = factory.qkv_linear(
            prefix, config.hidden_size, config.num_heads, config.num_kv_heads, head_dim, bias=bias
        )
        self.query_norm = factory.norm(f"{prefix}.q_norm", head_dim, config.rms_norm_eps)
        self.key_norm = factory.norm(f"{prefix}.k_norm", head_dim, config.rms_norm_eps)
        self.attention = factory.attention(
            index,
            config.num_heads,
            config.num_kv_heads,
            head_dim,
            head_dim**-0.5,
            rope=config.rope,
            sliding_window=_window(config, index),
        )
        self.output = factory.linear(f"{prefix}.o_proj", config.num_heads * head_dim, config.hidden_size, bias=bias)

    def __call__(self, hidden: Tensor, context: ForwardContext) -> Tensor:
        query, key, value = self.qkv(hidden)
        query, _ = self.query_norm(self._heads(query), None)
        key, _ = self.key_norm(self._heads(key), None)
        return self.output(self.attention(query.flatten(1), key.flatten(1), value, context))

    def _heads(self, x: Tensor) -> Tensor:
        # A rank of several holds fewer heads than the configuration says: the tensor tells how many.
        return x.view(x.shape[0], -1, self.head_dim)


_ATTENTION: dict[str, type[Qwen2Attention] | type[Qwen3Attention]] = {
    "Qwen2ForCausalLM": Qwen2Attention,
    "Qwen3ForCausalLM": Qwen3Attention,
}


def _window(config: ModelConfig, index: int) -> int | None:
    """Of one layer: config.json names each layer's type, or how many of the first layers see everything."""
    if not config.raw.get("use_sliding_window", False):
        return None
    if layer_types := config.raw.get("layer_types"):
        return config.sliding_window if layer_types[index] == "sliding_attention" else None
    return config.sliding_window if index >= config.raw.get("max_window_layers", 28) else None


class QwenLayer:
    """Attention and a gated feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, factory: LayerFactory, index: int) -> None:
        prefix, hidden_size, intermediate_size = f"model.layers.{index}", config.hidden_size, config.intermediate_size
        self.input_norm = factory.norm(f"{prefix}.input_layernorm", hidden_size, config.rms_norm_eps)
        self.attention = _ATTENTION[config.architecture](config, factory, index)
        self.mlp_norm = factory.norm(f"{prefix}.post_attention_layernorm", hidden_size, config.rms_norm_eps)
        self.gate_up = factory.stacked_linear(
            f"{prefix}.mlp", hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        )
        self.activation = factory.gated_activation("silu")
        self.down = factory.linear(f"{prefix}.mlp.down_proj", intermediate_size, hidden_size)

    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm(hidden, residual)
        hidden, residual = self.mlp_norm(self.attention(hidden, context), residual)
        gate, up = self.gate_up(hidden)
        return self.down(self.activation(gate, up)), residual


class Qwen(ModelArchitecture):
    """Qwen2ForCausalLM (Qwen2, Qwen2.5) and Qwen3ForCausalLM.

    Raises:
        CheckpointError: config.json asks for a computation that is not this one.

    Source: Qwen2: arXiv:2407.10671; Qwen2.5: arXiv:2412.15115; Qwen3: arXiv:2505.09388.
    """

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        if faults := _faults(config):
            raise CheckpointError(
                f"config.json asks for what {config.architecture} here cannot do: {'; '.join(faults)}."
            )
        self._tied = config.tie_word_embeddings
        self.embed = factory.embedding(_EMBEDDING, config.vocab_size, config.hidden_size)
        self.layers = [QwenLayer(config, factory, index) for index in range(config.num_layers)]
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
    faults = []
    if (activation := config.raw.get("hidden_act", "silu")) != "silu":
        faults.append(f"hidden_act is {activation!r}; only 'silu' is computed")
    layer_types = set(config.raw.get("layer_types") or ())
    if unknown := sorted(layer_types - {"full_attention", "sliding_attention"}):
        faults.append(
            f"layer_types has {', '.join(map(repr, unknown))}; layers attend to their whole context or to a window"
        )
    if "sliding_attention" in layer_types and config.sliding_window is None:
        faults.append("layer_types has 'sliding_attention', and no sliding_window is in use")
    return faults
