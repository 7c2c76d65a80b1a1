"""The factory a model is built with: it knows the chosen plugins, the model does not."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.interfaces.attention import AttentionBackend
from octavo.interfaces.model import AttentionLayer, LayerFactory, Norm, Unary
from octavo.interfaces.model import StackedLinear as StackedLinearLayer
from octavo.interfaces.quantization import QuantizationMethod
from octavo.nn.attention import Attention
from octavo.nn.embedding import Embedding
from octavo.nn.linear import Linear, StackedLinear
from octavo.nn.norm import RMSNorm
from octavo.nn.weights import WeightLoader


class DeviceLayerFactory(LayerFactory):
    """Layers on one device, their weights expected from `loader`."""

    def __init__(self, method: QuantizationMethod, backend: AttentionBackend, loader: WeightLoader) -> None:
        self._method = method
        self._backend = backend
        self._loader = loader

    def linear(self, prefix: str, in_features: int, out_features: int, *, bias: bool = False) -> Unary:
        return Linear(self._method, self._loader, [prefix], in_features, [out_features], bias=bias)

    def stacked_linear(
        self, prefix: str, in_features: int, parts: Mapping[str, int], *, bias: bool = False
    ) -> StackedLinearLayer:
        names = [f"{prefix}.{part}" for part in parts]
        sizes = list(parts.values())
        if self._method.can_stack:
            linears = [Linear(self._method, self._loader, names, in_features, sizes, bias=bias)]
        else:
            linears = [
                Linear(self._method, self._loader, [name], in_features, [size], bias=bias)
                for name, size in zip(names, sizes, strict=True)
            ]
        return StackedLinear(linears, sizes)

    def qkv_linear(
        self,
        prefix: str,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"),
    ) -> StackedLinearLayer:
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        return self.stacked_linear(prefix, in_features, dict(zip(names, sizes, strict=True)), bias=bias)

    def norm(self, prefix: str, hidden_size: int, eps: float) -> Norm:
        return RMSNorm(self._loader, prefix, hidden_size, eps, self._method.dtype, self._method.device)

    def embedding(self, prefix: str, vocab_size: int, hidden_size: int) -> Unary:
        return Embedding(self._loader, prefix, vocab_size, hidden_size, self._method.dtype, self._method.device)

    def head(self, prefix: str, vocab_size: int, hidden_size: int, *, tied_to: str | None) -> Unary:
        return Linear(self._method, self._loader, [tied_to or prefix], hidden_size, [vocab_size], bias=False)

    def attention(
        self, layer_index: int, num_heads: int, num_kv_heads: int, head_dim: int, scale: float
    ) -> AttentionLayer:
        return Attention(self._backend, layer_index, head_dim, scale)
