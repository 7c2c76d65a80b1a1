"""ModelArchitecture socket, the factory it builds its layers with, and the context of one forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from octavo.interfaces.attention import KVCache
from octavo.interfaces.kernels import Activation
from octavo.model_config import ModelConfig, RopeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardContext:
    """What every layer of one forward pass may read.

    Attributes:
        positions: [num_tokens] int64, each token's position in its request.
        rotary: the rotary table rows of these positions, gathered once a step: one (cos, sin) for each distinct
            RopeConfig that layers named, [num_tokens, 1, rotary_dim] each. Read by the layers that the factory makes.
        kv_caches: one KVCache a layer.
        attention_state: the attention backend's state, planned for this step.
    """

    positions: Tensor
    rotary: Sequence[tuple[Tensor, Tensor]]
    kv_caches: Sequence[KVCache]
    attention_state: object


Unary = Callable[[Tensor], Tensor]
"""A layer of one input: linears, embeddings, head."""


class Norm(Protocol):
    def __call__(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add `residual` (if any), normalise the sum; return (normalised, sum)."""


class GatedActivation(Protocol):
    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """activation(gate) * up, [num_tokens, size] each."""


class AttentionLayer(Protocol):
    def __call__(self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext) -> Tensor:
        """[num_tokens, heads * head_dim] each, unrotated -> [num_tokens, num_heads * head_dim]."""


class StackedLinear(Protocol):
    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """One output for each named part, [num_tokens, out_features of the part]."""


class DecoderLayer(Protocol):
    def __call__(self, hidden: Tensor, residual: Tensor | None, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """(hidden, residual) in, (hidden, residual) out; their sum is the residual stream."""


class LayerFactory(ABC):
    """Hands a model its layers and never tells which plugin answers for them.

    `prefix` is the checkpoint name without the parameter's suffix: "model.layers.0.mlp.down_proj".
    """

    @abstractmethod
    def linear(self, prefix: str, in_features: int, out_features: int, *, bias: bool = False) -> Unary:
        """The projection that ends a block (o_proj, down_proj); among several devices its input is what is parted."""

    @abstractmethod
    def stacked_linear(
        self,
        prefix: str,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool = False,
        stored_as: str | None = None,
    ) -> StackedLinear:
        """Projections that read one input (gate, up); `parts` maps the name after `prefix` to its out_features.

        Among several devices each output is parted.

        Args:
            stored_as: the checkpoint holds the parts as one linear of this name, in their order; None: one by one.
        """

    @abstractmethod
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
        stored_as: str | None = None,
    ) -> StackedLinear:
        """Query, key and value projections, parted among devices by whole heads; few KV heads are repeated.

        Args:
            stored_as: as in `stacked_linear`.
        """

    @abstractmethod
    def norm(self, prefix: str, hidden_size: int, eps: float, *, weight_offset: float = 0.0) -> Norm:
        """RMSNorm over the last axis, of `hidden_size`; [num_tokens, heads, head_dim] normalises each head.

        Args:
            weight_offset: added to the checkpoint's weight, the product then rounded once; Gemma stores weight - 1.
        """

    @abstractmethod
    def gated_activation(self, activation: Activation) -> GatedActivation:
        """What a gated feed-forward network computes between its linears."""

    @abstractmethod
    def embedding(self, prefix: str, vocab_size: int, hidden_size: int) -> Unary: ...

    @abstractmethod
    def head(self, prefix: str, vocab_size: int, hidden_size: int, *, tied_to: str | None) -> Unary:
        """The linear that makes logits; `tied_to` is the embedding's prefix whose tensor it shares."""

    @abstractmethod
    def parameter(self, name: str, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        """A tensor of the checkpoint that is in no other layer, by its whole name; called when the weights are loaded.

        It is in the model's dtype, and among several devices each has the whole.
        """

    @abstractmethod
    def attention(
        self,
        layer_index: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        *,
        rope: RopeConfig | None,
        sliding_window: int | None = None,
        logit_softcap: float | None = None,
    ) -> AttentionLayer:
        """Rotation, cache and attention of one layer.

        Args:
            rope: how query and key are rotated; None: not at all.
            sliding_window: tokens a query sees, itself included: the ModelConfig's, or None for all.
            logit_softcap: the ModelConfig's attn_logit_softcapping, or None.

        Raises:
            PluginError: a window or a cap that is not the ModelConfig's, for which no backend was asked.
        """


class ModelArchitecture(ABC):
    """Built from a factory: `embed`, `layers` and `head` only, so that each can be built where its rank needs it.

    Attributes:
        can_be_captured: whether a CUDA graph can capture `embed` and `layers`: they neither wait for the device nor
            choose by what is on it.
    """

    can_be_captured: bool = True
    embed: Unary
    layers: Sequence[DecoderLayer]

    @abstractmethod
    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None: ...

    @abstractmethod
    def head(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The last layer's outputs, [num_rows, hidden_size] each, of the rows that sample -> [num_rows, vocab_size]."""

    def ignored_names(self) -> Sequence[str]:
        """Patterns (fnmatch) of checkpoint tensors that this architecture knowingly does not read."""
        return ()
