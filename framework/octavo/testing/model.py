"""ModelSuite: whether an architecture computes one model, however its tokens are cut into steps, batches and ranks.

    class TestMine(ModelSuite):
        component = "my-plugin/mine"
        config = {"architectures": ["MineForCausalLM"], "vocab_size": 101, ...}  # a small config.json

The model is built with the engine's own layers on a CPU, with torch attention and random weights for exactly the
tensors it expects; no file is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from octavo.interfaces.model import LayerFactory, ModelArchitecture
from octavo.model_config import ModelConfig
from octavo.testing.model_under_test import ModelUnderTest
from octavo.testing.suite import Suite

_WHOLE = 37  # tokens of the longest prompt: several blocks, the last one not full
_TOLERANCE = 1e-4
_NUMBERED = re.compile(r"\.(\d+)\.")


class ModelSuite(Suite):
    """What the engine relies on in every `octavo.interfaces.ModelArchitecture`.

    Attributes:
        config: config.json of a small model: two layers or more, 64 positions, an even number of KV heads, and few
            enough weights to build it some fifty times.
    """

    kind = "model"
    config: ClassVar[Mapping[str, Any]]

    def make(self, config: ModelConfig, factory: LayerFactory) -> ModelArchitecture:
        """The model under test."""
        model: ModelArchitecture = self.build(config, factory)
        return model

    def reference(self, tensors: Mapping[str, Tensor], token_ids: Sequence[int]) -> Tensor | None:
        """Another program's logits of the model `config` with these weights, [len(token_ids), vocab_size] float32.

        Optional, and the only test that can tell one right-looking formula from another.
        """
        return None

    # ------------------------------------------------------------------------------------------- what it asks for

    def test_builds_as_many_layers_as_the_configuration_says(self) -> None:
        built = self._model()
        found, wanted = len(built.model.layers), built.config.num_layers
        assert found == wanted, f"`layers` has {found}, num_hidden_layers is {wanted}"

    def test_asks_for_one_attention_for_each_layer_s_cache(self) -> None:
        built = self._model()
        found = [layer_index for layer_index, *_ in built.asked.attentions]
        wanted = list(range(built.config.num_layers))
        assert sorted(found) == wanted, f"factory.attention was asked for the layers {found}; each has one, {wanted}"

    def test_attention_has_the_heads_that_the_cache_is_made_for(self) -> None:
        built = self._model()
        config = built.config
        wanted = (config.num_heads, config.num_kv_heads, config.head_dim)
        wrong = [heads for _, *heads in built.asked.attentions if tuple(heads) != wanted]
        assert not wrong, f"factory.attention was asked for (num_heads, num_kv_heads, head_dim) {wrong}, not {wanted}"

    def test_queries_keys_and_values_come_from_qkv_linear(self) -> None:
        built = self._model()
        config = built.config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        found, wanted = built.asked.qkv_heads, [heads] * config.num_layers
        assert found == wanted, f"factory.qkv_linear, which parts whole heads among devices, was asked for {found}"

    def test_linears_that_read_one_input_are_one_stacked_linear(self) -> None:
        built = self._model()
        built.logits([self._token_ids(5)])
        shared = built.asked.linears_that_share_their_input()
        assert not shared, f"{shared} read what another projection reads too: ask for them by factory.stacked_linear"

    def test_each_tensor_is_asked_for_in_one_shape(self) -> None:
        shapes = self._model().asked.shapes
        several = {name: found for name, found in shapes.items() if len(found) > 1}
        assert not several, f"expected in several shapes: {several}"

    def test_ignored_names_are_not_expected_ones(self) -> None:
        built = self._model()
        both = [
            f"{name} matches {pattern!r}"
            for pattern in built.model.ignored_names()
            for name in built.asked.shapes
            if fnmatchcase(name, pattern)
        ]
        assert not both, f"ignored and expected at once: {both}"

    def test_every_tensor_it_asks_for_is_used(self) -> None:
        token_ids, tensors = self._token_ids(5), self._tensors()
        numbers = [int(found[1]) for name in tensors if (found := _NUMBERED.search(name))]
        ends = {str(number) for number in (min(numbers, default=0), max(numbers, default=0))}
        tried = [name for name in tensors if not (found := _NUMBERED.search(name)) or found[1] in ends]
        (before,) = self._model(tensors).logits([token_ids])
        unused = []
        for name in tried:
            spoilt = {**tensors, name: torch.full_like(tensors[name], torch.nan)}
            (logits,) = self._model(spoilt).logits([token_ids])
            if torch.equal(logits, before):
                unused.append(name)
        assert not unused, f"filled with NaN, these change no logit: {unused}"

    # -------------------------------------------------------------------------------------------- what it computes

    def test_logits_are_finite_and_one_row_a_token(self) -> None:
        built = self._model()
        (logits,) = built.logits([self._token_ids(_WHOLE)])
        wanted = (_WHOLE, built.config.vocab_size)
        assert tuple(logits.shape) == wanted, f"logits are {list(logits.shape)}, not {list(wanted)}"
        assert logits.isfinite().all(), "logits are not finite"

    def test_equals_the_reference(self) -> None:
        token_ids, tensors = self._token_ids(_WHOLE), self._tensors()
        wanted = self.reference(tensors, token_ids)
        if wanted is not None:
            (found,) = self._model(tensors).logits([token_ids])
            _assert_close(found, wanted.float(), "the logits and those of the reference")

    def test_prompt_in_chunks_equals_prompt_at_once(self) -> None:
        token_ids = self._token_ids(_WHOLE)
        (at_once,), (in_chunks,) = self._logits(token_ids), self._logits(token_ids, chunks=[16, 3, 1, 17])
        _assert_close(in_chunks, at_once, "a prompt in chunks of 16, 3, 1 and 17 tokens and the same at once")

    def test_token_by_token_equals_prompt_at_once(self) -> None:
        token_ids = self._token_ids(_WHOLE)
        (at_once,), (one_by_one,) = self._logits(token_ids), self._logits(token_ids, chunks=[1] * _WHOLE)
        _assert_close(one_by_one, at_once, "tokens one by one and the same at once")

    def test_batched_equals_alone(self) -> None:
        requests = [self._token_ids(_WHOLE), self._token_ids(9, seed=1), self._token_ids(20, seed=2)]
        batched = self._model().logits(requests, [[30, 1, 6], [7, 1, 1], [1, 18, 1]])
        for index, (token_ids, found) in enumerate(zip(requests, batched, strict=True)):
            (alone,) = self._logits(token_ids)
            _assert_close(found, alone, f"request {index} among others and the same alone")

    def test_one_token_alone_equals_the_first_of_many(self) -> None:
        token_ids = self._token_ids(_WHOLE)
        (whole,), (first,) = self._logits(token_ids), self._logits(token_ids[:1])
        _assert_close(first, whole[:1], "a prompt of one token and the first of many")

    def test_later_tokens_do_not_change_earlier_logits(self) -> None:
        token_ids = self._token_ids(20)
        changed = [*token_ids[:12], *self._token_ids(8, seed=1)]
        (before,), (after,) = self._logits(token_ids), self._logits(changed)
        _assert_close(after[:12], before[:12], "logits before a change of later tokens and after it")
        assert _differ(after[12:], before[12:]), "other tokens, yet the same logits: the tokens are not read"

    def test_order_of_tokens_matters(self) -> None:
        token_ids = self._token_ids(12)
        swapped = [token_ids[1], token_ids[0], *token_ids[2:]]
        (before,), (after,) = self._logits(token_ids), self._logits(swapped)
        assert _differ(after[-1], before[-1]), "two tokens changed places, and the last logits stayed the same"

    def test_positions_matter(self) -> None:
        token_ids = self._token_ids(20)
        (before,), (after,) = self._logits(token_ids), self._model().logits([token_ids], position_stride=3)
        assert _differ(after[-1], before[-1]), "with its tokens three times as far apart, the logits stayed the same"

    def test_same_input_gives_the_same_bits(self) -> None:
        built, token_ids = self._model(), self._token_ids(_WHOLE)
        (first,), (second,) = built.logits([token_ids]), built.logits([token_ids])
        assert torch.equal(first, second), "the same prompt twice gives other logits: something is kept, or random"

    def test_bfloat16_stays_close_to_float32(self) -> None:
        token_ids, tensors = self._token_ids(_WHOLE), self._tensors()
        (wanted,) = self._model(tensors).logits([token_ids])
        (found,) = self._model(tensors, torch.bfloat16).logits([token_ids])
        assert found.dtype == torch.bfloat16, f"the model was built in bfloat16 and its logits are {found.dtype}"
        error = float((found.float() - wanted).norm() / wanted.norm())
        assert error < 0.05, f"bfloat16 logits are off by {error:.1%} of their size"

    # ------------------------------------------------------------------------------------- how it is taken apart

    def test_head_on_some_rows_equals_head_on_all(self) -> None:
        built = self._model()
        hidden, residual = built.hidden(self._token_ids(_WHOLE))
        rows = torch.tensor([_WHOLE - 1, 4])
        found, wanted = built.model.head(hidden[rows], residual[rows]), built.model.head(hidden, residual)[rows]
        _assert_close(found, wanted, "the head on two rows and these rows of the head on all")

    def test_sum_of_hidden_and_residual_is_what_counts(self) -> None:
        """How it is parted into the two is each layer's own matter, and nothing of it may be lost."""
        built, token_ids = self._model(), self._token_ids(_WHOLE)
        hidden, residual = built.hidden(token_ids, slice(1))
        rest, moved = slice(1, None), 0.5 * residual
        wanted = built.model.head(*built.hidden(token_ids, rest, (hidden, residual)))
        found = built.model.head(*built.hidden(token_ids, rest, (hidden + moved, residual - moved)))
        _assert_close(found, wanted, "one sum of hidden and residual, parted in two ways:")
        hidden, residual = built.hidden(token_ids)
        found = built.model.head(hidden + residual, torch.zeros_like(residual))
        _assert_close(found, built.model.head(hidden, residual), "the head, its two inputs parted in two ways:")

    def test_layers_may_lie_on_several_ranks(self) -> None:
        """The first half is computed by one copy of the model, the rest by another, as pipeline ranks do."""
        token_ids, tensors = self._token_ids(_WHOLE), self._tensors()
        ranks = [self._model(tensors), self._model(tensors)]
        border = ranks[0].config.num_layers // 2
        hidden, residual = ranks[0].hidden(token_ids, slice(border))
        hidden, residual = ranks[1].hidden(token_ids, slice(border, None), (hidden.clone(), residual.clone()))
        (wanted,) = self._model(tensors).logits([token_ids])
        _assert_close(ranks[1].model.head(hidden, residual), wanted, "layers on two ranks and the same on one")

    def test_one_rank_computes_its_share_from_what_it_has(self) -> None:
        """The first of two tensor-parallel ranks, while the second, all its products zero, adds nothing."""
        token_ids, whole = self._token_ids(_WHOLE), self._tensors()
        share = dict(whole)
        for name, (axis, sizes) in ModelUnderTest(self.make, self.config).asked.parted.items():
            if name in whole:
                halves = [part.tensor_split(2, axis) for part in torch.split(whole[name], sizes, axis)]
                share[name] = torch.cat([first for first, _ in halves], axis)
                if axis == 1:  # each rank has some of the inputs, and the products are summed
                    whole[name] = torch.cat([share[name], *(torch.zeros_like(second) for _, second in halves)], axis)
        (wanted,) = self._model(whole).logits([token_ids])
        (found,) = ModelUnderTest(self.make, self.config, share, num_ranks=2).logits([token_ids])
        _assert_close(found, wanted, "one rank's share by itself and in the whole model")

    # ------------------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """Random weights, the same each time."""
        return ModelUnderTest(self.make, self.config).asked.random_tensors()

    def _model(self, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32) -> ModelUnderTest:
        return ModelUnderTest(self.make, self.config, self._tensors() if tensors is None else tensors, dtype)

    def _logits(self, token_ids: Sequence[int], chunks: Sequence[int] | None = None) -> list[Tensor]:
        return self._model().logits([token_ids], None if chunks is None else [chunks])

    def _token_ids(self, num_tokens: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        token_ids: list[int] = torch.randint(
            int(self.config["vocab_size"]), (num_tokens,), generator=generator
        ).tolist()
        return token_ids


def _differ(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def _assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(
        found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE, msg=lambda text: f"{what} differ. {text}"
    )
