"""TritonLora in Triton's interpreter: against a loop over rows in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_scene import Scene, make_adapter, wanted, wanted_embedding

from octavo_lora.kernels.tiles import block_rows, num_tiles, tile_table
from octavo_lora.placement import group_rows
from octavo_lora.triton_backend import TritonLora

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def check(scene: Scene, positions: list[int]) -> None:
    backend = scene.backend(TritonLora)
    x, output = scene.inputs(len(positions))
    backend.plan(np.array(positions, np.int32))
    found = backend.apply(scene.slot, x, output.clone())
    expected = wanted(scene, positions, x, output)
    assert (found.double() - expected).abs().max() <= TOLERANCES[scene.dtype] * expected.abs().max()
    without = torch.tensor(positions) < 0
    assert torch.equal(found[without], output[without])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixed_batch_in_any_dtype(dtype: torch.dtype) -> None:
    scene = Scene(in_features=64, outs=(48, 16, 16), max_rank=8, dtype=dtype)
    scene.adapters = [make_adapter(scene, (8, 8, 8), seed=1), None, make_adapter(scene, (3, 3, 3), seed=2)]
    check(scene, [0, 2, -1, 0, 0, -1, 2, 2])


@pytest.mark.parametrize("rank", [1, 2, 7, 16, 17, 33, 64])
def test_any_rank(rank: int) -> None:
    scene = Scene(in_features=40, outs=(24,), max_rank=64, adapters=[])
    scene.adapters = [make_adapter(scene, (rank,)), make_adapter(scene, (64,), seed=3)]
    check(scene, [1, 0, -1, 0])


@pytest.mark.parametrize(("in_features", "outs"), [(1, (1,)), (33, (130, 7)), (129, (65,)), (700, (5, 3, 9))])
def test_sizes_that_no_block_divides(in_features: int, outs: tuple[int, ...]) -> None:
    scene = Scene(in_features=in_features, outs=outs, max_rank=5)
    scene.adapters = [make_adapter(scene, (5,) * len(outs)), make_adapter(scene, (2,) * len(outs), seed=4)]
    check(scene, [1, -1, 0, 0, 1])


def test_inputs_are_summed_over_splits() -> None:
    scene = Scene(in_features=1000, outs=(8,), max_rank=4)
    scene.adapters = [make_adapter(scene, (4,))]
    check(scene, [0, 0, -1])


@pytest.mark.parametrize("ranks", [(4, 0, 2), (0, 0, 3), (0, 0, 0)])
def test_parts_of_different_ranks_some_of_them_not_changed(ranks: tuple[int, ...]) -> None:
    scene = Scene(in_features=32, outs=(20, 12, 8), max_rank=4)
    scene.adapters = [make_adapter(scene, ranks), make_adapter(scene, (1, 4, 4), seed=5)]
    check(scene, [0, 1, 0, -1, 1])


@pytest.mark.parametrize(("scale", "shift"), [(True, False), (False, True), (True, True)])
def test_scale_and_shift_are_each_rows_own(scale: bool, shift: bool) -> None:
    scene = Scene(in_features=32, outs=(20, 12), max_rank=4)
    scene.adapters = [make_adapter(scene, (4, 2), scale=scale, shift=shift), make_adapter(scene, (3, 3), seed=5)]
    check(scene, [0, 1, 0, -1, 1])


def test_shift_alone_needs_no_rank() -> None:
    scene = Scene(in_features=32, outs=(20,), max_rank=4)
    scene.adapters = [make_adapter(scene, (0,), shift=True, touch_all=True), None]
    check(scene, [0, 1, -1])


def test_more_rows_of_one_adapter_than_a_tile_has() -> None:
    scene = Scene(in_features=32, outs=(16,), max_rank=4)
    scene.adapters = [make_adapter(scene, (4,)), make_adapter(scene, (4,), seed=9)]
    check(scene, [0] * 37 + [1] * 3 + [-1])


def test_more_rows_than_small_tiles_are_for() -> None:
    scene = Scene(in_features=16, outs=(16,), max_rank=2)
    scene.adapters = [make_adapter(scene, (2,)), make_adapter(scene, (1,), seed=9)]
    check(scene, ([0] * 5 + [1, -1]) * 80)


def test_new_tenant_has_nothing_of_the_old() -> None:
    scene = Scene(in_features=32, outs=(20, 12), max_rank=6)
    scene.adapters = [make_adapter(scene, (6, 6), scale=True, shift=True)]
    backend = scene.backend(TritonLora)
    scene.adapters = [make_adapter(scene, (2, 0), seed=8)]
    backend.place(0, scene.adapters[0])
    x, output = scene.inputs(3)
    backend.plan(np.zeros(3, np.int32))
    found = backend.apply(scene.slot, x, output.clone())
    assert (found.double() - wanted(scene, [0, 0, 0], x, output)).abs().max() < 1e-4


@pytest.mark.parametrize("saves", [False, True])
def test_embedding(saves: bool) -> None:
    scene = Scene(in_features=11, outs=(20,), max_rank=5, kind="embedding", saves=saves)
    own = torch.randn(11, 20) if saves else None
    scene.adapters = [make_adapter(scene, (5,)), make_adapter(scene, (2,), seed=3, saved=own), None]
    backend = scene.backend(TritonLora)
    positions, tokens = [0, 1, -1, 2, 1], torch.tensor([3, 0, 10, 4, 10])
    _, output = scene.inputs(5)
    backend.plan(np.array(positions, np.int32))
    found = backend.apply_embedding(scene.slot, tokens, output.clone())
    assert (found.double() - wanted_embedding(scene, positions, tokens, output)).abs().max() < 1e-4
    assert torch.equal(found[2], output[2])


def test_head_of_an_adapters_own_replaces_the_bases() -> None:
    scene = Scene(in_features=16, outs=(30,), max_rank=2, kind="head", saves=True)
    scene.adapters = [make_adapter(scene, (0,), saved=torch.randn(30, 16)), make_adapter(scene, (2,), seed=2)]
    check(scene, [0, 1, -1, 0])


def test_captured_plan_of_no_adapter_changes_no_row() -> None:
    scene = Scene(in_features=32, outs=(20,), max_rank=4)
    scene.adapters = [make_adapter(scene, (4,))]
    backend = scene.backend(TritonLora)
    backend.plan(np.full(6, -1, np.int32), captured=True)
    assert backend.active
    x, output = scene.inputs(6)
    assert torch.equal(backend.apply(scene.slot, x, output.clone()), output)


def test_launches_and_addresses_are_the_same_in_all_plans_of_as_many_rows() -> None:
    scene = Scene(in_features=32, outs=(20,), max_rank=4, num_positions=4)
    backend = scene.backend(TritonLora)
    seen = set()
    for positions in ([-1] * 40, [0] * 40, [0, 1, 2, 3] * 10, list(range(-1, 3)) * 10):
        backend.plan(np.array(positions, np.int32), captured=True)
        tiles = backend._tiles
        seen.add((tiles.table.shape, tiles.table.data_ptr(), tiles.order.data_ptr(), tiles.block_rows))
    assert len(seen) == 1


def test_replayed_launches_read_the_newest_plan() -> None:
    scene = Scene(in_features=32, outs=(20,), max_rank=4)
    scene.adapters = [make_adapter(scene, (4,)), make_adapter(scene, (3,), seed=4)]
    backend = scene.backend(TritonLora)
    x, output = scene.inputs(4)
    backend.plan(np.full(4, -1, np.int32), captured=True)
    recorded = backend._tiles  # what a graph holds
    positions = [1, -1, 0, 1]
    backend.plan(np.array(positions, np.int32), captured=True)
    backend._tiles = recorded
    found = backend.apply(scene.slot, x, output.clone())
    assert (found.double() - wanted(scene, positions, x, output)).abs().max() < 1e-4


@pytest.mark.parametrize("num_rows", [1, 2, 15, 16, 17, 100, 512, 513, 700])
@pytest.mark.parametrize("max_loras", [1, 3, 8])
def test_tiles_hold_each_row_once_however_they_are_mixed(num_rows: int, max_loras: int) -> None:
    generator = np.random.default_rng(num_rows)
    for weights in ([1.0] * (max_loras + 1), [0.0, *[1.0] * max_loras], [0.0, 50.0, *[0.1] * (max_loras - 1)]):
        shares = np.array(weights) / sum(weights)
        positions = generator.choice(np.arange(-1, max_loras), num_rows, p=shares).astype(np.int32)
        rows = group_rows(positions)
        table = tile_table(rows, num_rows, max_loras)
        assert len(table) == num_tiles(num_rows, max_loras)
        found = [
            (int(row), position)
            for position, first, end in table.tolist()
            if position >= 0
            for row in rows.order[first:end]
        ]
        assert max((end - first for _, first, end in table.tolist()), default=0) <= block_rows(num_rows)
        assert sorted(found) == [(row, at) for row, at in enumerate(positions.tolist()) if at >= 0]
