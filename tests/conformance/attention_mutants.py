"""Backends that each get one step of attention wrong, and the test of the suite that says so."""

from __future__ import annotations

import dataclasses

import torch
from conformance.plain_attention import PlainAttention
from torch import Tensor

from octavo.interfaces import AttentionParameters, BatchLayout, KVCache, KVLayout, rotate
from octavo.plugins.specs import AttentionNeed

# -------------------------------------------------------------------------------------------- what is attended to


class IgnoresBlockTable(PlainAttention):
    def slots(self, block_ids: Tensor, seq_len: int) -> Tensor:
        return torch.arange(seq_len) + self.need.block_size


class ReadsPadding(PlainAttention):
    """Rounds each context up to whole blocks."""

    def seq_len(self, layout: BatchLayout, index: int) -> int:
        size = self.need.block_size
        return min(-(-int(layout.seq_lens[index]) // size) * size, layout.block_table.shape[1] * size)


class OffByOne(PlainAttention):
    """Forgets that a decode's own token is part of its context."""

    def seq_len(self, layout: BatchLayout, index: int) -> int:
        return int(layout.seq_lens[index]) - (index < layout.num_decode_requests)


class NoCausalMask(PlainAttention):
    def hidden(self, num_tokens: int, seq_len: int) -> Tensor:
        return torch.zeros(num_tokens, seq_len, dtype=torch.bool)


class MaskFromTheTop(PlainAttention):
    """Aligns the mask of a chunk with the beginning of the context, not with its end."""

    def hidden(self, num_tokens: int, seq_len: int) -> Tensor:
        return torch.arange(seq_len) > torch.arange(num_tokens).unsqueeze(1)


class WindowWithoutItself(PlainAttention):
    """Counts the tokens before a query, not the query with them: one key too many."""

    def behind_window(self, scores: Tensor, parameters: AttentionParameters) -> Tensor:
        if parameters.sliding_window is not None:
            parameters = dataclasses.replace(parameters, sliding_window=parameters.sliding_window + 1)
        return super().behind_window(scores, parameters)


class WindowInEveryLayer(PlainAttention):
    """Takes the window from the need, also in layers that have none."""

    def behind_window(self, scores: Tensor, parameters: AttentionParameters) -> Tensor:
        return super().behind_window(scores, dataclasses.replace(parameters, sliding_window=self.need.sliding_window))


class TrustsHostLengths(PlainAttention):
    def seq_len(self, layout: BatchLayout, index: int) -> int:
        return int(layout.host_seq_lens[index])


# ---------------------------------------------------------------------------------------------------- arithmetic


class TilesGroups(PlainAttention):
    def heads_of(self, keys: Tensor) -> Tensor:
        return keys.repeat(1, self.group, 1)


class HardCodesScale(PlainAttention):
    def scale(self, scale: float) -> float:
        return float(self.need.head_dim**-0.5)


class ScaleOf64(PlainAttention):
    """Right for the commonest head size, and for any scale a caller gives that is not the usual one."""

    def scale(self, scale: float) -> float:
        return 0.125 if scale == self.need.head_dim**-0.5 else scale


class IgnoresCap(PlainAttention):
    def cap(self, parameters: AttentionParameters) -> float | None:
        return None


class CapsHard(PlainAttention):
    """Cuts scores off at the cap."""

    def scores(self, query: Tensor, keys: Tensor, scale: float) -> Tensor:
        scores = super().scores(query, keys, scale)
        cap = self.need.logit_softcap
        return scores if cap is None else scores.clamp(-cap, cap)

    def cap(self, parameters: AttentionParameters) -> float | None:
        return None


class LowPrecisionProbabilities(PlainAttention):
    def softmax(self, scores: Tensor) -> Tensor:
        return super().softmax(scores).bfloat16().float()


class Overflows(PlainAttention):
    """Softmax without subtracting the largest score."""

    def softmax(self, scores: Tensor) -> Tensor:
        weights = scores.exp()
        return weights / weights.sum(dim=-1, keepdim=True)


class AnswersInFloat32(PlainAttention):
    def result(self, output: Tensor) -> Tensor:
        return output


class NeverTheSame(PlainAttention):
    def result(self, output: Tensor) -> Tensor:
        return super().result(output * (1 + 1e-6 * torch.rand_like(output)))


class OnlyPowersOfTwo(PlainAttention):
    """Rounds a head down to a power of two, as a tile of a kernel without a mask would."""

    def scores(self, query: Tensor, keys: Tensor, scale: float) -> Tensor:
        size = 1 << (self.need.head_dim.bit_length() - 1)
        return super().scores(query[..., :size], keys[..., :size], scale)


# ------------------------------------------------------------------------------------------------ cache and inputs


class WritesNextSlotToo(PlainAttention):
    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, layout: BatchLayout) -> None:
        last = dataclasses.replace(
            layout, slot_mapping=torch.where(layout.slot_mapping < 0, -1, layout.slot_mapping + 1)
        )
        super().write(kv_cache, key, value, last)
        super().write(kv_cache, key, value, layout)


class WritesPadding(PlainAttention):
    """PAD_SLOT is -1, and index -1 is the last slot."""

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, layout: BatchLayout) -> None:
        for buffer, new in zip(kv_cache, (key, value), strict=True):
            buffer.flatten(0, 1)[layout.slot_mapping] = new


