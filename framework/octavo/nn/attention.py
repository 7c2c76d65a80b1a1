"""One layer's attention: shapes, rotation, and the chosen backend over this layer's cache."""

from __future__ import annotations

from torch import Tensor

from octavo.interfaces.attention import AttentionBackend, AttentionParameters
from octavo.interfaces.model import ForwardContext


class Attention:
    """query, key, value [num_tokens, heads * head_dim], unrotated -> [num_tokens, num_heads * head_dim].

    `rotary_index` is this layer's entry of `ForwardContext.rotary`; None leaves query and key as they are.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        layer_index: int,
        head_dim: int,
        parameters: AttentionParameters,
        rotary_index: int | None,
    ) -> None:
        self._backend = backend
        self._layer_index = layer_index
        self._head_dim = head_dim
        self._parameters = parameters
        self._rotary_index = rotary_index

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext) -> Tensor:
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        backend, kv_cache, state = self._backend, context.kv_caches[self._layer_index], context.attention_state
        if self._rotary_index is None:
            return backend.forward(query, key, value, kv_cache, state, self._parameters)
        rotary = context.rotary[self._rotary_index]
        return backend.rotate_and_forward(query, key, value, rotary, kv_cache, state, self._parameters)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self._head_dim)
