"""What the tests of AttentionSuite are made with: needs that a backend accepts, batches of them, and the comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from octavo.interfaces.attention import AttentionBackend, AttentionParameters
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import AttentionNeed, AttentionSpec
from octavo.testing.attention_needs import (
    DTYPES,
    FEW,
    MANY,
    MORE_TOKENS,
    PHASES,
    Shapes,
    build_partner,
    in_words,
    phase_of,
    variations,
)
from octavo.testing.paged_scene import Batch, PagedScene, Row, torch_dtype, usual_parameters
from octavo.testing.suite import Suite, installed_components


class AttentionChecks(Suite):
    """A component under test, without tests.

    Attributes:
        device: where its tests run. A backend that needs a GPU says "cuda", and its tests are skipped elsewhere with
            `pytestmark = pytest.mark.skipif(...)`.
        small: ask for the same facts with fewer and shorter requests: for a backend that runs in an interpreter.
        tolerances: largest error of an output, by dtype; values are drawn from a normal distribution.
        fp8_tolerances: the same over an fp8 cache, compared with the formula over what the cache holds.
    """

    kind = "attention"
    device: ClassVar[str] = "cpu"
    small: ClassVar[bool] = False
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
    fp8_tolerances: ClassVar[Mapping[str, float]] = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 8e-3}

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
        sizes = {"head_dim": self.head_sizes(), "block_size": self.block_sizes(), "heads": self.shapes.heads}
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

    @property
    def shapes(self) -> Shapes:
        """Lengths and sizes to try."""
        return FEW if self.small else MANY

    def head_sizes(self) -> tuple[int, ...]:
        """Those that the spec lists; some, when it takes any."""
        return self.spec().head_sizes or self.shapes.head_sizes

    def block_sizes(self) -> tuple[int, ...]:
        """Those that the spec lists; some, when it takes any."""
        return self.spec().block_sizes or self.shapes.block_sizes

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
        longest = self.shapes.longest_context
        lengths = [(min(context, longest), new) for context, new in lengths if phase_of(context, new) in need.features]
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
        allowed: float | None = None,
        by: str = "it",
    ) -> None:
        """Compare a step's output with the formula; rows that are padding have no right output.

        Args:
            allowed: the largest error, when it is not that of `tolerances`.
        """
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
        allowed = self.tolerances[need.dtype] if allowed is None else allowed
        assert errors[token] <= allowed, f"{by} is wrong by {errors[token]:.2g}, allowed is {allowed:g} ({where})"

    def _context_writer(self, need: AttentionNeed) -> AttentionBackend:
        """A backend for decode alone reads what another wrote, so there must be another."""
        need = replace(need, features=frozenset({"prefill"}))
        partners = self.partners(need)
        assert partners, (
            f"{self.component} serves decode alone and no installed backend serves prefill over its KV layout "
            f"{self.spec().kv_layout!r}; declare prefill too, or a layout that another backend has published"
        )
        return build_partner(partners[0], need)
