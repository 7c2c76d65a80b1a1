"""Attention by two backends that share one KV layout: decode tokens go to one, the others to the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from octavo.errors import PluginError
from octavo.interfaces.attention import (
    AttentionBackend,
    AttentionParameters,
    BatchLayout,
    BatchLimits,
    KVCache,
    KVLayout,
)
from octavo.interfaces.manifest import ChosenComponent
from octavo.plugins.specs import AttentionNeed


@dataclass(slots=True)
class _State:
    """Both backends' states, and how many tokens of this step are each one's."""

    prefill: object
    decode: object
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0


def build_attention(prefill: ChosenComponent, decode: ChosenComponent, need: AttentionNeed) -> AttentionBackend:
    """One backend when the same was chosen for both, else the two behind one."""

    def build(chosen: ChosenComponent, *features: str) -> AttentionBackend:
        backend: AttentionBackend = chosen.build(replace(need, features=need.features | set(features)))
        return backend

    if prefill == decode:
        return build(prefill, "prefill", "decode")
    return SplitAttention(build(prefill, "prefill"), build(decode, "decode"))


class SplitAttention(AttentionBackend):
    """Gives each backend its slice of the batch, whose rows are ordered decode first; neither knows of the other.

    Raises:
        PluginError: their layouts differ although their specs name the same.
    """

    def __init__(self, prefill: AttentionBackend, decode: AttentionBackend) -> None:
        super().__init__(replace(prefill.need, features=prefill.need.features | decode.need.features))
        layouts = prefill.kv_layout(), decode.kv_layout()
        if layouts[0] != layouts[1]:
            raise PluginError(
                f"{type(prefill).__name__} and {type(decode).__name__} were chosen to share one KV layout but make it "
                f"differently: {layouts[0]} and {layouts[1]}. Choose one of them for both."
            )
        self._prefill = prefill
        self._decode = decode
        self.graph_mode = decode.graph_mode  # a step of decodes alone is its alone

    def kv_layout(self) -> KVLayout:
        return self._prefill.kv_layout()

    def make_state(self, limits: BatchLimits) -> _State:
        return _State(prefill=self._prefill.make_state(limits), decode=self._decode.make_state(limits))

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, _State)
        state.num_decode_tokens = layout.num_decode_tokens
        state.num_prefill_tokens = layout.num_tokens - layout.num_decode_tokens
        if state.num_decode_tokens:
            self._decode.plan(layout.decodes(), state.decode)
        if state.num_prefill_tokens:
            self._prefill.plan(layout.prefills(), state.prefill)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        def part(backend: AttentionBackend, its_state: object, tokens: slice) -> Tensor:
            return backend.forward(query[tokens], key[tokens], value[tokens], kv_cache, its_state, parameters)

        return self._of_parts(state, part)

    def rotate_and_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor],
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        def part(backend: AttentionBackend, its_state: object, tokens: slice) -> Tensor:
            cos_sin = rotary[0][tokens], rotary[1][tokens]
            inputs = query[tokens], key[tokens], value[tokens]
            return backend.rotate_and_forward(*inputs, cos_sin, kv_cache, its_state, parameters)

        return self._of_parts(state, part)

    def _of_parts(self, state: object, part: Callable[[AttentionBackend, object, slice], Tensor]) -> Tensor:
        """The decodes' output before the others'; `part` computes one from (backend, its state, its tokens)."""
        assert isinstance(state, _State)
        border, outputs = state.num_decode_tokens, []
        if border:
            outputs.append(part(self._decode, state.decode, slice(0, border)))
        if state.num_prefill_tokens:
            outputs.append(part(self._prefill, state.prefill, slice(border, border + state.num_prefill_tokens)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
