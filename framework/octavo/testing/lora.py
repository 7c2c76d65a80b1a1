"""LoraSuite: what every LoRA backend must do, checked row by row in float64 on adapters that are drawn.

class TestMine(LoraSuite):
    component = "my-plugin/mine"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.interfaces.lora import NO_ADAPTER, AdapterWeights, LoraBackend, LoraLimits
from octavo.plugins.specs import LoraSpec, Need
from octavo.testing.drawn_adapters import (
    HIDDEN,
    MAX_RANK,
    MAX_ROWS,
    SLOTS,
    DrawnSlot,
    Scene,
    TensorsMade,
    adapter_of,
    share,
)
from octavo.testing.suite import Suite

DTYPES = ("float32", "bfloat16", "float16")
_NUM_POSITIONS = 4
_MIXES: Mapping[str, list[int]] = {
    "one row": [2],
    "one adapter for all": [1] * 9,
    "no adapter at either end": [NO_ADAPTER, 0, 0, 3, NO_ADAPTER],
    "in no order": [3, 0, NO_ADAPTER, 2, 0, 1, NO_ADAPTER, 3, 0, 2, 2],
    "a long one beside short ones": [0] * 40 + [1, 2, NO_ADAPTER, 3],
    "as many rows as there may be": [position % 5 - 1 for position in range(MAX_ROWS)],
}


class LoraSuite(Suite):
    """The conformance of a LoRA backend. Adapters are given as weights: no file is read.

    Attributes:
        device: where its tests run. A backend that needs a GPU says "cuda", and its tests are skipped elsewhere with
            `pytestmark = pytest.mark.skipif(...)`.
        small: few mixes of rows, for kernels that an interpreter runs.
        tolerances: largest error of a row, as a share of the sums of magnitudes it is made of, by dtype. What lies
            between A and B may be rounded to the dtype.
    """

    kind = "lora"
    device: ClassVar[str] = "cpu"
    small: ClassVar[bool] = False
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 3e-6, "bfloat16": 1.2e-2, "float16": 2e-3}

    # ---------------------------------------------------------------------------------------- what is under test

    def make(self, limits: LoraLimits) -> LoraBackend:
        """The backend for a model, as the engine makes it."""
        backend: LoraBackend = self.build(limits)
        return backend

    def spec(self) -> LoraSpec:
        """What the component says of itself."""
        spec = self.candidate().spec
        assert isinstance(spec, LoraSpec)
        return spec

    def dtypes(self) -> list[str]:
        """Those that it accepts here."""
        accepted = [dtype for dtype in DTYPES if not self.spec().why_not(Need(device=self.device, dtype=dtype))]
        reasons = "; ".join(self.spec().why_not(Need(device=self.device)))
        assert accepted, f"it refuses every dtype on {self.device!r}: {reasons}"
        return accepted

    def limits(self, dtype: str, modules_to_save: bool = False) -> LoraLimits:
        """Of the suite's backends."""
        return LoraLimits(
            max_loras=_NUM_POSITIONS,
            max_lora_rank=MAX_RANK,
            max_num_rows=MAX_ROWS,
            dtype=getattr(torch, dtype),
            device=self.device,
            modules_to_save=modules_to_save,
        )

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Threads of many small products wait for each other longer than they compute."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    # ---------------------------------------------------------------------------------------------------- scenes

    def _scene(
        self, dtype: str | None = None, adapters: Sequence[AdapterWeights] | None = None, saves: bool = False
    ) -> Scene:
        dtype = dtype or self.dtypes()[0]
        scene = Scene(self.make(self.limits(dtype, saves)), self.tolerances[dtype])
        for position, adapter in enumerate(self._adapters(dtype) if adapters is None else adapters):
            scene.place(position, adapter)
        return scene

    def _adapters(self, dtype: str) -> list[AdapterWeights]:
        """Of one rank and of several, down to none; with and without scales and shifts; of some modules only."""
        of: torch.dtype = getattr(torch, dtype)
        return [
            adapter_of(1, 5, dtype=of),
            adapter_of(2, MAX_RANK, dtype=of, scaled=True),
            adapter_of(3, 1, dtype=of, shifted=True, leave_out=("q", "up", "embed")),
            adapter_of(4, 4, dtype=of, scaled=True, shifted=True, varied=True, leave_out=("k", "head")),
        ]

    def _mixes(self) -> list[list[int]]:
        return [_MIXES["in no order"], _MIXES["one row"]] if self.small else list(_MIXES.values())

    # -------------------------------------------------------------------------------------------------- contract

    def test_is_a_lora_backend(self) -> None:
        assert isinstance(self.make(self.limits(self.dtypes()[0])), LoraBackend)

    def test_is_not_active_before_it_has_a_plan(self) -> None:
        assert not self._scene().backend.active

    def test_memory_is_counted_before_it_is_taken(self) -> None:
        backend = self.make(self.limits(self.dtypes()[0]))
        for slot in SLOTS:
            slot.make(backend)
        counted = backend.num_bytes
        backend.allocate()
        assert backend.num_bytes == counted
        matrices = sum(part.in_features + part.out_features for slot in SLOTS for part in slot.parts)
        least = _NUM_POSITIONS * MAX_RANK * matrices * backend.limits.dtype.itemsize
        assert counted >= least, f"both matrices of every part at every position take {least} bytes"

    def test_no_more_memory_is_taken_than_is_counted(self) -> None:
        dtype = self.dtypes()[0]
        for saves in (False, True):
            backend = self.make(self.limits(dtype, modules_to_save=saves))
            for slot in SLOTS:
                slot.make(backend)
            adapter = adapter_of(1, MAX_RANK, dtype=getattr(torch, dtype))
            with TensorsMade() as made:
                backend.allocate()
                for position in range(_NUM_POSITIONS):
                    backend.place(position, adapter)
            taken, counted = made.num_bytes(torch.device(self.device).type), backend.num_bytes
            assert taken <= counted * 17 // 16, f"{taken} bytes are taken and {counted} counted"

    def test_memory_grows_with_the_number_of_positions(self) -> None:
        def num_bytes(max_loras: int) -> int:
            limits = self.limits(self.dtypes()[0])
            backend = self.make(
                LoraLimits(
                    max_loras=max_loras,
                    max_lora_rank=limits.max_lora_rank,
                    max_num_rows=limits.max_num_rows,
                    dtype=limits.dtype,
                    device=limits.device,
                )
            )
            for slot in SLOTS:
                slot.make(backend)
            return backend.num_bytes

        assert num_bytes(4) - num_bytes(2) == 2 * (num_bytes(2) - num_bytes(1)), "a position takes what each takes"

    # -------------------------------------------------------------------------------------------------- products

    def test_each_row_gets_its_own_adapter(self) -> None:
        for dtype in self.dtypes():
            scene = self._scene(dtype)
            for positions in self._mixes():
                for slot in SLOTS:
                    scene.check(slot, positions)

    def test_each_row_gets_its_own_adapter_in_any_mix(self) -> None:
        scene = self._scene()

        longest, examples = (8, 12) if self.small else (MAX_ROWS, 40)

        @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
        @given(st.lists(st.integers(NO_ADAPTER, _NUM_POSITIONS - 1), min_size=1, max_size=longest))
        def check(positions: list[int]) -> None:
            scene.check(SLOTS[0], positions)

        check()

    def test_rows_without_an_adapter_keep_their_bits(self) -> None:
        for dtype in self.dtypes():
            scene = self._scene(dtype)
            positions = _MIXES["in no order"]
            for slot in SLOTS:
                output, found = scene.compute(slot, positions)
                rows = [row for row, position in enumerate(positions) if position == NO_ADAPTER]
                assert torch.equal(found[rows], output[rows]), f"{slot.name}: a row without an adapter has changed"

    def test_parts_that_an_adapter_leaves_out_keep_their_bits(self) -> None:
        scene = self._scene()
        slot = next(slot for slot in SLOTS if slot.name == "qkv")
        output, found = scene.compute(slot, [2, 2])
        width = slot.parts[0].out_features
        assert torch.equal(found[:, :width], output[:, :width]), "q is in no tensor of the adapter"

    def test_a_row_gets_in_a_mix_what_it_gets_alone(self) -> None:
        for dtype in self.dtypes():
            scene = self._scene(dtype)
            positions = _MIXES["in no order"]
            for slot in SLOTS:
                _, together = scene.compute(slot, positions)
                for row, position in list(enumerate(positions))[: 3 if self.small else None]:
                    _, alone = scene.compute(slot, [position], first_row=row)
                    size = scene.size(slot, [position], first_row=row)
                    error = (together[row].double() - alone[0].double()).abs()
                    assert (error <= 2 * scene.tolerance * size[0]).all(), f"{slot.name}: row {row} depends on others"

    def test_other_rows_that_are_not_numbers_leave_a_row_alone(self) -> None:
        scene = self._scene()
        slot = next(slot for slot in SLOTS if slot.name == "o")
        x, output = scene.inputs(slot, 6)
        x[::2], output[::2] = float("nan"), float("nan")
        found = scene.apply(slot, [0, 0, 1, 1, NO_ADAPTER, 3], x, output)
        assert found[1::2].isfinite().all()

    def test_products_are_summed_in_float32(self) -> None:
        for dtype in set(self.dtypes()) - {"float32"}:
            of: torch.dtype = getattr(torch, dtype)
            adapter = adapter_of(9, 1, dtype=of)
            slot = next(slot for slot in SLOTS if slot.name == "o")
            low_rank = adapter.low_ranks[slot.parts[0].module]
            low_rank.a.fill_(1.0)
            low_rank.b.fill_(1.0)
            scene = self._scene(dtype, [adapter])
            x = torch.full((2, HIDDEN), 1.0, dtype=of, device=self.device)
            x[:, 0] = 255.0  # a sum in bfloat16 stays at 256 when ones are added to it
            output = torch.zeros(2, HIDDEN, dtype=of, device=self.device)
            found = scene.apply(slot, [0, 0], x, output).double()
            wanted = 255.0 + HIDDEN - 1
            assert ((found - wanted).abs() <= wanted / 100).all(), f"{dtype}: {found[0, 0]} where {wanted} is the sum"

    # ------------------------------------------------------------------------------------------------- positions

    def test_a_position_without_an_adapter_changes_nothing(self) -> None:
        adapter = adapter_of(1, 4, dtype=getattr(torch, self.dtypes()[0]))
        scene = self._scene(adapters=[adapter])
        for slot in SLOTS:
            output, found = scene.compute(slot, [3, 0, 3])
            assert torch.equal(found[::2], output[::2]), f"{slot.name}: nothing was ever placed there"

    def test_a_position_has_nothing_of_who_had_it_before(self) -> None:
        dtype: torch.dtype = getattr(torch, self.dtypes()[0])
        scene = self._scene()
        for tenant in (
            adapter_of(7, 2, dtype=dtype, leave_out=("o", "k")),
            adapter_of(8, MAX_RANK, dtype=dtype, scaled=True, shifted=True),
            adapter_of(9, 3, dtype=dtype),
        ):
            scene.place(1, tenant)
            for slot in SLOTS:
                scene.check(slot, [1, 0, 1, 2])

    def test_an_emptied_position_changes_nothing(self) -> None:
        scene = self._scene()
        scene.backend.place(1, None)
        for slot in SLOTS:
            output, found = scene.compute(slot, [1, 1])
            assert torch.equal(found, output), f"{slot.name}: the adapter was taken away"

    def test_what_is_placed_is_a_copy(self) -> None:
        adapter = adapter_of(1, 4, dtype=getattr(torch, self.dtypes()[0]))
        scene = self._scene(adapters=[adapter])
        slot = SLOTS[0]
        _, before = scene.compute(slot, [0])
        for low_rank in adapter.low_ranks.values():
            low_rank.a.zero_()
        _, after = scene.compute(slot, [0])
        assert torch.equal(before, after), "the host's copy may be dropped or reused once the adapter is placed"

    def test_it_says_whether_an_adapter_changes_the_head(self) -> None:
        dtype: torch.dtype = getattr(torch, self.dtypes()[0])
        without, with_head = adapter_of(1, 4, dtype=dtype, leave_out=("head",)), adapter_of(2, 4, dtype=dtype)
        scene = self._scene(adapters=[without])
        assert not scene.backend.acts_on_head
        scene.place(1, with_head)
        assert scene.backend.acts_on_head
        scene.place(1, without)
        assert not scene.backend.acts_on_head, "the one that did has been replaced"

    # ----------------------------------------------------------------------------------------------------- plans

    def test_a_plan_says_whether_it_is_to_be_called(self) -> None:
        backend = self._scene().backend
        backend.plan(np.array([0, NO_ADAPTER], np.int32))
        assert backend.active
        backend.plan(None)
        assert not backend.active

    def test_a_plan_serves_every_slot_of_a_step(self) -> None:
        scene = self._scene()
        positions = [3, 0, NO_ADAPTER, 1]
        scene.backend.plan(np.array(positions, np.int32))
        for slot in (*SLOTS, *SLOTS):
            scene.check_again(slot, positions)

    def test_a_plan_may_be_of_more_or_fewer_rows_than_the_one_before(self) -> None:
        scene = self._scene()
        for num_rows in (9, 2, 30, 1):
            scene.check(SLOTS[0], [row % 4 for row in range(num_rows)])

    def test_a_plan_of_a_captured_step_gives_what_another_gives(self) -> None:
        scene = self._scene()
        if not scene.backend.can_be_captured:
            return
        for positions in ([NO_ADAPTER] * 8, [0, 1, NO_ADAPTER, 3, 0, 0, NO_ADAPTER, NO_ADAPTER], [2] * 8):
            for slot in SLOTS:
                scene.check(slot, positions, captured=True)

    # ------------------------------------------------------------------------------------------- shares and saved

    def test_shares_of_the_outputs_stand_beside_each_other(self) -> None:
        dtype: torch.dtype = getattr(torch, self.dtypes()[0])
        saves = adapter_of(5, 3, dtype=dtype, leave_out=("head",), saved=("lm_head",))
        scene = self._scene(adapters=[*self._adapters(self.dtypes()[0])[:3], saves], saves=True)
        for slot in (one for one in SLOTS if one.kind != "embedding"):
            halves = [share(slot, outputs=index, of=2) for index in range(2)]
            self._check_shares(scene, slot, halves)

    def test_shares_of_the_inputs_add_up(self) -> None:
        dtype = self.dtypes()[0]
        adapters = [adapter_of(seed, 4, dtype=getattr(torch, dtype), scaled=seed == 2) for seed in (1, 2)]
        for slot in (one for one in SLOTS if one.kind == "linear"):
            whole = self._scene(dtype, adapters)
            x, _ = whole.inputs(slot, 4)
            zeros = x.new_zeros(4, slot.out_features)
            positions = [0, 1, 1, 0]
            wanted = whole.apply(slot, positions, x, zeros.clone()).double()
            total = torch.zeros_like(wanted)
            for index in range(2):
                half = share(slot, inputs=index, of=2)
                scene = Scene(self.make(self.limits(dtype)), whole.tolerance, [half])
                for position, adapter in enumerate(adapters):
                    scene.place(position, adapter)
                start = half.parts[0].input_start
                columns = x[:, start : start + half.in_features].contiguous()
                total += scene.apply(half, positions, columns, zeros.clone()).double()
            size = whole.size(slot, positions, zero_output=True)
            assert ((total - wanted).abs() <= 4 * whole.tolerance * size).all(), f"{slot.name}: halves of the inputs"

    def _check_shares(self, whole: Scene, slot: DrawnSlot, halves: Sequence[DrawnSlot]) -> None:
        positions = [0, 1, 2, 3]
        x, output = whole.inputs(slot, len(positions))
        wanted = whole.apply(slot, positions, x, output.clone())
        for half in halves:
            scene = Scene(self.make(whole.backend.limits), whole.tolerance, [half])
            for position, adapter in whole.placed.items():
                scene.place(position, adapter)
            columns = torch.cat([output[:, one] for one in half.columns_of(slot)], dim=1)
            found = scene.apply(half, positions, x, columns)
            expected = torch.cat([wanted[:, one] for one in half.columns_of(slot)], dim=1)
            size = torch.cat([whole.size(slot, positions)[:, one] for one in half.columns_of(slot)], dim=1)
            error = (found.double() - expected.double()).abs()
            assert (error <= 2 * whole.tolerance * size).all(), f"{slot.name}: a share of its outputs"

    def test_an_adapters_own_embedding_and_head_replace_the_bases(self) -> None:
        dtype: torch.dtype = getattr(torch, self.dtypes()[0])
        saves = adapter_of(5, 3, dtype=dtype, leave_out=("head", "embed"), saved=("lm_head", "model.embed_tokens"))
        scene = self._scene(adapters=[saves, adapter_of(6, 2, dtype=dtype)], saves=True)
        assert scene.backend.acts_on_head
        for slot in (one for one in SLOTS if one.kind != "linear"):
            scene.check(slot, [0, 1, NO_ADAPTER, 0])
        scene.place(0, adapter_of(6, 2, dtype=dtype))
        for slot in (one for one in SLOTS if one.kind != "linear"):
            scene.check(slot, [0, 1, NO_ADAPTER, 0])
