"""What the conformance suite does not ask: padding requests, all-padding steps, planning ahead, waiting for nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.errors import UnavailableComponentError
from octavo.interfaces import PAD_SLOT, AttentionBackend, AttentionParameters, BatchLayout, BatchLimits
from octavo.plugins.specs import AttentionNeed
from octavo_attention_flash.flash_attention import FlashAttention
from octavo_attention_flash.flashinfer_attention import FlashInferAttention
from octavo_attention_flash.kv_writes import plan_writes, write_kv

Install = Callable[..., None]

NEED = AttentionNeed(
    dtype="bfloat16",
    features=frozenset({"prefill", "decode"}),
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    block_size=4,
)
PLAIN = AttentionParameters(scale=0.1)
GENERATIONS = {"flash-attn-3": 4, "flash-attn-4": 4, "flash-attn-2": 256}


def step(lengths: list[tuple[int, int]], block_size: int = 4) -> BatchLayout:
    """Requests of (context, new) tokens, each in blocks of its own from block 1 on; (-1, 1) is a padding request."""
    query_start_loc = np.cumsum([0, *(new for _, new in lengths)], dtype=np.int32)
    seq_lens = np.array([context + new for context, new in lengths], np.int32)
    width = -(-int(seq_lens.max()) // block_size)
    table = torch.arange(1, len(lengths) * width + 1, dtype=torch.int32).view(len(lengths), width)
    slots = [
        int(table[row, position // block_size]) * block_size + position % block_size if context >= 0 else PAD_SLOT
        for row, (context, new) in enumerate(lengths)
        for position in range(context, context + new)
    ]
    num_decodes = sum(new == 1 and context != 0 for context, new in lengths)
    return BatchLayout(
        num_requests=len(lengths),
        num_tokens=len(slots),
        num_decode_requests=num_decodes,
        num_decode_tokens=num_decodes,
        max_query_len=max(new for _, new in lengths),
        max_seq_len=int(seq_lens.max()),
        block_size=block_size,
        query_start_loc=torch.from_numpy(query_start_loc),
        seq_lens=torch.from_numpy(seq_lens),
        block_table=table,
        slot_mapping=torch.tensor(slots),
        host_query_start_loc=query_start_loc,
        host_seq_lens=seq_lens,
        has_padding=PAD_SLOT in slots,
    )


def limits(need: AttentionNeed = NEED) -> BatchLimits:
    return BatchLimits(
        max_num_requests=8, max_num_tokens=64, max_model_len=64, block_size=need.block_size, device="cpu"
    )


def inputs(layout: BatchLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(layout.num_tokens, heads, 64, generator=generator).bfloat16() for heads in (2, 1, 1))


# ---------------------------------------------------------------------------------------------------- writes


def test_padding_is_written_nowhere_and_the_rest_to_its_slots() -> None:
    slots = torch.tensor([PAD_SLOT, 6, PAD_SLOT, 9])
    layout = replace(step([(0, 4)]), slot_mapping=slots, has_padding=True)
    cache = tuple(torch.zeros(4, 4, 1, 1) for _ in range(2))
    key = torch.arange(1.0, 5.0).view(4, 1, 1)
    write_kv(key, -key, cache, plan_writes(layout))
    wanted = torch.zeros(16)
    wanted[6], wanted[9] = 2.0, 4.0
    assert torch.equal(cache[0].flatten(), wanted)
    assert torch.equal(cache[1].flatten(), -wanted)


def test_step_of_padding_alone_leaves_the_cache_as_it_is() -> None:
    layout = replace(step([(0, 4)]), slot_mapping=torch.full((4,), PAD_SLOT), has_padding=True)
    cache = tuple(torch.randn(4, 4, 1, 1) for _ in range(2))
    before = [buffer.clone() for buffer in cache]
    write_kv(torch.ones(4, 1, 1), torch.ones(4, 1, 1), cache, plan_writes(layout))
    assert all(map(torch.equal, cache, before))


# ------------------------------------------------------------------------------------------------ flash-attn


@pytest.mark.parametrize("library", GENERATIONS)
def test_padding_request_disturbs_nobody_and_gets_finite_output(install: Install, library: str) -> None:
    install(library)
    need = replace(NEED, block_size=GENERATIONS[library])
    backend = FlashAttention(need)
    state = backend.make_state(limits(need))
    outputs = []
    for lengths in ([(2, 1), (0, 3)], [(2, 1), (-1, 1), (0, 3)]):
        layout = step(lengths, need.block_size)
        cache = backend.kv_layout().allocate(8, "cpu")
        query, key, value = inputs(step([(2, 1), (0, 3)]))
        if len(lengths) == 3:  # the padding's token behind the first
            query, key, value = (torch.cat([x[:1], torch.ones_like(x[:1]), x[1:]]) for x in (query, key, value))
        backend.plan(layout, state)
        outputs.append(backend.forward(query, key, value, cache, state, PLAIN))
    assert torch.equal(outputs[0], outputs[1][[0, 2, 3, 4]])
    assert outputs[1].isfinite().all()


def test_flash_attn_is_not_built_where_no_generation_can_serve(install: Install) -> None:
    install("flash-attn-2")
    with pytest.raises(UnavailableComponentError, match="block_size is 4: set block_size=256"):
        FlashAttention(NEED)


def test_flash_attn_logs_the_generation_that_it_uses(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("flash-attn-3")
    with caplog.at_level("INFO"):
        FlashAttention(NEED).make_state(limits())
    assert caplog.messages == ["attention by FlashAttention-3 (flash-attn-3 3.0.0b1)"]


@pytest.mark.parametrize("backend", [FlashAttention, FlashInferAttention])
def test_layout_is_told_without_importing_the_library(install: Install, backend: type[AttentionBackend]) -> None:
    install("flash-attn-3", "flashinfer")
    assert backend(NEED).kv_layout().name == "torch-nhd"
    assert not {"flash_attn_interface", "flashinfer"} & set(sys.modules)


# ------------------------------------------------------------------------------------------------ flashinfer


class Plans:
    """Counts how often wrappers are made and planned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import flashinfer

        self.num_wrappers, self.planned_with = 0, []
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        make, plan = wrapper.__init__, wrapper.plan

        def counted_make(self_: object, *arguments: object) -> None:
            self.num_wrappers += 1
            make(self_, *arguments)

        def counted_plan(self_: object, *arguments: object, **options: object) -> None:
            self.planned_with.append((options["window_left"], options["logits_soft_cap"]))
            plan(self_, *arguments, **options)

        monkeypatch.setattr(wrapper, "__init__", counted_make)
        monkeypatch.setattr(wrapper, "plan", counted_plan)


