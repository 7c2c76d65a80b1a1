"""Prefill by one attention backend and decode by another: how the two are chosen, and that they are as good as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_llama

from octavo import LLM, SamplingParams
from octavo.builtin.torch_attention import TorchAttention
from octavo.config import ComponentConfig
from octavo.errors import PluginError, UnavailableComponentError, UnknownNameError
from octavo.interfaces import BatchLayout, BatchLimits, KVLayout
from octavo.nn.split_attention import SplitAttention, build_attention
from octavo.plugins.attention_pair import choose_attention
from octavo.plugins.host import Plugin
from octavo.plugins.registry import Choice, Registry
from octavo.plugins.specs import AttentionNeed, AttentionSpec
from octavo.testing.paged_scene import LIMITS, Batch, PagedScene, Row, usual_parameters

NEED = AttentionNeed(device="cpu", dtype="float32", num_heads=6, num_kv_heads=2, head_dim=16, block_size=16)

# (context, new tokens) of each request
DECODES = [(1, 1), (15, 1), (16, 1), (70, 1)]
PREFILLS = [(0, 1), (0, 17), (5, 3), (31, 33)]


# ----------------------------------------------------------------------------------------------------- computing


class RecordingAttention(TorchAttention):
    """Remembers which lengths it was given."""

    def __init__(self, need: AttentionNeed) -> None:
        super().__init__(need)
        self.planned: list[list[tuple[int, int]]] = []

    def plan(self, layout: BatchLayout, state: object) -> None:
        super().plan(layout, state)
        new = layout.query_start_loc.diff().tolist()
        self.planned.append([(end - count, count) for end, count in zip(layout.seq_lens.tolist(), new, strict=True)])


def scene_of(lengths: Sequence[tuple[int, int]]) -> tuple[PagedScene, Batch]:
    """The same requests each time, their contexts in the cache, and the step that computes what is new."""
    scene = PagedScene(TorchAttention(NEED), NEED)
    rows = [Row(request=scene.request(start + new), start=start, end=start + new) for start, new in lengths]
    scene.step(scene.batch([replace(row, start=0, end=row.start) for row in rows if row.start]))
    return scene, scene.batch(rows)


@pytest.mark.parametrize(
    "lengths", [DECODES, PREFILLS, DECODES + PREFILLS], ids=["decodes", "prefills", "decodes and prefills"]
)
def test_two_backends_equal_one(lengths: list[tuple[int, int]]) -> None:
    scene, batch = scene_of(lengths)
    other_scene, other_batch = scene_of(lengths)
    found = scene.step(batch, SplitAttention(TorchAttention(NEED), TorchAttention(NEED)))
    assert torch.equal(found, other_scene.step(other_batch))
    for buffer, other in zip(scene.cache, other_scene.cache, strict=True):
        torch.testing.assert_close(buffer, other, rtol=0, atol=0, equal_nan=True)


def test_steps_of_all_kinds_may_follow_each_other() -> None:
    prefill, decode = RecordingAttention(NEED), RecordingAttention(NEED)
    split = SplitAttention(prefill, decode)
    scene, batch = scene_of(DECODES + PREFILLS)
    only_decodes, only_prefills = scene.batch(batch.rows[:4]), scene.batch(batch.rows[4:])
    for step in (batch, only_decodes, only_prefills, batch):
        error = (scene.step(step, split) - step.wanted(usual_parameters(NEED))).abs().max()
        assert error < 1e-5
    assert decode.planned == [DECODES] * 3
    assert prefill.planned == [PREFILLS] * 3


def test_backend_of_each_phase_is_given_that_phase_alone() -> None:
    prefill, decode = RecordingAttention(NEED), RecordingAttention(NEED)
    scene, batch = scene_of([*PREFILLS, *DECODES])
    scene.step(batch, SplitAttention(prefill, decode))
    assert (prefill.planned, decode.planned) == ([PREFILLS], [DECODES])


def test_two_backends_that_rotate_equal_one() -> None:
    scene, batch = scene_of(DECODES + PREFILLS)
    rotary, split = scene.rotary(batch, 8), SplitAttention(TorchAttention(NEED), TorchAttention(NEED))
    state = split.make_state(BatchLimits(**LIMITS, block_size=16, device="cpu"))
    split.plan(batch.layout, state)
    inputs = batch.query, batch.key, batch.value, rotary, scene.cache, state, usual_parameters(NEED)
    wanted = batch.rotated(rotary).wanted(usual_parameters(NEED))
    assert (split.rotate_and_forward(*inputs) - wanted).abs().max() < 1e-5


def test_graphs_are_those_of_the_backend_for_decode() -> None:
    class Captured(TorchAttention):
        graph_mode = "decode"

    plain, captured = TorchAttention(NEED), Captured(NEED)
    assert SplitAttention(plain, captured).graph_mode == "decode"
    assert SplitAttention(captured, plain).graph_mode == "none"


def test_two_that_make_one_layout_differently_are_refused_with_both_named() -> None:
    class OtherOrder(TorchAttention):
        def kv_layout(self) -> KVLayout:
            layout = super().kv_layout()
            return replace(layout, buffers=layout.buffers[::-1])

    with pytest.raises(PluginError, match="TorchAttention and OtherOrder were chosen to share one KV layout"):
        SplitAttention(TorchAttention(NEED), OtherOrder(NEED))


# ------------------------------------------------------------------------------------------------------ choosing


def spec(name: str, *phases: str, layout: str = "shared", priority: int = 0, **fields: Any) -> AttentionSpec:
    return AttentionSpec(
        name=name,
        target="octavo.builtin.torch_attention:TorchAttention",
        features=frozenset(phases or ("prefill", "decode")),
        kv_layout=layout,
        priority=priority,
        **fields,
    )


def choose(*specs: AttentionSpec, prefill: str = "auto", decode: str = "auto") -> tuple[Choice, Choice]:
    plugin = Plugin(name="test", module="test", distribution="test", version="1", specs=specs)
    return choose_attention(Registry([plugin]), NEED, (ComponentConfig(name=prefill), ComponentConfig(name=decode)))


def names(choices: tuple[Choice, Choice]) -> tuple[str, str]:
    return choices[0].get().name, choices[1].get().name


def reasons(choice: Choice) -> dict[str, tuple[str, ...]]:
    return {one.spec.name: one.reasons for one in choice.candidates}


def test_auto_takes_the_pair_with_the_highest_priorities() -> None:
    flash, paged = spec("flash", "prefill", priority=10), spec("paged", "decode", priority=5)
    assert names(choose(spec("plain"), flash, paged)) == ("flash", "paged")


def test_auto_ranks_a_backend_apart_for_each_phase() -> None:
    flash, paged = spec("flash", priority=10, decode_priority=5), spec("paged", priority=5, decode_priority=10)
    assert names(choose(spec("plain"), flash, paged)) == ("flash", "paged")
    assert names(choose(spec("plain", priority=11), flash, paged)) == ("plain", "plain")


def test_rank_for_decode_may_be_zero_or_below() -> None:
    prefills_better = spec("flash", priority=10, decode_priority=0)
    assert names(choose(spec("plain", priority=1), prefills_better)) == ("flash", "plain")


def test_auto_leaves_the_best_for_one_phase_when_nothing_of_its_layout_serves_the_other() -> None:
    flash = spec("flash", "prefill", layout="of-its-own", priority=10)
    choices = choose(spec("plain"), flash)
    assert names(choices) == ("plain", "plain")
    assert reasons(choices[0])["flash"] == (
        "its KV layout is 'of-its-own'; test/plain, chosen for decode, has 'shared'",
    )


def test_auto_weighs_the_pair_not_one_side() -> None:
    """Alone for prefill, "flash" is the best; with the decode it allows, the pair of "plain" is better."""
    flash, slow = spec("flash", "prefill", layout="a", priority=10), spec("slow", "decode", layout="a", priority=-20)
    assert names(choose(spec("plain", layout="b"), flash, slow)) == ("plain", "plain")


def test_one_backend_comes_before_two_of_the_same_rank() -> None:
    assert names(choose(spec("a", "prefill"), spec("b", "decode"), spec("z"))) == ("z", "z")


def test_pairs_of_the_same_rank_are_ordered_by_name() -> None:
    specs = [spec("b"), spec("a"), spec("c")]
    assert names(choose(*specs)) == names(choose(*specs[::-1])) == ("a", "a")


def test_named_backend_is_kept_though_another_ranks_higher() -> None:
    choices = choose(spec("plain"), spec("best", priority=100), prefill="plain", decode="plain")
    assert names(choices) == ("plain", "plain")


def test_named_side_is_kept_and_the_other_follows_its_layout() -> None:
    best = spec("best", layout="of-its-own", priority=100)
    assert names(choose(spec("plain"), best, prefill="plain")) == ("plain", "plain")
    assert names(choose(spec("plain"), best, decode="test/best")) == ("best", "best")


def test_two_names_of_one_layout_are_both_kept() -> None:
    choices = choose(spec("a"), spec("b"), spec("c", priority=9), prefill="b", decode="a")
    assert names(choices) == ("b", "a")


def test_two_names_of_different_layouts_are_refused_with_both_named() -> None:
    choices = choose(spec("a", layout="one"), spec("b", layout="other"), prefill="a", decode="b")
    for choice in choices:
        with pytest.raises(UnavailableComponentError, match=r"for prefill test/a \(one\); for decode test/b \(other\)"):
            choice.get()
        assert not any(one.chosen for one in choice.candidates)


def test_layout_without_a_published_name_is_shared_with_nobody() -> None:
    choices = choose(spec("a", layout=""), spec("b", layout=""), prefill="a", decode="b")
    with pytest.raises(UnavailableComponentError, match="no two of these share a KV layout"):
        choices[0].get()
    assert names(choose(spec("a", layout=""), prefill="a", decode="a")) == ("a", "a")


def test_side_that_a_name_cannot_serve_quotes_the_reason() -> None:
    prefill, decode = choose(spec("plain"), spec("paged", "decode"), prefill="paged", decode="paged")
    with pytest.raises(UnavailableComponentError, match="'paged' cannot be used: does not support prefill"):
        prefill.get()
    assert decode.get().name == "paged"


def test_unknown_name_is_an_error_on_its_side() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'plain'\?"):
        choose(spec("plain"), decode="plane")[1].get()


def test_reasons_of_a_candidate_come_before_its_layout() -> None:
    choices = choose(spec("plain"), spec("wide", layout="of-its-own", head_sizes=(128,)))
    assert reasons(choices[0])["wide"] == ("supports head sizes 128; the model has 16",)


# --------------------------------------------------------------------------------------------------- in an engine

SECOND = """
    from octavo import AttentionSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [
            AttentionSpec(
                name="second",
                summary="Decodes only",
                target="dummy_second.backend:Second",
                features=frozenset({"decode"}),
                kv_layout="torch-nhd",
                priority=-1,
            )
        ]
