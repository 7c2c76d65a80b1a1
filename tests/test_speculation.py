"""Speculative decoding: guesses save steps and change no output; whoever guesses badly or fails harms nobody."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tiny_model import BOS, MAX_POSITIONS, VOCAB_SIZE, token_ids_of, write_tiny_llama

from octavo import LLM, CompletionOutput, SamplingParams
from octavo.errors import UnknownNameError
from octavo.interfaces import Step

PLUGIN = """
    from pydantic import BaseModel, ConfigDict
    from octavo import ProposerSpec, hookimpl

    OCTAVO_API = "1.0"

    class FortuneOptions(BaseModel):
        model_config = ConfigDict(extra="forbid")
        texts: list[list[int]] = []
        num_right: int = 100
        fault: str = ""

    @hookimpl
    def octavo_components():
        return [
            ProposerSpec(
                name="fortune",
                summary="Knows whole texts, and guesses so many tokens of them rightly",
                target="fortune.teller:FortuneTeller",
                options="fortune:FortuneOptions",
            )
        ]
"""
PROPOSER = """
from octavo.interfaces.proposer import Proposer

FAULTS = {
    "too many": lambda one: [1] * (one.max_drafts + 1),
    "out of vocabulary": lambda one: [105],
    "negative": lambda one: [-1],
    "no integers": lambda one: [0.5],
    "no list": lambda one: 7,
}
asked = []


class FortuneTeller(Proposer):
    def __init__(self, context, *, options):
        super().__init__(context)
        self.options = options
        asked.clear()

    def propose(self, continuations):
        asked.append([one.request_id for one in continuations])
        if self.options.fault == "raises":
            raise RuntimeError("the crystal ball is cloudy")
        if self.options.fault == "one missing":
            return [[]] * (len(continuations) - 1)
        return [self.guess(one) for one in continuations]

    def forget(self, request_id):
        if self.options.fault == "forgets badly":
            raise KeyError(request_id)

    def guess(self, one):
        known = one.token_ids.tolist()
        if self.options.fault in FAULTS:
            return FAULTS[self.options.fault](one)
        if not self.options.texts:  # anything, but not always the same
            return [(known[-1] + position) % self.context.vocab_size for position in range(one.max_drafts)]
        text = next(text for text in self.options.texts if text[: len(known)] == known)
        guess = text[len(known) : len(known) + one.max_drafts]
        right = self.options.num_right
        return guess[:right] + [(token_id + 1) % self.context.vocab_size for token_id in guess[right:]]
