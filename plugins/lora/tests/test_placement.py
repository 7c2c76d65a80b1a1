"""Positions: their memory, what of an adapter goes into which slot, and rows by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_scene import Scene, make_adapter

from octavo.interfaces import LoraLimits, LoraPart
from octavo_lora.placement import PlacedLora, Slot, group_rows
from octavo_lora.torch_backend import TorchLora


def limits(*, modules_to_save: bool = False) -> LoraLimits:
    return LoraLimits(
        max_loras=2,
        max_lora_rank=4,
        max_num_rows=16,
        dtype=torch.float32,
        device="cpu",
        modules_to_save=modules_to_save,
    )


def held_bytes(slot: Slot) -> int:
    tensors = [slot.a, slot.b, slot.scale, slot.shift, slot.table, slot.saved]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("modules_to_save", [False, True])
def test_bytes_are_known_before_they_are_taken(modules_to_save: bool) -> None:
    backend = TorchLora(limits(modules_to_save=modules_to_save))
    slots = [
        backend.linear([LoraPart(module="q", in_features=6, out_features=8)] * 2),
        backend.linear([LoraPart(module="lm_head", in_features=6, out_features=11)], is_head=True),
        backend.embedding(LoraPart(module="embed", in_features=11, out_features=6)),
    ]
    before = backend.num_bytes
    backend.allocate()
    assert before == backend.num_bytes == sum(held_bytes(slot) for slot in slots)


def test_whole_weights_take_memory_only_by_option() -> None:
    sizes = []
    for modules_to_save in (False, True):
        backend = TorchLora(limits(modules_to_save=modules_to_save))
        backend.linear([LoraPart(module="lm_head", in_features=6, out_features=11)], is_head=True)
        backend.linear([LoraPart(module="q", in_features=6, out_features=8)])
        sizes.append(backend.num_bytes)
    assert sizes[1] - sizes[0] == 2 * 11 * 6 * 4


def outputs_of(backend: PlacedLora, slot: Slot, x: torch.Tensor) -> torch.Tensor:
    backend.plan(np.zeros(len(x), np.int32))
    return backend.apply(slot, x, torch.zeros(len(x), slot.out_features))


def test_shares_of_a_modules_outputs_make_up_the_whole() -> None:
    scene = Scene(in_features=6, outs=(8,), max_rank=4)
    adapter = make_adapter(scene, (3,), scale=True, shift=True)
    backend = TorchLora(limits())
    whole = backend.linear([LoraPart(module="m0", in_features=6, out_features=8)])
    shares = [
        backend.linear([LoraPart(module="m0", in_features=6, out_features=size, output_start=start)])
        for start, size in ((0, 3), (3, 5))
    ]
    backend.allocate()
    backend.place(0, adapter)
    x = torch.randn(4, 6)
    found = torch.cat([outputs_of(backend, share, x) for share in shares], dim=1)
    assert torch.allclose(found, outputs_of(backend, whole, x), atol=1e-5)


def test_shares_of_a_modules_inputs_sum_to_the_whole() -> None:
    scene = Scene(in_features=6, outs=(8,), max_rank=4)
    backend = TorchLora(limits())
    whole = backend.linear([LoraPart(module="m0", in_features=6, out_features=8)])
    first = backend.linear([LoraPart(module="m0", in_features=2, out_features=8)])
    second = backend.linear([LoraPart(module="m0", in_features=4, out_features=8, input_start=2)])
    backend.allocate()
    backend.place(0, make_adapter(scene, (3,)))
    x = torch.randn(4, 6)
    found = outputs_of(backend, first, x[:, :2]) + outputs_of(backend, second, x[:, 2:])
    assert torch.allclose(found, outputs_of(backend, whole, x), atol=1e-5)


def test_shares_of_a_head_of_an_adapters_own_make_up_the_whole() -> None:
    scene = Scene(in_features=6, outs=(8,), max_rank=4)
    saved = torch.randn(8, 6)
    backend = TorchLora(limits(modules_to_save=True))
    share = backend.linear([LoraPart(module="m0", in_features=6, out_features=5, output_start=3)], is_head=True)
    backend.allocate()
    backend.place(0, make_adapter(scene, (0,), saved=saved))
    x = torch.randn(4, 6)
    assert torch.allclose(outputs_of(backend, share, x), x @ saved[3:].t(), atol=1e-5)


def test_part_that_the_adapter_does_not_touch_takes_no_rows() -> None:
    scene = Scene(in_features=6, outs=(8, 4, 2), max_rank=4)
    scene.adapters = [make_adapter(scene, (3, 0, 2))]
    scene.backend(TorchLora)
    assert [(change.part, change.start, change.rank) for change in scene.slot.changes[0]] == [(0, 0, 3), (2, 3, 2)]
    assert scene.slot.num_rows(0) == 5
    assert scene.slot.table[0].tolist() == [5, 0, 0, 3, 0, 0, 8, 0, 0, 0, 0, 0, 3, 2, 0, 12, 14]


def test_emptied_position_changes_nothing() -> None:
    scene = Scene(in_features=6, outs=(8,), max_rank=4)
    scene.adapters = [make_adapter(scene, (3,), scale=True)]
    backend = scene.backend(TorchLora)
    backend.place(0, None)
    assert scene.slot.changes[0] == ()
    assert scene.slot.table[0].tolist() == [0] * 7


def test_head_is_acted_on_while_an_adapter_that_changes_it_is_placed() -> None:
    scene = Scene(in_features=6, outs=(8,), max_rank=4, kind="head")
    scene.adapters = [make_adapter(scene, (3,)), make_adapter(scene, (0,))]
    backend = scene.backend(TorchLora)
    assert backend.acts_on_head
    backend.place(0, None)
    assert not backend.acts_on_head


def test_other_linears_do_not_act_on_the_head() -> None:
    scene = Scene(in_features=6, outs=(8,), max_rank=4)
    scene.adapters = [make_adapter(scene, (3,))]
    assert not scene.backend(TorchLora).acts_on_head


def test_rows_are_grouped_by_position_in_their_order() -> None:
    rows = group_rows(np.array([2, -1, 0, 2, 0, -1, 2], np.int32))
    assert rows.order.tolist() == [2, 4, 0, 3, 6]
    assert list(rows.groups) == [(0, 0, 2), (2, 2, 5)]


def test_rows_without_adapters_are_in_no_group() -> None:
    assert group_rows(np.full(3, -1, np.int32)).groups == []
    assert group_rows(np.empty(0, np.int32)).groups == []
