"""The prefill kernel compared with its formula in float64, over pages in random order whose other slots hold NaN."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import AttentionParameters
from octavo.plugins.specs import AttentionNeed
from octavo.testing.paged_scene import Batch, PagedScene, Row
from octavo_attention_triton.cache import write_kv
from octavo_attention_triton.flash import TritonFlash
from octavo_attention_triton.kernels.flash_prefill import flash_prefill, flash_prefill_reference
from octavo_attention_triton.tuned import FlashConfig

Lengths = tuple[tuple[int, int], ...]  # (tokens already in the cache, tokens of this step) of each request

# Decodes, a request of one token, prefills and chunks around the borders of tiles.
MIXED: Lengths = ((1, 1), (33, 1), (0, 1), (0, 17), (5, 3), (31, 33), (64, 7))
SHORT: Lengths = ((17, 1), (0, 5), (30, 19))
TILES = [(16, 32), (32, 64), (128, 16)]  # (block_m, block_n)
# Largest error of numbers from a normal distribution; the interpreter cuts off where a GPU rounds to bfloat16.
TOLERANCES = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 4e-2}


def make_need(
    heads: tuple[int, int] = (4, 2),
    *,
    dtype: str = "float32",
    head_dim: int = 64,
    block_size: int = 16,
    kv_cache_dtype: str = "auto",
) -> AttentionNeed:
    return AttentionNeed(
        dtype=dtype,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        block_size=block_size,
        kv_cache_dtype=kv_cache_dtype,
    )


def make_step(need: AttentionNeed, lengths: Lengths) -> tuple[PagedScene, Batch]:
    """Requests whose contexts are in the cache, and the step that computes what is new, written too."""
    scene = PagedScene(TritonFlash(need), need)
    requests = [scene.request(context + new) for context, new in lengths]
    pairs = list(zip(requests, lengths, strict=True))
    if contexts := [Row(request=one, start=0, end=context) for one, (context, _) in pairs if context]:
        write(scene, scene.batch(contexts))
    batch = scene.batch([Row(request=one, start=start, end=start + new) for one, (start, new) in pairs])
    write(scene, batch)
    return scene, batch


def write(scene: PagedScene, batch: Batch) -> None:
    write_kv(batch.key, batch.value, scene.cache, batch.layout.slot_mapping)


def attend(
    scene: PagedScene,
    batch: Batch,
    parameters: AttentionParameters | None = None,
    tile: tuple[int, int] = (32, 32),
) -> Tensor:
    return flash_prefill(
        batch.query,
        scene.cache,
        batch.layout,
        parameters=parameters or AttentionParameters(scale=0.125),
        max_num_requests=batch.layout.num_requests,
        config=FlashConfig(block_m=tile[0], block_n=tile[1], num_warps=4, num_stages=2),
    )


def check(
    scene: PagedScene,
    batch: Batch,
    parameters: AttentionParameters | None = None,
    tile: tuple[int, int] = (32, 32),
    allowed: float | None = None,
) -> None:
    parameters = parameters or AttentionParameters(scale=0.125)
    found = attend(scene, batch, parameters, tile)
    wanted = flash_prefill_reference(batch.query, scene.cache, batch.layout, parameters)
    assert found.shape == batch.query.shape
    assert found.dtype == batch.query.dtype
    error = float((found.double() - wanted).abs().nan_to_num(nan=math.inf).max())
    assert error <= (allowed or TOLERANCES[str(scene.need.dtype)])


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 2)], ids=str)
def test_equals_the_formula_whatever_the_tile(heads: tuple[int, int], tile: tuple[int, int]) -> None:
    check(*make_step(make_need(heads), MIXED), tile=tile)


@pytest.mark.parametrize("tile", TILES[:2], ids=str)
@pytest.mark.parametrize("window", [1, 16, 17, 35, 40])
def test_window_shows_the_last_tokens_and_no_other(window: int, tile: tuple[int, int]) -> None:
    parameters = AttentionParameters(scale=0.125, sliding_window=window)
    check(*make_step(make_need((4, 1)), MIXED), parameters, tile)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("cap", [1.5, 50.0])
def test_scores_are_capped(cap: float, window: int | None) -> None:
    parameters = AttentionParameters(scale=2.0, sliding_window=window, logit_softcap=cap)
    check(*make_step(make_need(), SHORT), parameters)


@pytest.mark.parametrize("head_dim", [16, 20, 72, 80, 96, 112, 128, 256])
def test_every_head_size(head_dim: int) -> None:
    check(*make_step(make_need(head_dim=head_dim), SHORT))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 112])
def test_every_dtype(head_dim: int, dtype: str) -> None:
    check(*make_step(make_need(dtype=dtype, head_dim=head_dim), SHORT))


@pytest.mark.parametrize("block_size", [8, 32, 64])
def test_every_block_size(block_size: int) -> None:
    check(*make_step(make_need(block_size=block_size), MIXED))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("window", [None, 17])
def test_fp8_cache_is_read_with_its_scales(window: int | None, dtype: str) -> None:
    parameters = AttentionParameters(scale=0.125, sliding_window=window)
    check(*make_step(make_need(dtype=dtype, kv_cache_dtype="fp8"), SHORT), parameters)


def test_more_query_heads_than_rows_of_a_tile() -> None:
    check(*make_step(make_need((24, 1)), SHORT), tile=(16, 16))


@pytest.mark.parametrize("lengths", [((0, 1),), ((0, 40),), ((40, 40),)], ids=str)
def test_one_request_alone(lengths: Lengths) -> None:
    check(*make_step(make_need(), lengths))


def test_many_requests_of_which_each_has_a_tile_of_its_own() -> None:
    check(*make_step(make_need((2, 1)), tuple((context, 1) for context in range(1, 22))), tile=(16, 32))


def test_query_may_be_a_slice_of_one_wider_tensor() -> None:
    scene, batch = make_step(make_need(), SHORT)
    wide = torch.cat([batch.query, batch.key, batch.value], dim=1)
    check(scene, replace(batch, query=wide[:, : scene.need.num_heads]))


def test_request_of_length_0_gets_zeros() -> None:
    scene, batch = make_step(make_need(), ((17, 1), (5, 1), (0, 5)))
    seq_lens = batch.layout.seq_lens.clone()
    seq_lens[1] = 0
    found = attend(scene, replace(batch, layout=replace(batch.layout, seq_lens=seq_lens)))
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert torch.equal(found[[0, 2, 3, 4, 5, 6]], attend(scene, batch)[[0, 2, 3, 4, 5, 6]])


def test_scores_that_are_far_apart_neither_overflow_nor_vanish() -> None:
    scene, batch = make_step(make_need(), SHORT)
    check(scene, batch, AttentionParameters(scale=100.0), allowed=1e-3)  # the scores themselves are in the thousands


def test_cache_of_other_heads_is_refused() -> None:
    scene, batch = make_step(make_need(), ((0, 3),))
    other = PagedScene(TritonFlash(make_need(head_dim=128)), make_need(head_dim=128))
    with pytest.raises(ShapeError, match=r"Wanted a query .* found \[3, 4, 64\] over \[\d+, 16, 2, 128\]"):
        attend(other, batch)
    with pytest.raises(ShapeError, match=r"found \[3, 3, 64\]"):
        attend(scene, replace(batch, query=batch.query[:, :3]))