class ClampsPadding(PlainAttention):
    """Writes padding to slot 0."""

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, layout: BatchLayout) -> None:
        slots = layout.slot_mapping.clamp(min=0)
        super().write(kv_cache, key, value, dataclasses.replace(layout, slot_mapping=slots))


class ClearsBlocks(PlainAttention):
    """Takes a block in which it writes for a new one."""

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, layout: BatchLayout) -> None:
        for buffer in kv_cache:
            buffer[layout.slot_mapping // self.need.block_size] = 0
        super().write(kv_cache, key, value, layout)


class WritesOnce(PlainAttention):
    """Writes in the first layer after a plan only."""

    def plan(self, layout: BatchLayout, state: object) -> None:
        super().plan(layout, state)
        self.has_written = False

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, layout: BatchLayout) -> None:
        if not self.has_written:
            super().write(kv_cache, key, value, layout)
        self.has_written = True


class BlocksKnowTheirNumber(PlainAttention):
    """Stores keys with a sign that depends on the block's id, so that a block cannot be copied."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        keys = kv_cache[0]
        keys[::2] *= -1
        output = super().forward(query, key, value, kv_cache, state, parameters)
        keys[::2] *= -1
        return output


class KeepsLongestLengths(PlainAttention):
    """Keeps lengths in its state and only ever raises them."""

    def plan(self, layout: BatchLayout, state: object) -> None:
        assert isinstance(state, dict)
        kept = state.setdefault("seq_lens", torch.zeros(32, dtype=torch.int32))[: layout.num_requests]
        state["layout"] = dataclasses.replace(layout, seq_lens=torch.maximum(kept, layout.seq_lens, out=kept))


class ScalesQueryInPlace(PlainAttention):
    def scores(self, query: Tensor, keys: Tensor, scale: float) -> Tensor:
        return super().scores(query.mul_(scale), keys, 1.0)


class WantsContiguousValues(PlainAttention):
    """Reads values as if they lay without gaps, as a kernel with fixed strides would."""

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, layout: BatchLayout) -> None:
        packed = torch.empty(value.shape).stride()
        super().write(kv_cache, key, value.as_strided(value.shape, packed), layout)


# ------------------------------------------------------------------------------------- rotation, padding, graphs


class RotatesNeighbours(PlainAttention):
    """Pairs each element with its neighbour, the other convention."""

    def rotated(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        size = rotary[0].shape[-1]
        order = torch.arange(size).view(2, size // 2).T.flatten()  # 0, size / 2, 1, size / 2 + 1 ...
        turned = rotate(x[..., :size][..., order.argsort()], rotary)[..., order]
        return torch.cat((turned, x[..., size:]), dim=2)


class RotatesWhatIsLast(PlainAttention):
    """Of a partial rotation the last elements, not the first."""

    def rotated(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        kept = x.shape[2] - rotary[0].shape[-1]
        return torch.cat((x[..., :kept], rotate(x[..., kept:], rotary)), dim=2)


class RotatesPackedHeads(PlainAttention):
    """Reads queries and keys as if they lay without gaps, when it rotates them."""

    def rotated(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        return super().rotated(x.as_strided(x.shape, torch.empty(x.shape).stride()), rotary)


class ReadsOneKeyAtLeast(PlainAttention):
    def seq_len(self, layout: BatchLayout, index: int) -> int:
        return max(1, super().seq_len(layout, index))


class WritesForNobody(PlainAttention):
    """Takes a request without a slot for one that begins in its first block."""

    def write(self, kv_cache: KVCache, key: Tensor, value: Tensor, layout: BatchLayout) -> None:
        slots = torch.where(layout.slot_mapping < 0, 0, layout.slot_mapping)
        super().write(kv_cache, key, value, dataclasses.replace(layout, slot_mapping=slots))


class LengthsOfThePlan(PlainAttention):
    """Copies the lengths in `plan`, to memory that no graph knows."""

    def plan(self, layout: BatchLayout, state: object) -> None:
        super().plan(dataclasses.replace(layout, seq_lens=layout.seq_lens.clone()), state)


class LaunchesForHostLengths(PlainAttention):
    """Leaves out of its work what the host knew to be long, when it planned."""

    def plan(self, layout: BatchLayout, state: object) -> None:
        super().plan(layout, state)
        state["longest"] = int(layout.seq_lens.max())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        layout, longest = state["layout"], state["longest"]
        seen = {**state, "layout": dataclasses.replace(layout, seq_lens=layout.seq_lens.clamp(max=longest))}
        return super().forward(query, key, value, kv_cache, seen, parameters)


# ----------------------------------------------------------------------------------------------------------- fp8


class CutsToFp8(PlainAttention):
    """Rounds toward zero."""

    def fp8(self, x: Tensor) -> Tensor:
        nearest = super().fp8(x)
        too_far = nearest.float().abs() > x.abs()
        return (nearest.view(torch.uint8) - too_far.to(torch.uint8)).view(nearest.dtype)


class OneScaleForAllHeads(PlainAttention):
    def scale_of(self, x: Tensor) -> Tensor:
        return super().scale_of(x).amax(dim=1, keepdim=True).expand(x.shape[:2]) * 4


class ScalesOfKeysForValues(PlainAttention):
    def read(self, kv_cache: KVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        if len(kv_cache) == 4:
            kv_cache = (*kv_cache[:2], kv_cache[2], kv_cache[2])
        return super().read(kv_cache, slots)


class ScalesInAnotherOrder(PlainAttention):
    def kv_layout(self) -> KVLayout:
        layout = super().kv_layout()
        return dataclasses.replace(layout, buffers=(*layout.buffers[:2], *layout.buffers[:1:-1]))


class ReadsWhatIsNewUnrounded(PlainAttention):
    """Attends to this step's keys as they were before they were written in fp8."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        self.new = dict(zip(state["layout"].slot_mapping.tolist(), zip(key, value, strict=True), strict=True))
        return super().forward(query, key, value, kv_cache, state, parameters)

    def read(self, kv_cache: KVCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        found = super().read(kv_cache, slots)
        for index, slot in enumerate(slots.tolist()):
            if slot in self.new:
                for tensor, unrounded in zip(found, self.new[slot], strict=True):
                    tensor[index] = unrounded
        return found


# ---------------------------------------------------------------------------------------------------- contract


class MisnamesLayout(PlainAttention):
    def kv_layout(self) -> KVLayout:
        return dataclasses.replace(super().kv_layout(), name="torch-hnd")


class LayoutDependsOnPhase(PlainAttention):
    def kv_layout(self) -> KVLayout:
        layout = super().kv_layout()
        return layout if "prefill" in self.need.features else dataclasses.replace(layout, name="torch-nhd-decode")


class SwapsKeysAndValues(PlainAttention):
    """Publishes a layout's name and fills its buffers the other way round."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: KVCache,
        state: object,
        parameters: AttentionParameters,
    ) -> Tensor:
        return super().forward(query, key, value, kv_cache[::-1], state, parameters)


MUTANTS: dict[type[PlainAttention], str] = {
    IgnoresBlockTable: "decodes_equal_the_formula",
    ReadsPadding: "decodes_equal_the_formula",
    OffByOne: "decodes_equal_the_formula",
    NoCausalMask: "later_tokens_of_a_prefill_change_nothing_before_them",
    MaskFromTheTop: "chunks_attend_to_their_context_and_to_themselves",
    TrustsHostLengths: "lengths_on_the_host_may_exceed_those_of_decodes",
    WindowWithoutItself: "a_window_shows_the_last_tokens_and_no_other",
    WindowInEveryLayer: "one_plan_serves_layers_with_and_without_a_window_or_a_cap",
    IgnoresCap: "scores_are_capped_smoothly",
    CapsHard: "scores_are_capped_smoothly",
    TilesGroups: "query_heads_are_grouped_in_order_over_the_kv_heads",
    HardCodesScale: "scale_is_the_one_that_was_given",
    ScaleOf64: "every_head_size_that_it_accepts",
    LowPrecisionProbabilities: "decodes_equal_the_formula",
    Overflows: "large_scores_do_not_overflow",
    AnswersInFloat32: "every_dtype_that_it_accepts",
    NeverTheSame: "same_step_gives_the_same_bits",
    OnlyPowersOfTwo: "every_head_size_that_it_accepts",
    WritesNextSlotToo: "writes_no_block_but_those_of_its_slots",
    WritesPadding: "padding_is_not_written_and_disturbs_nobody",
    ClampsPadding: "padding_is_not_written_and_disturbs_nobody",
    ClearsBlocks: "what_one_step_writes_the_next_ones_read",
    WritesOnce: "one_plan_serves_every_layer",
    BlocksKnowTheirNumber: "copied_block_means_the_same_elsewhere",
    KeepsLongestLengths: "plan_forgets_the_one_before",
    ScalesQueryInPlace: "inputs_are_left_as_they_are",
    WantsContiguousValues: "inputs_may_be_slices_of_one_wider_tensor",
    RotatesNeighbours: "rotates_queries_and_keys_in_the_same_pass",
    RotatesWhatIsLast: "rotates_queries_and_keys_in_the_same_pass",
    RotatesPackedHeads: "rotates_queries_and_keys_in_the_same_pass",
    ReadsOneKeyAtLeast: "requests_that_are_padding_get_something_finite_and_change_nothing",
    WritesForNobody: "requests_that_are_padding_get_something_finite_and_change_nothing",
    LengthsOfThePlan: "captured_step_goes_by_what_its_tensors_hold_when_it_is_replayed",
    LaunchesForHostLengths: "captured_step_goes_by_what_its_tensors_hold_when_it_is_replayed",
    CutsToFp8: "fp8_cache_holds_each_head_rounded_to_the_nearest",
    OneScaleForAllHeads: "fp8_cache_holds_each_head_rounded_to_the_nearest",
    ScalesOfKeysForValues: "attention_over_an_fp8_cache_equals_the_formula_over_what_it_holds",
    ReadsWhatIsNewUnrounded: "attention_over_an_fp8_cache_equals_the_formula_over_what_it_holds",
    ScalesInAnotherOrder: "fp8_cache_of_a_published_name_is_the_published_one",
    MisnamesLayout: "kv_layout_has_the_name_that_its_spec_publishes",
    LayoutDependsOnPhase: "kv_layout_follows_from_the_need_alone",
    SwapsKeysAndValues: "other_backends_of_its_layout_read_what_it_writes",
}
"""Each mutant, and the test of the suite that names its fault (others may fail too)."""


def refuses_without_a_word(need: AttentionNeed) -> list[str]:
    """A probe whose reasons are none."""
    return ["no"] if need.block_size == 3 else []


def refuses_windows(need: AttentionNeed) -> list[str]:
    """A probe that takes back what its spec declares."""
    return ["it knows no windows after all"] if need.sliding_window else []


def raises_on_odd_head_sizes(need: AttentionNeed) -> list[str]:
    """A probe with a fault."""
    return [] if need.head_dim % 2 == 0 else [str(1 // 0)]