"""
FAULTS = ["raises", "one missing", "too many", "out of vocabulary", "negative", "no integers", "no list"]

PROMPTS = [[BOS, *token_ids_of(text)] for text in ("hello world", "hello there, this is a longer prompt", "abc")]
NUM_TOKENS = 24
BLOCK_SIZE = 8
BYTES_PER_BLOCK = 4 * BLOCK_SIZE * (2 * 2 * 2 * 12)  # float32: 2 layers, keys and values, 2 heads of 12

MakeLLM = Callable[..., LLM]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **fields})


def generate(llm: LLM, *each: SamplingParams) -> list[CompletionOutput]:
    """The completions of PROMPTS, all at once."""
    outputs = llm.generate(PROMPTS, list(each) if len(each) > 1 else each[0])
    return [output.outputs[0] for output in outputs]


def is_idle(llm: LLM) -> bool:
    stats = llm.stats()
    return (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_llm(folder: Path, site_packages: Any) -> Iterator[MakeLLM]:
    """The tiny model, with the proposer above when options of it are given."""
    file = site_packages.install("fortune", PLUGIN, module="fortune")
    (file.parent / "teller.py").write_text(PROPOSER)
    made = []

    def make(proposer: dict[str, Any] | None = None, **settings: Any) -> LLM:
        if proposer is not None:
            settings["proposer"] = {"name": "fortune", **proposer}
        made.append(LLM(str(folder), **{"dtype": "float32", "block_size": BLOCK_SIZE, "max_num_seqs": 4, **settings}))
        return made[-1]

    yield make
    for llm in made:
        llm.shutdown()


def plain(make_llm: MakeLLM, *each: SamplingParams, **settings: Any) -> list[CompletionOutput]:
    """What comes without speculation."""
    return generate(make_llm(**settings), *each)


def texts_of(outputs: list[CompletionOutput]) -> list[list[int]]:
    """Prompts and outputs: what a proposer that knows the future knows."""
    return [prompt + output.token_ids for prompt, output in zip(PROMPTS, outputs, strict=True)]


# --------------------------------------------------------------------------------------------------- same output


@pytest.mark.parametrize("num_right", [0, 1, 3, 100])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="batched"),
        pytest.param({"max_num_seqs": 1}, id="alone"),
        pytest.param({"max_num_batched_tokens": 6}, id="chunked"),
        pytest.param({"max_model_len": 64, "kv_cache_memory_bytes": 9 * BYTES_PER_BLOCK}, id="preempted"),
        pytest.param({"max_steps_in_flight": 2}, id="two steps in flight"),
        pytest.param({"num_speculative_tokens": 1}, id="one guess"),
        pytest.param({"num_speculative_tokens": 20}, id="guesses over several blocks"),
        pytest.param({"enable_prefix_caching": False}, id="no prefix cache"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_guesses_change_no_output(
    make_llm: MakeLLM, temperature: float, settings: dict[str, Any], num_right: int
) -> None:
    each = [params(temperature=temperature, seed=seed) for seed in range(len(PROMPTS))]
    wanted = plain(make_llm, *each)
    llm = make_llm({"texts": texts_of(wanted), "num_right": num_right}, **settings)
    for _ in range(2):  # the second time from the prefix cache
        assert generate(llm, *each) == wanted
        assert is_idle(llm)
    stats = llm.stats()
    assert stats.num_accepted_drafts <= stats.num_drafts
    if "kv_cache_memory_bytes" in settings:
        assert stats.num_preemptions
    elif "max_steps_in_flight" not in settings:
        assert stats.num_drafts
        assert bool(stats.num_accepted_drafts) == bool(num_right)


def test_right_guesses_save_steps_and_are_counted(make_llm: MakeLLM) -> None:
    wanted = plain(make_llm, params())
    llm = make_llm({"texts": texts_of(wanted)}, num_speculative_tokens=4)
    generate(llm, params())
    stats = llm.stats()
    # The prompt's step gives 1 token, each step after it 5, and the last the 3 that are left: 2 guesses and one more.
    assert stats.num_steps == 1 + 4 + 1
    assert stats.num_drafts == stats.num_accepted_drafts == len(PROMPTS) * (4 * 4 + 2)


def test_wrong_guesses_are_counted_as_not_accepted(make_llm: MakeLLM) -> None:
    wanted = plain(make_llm, params())
    llm = make_llm({"texts": texts_of(wanted), "num_right": 0})
    generate(llm, params())
    assert llm.stats().num_drafts
    assert not llm.stats().num_accepted_drafts


@pytest.mark.parametrize("max_tokens", range(1, 8))
def test_max_tokens_is_kept_to_the_token(make_llm: MakeLLM, max_tokens: int) -> None:
    texts = texts_of(plain(make_llm, params()))  # which go on longer
    (wanted, *_), llm = plain(make_llm, params(max_tokens=max_tokens)), make_llm({"texts": texts})
    found, *_ = generate(llm, params(max_tokens=max_tokens))
    assert (found.token_ids, found.finish_reason) == (wanted.token_ids, "length")
    assert len(found.token_ids) == max_tokens


@pytest.mark.parametrize("prompt_length", range(MAX_POSITIONS - 7, MAX_POSITIONS))
def test_guesses_end_with_the_context(make_llm: MakeLLM, prompt_length: int) -> None:
    prompt = [BOS, *token_ids_of("ab" * MAX_POSITIONS)][:prompt_length]
    (wanted,) = make_llm().generate(prompt, params(max_tokens=None))
    (found,) = make_llm({"texts": [[*prompt, *wanted.outputs[0].token_ids, *range(9)]]}).generate(
        prompt, params(max_tokens=None)
    )
    assert found.outputs == wanted.outputs
    assert len(found.outputs[0].token_ids) == MAX_POSITIONS - prompt_length


@pytest.mark.parametrize("position", range(1, 8))
def test_a_stop_token_among_accepted_guesses_ends_the_output_there(make_llm: MakeLLM, position: int) -> None:
    texts = texts_of(plain(make_llm, params()))
    stop = texts[0][len(PROMPTS[0]) + position]
    wanted = plain(make_llm, params(stop_token_ids=[stop]))
    found = generate(make_llm({"texts": texts}), params(stop_token_ids=[stop]))
    assert found == wanted
    assert (found[0].finish_reason, found[0].stop_reason, found[0].token_ids[-1]) == ("stop", stop, stop)


def test_an_end_of_sequence_among_accepted_guesses_ends_the_output_there(make_llm: MakeLLM) -> None:
    """Whatever the model says, the bias lets it end: after a few tokens at temperature 1 it does."""
    each = [
        params(temperature=1.0, seed=seed, ignore_eos=ignore_eos, logit_bias={1: 4.0})
        for ignore_eos in (True, False)
        for seed in range(3)
    ]
    texts = texts_of(plain(make_llm, *each[:3]))
    wanted = plain(make_llm, *each[3:])
    assert any(output.finish_reason == "stop" for output in wanted)
    llm = make_llm({"texts": texts})
    assert generate(llm, *each[3:]) == wanted
    assert llm.stats().num_accepted_drafts


def test_a_stop_string_over_accepted_guesses_cuts_the_text_there(make_llm: MakeLLM) -> None:
    outputs = plain(make_llm, params())
    stop = outputs[0].text[2:4]
    wanted = plain(make_llm, params(stop=stop))
    found = generate(make_llm({"texts": texts_of(outputs)}), params(stop=stop))
    assert [output.text for output in found] == [output.text for output in wanted]
    assert found[0].stop_reason == stop


def test_min_tokens_holds_back_a_stop_that_was_guessed(make_llm: MakeLLM) -> None:
    texts = texts_of(plain(make_llm, params()))
    stop = texts[0][len(PROMPTS[0]) + 1]
    each = params(stop_token_ids=[stop], min_tokens=6)
    wanted = plain(make_llm, each)
    found = generate(make_llm({"texts": texts_of(wanted)}), each)
    assert found == wanted
    assert stop not in found[0].token_ids[:6]


def test_logprobs_of_accepted_guesses_are_those_without(make_llm: MakeLLM) -> None:
    each = params(logprobs=3, max_tokens=8)
    wanted = plain(make_llm, each)
    llm = make_llm({"texts": texts_of(wanted), "num_right": 2})
    found = generate(llm, each)
    assert llm.stats().num_accepted_drafts
    for output, other in zip(found, wanted, strict=True):
        assert output.logprobs is not None
        assert other.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids) == 8
        for one, two in zip(output.logprobs, other.logprobs, strict=True):
            assert list(one) == list(two)
            assert [one[key].rank for key in one] == [two[key].rank for key in two]
            assert [one[key].logprob for key in one] == pytest.approx([two[key].logprob for key in two], abs=1e-4)


def test_a_request_under_a_penalty_is_not_speculated_on(make_llm: MakeLLM) -> None:
    wanted = plain(make_llm, params(frequency_penalty=1.0))
    llm = make_llm({"texts": texts_of(wanted)})
    assert generate(llm, params(frequency_penalty=1.0)) == wanted
    assert llm.stats().num_drafts == 0


def test_sampled_tokens_have_the_models_probabilities(make_llm: MakeLLM) -> None:
    """Chi-square over three tokens of a vocabulary of three, the last two of them verified guesses or corrections."""
    allowed, temperature, num_samples = token_ids_of("abc"), 8.0, 4000
    prompt, cells = PROMPTS[0], list(product(allowed, repeat=3))
    llm = make_llm({}, max_num_seqs=256, num_speculative_tokens=2)
    read = llm.generate([[*prompt, *cell] for cell in cells], params(max_tokens=1, prompt_logprobs=0))
    weights: dict[tuple[int, ...], float] = {}  # of a token after those before it
    for cell, output in zip(cells, read, strict=True):
        assert output.prompt_logprobs is not None
        for index, token_id in enumerate(cell):
            logprobs = output.prompt_logprobs[len(prompt) + index]
            assert logprobs is not None
            weights[cell[: index + 1]] = math.exp(logprobs[token_id].logprob / temperature)

    def probability(*cell: int) -> float:
        return weights[cell] / sum(weights[*cell[:-1], token_id] for token_id in allowed)

    expected = {
        cell: num_samples * probability(*cell[:1]) * probability(*cell[:2]) * probability(*cell) for cell in cells
    }
    assert min(expected.values()) > 5

    each = [
        SamplingParams(temperature=temperature, seed=seed, max_tokens=4, allowed_token_ids=allowed, ignore_eos=True)
        for seed in range(num_samples)
    ]
    outputs = llm.generate([prompt] * num_samples, each)
    found = Counter(tuple(output.outputs[0].token_ids[:3]) for output in outputs)
    assert llm.stats().num_drafts
    chi_square = sum((found[cell] - count) ** 2 / count for cell, count in expected.items())
    assert chi_square < 54.05  # the 0.999 quantile of 26 degrees of freedom


# -------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", [*FAULTS, "forgets badly"])
def test_a_proposer_at_fault_is_put_aside_with_one_error_and_every_answer_comes(
    make_llm: MakeLLM, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = plain(make_llm, params())
    llm = make_llm({"fault": fault, "texts": texts_of(wanted)})
    for _ in range(2):
        assert generate(llm, params()) == wanted
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "Proposer fortune/fortune failed and is not asked again" in errors[0]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("raises", "RuntimeError: the crystal ball is cloudy"),
        ("one missing", "was given 3 requests and returned 2 guesses"),
        ("too many", "guessed 5 tokens for request"),
        ("out of vocabulary", f"guessed [105]; token ids are 0 to {VOCAB_SIZE - 1}"),
        ("no integers", "guessed [0.5], which are no token ids"),
    ],
)
def test_the_error_says_what_was_wrong_with_the_guesses(
    make_llm: MakeLLM, fault: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    generate(make_llm({"fault": fault}), params())
    assert sentence in caplog.text


def test_a_proposer_that_cannot_be_made_is_an_error_at_start(make_llm: MakeLLM, site_packages: Any) -> None:
    (site_packages.path / "fortune" / "teller.py").write_text("import no_such_module")
    with pytest.raises(Exception, match=r"proposer fortune/fortune .* cannot be loaded: .*no_such_module"):
        make_llm({})


# ----------------------------------------------------------------------------------------------------- selection


def test_explain_shows_the_proposer_and_its_options(make_llm: MakeLLM) -> None:
    explanation = make_llm({"num_right": 2}).explain()
    (socket,) = [one for one in explanation.sockets if one.name == "proposer"]
    assert [one.name for one in socket.candidates if one.chosen] == ["fortune"]
    assert {"proposer": "fortune/fortune", "proposer.num_right": 2}.items() <= {
        one.name: one.value for one in explanation.settings
    }.items()


def test_none_is_chosen_unless_one_is_named(make_llm: MakeLLM) -> None:
    llm = make_llm()
    generate(llm, params())
    assert "proposer" not in [socket.name for socket in llm.explain().sockets]
    assert llm.stats().num_drafts == 0


def test_an_unknown_proposer_is_an_error_that_names_those_installed(make_llm: MakeLLM) -> None:
    with pytest.raises(UnknownNameError, match="fortune"):
        make_llm({"name": "fortun"})


def test_a_step_carries_the_guesses_as_more_tokens_of_the_request(make_llm: MakeLLM) -> None:
    wanted = plain(make_llm, params())
    llm, steps = make_llm({"texts": texts_of(wanted)}, num_speculative_tokens=3), list[Step]()
    llm.engine.step_listeners.append(steps.append)
    generate(llm, params())
    assert [(row.num_tokens, row.num_drafts) for row in steps[1].rows] == [(4, 3)] * len(PROMPTS)
