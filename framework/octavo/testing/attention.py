"""AttentionSuite: what every attention backend must do, checked against attention in float64.

    class TestMine(AttentionSuite):
        component = "my-plugin/mine"

Its spec says what is asked of it: features, head sizes, block sizes, dtypes. What the spec leaves empty means "any".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from octavo.interfaces.attention import PAD_SLOT, AttentionBackend, AttentionParameters, nhd_layout
from octavo.nn.split_attention import SplitAttention
from octavo.plugins.specs import AttentionNeed
from octavo.testing.attention_checks import AttentionChecks
from octavo.testing.attention_needs import DTYPES, PHASES, build_partner, phase_of
from octavo.testing.paged_scene import FP8_LOSS, blocks_that_differ, check_fp8, usual_parameters, with_the_same_tensors


class AttentionSuite(AttentionChecks):
    """The conformance of an attention backend."""

    # ------------------------------------------------------------------------------------------------- contract

    def test_is_an_attention_backend_that_serves_prefill_or_decode(self) -> None:
        assert isinstance(self.make(self.need()), AttentionBackend)
        assert self.spec().features & PHASES, 'its spec\'s features name "prefill", "decode" or both'

    def test_refusals_are_sentences(self) -> None:
        base = self.need()
        strange = [
            replace(base, features=base.features | {"no_such_feature"}),
            replace(base, device="xpu"),
            replace(base, dtype="float64"),
            replace(base, head_dim=7, num_heads=5, num_kv_heads=5),
            replace(base, block_size=3),
        ]
        assert self.spec().why_not(strange[0]), "it accepts a feature that it does not declare"
        for feature in set(self.spec().known_features) - self.spec().features:
            need = replace(base, features=base.features | {feature})
            assert self.spec().why_not(need), f"it accepts {feature}, which it does not declare"
        for need in strange:
            for reason in self.spec().why_not(need):
                assert len(reason.split()) > 2, f"{reason!r} does not explain why it refuses {need}"
                assert not reason.startswith("its probe"), f"{reason} (asked with {need})"

    def test_kv_layout_has_the_name_that_its_spec_publishes(self) -> None:
        found = self.make(self.need()).kv_layout()
        assert found.name, "a layout has a name"
        assert self.spec().kv_layout in ("", found.name), "the spec's kv_layout is the KVLayout's name"

    def test_kv_layout_follows_from_the_need_alone(self) -> None:
        need = self.need()
        first = self.make(need).kv_layout()
        for phase in sorted(need.features & PHASES):
            assert self.make(replace(need, features=frozenset({phase}))).kv_layout() == first, f"differs for {phase}"

    def test_its_ranks_are_numbers(self) -> None:
        for phase in sorted(PHASES):
            rank = self.spec().priority_for(phase)
            assert type(rank) is int, f"`auto` ranks it by priority and decode_priority; for {phase} that is {rank!r}"

    # ------------------------------------------------------------------------------------------------- numbers

    def test_prefills_equal_the_formula(self) -> None:
        self._check_step(self.shapes.prefills)

    def test_chunks_attend_to_their_context_and_to_themselves(self) -> None:
        self._check_step(self.shapes.chunks)

    def test_decodes_equal_the_formula(self) -> None:
        self._check_step(self.shapes.decodes)

    def test_decodes_chunks_and_prefills_in_one_step_equal_the_formula(self) -> None:
        self._check_step(self.shapes.everything)

    def test_query_heads_are_grouped_in_order_over_the_kv_heads(self) -> None:
        for need in self.accepted(heads=self.shapes.heads):
            self._check_step(((17, 1), (0, 17)), need)

    def test_every_head_size_that_it_accepts(self) -> None:
        for need in self.accepted(head_dim=self.head_sizes()):
            self._check_step(((17, 1), (33, 1), (0, 17), (5, 3)), need)

    def test_every_block_size_that_it_accepts(self) -> None:
        for need in self.accepted(block_size=self.block_sizes()):
            self._check_step(((15, 1), (33, 1), (0, 33), (31, 5)), need)

    def test_every_dtype_that_it_accepts(self) -> None:
        for need in self.accepted(dtype=DTYPES):
            self._check_step(((33, 1), (190, 1), (0, 17), (31, 5)), need)

    def test_scale_is_the_one_that_was_given(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((17, 1), (33, 1), (0, 17)), need)
        for parameters in (AttentionParameters(scale=0.3), AttentionParameters(scale=0.07)):
            self.check(need, scene.step(batch, parameters=parameters), batch, parameters=parameters)

    def test_a_window_shows_the_last_tokens_and_no_other(self) -> None:
        for need in self.needs_with("sliding_window", sliding_window=self.shapes.windows):
            parameters = replace(usual_parameters(need), sliding_window=need.sliding_window)
            scene, batch = self.set_up(self.shapes.everything, need)
            self.check(need, scene.step(batch, parameters=parameters), batch, parameters=parameters)

    def test_scores_are_capped_smoothly(self) -> None:
        for need in self.needs_with("logit_softcap", logit_softcap=self.shapes.caps):
            parameters = replace(usual_parameters(need), logit_softcap=need.logit_softcap)
            scene, batch = self.set_up(self.shapes.everything, need, amplify=3.0)
            self.check(need, scene.step(batch, parameters=parameters), batch, parameters=parameters)

    def test_one_plan_serves_layers_with_and_without_a_window_or_a_cap(self) -> None:
        values = {"sliding_window": self.shapes.windows[-1:], "logit_softcap": self.shapes.caps[:1]}
        features = sorted(set(values) & self.spec().features)
        for need in self.needs_with(*features, **{feature: values[feature] for feature in features}):
            scene, batch = self.set_up(self.shapes.everything, need)
            scene.plan(batch)
            of_layers = [usual_parameters(need)]
            for feature in features:
                of_layers += [replace(one, **{feature: getattr(need, feature)}) for one in of_layers]
            for parameters in reversed(of_layers):
                cache = tuple(buffer.clone() for buffer in scene.cache)
                output = scene.forward(batch, cache=cache, parameters=parameters)
                self.check(need, output, batch, parameters=parameters)

    def test_large_scores_do_not_overflow(self) -> None:
        scene, batch = self.set_up(((17, 1), (100, 1), (0, 33), (16, 16)), amplify=100.0)
        assert scene.step(batch).isfinite().all(), "subtract each row's largest score before the exponential"

    def test_later_tokens_of_a_prefill_change_nothing_before_them(self) -> None:
        scene, batch = self.set_up(((0, 33), (16, 16)))
        before = scene.step(batch)
        last = {batch.tokens_of(row).stop - 1 for row in batch.rows}
        earlier = [token for token in range(batch.layout.num_tokens) if token not in last]
        for token in last:
            batch.key[token] += 5.0
            batch.value[token] += 5.0
        error = (scene.step(batch)[earlier] - before[earlier]).abs().max()
        assert error <= self.tolerances[str(scene.need.dtype)], "tokens attend to tokens that come after them"

    def test_request_alone_equals_the_request_in_a_batch(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((1, 1), (33, 1), (190, 1), (0, 17), (31, 5)), need)
        together = scene.step(batch)
        for row in batch.rows:
            alone = scene.step(scene.batch([row]))
            error = (alone - together[batch.tokens_of(row)]).abs().max()
            assert error <= self.tolerances[str(need.dtype)], f"{row}: differs by {error:.2g} from when it is alone"

    def test_same_step_gives_the_same_bits(self) -> None:
        scene, batch = self.set_up(self.shapes.everything)
        assert torch.equal(scene.step(batch), scene.step(batch))

    # --------------------------------------------------------------------------------------------------- inputs

    def test_inputs_may_be_slices_of_one_wider_tensor(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((17, 1), (0, 17)), need)
        self.check(need, scene.step(batch.in_one_tensor()), batch)

    def test_inputs_are_left_as_they_are(self) -> None:
        scene, batch = self.set_up(((17, 1), (0, 17)))
        before = [tensor.clone() for tensor in (batch.query, batch.key, batch.value)]
        scene.step(batch)
        for name, old in zip(("query", "key", "value"), before, strict=True):
            assert torch.equal(getattr(batch, name), old), f"it changes {name}"

    def test_lengths_on_the_host_may_exceed_those_of_decodes(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((3, 1), (15, 1), (33, 1)), need)
        layout, more = batch.layout, need.block_size + 1
        table = torch.nn.functional.pad(layout.block_table, (0, 2))
        layout = replace(layout, host_seq_lens=layout.host_seq_lens + more, max_seq_len=layout.max_seq_len + more)
        self.check(need, scene.step(replace(batch, layout=replace(layout, block_table=table))), batch)

    def test_rotates_queries_and_keys_in_the_same_pass(self) -> None:
        whole = [(need, need.head_dim) for need in self.accepted(dtype=DTYPES[:2])]
        part = [(need, need.head_dim // 2) for need in self.accepted(head_dim=self.head_sizes()[:2])]
        for need, rotary_dim in whole + part:
            scene, batch = self.set_up(((17, 1), (33, 1), (0, 17), (5, 3)), need)
            rotary, planned = scene.rotary(batch, rotary_dim), batch.in_one_tensor()
            scene.plan(planned)
            output, turned = scene.rotate_and_forward(planned, rotary), batch.rotated(rotary)
            self.check(need, output, turned, by=f"it, rotating the first {rotary_dim} elements of a head,")
            after = scene.batch([row.next(1 if "decode" in need.features else 3) for row in turned.rows])
            self.check(need, scene.step(after), after, by="a step over the keys that it rotated")

    def test_requests_that_are_padding_get_something_finite_and_change_nothing(self) -> None:
        need = self.need()
        for host_seq_len in (0, 2 * need.block_size + 2):
            scene, batch = self.set_up(((3, 1), (16, 1), (33, 1), (0, 5)), need)
            padded = batch.with_padding_requests(3, host_seq_len) if "decode" in need.features else batch
            before, real = tuple(buffer.clone() for buffer in scene.cache), padded.layout.slot_mapping != PAD_SLOT
            output = scene.step(padded)
            assert output[~real].isfinite().all(), "what requests of seq_lens 0 get is not finite"
            self.check(need, output[real], batch)
            strange = blocks_that_differ(before, scene.cache) - batch.written_blocks()
            assert not strange, f"blocks {sorted(strange)} have changed; requests of seq_lens 0 own none"

    # ------------------------------------------------------------------------------------------- cache and plan

    def test_writes_no_block_but_those_of_its_slots(self) -> None:
        for lengths in (((15, 1), (31, 1), (32, 1)), ((0, 16), (0, 17), (31, 33))):
            need = self.need()
            if {phase_of(*one) for one in lengths} <= need.features:
                scene, batch = self.set_up(lengths, need)
                before = tuple(buffer.clone() for buffer in scene.cache)
                scene.step(batch)
                strange = blocks_that_differ(before, scene.cache) - batch.written_blocks()
                assert not strange, f"blocks {sorted(strange)} have changed; slot_mapping names others"

    def test_padding_is_not_written_and_disturbs_nobody(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((3, 1), (16, 1), (33, 1), (0, 5), (0, 17)), need)
        batch = batch.without_writes_of(*batch.rows[1::2])
        before = tuple(buffer.clone() for buffer in scene.cache)
        self.check(need, scene.step(batch), batch)
        strange = blocks_that_differ(before, scene.cache) - batch.written_blocks()
        assert not strange, f"blocks {sorted(strange)} have changed though their tokens' slots are PAD_SLOT"

    def test_what_one_step_writes_the_next_ones_read(self) -> None:
        need, num_tokens = self.need(), 1 if "decode" in self.need().features else 3
        scene, batch = self.set_up(((13, num_tokens), (30, num_tokens)), need)
        for _ in range(self.shapes.num_steps):
            self.check(need, scene.step(batch), batch)
            batch = scene.batch([row.next(num_tokens) for row in batch.rows])

    def test_requests_may_share_blocks(self) -> None:
        need = self.need()
        size = need.block_size
        scene, batch = self.set_up(((2 * size, 1), (2 * size, 3)), need)
        rows = []
        for row in batch.rows:
            twin = scene.request(row.end, after=row.request.blocks[:2])
            for mine, its in ((twin.key, row.request.key), (twin.value, row.request.value)):
                mine[: 2 * size] = its[: 2 * size]
            rows += [row, replace(row, request=twin)]
        batch = scene.batch(rows)
        self.check(need, scene.step(batch), batch)

    def test_copied_block_means_the_same_elsewhere(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((20, 1), (33, 1), (20, 3)), need)
        for row in batch.rows:
            for index, block in enumerate(row.request.blocks):
                row.request.blocks[index] = copy = scene.take_block()
                for buffer in scene.cache:
                    buffer[copy] = buffer[block]
        batch = scene.batch(batch.rows)
        self.check(need, scene.step(batch), batch)

    def test_plan_forgets_the_one_before(self) -> None:
        need = self.need()
        scene, batch = self.set_up(self.shapes.everything, need)
        rows = sorted(batch.rows, key=lambda row: row.end)
        before, after = scene.batch(rows[::-1]), scene.batch(rows[:5])
        scene.step(before.without_writes_of(rows[0]))
        scene.plan(scene.batch(rows[::4]))
        self.check(need, scene.step(after), after)

    def test_one_plan_serves_every_layer(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((0, 17), (0, 33)) if "prefill" in need.features else ((17, 1), (33, 1)), need)
        layers = [tuple(buffer.clone() for buffer in scene.cache) for _ in range(2)]
        scene.plan(batch)
        for cache in layers:
            self.check(need, scene.forward(batch, cache=cache), batch)
        assert not blocks_that_differ(*layers), "equal steps leave equal caches in every layer"

    def test_captured_step_goes_by_what_its_tensors_hold_when_it_is_replayed(self) -> None:
        need = self.need()
        graph_mode = self.make(need).graph_mode
        assert graph_mode in ("none", "decode"), f"graph_mode is {graph_mode!r}"
        if graph_mode == "none" or "decode" not in need.features:
            return
        scene, both = self.set_up(((3, 1), (15, 1), (33, 1), (16, 1), (36, 1), (1, 1), (18, 1)), need)
        batches = [scene.batch(both.rows[:4]), scene.batch(both.rows[4:])]
        first, second = (batch.for_a_graph(4, -(-64 // need.block_size) * need.block_size) for batch in batches)
        self.check(need, scene.step(first)[: len(batches[0].rows)], batches[0])
        captured = with_the_same_tensors(scene.state(scene.backend))
        for name in ("query_start_loc", "seq_lens", "block_table", "slot_mapping"):
            getattr(first.layout, name).copy_(getattr(second.layout, name))
        scene.plan(first)
        output = scene.forward(second, state=captured)
        assert output.isfinite().all(), "what a replayed step gives requests of seq_lens 0 is not finite"
        self.check(need, output[: len(batches[1].rows)], batches[1], by="a replayed step")

    def test_fp8_cache_of_a_published_name_is_the_published_one(self) -> None:
        for need in self.needs_with("fp8_kv_cache", kv_cache_dtype=["fp8"]):
            found, wanted = self.make(need).kv_layout(), nhd_layout(need)
            assert found.name != wanted.name or found == wanted, f"{found} is not {wanted}"

    def test_fp8_cache_holds_each_head_rounded_to_the_nearest(self) -> None:
        for need in self.needs_with("fp8_kv_cache", kv_cache_dtype=["fp8"]):
            scene, batch = self.set_up(((3, 1), (16, 1), (0, 17), (5, 3)), need)
            scene.step(batch)
            if self.make(need).kv_layout().name == "torch-nhd":
                for row, stored in zip(batch.rows, scene.as_stored(batch).rows, strict=True):
                    for name in ("key", "value"):
                        wanted = getattr(row.request, name)[: row.end].cpu().double()
                        check_fp8(getattr(stored.request, name), wanted, f"{name}s of {row}")

    def test_attention_over_an_fp8_cache_equals_the_formula_over_what_it_holds(self) -> None:
        for need in self.needs_with("fp8_kv_cache", kv_cache_dtype=["fp8"], dtype=DTYPES[:2]):
            scene, batch = self.set_up(self.shapes.everything, need)
            output = scene.step(batch)
            self.check(need, output, batch, allowed=FP8_LOSS, by="it, over an fp8 cache,")
            if scene.backend.kv_layout().name == "torch-nhd":
                allowed = self.fp8_tolerances[str(need.dtype)]
                self.check(need, output, scene.as_stored(batch), allowed=allowed, by="it, over what its cache holds,")

    def test_prefill_in_one_object_and_decode_in_another_equal_the_formula(self) -> None:
        need = self.need()
        if not need.features >= PHASES:
            pytest.skip(f"{self.component} serves {' and '.join(sorted(need.features))} only")
        prefill, decode = (self.make(replace(need, features=frozenset({phase}))) for phase in ("prefill", "decode"))
        scene, batch = self.set_up(self.shapes.everything, need)
        self.check(need, scene.step(batch, SplitAttention(prefill, decode)), batch)

    def test_other_backends_of_its_layout_read_what_it_writes(self) -> None:
        for need in [self.need(), *self.needs_with("fp8_kv_cache", kv_cache_dtype=["fp8"])]:
            for phase, num_tokens in (("decode", 1), ("prefill", 3)):
                its_need = replace(need, features=need.features - PHASES | {phase})
                for partner in self.partners(its_need):
                    other = build_partner(partner, its_need)
                    assert other.kv_layout() == self.make(need).kv_layout(), (
                        f"{partner.full_name} has a KV layout of this name and makes it differently"
                    )
                    scene, batch = self.set_up(((15, 1), (31, 1), (0, 20)), need)
                    scene.step(batch)
                    batch = scene.batch([row.next(num_tokens) for row in batch.rows])
                    output, by = scene.step(batch, other), f"{partner.full_name}, reading what it wrote,"
                    if need.kv_cache_dtype == "auto":
                        self.check(need, output, batch, by=by)
                    else:
                        allowed = self.fp8_tolerances[str(need.dtype)]
                        self.check(need, output, scene.as_stored(batch), allowed=allowed, by=by)

    def _check_step(self, lengths: Sequence[tuple[int, int]], need: AttentionNeed | None = None) -> None:
        need = need or self.need()
        scene, batch = self.set_up(lengths, need)
        self.check(need, scene.step(batch), batch)
