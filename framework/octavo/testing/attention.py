"""AttentionSuite: what every attention backend must do, checked against attention in float64.

    class TestMine(AttentionSuite):
        component = "my-plugin/mine"

Its spec says what is asked of it: features, head sizes, block sizes, dtypes. What the spec leaves empty means "any".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from octavo.interfaces.attention import AttentionBackend, AttentionParameters
from octavo.nn.split_attention import SplitAttention
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import AttentionNeed, AttentionSpec
from octavo.testing.attention_needs import (
    BLOCK_SIZES,
    CAPS,
    CHUNKS,
    DECODES,
    DTYPES,
    HEAD_SIZES,
    HEADS,
    LAYER_VALUES,
    MORE_TOKENS,
    PHASES,
    PREFILLS,
    WINDOWS,
    build_partner,
    in_words,
    variations,
)
from octavo.testing.paged_scene import Batch, PagedScene, Row, blocks_that_differ, torch_dtype, usual_parameters
from octavo.testing.suite import Suite, installed_components


class AttentionSuite(Suite):
    """The conformance of an attention backend.

    Attributes:
        device: where its tests run. A backend that needs a GPU says "cuda", and its tests are skipped elsewhere with
            `pytestmark = pytest.mark.skipif(...)`.
        tolerances: largest error of an output, by dtype; values are drawn from a normal distribution.
    """

    kind = "attention"
    device: ClassVar[str] = "cpu"
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}

    # ---------------------------------------------------------------------------------------- what is under test

    def make(self, need: AttentionNeed) -> AttentionBackend:
        """The backend for a need, as the engine makes it."""
        backend: AttentionBackend = self.build(need)
        return backend

    def spec(self) -> AttentionSpec:
        """What the component says of itself."""
        spec = self.candidate().spec
        assert isinstance(spec, AttentionSpec)
        return spec

    def need(self) -> AttentionNeed:
        """The simplest need that the component accepts."""
        features = self.spec().features & PHASES
        sizes = {"head_dim": self.head_sizes(), "block_size": self.block_sizes(), "heads": HEADS}
        first = AttentionNeed(
            device=self.device, features=features, num_heads=1, num_kv_heads=1, head_dim=1, block_size=1
        )
        tried = list(variations(first, dtype=DTYPES, **sizes))
        accepted = next((need for need in tried if not self.spec().why_not(need)), None)
        assert accepted is not None, (
            f"it refuses every need the suite knows on device {self.device!r} (a class attribute of the suite), "
            f"the first of them because it {'; '.join(self.spec().why_not(tried[0]))}"
        )
        return accepted

    def accepted(self, **choices: Sequence[object]) -> list[AttentionNeed]:
        """Needs that differ from `need()` in these fields and that the component accepts."""
        return [need for need in variations(self.need(), **choices) if not self.spec().why_not(need)]

    def needs_with(self, *features: str, **values: Sequence[object]) -> list[AttentionNeed]:
        """Needs of these features, with each of these values; none when the component does not declare them."""
        if not self.spec().features >= set(features):
            return []
        found = self.accepted(features=[self.need().features | set(features)], **values)
        assert found, f"its spec declares {', '.join(features)} and it refuses all of {values}"
        return found

    def head_sizes(self) -> tuple[int, ...]:
        """Those that the spec lists; some, when it takes any."""
        return self.spec().head_sizes or HEAD_SIZES

    def block_sizes(self) -> tuple[int, ...]:
        """Those that the spec lists; some, when it takes any."""
        return self.spec().block_sizes or BLOCK_SIZES

    def partners(self, need: AttentionNeed) -> list[Candidate]:
        """Other installed backends that can serve this need over the same published KV layout."""
        layout = self.spec().kv_layout
        return [
            one
            for one in installed_components().ask("attention", need)
            if layout and isinstance(one.spec, AttentionSpec) and one.spec.kv_layout == layout
            if not one.reasons and one.full_name != self.candidate().full_name
        ]

    # ---------------------------------------------------------------------------------------------- setting up

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Threads of many small products wait for each other longer than they compute."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    def set_up(
        self,
        lengths: Sequence[tuple[int, int]],
        need: AttentionNeed | None = None,
        *,
        amplify: float = 1.0,
    ) -> tuple[PagedScene, Batch]:
        """Requests of these (context, new) lengths, their contexts written, and the step that computes what is new.

        Requests of a phase that the component does not serve are left out; when that is all of them, the test does
        not concern it.
        """
        need = need or self.need()
        lengths = [one for one in lengths if self._phase(*one) in need.features]
        if not lengths:
            pytest.skip(f"{self.component} serves {' and '.join(sorted(need.features))} only")
        backend = self.make(need)
        scene = PagedScene(backend, need, device=self.device)
        requests = [scene.request(context + new + MORE_TOKENS, amplify=amplify) for context, new in lengths]
        pairs = list(zip(requests, lengths, strict=True))
        if contexts := [Row(request=one, start=0, end=context) for one, (context, _) in pairs if context]:
            scene.step(scene.batch(contexts), backend if "prefill" in need.features else self._context_writer(need))
        return scene, scene.batch([Row(request=one, start=start, end=start + new) for one, (start, new) in pairs])

    def check(
        self,
        need: AttentionNeed,
        output: Tensor,
        batch: Batch,
        *,
        parameters: AttentionParameters | None = None,
        by: str = "it",
    ) -> None:
        """Compare a step's output with the formula; rows that are padding have no right output."""
        assert need.dtype is not None
        assert output.dtype == torch_dtype(need), f"the output is {output.dtype}, the query {torch_dtype(need)}"
        parameters = parameters or usual_parameters(need)
        wanted = batch.wanted(parameters)
        assert output.shape == wanted.shape, "the output is [num_tokens, num_heads * head_dim]"
        errors = (output.cpu().double() - wanted).abs().amax(dim=1)
        errors = errors.masked_fill(batch.layout.slot_mapping.cpu() < 0, 0.0)
        token = int(errors.nan_to_num(nan=torch.inf).argmax())
        where = f"{batch.row_of(token)}, {in_words(need)}, {parameters}"
        assert errors.isfinite().all(), f"not finite: {by} reads slots that were never written, or overflows ({where})"
        allowed = self.tolerances[need.dtype]
        assert errors[token] <= allowed, f"{by} is wrong by {errors[token]:.2g}, allowed is {allowed:g} ({where})"

    def _phase(self, context: int, new: int) -> str:
        return "decode" if context and new == 1 else "prefill"

    def _context_writer(self, need: AttentionNeed) -> AttentionBackend:
        """A backend for decode alone reads what another wrote, so there must be another."""
        need = replace(need, features=frozenset({"prefill"}))
        partners = self.partners(need)
        assert partners, (
            f"{self.component} serves decode alone and no installed backend serves prefill over its KV layout "
            f"{self.spec().kv_layout!r}; declare prefill too, or a layout that another backend has published"
        )
        return build_partner(partners[0], need)

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

    # ------------------------------------------------------------------------------------------------- numbers

    def test_prefills_equal_the_formula(self) -> None:
        self._check_step(PREFILLS)

    def test_chunks_attend_to_their_context_and_to_themselves(self) -> None:
        self._check_step(CHUNKS)

    def test_decodes_equal_the_formula(self) -> None:
        self._check_step(DECODES)

    def test_decodes_chunks_and_prefills_in_one_step_equal_the_formula(self) -> None:
        self._check_step(DECODES + CHUNKS + PREFILLS)

    def test_query_heads_are_grouped_in_order_over_the_kv_heads(self) -> None:
        for need in self.accepted(heads=HEADS):
            self._check_step(((17, 1), (0, 17)), need)

    def test_every_head_size_that_it_accepts(self) -> None:
        for need in self.accepted(head_dim=self.head_sizes()):
            self._check_step(((17, 1), (33, 1), (0, 17), (5, 3)), need)

    def test_every_block_size_that_it_accepts(self) -> None:
        for need in self.accepted(block_size=self.block_sizes()):
            self._check_step(((15, 1), (33, 1), (0, 33), (31, 33)), need)

    def test_every_dtype_that_it_accepts(self) -> None:
        for need in self.accepted(dtype=DTYPES):
            self._check_step(((33, 1), (190, 1), (0, 33), (31, 33)), need)

    def test_scale_is_the_one_that_was_given(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((17, 1), (33, 1), (0, 17)), need)
        for parameters in (AttentionParameters(scale=0.3), AttentionParameters(scale=0.07)):
            self.check(need, scene.step(batch, parameters=parameters), batch, parameters=parameters)

    def test_a_window_shows_the_last_tokens_and_no_other(self) -> None:
        for need in self.needs_with("sliding_window", sliding_window=WINDOWS):
            parameters = replace(usual_parameters(need), sliding_window=need.sliding_window)
            scene, batch = self.set_up(DECODES + CHUNKS + PREFILLS, need)
            self.check(need, scene.step(batch, parameters=parameters), batch, parameters=parameters)

    def test_scores_are_capped_smoothly(self) -> None:
        for need in self.needs_with("logit_softcap", logit_softcap=CAPS):
            parameters = replace(usual_parameters(need), logit_softcap=need.logit_softcap)
            scene, batch = self.set_up(DECODES[::2] + CHUNKS + PREFILLS, need, amplify=3.0)
            self.check(need, scene.step(batch, parameters=parameters), batch, parameters=parameters)

    def test_one_plan_serves_layers_with_and_without_a_window_or_a_cap(self) -> None:
        features = sorted(set(LAYER_VALUES) & self.spec().features)
        for need in self.needs_with(*features, **{feature: LAYER_VALUES[feature][:1] for feature in features}):
            scene, batch = self.set_up(DECODES + CHUNKS + PREFILLS, need)
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
        scene, batch = self.set_up(((1, 1), (33, 1), (190, 1), (0, 17), (31, 33)), need)
        together = scene.step(batch)
        for row in batch.rows:
            alone = scene.step(scene.batch([row]))
            error = (alone - together[batch.tokens_of(row)]).abs().max()
            assert error <= self.tolerances[str(need.dtype)], f"{row}: differs by {error:.2g} from when it is alone"

    def test_same_step_gives_the_same_bits(self) -> None:
        scene, batch = self.set_up(DECODES + CHUNKS + PREFILLS)
        assert torch.equal(scene.step(batch), scene.step(batch))

    # --------------------------------------------------------------------------------------------------- inputs

    def test_inputs_may_be_slices_of_one_wider_tensor(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((17, 1), (0, 17)), need)
        wide = torch.cat([batch.query, batch.key, batch.value], dim=1)  # as one linear for all three makes them
        query, key, value = torch.split(wide, [need.num_heads, need.num_kv_heads, need.num_kv_heads], dim=1)
        self.check(need, scene.step(replace(batch, query=query, key=key, value=value)), batch)

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

    # ------------------------------------------------------------------------------------------- cache and plan

    def test_writes_no_block_but_those_of_its_slots(self) -> None:
        for lengths in (((15, 1), (31, 1), (32, 1)), ((0, 16), (0, 17), (31, 33))):
            need = self.need()
            if {self._phase(*one) for one in lengths} <= need.features:
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
        for _ in range(5):
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
        scene, batch = self.set_up(DECODES + CHUNKS + PREFILLS, need)
        after = scene.batch(batch.rows[1::3])
        scene.step(batch.without_writes_of(batch.rows[-1]))
        scene.plan(scene.batch(batch.rows[::4]))
        self.check(need, scene.step(after), after)

    def test_one_plan_serves_every_layer(self) -> None:
        need = self.need()
        scene, batch = self.set_up(((0, 17), (0, 33)) if "prefill" in need.features else ((17, 1), (33, 1)), need)
        layers = [tuple(buffer.clone() for buffer in scene.cache) for _ in range(2)]
        scene.plan(batch)
        for cache in layers:
            self.check(need, scene.forward(batch, cache=cache), batch)
        assert not blocks_that_differ(*layers), "equal steps leave equal caches in every layer"

    def test_prefill_in_one_object_and_decode_in_another_equal_the_formula(self) -> None:
        need = self.need()
        if not need.features >= PHASES:
            pytest.skip(f"{self.component} serves {' and '.join(sorted(need.features))} only")
        prefill, decode = (self.make(replace(need, features=frozenset({phase}))) for phase in ("prefill", "decode"))
        scene, batch = self.set_up(DECODES[:5] + CHUNKS + PREFILLS, need)
        self.check(need, scene.step(batch, SplitAttention(prefill, decode)), batch)

    def test_other_backends_of_its_layout_read_what_it_writes(self) -> None:
        need = self.need()
        for phase, num_tokens in (("decode", 1), ("prefill", 3)):
            its_need = replace(need, features=frozenset({phase}))
            for partner in self.partners(its_need):
                other = build_partner(partner, its_need)
                assert other.kv_layout() == self.make(need).kv_layout(), (
                    f"{partner.full_name} has a KV layout of this name and makes it differently"
                )
                scene, batch = self.set_up(((15, 1), (31, 1), (0, 20), (0, 33)), need)
                scene.step(batch)
                batch = scene.batch([row.next(num_tokens) for row in batch.rows])
                self.check(need, scene.step(batch, other), batch, by=f"{partner.full_name}, reading what it wrote,")

    def _check_step(self, lengths: Sequence[tuple[int, int]], need: AttentionNeed | None = None) -> None:
        need = need or self.need()
        scene, batch = self.set_up(lengths, need)
        self.check(need, scene.step(batch), batch)
