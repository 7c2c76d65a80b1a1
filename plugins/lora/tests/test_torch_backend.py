"""TorchLora against a loop over rows in float64: drawn slots, ranks, positions and tenants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_scene import Scene, make_adapter, wanted, wanted_embedding

from octavo_lora.torch_backend import TorchLora

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
MAX_RANK = 6


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Scene, list[int]]:
    outs = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    scene = Scene(
        in_features=draw(st.integers(1, 40)),
        outs=outs,
        max_rank=MAX_RANK,
        dtype=draw(st.sampled_from(sorted(TOLERANCES, key=str))),
        num_positions=draw(st.integers(1, 4)),
    )
    ranks = st.lists(st.integers(0, MAX_RANK), min_size=len(outs), max_size=len(outs))
    for position in range(scene.num_positions):
        made = make_adapter(scene, draw(ranks), seed=position, scale=draw(st.booleans()), shift=draw(st.booleans()))
        scene.adapters.append(draw(st.sampled_from([made, made, None])))
    positions = draw(st.lists(st.integers(-1, scene.num_positions - 1), min_size=1, max_size=20))
    return scene, positions


def apply(scene: Scene, backend: TorchLora, positions: list[int], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    backend.plan(np.array(positions, np.int32))
    assert backend.active == any(position >= 0 for position in positions)
    return backend.apply(scene.slot, x, y.clone()) if backend.active else y


def check(scene: Scene, backend: TorchLora, positions: list[int]) -> None:
    x, output = scene.inputs(len(positions))
    found = apply(scene, backend, positions, x, output)
    expected = wanted(scene, positions, x, output)
    tolerance = TOLERANCES[scene.dtype] * max(float(expected.abs().max()), 1.0)
    assert (found.double() - expected).abs().max() <= tolerance
    without = torch.tensor(positions) < 0
    assert torch.equal(found[without].view(torch.uint8), output[without].view(torch.uint8))
    for position in set(positions):  # each row as in a batch of its kind
        rows = torch.tensor(positions) == position
        alone = apply(scene, backend, [position] * int(rows.sum()), x[rows], output[rows])
        assert (alone.double() - found[rows].double()).abs().max() <= tolerance


@settings(max_examples=150, deadline=None)
@given(scenes())
def test_each_row_has_its_own_adapter_and_others_keep_their_bits(drawn: tuple[Scene, list[int]]) -> None:
    scene, positions = drawn
    check(scene, scene.backend(TorchLora), positions)


@settings(max_examples=50, deadline=None)
@given(scenes(), st.data())
def test_new_tenants_have_nothing_of_the_old(drawn: tuple[Scene, list[int]], data: st.DataObject) -> None:
    scene, positions = drawn
    backend = scene.backend(TorchLora)
    for step in range(3):
        position = data.draw(st.integers(0, scene.num_positions - 1))
        ranks = data.draw(st.lists(st.integers(0, MAX_RANK), min_size=len(scene.outs), max_size=len(scene.outs)))
        scene.adapters[position] = make_adapter(scene, ranks, seed=10 + step) if any(ranks) else None
        backend.place(position, scene.adapters[position])
        check(scene, backend, positions)


@pytest.mark.parametrize("saves", [False, True])
def test_embedding_rows_are_gathered(saves: bool) -> None:
    scene = Scene(in_features=11, outs=(20,), max_rank=5, kind="embedding", saves=saves)
    own = torch.randn(11, 20) if saves else None
    scene.adapters = [make_adapter(scene, (5,)), make_adapter(scene, (2,), seed=3, saved=own), None]
    backend = scene.backend(TorchLora)
    _, output = scene.inputs(5)
    tokens = torch.tensor([3, 0, 10, 4, 10])
    for positions in ([0, 1, -1, 2, 1], [1] * 5, [0, 0, 1, 1, 1]):
        backend.plan(np.array(positions, np.int32))
        found = backend.apply_embedding(scene.slot, tokens, output.clone())
        assert (found.double() - wanted_embedding(scene, positions, tokens, output)).abs().max() < 1e-5


def test_head_of_an_adapters_own_replaces_the_bases() -> None:
    scene = Scene(in_features=16, outs=(30,), max_rank=2, kind="head", saves=True)
    scene.adapters = [make_adapter(scene, (0,), saved=torch.randn(30, 16)), make_adapter(scene, (2,), seed=2)]
    check(scene, scene.backend(TorchLora), [0, 1, -1, 0])


def test_batch_without_adapters_is_not_active() -> None:
    scene = Scene(in_features=4, outs=(3,), max_rank=2)
    backend = scene.backend(TorchLora)
    for positions in (None, np.full(3, -1, np.int32)):
        backend.plan(np.zeros(3, np.int32))
        assert backend.active
        backend.plan(positions)
        assert not backend.active


def test_slot_that_no_adapter_of_the_batch_changes_gets_its_output_back() -> None:
    scene = Scene(in_features=4, outs=(3,), max_rank=2)
    scene.adapters = [make_adapter(scene, (2,)), make_adapter(scene, (0,))]
    backend = scene.backend(TorchLora)
    x, output = scene.inputs(4)
    backend.plan(np.array([1, -1, 1, 1], np.int32))
    before = output.clone()
    assert backend.apply(scene.slot, x, output) is output
    assert torch.equal(output, before)
