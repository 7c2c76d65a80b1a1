"""transformers' attention interface, answered by Octavo: once to learn what each layer asks, then in every step.

transformers hands its attention functions what a model's forward was called with beside its own arguments; `octavo` is
there the callable that answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from octavo.errors import PluginError
from octavo.interfaces.model import AttentionLayer, ForwardContext

TRACED = "octavo-traced"
"""The attention implementation whose masks are `Mask`s."""

PAGED = "octavo"
"""The attention implementation without masks: the backend is causal in each request by itself."""

Arguments = Mapping[str, object]
AttentionCall = Callable[[nn.Module, Tensor, Tensor, Tensor, object, Arguments], Tensor]
"""(attention module, query, key, value, mask, other arguments) -> output.

query [1, num_heads, num_tokens, head_dim], key and value [1, num_kv_heads, num_tokens, head_dim], already rotated;
output [1, num_tokens, num_heads, head_dim].
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """Stands for a causal mask; `window` is how many tokens a query sees, itself included, None: all before it."""

    window: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedAttention:
    """What one layer's attention asked for. `module` is the one that asked."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    logit_softcap: float | None


class AttentionTrace:
    """Answers with empty tensors and notes each attention in the order of the layers.

    Attributes:
        faults: what was asked that Octavo's attention does not compute, in sentences.
    """

    def __init__(self) -> None:
        self.attentions: list[TracedAttention] = []
        self.faults: list[str] = []

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, arguments: Arguments
    ) -> Tensor:
        _, num_heads, num_tokens, head_dim = query.shape
        scale, softcap = arguments.get("scaling"), arguments.get("softcap")
        self.faults += self._faults(module, key, value, mask, arguments)
        self.attentions.append(
            TracedAttention(
                module=module,
                num_heads=num_heads,
                num_kv_heads=key.shape[1],
                head_dim=head_dim,
                scale=float(scale) if isinstance(scale, (int, float)) else head_dim**-0.5,
                sliding_window=mask.window if isinstance(mask, Mask) else None,
                logit_softcap=float(softcap) if isinstance(softcap, (int, float)) else None,
            )
        )
        return query.new_empty(1, num_tokens, num_heads, value.shape[-1])

    def _faults(self, module: nn.Module, key: Tensor, value: Tensor, mask: object, arguments: Arguments) -> list[str]:
        name = type(module).__name__
        faults = []
        if unknown := sorted(key for key, given in arguments.items() if given is not None and key not in _UNDERSTOOD):
            faults.append(f"{name} gives attention {', '.join(unknown)}, which it does not compute")
        if not isinstance(mask, Mask):
            faults.append(f"{name} makes its attention mask by itself")
        if not (arguments.get("is_causal", True) and getattr(module, "is_causal", True)):
            faults.append(f"{name} is not causal")
        if key.shape != value.shape:
            faults.append(f"{name} has keys of {key.shape[-1]} numbers and values of {value.shape[-1]}")
        if any(module is other.module for other in self.attentions):
            faults.append(f"one {name} serves several layers")
        return faults


class PagedAttention:
    """Answers with Octavo's attention layers for one step."""

    def __init__(self, layers: Mapping[nn.Module, AttentionLayer], context: ForwardContext) -> None:
        self._layers = layers
        self._context = context

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, arguments: Arguments
    ) -> Tensor:
        _, num_heads, num_tokens, _ = query.shape
        output = self._layers[module](_rows(query), _rows(key), _rows(value), self._context)
        return output.view(1, num_tokens, num_heads, -1)


# Arguments of attention functions that are read here, are of no meaning without a cache or when nothing is trained,
# or are what was handed on to other parts of the layer.
_UNDERSTOOD = frozenset(
    {
        *("scaling", "softcap", "is_causal", "dropout"),
        "sliding_window",  # the mask tells it, which is what transformers' own attention goes by
        *("position_ids", "position_embeddings", "cache_position", "past_key_values", "use_cache"),
        *("output_attentions", "output_hidden_states", "return_dict"),
    }
)


def _rows(heads: Tensor) -> Tensor:
    """[1, heads, num_tokens, head_dim] -> [num_tokens, heads * head_dim]."""
    return heads[0].transpose(0, 1).flatten(1)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    octavo: AttentionCall | None = None,
    **arguments: object,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; these names and the open end are its interface's."""
    if octavo is None:
        raise PluginError(f"the model does not hand on to {type(module).__name__} what it was called with")
    return octavo(module, query, key, value, attention_mask, arguments), None


def _mask(*positional: object, local_size: int | None = None, **arguments: object) -> Mask:
    """The mask function that transformers calls; `local_size` is a sliding window."""
    return Mask(window=local_size)


AttentionInterface.register(TRACED, _attend)
AttentionInterface.register(PAGED, _attend)
AttentionMaskInterface.register(TRACED, _mask)
