"""TritonPaged on the host: how many splits, and which rows a step has."""

from __future__ import annotations

import pytest
import torch

from octavo.errors import ConfigError
from octavo.interfaces import BatchLimits
from octavo.plugins.specs import AttentionNeed
from octavo.testing.paged_scene import Batch, PagedScene, Row
from octavo.testing.suite import installed_components
from octavo_attention_triton.options import PagedOptions
from octavo_attention_triton.paged import TritonPaged

NEED = AttentionNeed(
    device="cpu",
    dtype="float32",
    features=frozenset({"prefill", "decode"}),
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    block_size=16,
)
LIMITS = BatchLimits(max_num_requests=8, max_num_tokens=64, max_model_len=512, block_size=16, device="cpu")


def backend(num_kv_splits: int | None = None) -> TritonPaged:
    return TritonPaged(NEED, options=PagedOptions(num_kv_splits=num_kv_splits))


def batch(*lengths: tuple[int, int]) -> Batch:
    """Requests of (context, new) tokens; nothing of them is in the cache."""
    scene = PagedScene(backend(), NEED)
    rows = [Row(request=scene.request(context + new), start=context, end=context + new) for context, new in lengths]
    return scene.batch(rows)


def planned(of: TritonPaged, step: Batch):
    state = of.make_state(LIMITS)
    of.plan(step.layout, state)
    return state


def test_few_rows_are_cut_into_splits_that_fill_the_gpu() -> None:
    state = planned(backend(), batch((400, 1)))
    assert state.num_splits == 7  # 8 programs would fill it twice; 401 positions are 7 tiles of 64


def test_many_rows_fill_the_gpu_without_splits() -> None:
    assert planned(backend(), batch(*[(60, 1)] * 8)).num_splits == 1


def test_short_contexts_are_not_cut_below_a_tile() -> None:
    assert planned(backend(), batch((60, 1), (10, 1))).num_splits == 1


def test_option_fixes_the_number_of_splits() -> None:
    assert planned(backend(3), batch(*[(300, 1)] * 8)).num_splits == 3


def test_rows_without_room_for_their_splits_are_not_cut() -> None:
    assert planned(backend(3), batch((300, 30))).num_splits == 1


@pytest.mark.parametrize("num_rows", range(1, 9))
def test_splits_that_are_chosen_have_room(num_rows: int) -> None:
    state = planned(backend(), batch(*[(250, 1)] * num_rows))
    assert state.num_splits == min(round(8 / num_rows), 4)
    assert num_rows * NEED.num_heads * state.num_splits <= len(state.splits.max)


def test_decodes_are_rows_as_they_are() -> None:
    step = batch((20, 1), (3, 1))
    state = planned(backend(), step)
    assert state.row_requests.tolist() == [0, 1]
    assert state.row_lens is step.layout.seq_lens, "a captured launch reads the lengths where the runner writes them"


def test_token_of_a_prefill_is_a_row_that_sees_those_before_it() -> None:
    state = planned(backend(), batch((20, 1), (5, 3), (0, 2)))
    assert state.row_requests.tolist() == [0, 1, 1, 1, 2, 2]
    assert state.row_lens.tolist() == [21, 6, 7, 8, 1, 2]
    assert state.row_requests.dtype == state.row_lens.dtype == torch.int32


def test_number_of_splits_may_be_given_by_name() -> None:
    component = installed_components().component(
        installed_components().find("attention", "attention-triton/triton-paged"), {"num_kv_splits": 5}
    )
    assert planned(component.build(NEED), batch((400, 1))).num_splits == 5


@pytest.mark.parametrize("wrong", [{"num_kv_splits": 0}, {"num_kv_splits": 65}, {"num_splits": 2}])
def test_wrong_options_are_refused(wrong: dict[str, int]) -> None:
    candidate = installed_components().find("attention", "attention-triton/triton-paged")
    with pytest.raises(ConfigError):
        installed_components().component(candidate, wrong)