"""
BACKEND = """
from octavo.builtin.torch_attention import TorchAttention


class Second(TorchAttention):
    num_steps = 0

    def plan(self, layout, state):
        assert layout.num_decode_requests == layout.num_requests
        assert self.need.features == {"decode"}
        type(self).num_steps += 1
        super().plan(layout, state)
"""


@pytest.fixture
def second(site_packages: Any) -> None:
    """An installed plugin whose backend decodes over the layout of the built-in one."""
    module = site_packages.install("second", SECOND)
    module.with_name("backend.py").write_text(BACKEND)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


def generate(folder: Path, attention: object) -> tuple[list[list[int]], dict[str, str]]:
    """Greedy tokens, and the backends of the manifest."""
    prompts = ["hello world", "x", "what is this? " * 3]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(str(folder), dtype="float32", max_num_batched_tokens=16, max_num_seqs=4, attention=attention) as llm:
        outputs = llm.generate(prompts, params)
        components = llm.manifest.components
    chosen = {socket: components[f"attention.{socket}"].full_name for socket in ("prefill", "decode")}
    return [output.outputs[0].token_ids for output in outputs], chosen


def test_engine_with_two_backends_says_the_same_as_with_one(folder: Path, second: None) -> None:
    tokens, chosen = generate(folder, {"prefill": "torch", "decode": "second"})
    assert chosen == {"prefill": "builtin/torch", "decode": "second/second"}
    assert (tokens, {"prefill": "builtin/torch", "decode": "builtin/torch"}) == generate(folder, "torch")

    from dummy_second.backend import Second

    assert Second.num_steps >= 11


def test_auto_is_the_same_as_the_name_it_chooses(folder: Path, second: None) -> None:
    assert generate(folder, "auto") == generate(folder, "torch")


def test_one_component_for_both_is_built_once_for_both_phases() -> None:
    prefill, decode = choose(spec("plain"))
    backend = build_attention(prefill.get(), decode.get(), NEED)
    assert type(backend) is TorchAttention
    assert backend.need.features == {"prefill", "decode"}


def test_two_components_are_built_for_a_phase_each() -> None:
    choices = choose(spec("a"), spec("b"), prefill="a", decode="b")
    backend = build_attention(choices[0].get(), choices[1].get(), NEED)
    assert isinstance(backend, SplitAttention)
    assert backend.need.features == {"prefill", "decode"}