@pytest.fixture
def plans(install: Install, monkeypatch: pytest.MonkeyPatch) -> Plans:
    install("flashinfer")
    return Plans(monkeypatch)


def test_flashinfer_plans_at_start_with_every_window_and_cap_that_needs_a_kernel(plans: Plans) -> None:
    features = NEED.features | {"sliding_window", "logit_softcap"}
    FlashInferAttention(replace(NEED, features=features, sliding_window=7, logit_softcap=30.0)).make_state(limits())
    assert set(plans.planned_with) == {(-1, 0.0), (6, 0.0), (-1, 30.0), (6, 30.0)}


def test_flashinfer_plans_once_a_step_for_equal_layers(plans: Plans) -> None:
    backend = FlashInferAttention(NEED)
    state = backend.make_state(limits())
    plans.planned_with.clear()
    layout = step([(0, 3), (0, 5)])
    query, key, value = inputs(layout)
    for num_steps in (1, 2):
        backend.plan(layout, state)
        for _ in range(4):
            backend.forward(query, key, value, backend.kv_layout().allocate(8, "cpu"), state, PLAIN)
        assert len(plans.planned_with) == num_steps
    assert plans.num_wrappers == 2, "one for the scale of the start, one for this"


def test_flashinfer_leaves_a_wrapper_alone_whose_plan_is_still_being_copied(plans: Plans) -> None:
    backend = FlashInferAttention(NEED)
    state = backend.make_state(limits())
    layout = step([(0, 3)])
    query, key, value = inputs(layout)

    class Copy:
        done = False

        def query(self) -> bool:
            return self.done

        def record(self) -> None:
            self.done = False

    def run() -> None:
        backend.plan(layout, state)
        backend.forward(query, key, value, backend.kv_layout().allocate(8, "cpu"), state, PLAIN)

    run()
    [planner] = state.planners[PLAIN]
    planner.copied = copy = Copy()
    run()
    assert len(state.planners[PLAIN]) == 2
    copy.done = True
    run()
    assert not copy.done, "the one whose copy is done is planned again"
    assert len(state.planners[PLAIN]) == 2
