"""One layer's attention: shapes, rotation, and the chosen backend over this layer's cache."""

from __future__ import annotations

from torch import Tensor

from octavo.interfaces.attention import AttentionBackend
from octavo.interfaces.model import ForwardContext
from octavo.nn.rotary import rotate


class Attention:
    """query, key, value [num_tokens, heads * head_dim], unrotated -> [num_tokens, num_heads * head_dim]."""

    def __init__(self, backend: AttentionBackend, layer_index: int, head_dim: int, scale: float) -> None:
        self._backend = backend
        self._layer_index = layer_index
        self._head_dim = head_dim
        self._scale = scale

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext) -> Tensor:
        return self._backend.forward(
            rotate(self._heads(query), context.cos_sin),
            rotate(self._heads(key), context.cos_sin),
            self._heads(value),
            context.kv_caches[self._layer_index],
            context.attention_state,
            self._scale,
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self._head_dim)
