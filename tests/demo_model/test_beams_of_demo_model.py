"""Beam search on the real demo model: transformers' sequences and scores, where no candidates all but tie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from margin_rule import MARGIN

from octavo import LLM, BeamSearchOutput, BeamSearchParams
from octavo.beam_search.selection import Beam, BeamSelection

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little",
    "대한민국의 수도는",
    "def fibonacci(n):",
]
WIDTH, MAX_TOKENS = 4, 12
SEARCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "short and early": {"length_penalty": -1.0, "early_stopping": True},
}

Beams = tuple[list[list[int]], list[float]]
ReferenceBeams = Callable[[list[int], dict[str, Any]], Beams]


@pytest.fixture(scope="module")
def reference_beams(demo_model: Path) -> ReferenceBeams:
    """transformers' sequences up to their end, and their scores."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model.parent, gguf_file=demo_model.name, dtype=torch.float32)
    end: int = model.config.eos_token_id

    def beams(prompt_token_ids: list[int], fields: dict[str, Any]) -> Beams:
        found = model.generate(
            torch.tensor([prompt_token_ids]),
            num_beams=WIDTH,
            num_return_sequences=WIDTH,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=end,
            pad_token_id=end,
            return_dict_in_generate=True,
            output_scores=True,
            **fields,
        )
        outputs = [row[len(prompt_token_ids) :] for row in found.sequences.tolist()]
        cut = [output[: output.index(end) + 1] if end in output else output for output in outputs]
        return [prompt_token_ids + output for output in cut], found.sequences_scores.tolist()

    return beams


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", dtype="float32", max_model_len=128) as llm:
        yield llm


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """By how much what is kept at each step stands above what is not: beams that go on, and finished ones."""
    found: list[float] = []
    advance, finish = BeamSelection.advance, BeamSelection._finish

    def note(numbers: Iterable[float]) -> None:
        ordered = sorted(numbers, reverse=True)
        if len(ordered) > WIDTH:
            found.append(ordered[WIDTH - 1] - ordered[WIDTH])

    def measured_advance(self: BeamSelection, logprobs: Any) -> None:
        candidates = list(self._continuations(logprobs))
        note(beam.cum_logprob for beam in candidates)
        note(beam.cum_logprob for beam in candidates if beam.token_id not in self._end_token_ids)
        advance(self, logprobs)

    def measured_finish(self: BeamSelection, beams: Sequence[Beam]) -> None:
        note([one.score for one in self.finished] + [self._score(beam, beam.num_tokens) for beam in beams])
        finish(self, beams)

    monkeypatch.setattr(BeamSelection, "advance", measured_advance)
    monkeypatch.setattr(BeamSelection, "_finish", measured_finish)
    return found


def search(llm: LLM, prompts: list[str], fields: dict[str, Any]) -> list[BeamSearchOutput]:
    params = BeamSearchParams(beam_width=WIDTH, max_tokens=MAX_TOKENS, include_stop_str_in_output=True, **fields)
    return llm.beam_search(prompts, params)


@pytest.mark.parametrize("fields", SEARCHES.values(), ids=SEARCHES)
def test_beams_are_those_of_transformers(
    llm: LLM, reference_beams: ReferenceBeams, margins: list[float], fields: dict[str, Any]
) -> None:
    num_decided = 0
    for prompt in PROMPTS:
        margins.clear()
        (output,) = search(llm, [prompt], fields)
        wanted, scores = reference_beams(llm.get_tokenizer().encode(prompt), fields)
        if min(margins) >= MARGIN:
            num_decided += 1
            found = {tuple(sequence.tokens): sequence.score for sequence in output.sequences}
            assert found == pytest.approx(dict(zip(map(tuple, wanted), scores, strict=True)), abs=MARGIN)
    assert num_decided >= 2, "in too many prompts candidates all but tie: choose others"


def test_prompts_together_give_what_each_gives_alone(llm: LLM) -> None:
    alone = [search(llm, [prompt], {})[0] for prompt in PROMPTS]
    for one, other in zip(alone, search(llm, PROMPTS, {}), strict=True):
        assert [sequence.text for sequence in one.sequences] == [sequence.text for sequence in other.sequences]
