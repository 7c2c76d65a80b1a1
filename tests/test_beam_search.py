"""Beam search: which beams are kept, each of them on the engine, and that transformers finds the same sequences."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import VOCAB_SIZE, token_ids_of, write_tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from octavo import LLM, BeamSearchOutput, BeamSearchParams, SamplingParams
from octavo.beam_search.search import BeamSearch, run_beam_searches
from octavo.beam_search.selection import BeamSelection
from octavo.errors import RequestError
from octavo.interfaces import Step
from octavo.outputs import TokenLogprobs

BLOCK_SIZE = 8
BYTES_PER_BLOCK = 2 * 2 * BLOCK_SIZE * 2 * 12 * 4  # layers, keys and values, tokens, KV heads, head_dim, float32
ENDS = [7, 21, 39, 97]  # this model says them often
PROMPT = token_ids_of("hello world, hello beams")

Tokens = tuple[int, ...]
Probabilities = Callable[[Tokens], list[float]]
MakeLLM = Callable[..., LLM]


# ------------------------------------------------------------------------------------------------ the selection


def random_model(seed: int, vocab_size: int) -> Probabilities:
    """The log-probabilities of each token after some others: always the same, and of no pattern."""

    def after(token_ids: Tokens) -> list[float]:
        random = Random(f"{seed} {token_ids}")
        weights = [random.expovariate(1.0) ** 3 for _ in range(vocab_size)]
        return [math.log(weight / sum(weights)) for weight in weights]

    return after


def plain_search(
    model: Probabilities, width: int, max_tokens: int, ends: set[int], penalty: float, early: Any
) -> list[tuple[float, Tokens]]:
    """The search as a sentence says it, on lists of whole sequences."""
    running: list[tuple[float, Tokens]] = [(0.0, ())]
    finished: list[tuple[float, Tokens]] = []
    for length in range(1, max_tokens + 1):
        everything = [
            (total + logprob, (*token_ids, token_id))
            for total, token_ids in running
            for token_id, logprob in enumerate(model(token_ids))
        ]
        candidates = sorted(everything, reverse=True)[: width * max(2, 1 + len(ends))]
        open_ones = [one for one in candidates if one[1][-1] not in ends and length < max_tokens]
        new = [(total / length**penalty, ids) for total, ids in candidates[:width] if (total, ids) not in open_ones]
        finished = sorted(finished + new, reverse=True)[:width]
        running = open_ones[:width]
        if not running:
            break
        longest = max_tokens if early == "never" and penalty > 0 else length
        if len(finished) == width and (early is True or running[0][0] / longest**penalty <= finished[-1][0]):
            break
    return finished


def select(model: Probabilities, selection: BeamSelection) -> list[tuple[float, Tokens]]:
    """Run a selection on a model that gives it only as many candidates as it asks for."""
    while not selection.is_done:
        after = []
        for beam in selection.running:
            logprobs = model(tuple(choice.token_ids[0] for choice in beam.choices))
            best = sorted(range(len(logprobs)), key=logprobs.__getitem__, reverse=True)[: selection.num_candidates]
            after.append(TokenLogprobs(token_ids=(0, *best), logprobs=(0.0, *[logprobs[one] for one in best]), rank=1))
        selection.advance(after)
    return [(one.score, tuple(choice.token_ids[0] for choice in one.beam.choices)) for one in selection.finished]


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 4),
    max_tokens=st.integers(1, 7),
    ends=st.sets(st.integers(0, 11), max_size=3),
    penalty=st.sampled_from([1.0, 0.0, 2.0, -1.0, 0.5]),
    early=st.sampled_from([False, True, "never"]),
)
def test_a_selection_finds_what_the_plain_search_finds(
    seed: int, width: int, max_tokens: int, ends: set[int], penalty: float, early: Any
) -> None:
    model = random_model(seed, vocab_size=16)
    selection = BeamSelection(
        beam_width=width, max_tokens=max_tokens, end_token_ids=ends, length_penalty=penalty, early_stopping=early
    )
    found, wanted = select(model, selection), plain_search(model, width, max_tokens, ends, penalty, early)
    assert [token_ids for _, token_ids in found] == [token_ids for _, token_ids in wanted]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted])


def test_with_room_for_every_sequence_the_best_of_all_are_found() -> None:
    model = random_model(3, vocab_size=3)
    totals = {
        token_ids: sum(model(token_ids[:index])[token_id] for index, token_id in enumerate(token_ids))
        for token_ids in product(range(3), repeat=4)
    }
    found = select(model, BeamSelection(beam_width=81, max_tokens=4, length_penalty=0.0))
    assert [token_ids for _, token_ids in found] == sorted(totals, key=totals.__getitem__, reverse=True)


def after(*logprobs: float) -> TokenLogprobs:
    """Token 0 has the first of these, and so on, best first."""
    return TokenLogprobs(token_ids=(0, *range(len(logprobs))), logprobs=(0.0, *logprobs), rank=1)


def test_an_end_among_the_best_is_finished_and_the_others_go_on() -> None:
    selection = BeamSelection(beam_width=2, max_tokens=5, end_token_ids={0})
    selection.advance([after(-0.5, -1.0, -2.0, -3.0)])
    assert [(one.beam.token_id, one.score) for one in selection.finished] == [(0, -0.5)]
    assert [(beam.token_id, beam.cum_logprob) for beam in selection.running] == [(1, -1.0), (2, -2.0)]


def test_an_end_behind_the_best_is_dropped() -> None:
    selection = BeamSelection(beam_width=2, max_tokens=5, end_token_ids={2})
    selection.advance([after(-0.5, -1.0, -2.0, -3.0)])
    assert selection.finished == []
    assert [beam.token_id for beam in selection.running] == [0, 1]


def test_early_stopping_ends_with_as_many_as_are_wanted_though_better_ones_may_come() -> None:
    ended = {}
    for early in (True, False):
        selection = BeamSelection(beam_width=1, max_tokens=9, end_token_ids={0}, early_stopping=early, length_penalty=2)
        selection.advance([after(-1.0, -1.1)])
        ended[early] = selection.is_done
    assert ended == {True: True, False: True}
    for early in (True, "never"):
        selection = BeamSelection(beam_width=1, max_tokens=9, end_token_ids={0}, early_stopping=early, length_penalty=2)
        selection.advance([after(-1.0, -1.1)])
        ended[early] = selection.is_done
    assert ended == {True: True, False: True, "never": False}


def test_a_choice_comes_with_its_rank_and_the_candidates_it_is_from() -> None:
    selection = BeamSelection(beam_width=2, max_tokens=2)
    selection.advance([after(-0.5, -1.0)])
    assert selection.running[1].choices == [TokenLogprobs(token_ids=(1, 0, 1), logprobs=(-1.0, -0.5, -1.0), rank=2)]


# ------------------------------------------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.1, eos_token_id=ENDS)


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def make_llm(folder: Path) -> Iterator[MakeLLM]:
    made = []

    def make(**settings: Any) -> LLM:
        made.append(LLM(str(folder), **{"dtype": "float32", "block_size": BLOCK_SIZE, "max_num_seqs": 8, **settings}))
        return made[-1]

    yield make
    for llm in made:
        assert_nothing_is_left(llm)
        llm.shutdown()


@pytest.fixture
def llm(make_llm: MakeLLM) -> LLM:
    return make_llm()


def assert_nothing_is_left(llm: LLM) -> None:
    stats, pool = llm.stats(), llm.engine.scheduler.block_pool
    assert (stats.num_running, stats.num_waiting, pool.num_free) == (0, 0, pool.num_blocks)


def params(beam_width: int = 4, max_tokens: int = 16, **fields: Any) -> BeamSearchParams:
    return BeamSearchParams(beam_width=beam_width, max_tokens=max_tokens, **fields)


def tokens_of(output: BeamSearchOutput) -> list[list[int]]:
    return [sequence.tokens for sequence in output.sequences]


def random_prompt(random: Random) -> list[int]:
    return [random.randrange(5, VOCAB_SIZE) for _ in range(random.randint(1, 40))]


def transformers_beams(
    model: PreTrainedModel, prompt: list[int], width: int, max_tokens: int, **fields: Any
) -> tuple[list[list[int]], list[float]]:
    """Sequences up to their end, and their scores."""
    ends = [] if fields.pop("ignore_eos", False) else ENDS
    found = model.generate(
        torch.tensor([prompt]),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=ends or [VOCAB_SIZE + 1],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **fields,
    )
    sequences = []
    for row in found.sequences.tolist():
        output = row[len(prompt) :]
        first = next((index for index, token_id in enumerate(output) if token_id in ends), len(output))
        sequences.append(prompt + output[: first + 1])
    return sequences, found.sequences_scores.tolist()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
def test_sequences_and_scores_are_those_of_transformers(
    llm: LLM, reference: PreTrainedModel, length_penalty: float, early_stopping: Any
) -> None:
    finish_reasons = set()
    for seed in range(6):
        random = Random(seed)
        prompt, width, max_tokens = random_prompt(random), random.randint(2, 6), random.randint(1, 24)
        fields = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        wanted, scores = transformers_beams(reference, prompt, width, max_tokens, **fields)
        (found,) = llm.beam_search([prompt], params(width, max_tokens, include_stop_str_in_output=True, **fields))
        assert tokens_of(found) == wanted
        assert [sequence.score for sequence in found.sequences] == pytest.approx(scores, abs=1e-4)
        finish_reasons |= {sequence.finish_reason for sequence in found.sequences}
    assert finish_reasons == {"stop", "length"}


def test_ends_may_be_ignored(llm: LLM, reference: PreTrainedModel) -> None:
    wanted, _ = transformers_beams(reference, PROMPT, 4, 16, ignore_eos=True)
    (found,) = llm.beam_search([PROMPT], params(ignore_eos=True))
    assert tokens_of(found) == wanted
    assert any(token_id in ENDS for tokens in tokens_of(found) for token_id in tokens[len(PROMPT) :])


def test_one_beam_ends_where_a_greedy_completion_does(llm: LLM) -> None:
    (found,) = llm.beam_search([PROMPT], params(1, 12, ignore_eos=True))
    (greedy,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    assert tokens_of(found) == [PROMPT + greedy.outputs[0].token_ids]


def test_an_end_is_among_the_tokens_only_when_asked_for_but_its_logprob_always_counts(llm: LLM) -> None:
    (without,), (with_it,) = (
        llm.beam_search([PROMPT], params(max_tokens=24, include_stop_str_in_output=include))
        for include in (False, True)
    )
    ended = [index for index, one in enumerate(with_it.sequences) if one.finish_reason == "stop"]
    assert ended
    for index in ended:
        one, other = without.sequences[index], with_it.sequences[index]
        assert [*one.tokens, one.stop_reason] == other.tokens
        assert (one.cum_logprob, one.logprobs) == (other.cum_logprob, other.logprobs)


def test_a_sequence_s_logprobs_are_of_its_tokens_and_sum_to_its_own(llm: LLM) -> None:
    (found,) = llm.beam_search([PROMPT], params(ignore_eos=True))
    for sequence in found.sequences:
        output = sequence.tokens[len(PROMPT) :]
        chosen = [logprobs[token_id] for token_id, logprobs in zip(output, sequence.logprobs, strict=True)]
        assert sum(one.logprob for one in chosen) == pytest.approx(sequence.cum_logprob)
        assert [
            list(logprobs.values()).index(one) for one, logprobs in zip(chosen, sequence.logprobs, strict=True)
        ] == [0] * len(output)
        assert all(len(logprobs) == 8 for logprobs in sequence.logprobs)


def test_text_is_that_of_prompt_and_output(llm: LLM) -> None:
    (found,) = llm.beam_search("hello", params())
    assert [one.text for one in found.sequences] == [llm.get_tokenizer().decode(one.tokens) for one in found.sequences]
    assert all(one.text.startswith("hello") for one in found.sequences)


@pytest.mark.parametrize("num_prompt_tokens", [7, 8, 9, 24])
def test_no_token_is_computed_twice(make_llm: MakeLLM, num_prompt_tokens: int) -> None:
    llm = make_llm(enable_prefix_caching=False)
    steps = list[Step]()
    llm.engine.step_listeners.append(steps.append)
    llm.beam_search([PROMPT[:num_prompt_tokens]], params(ignore_eos=True))
    assert [step.num_tokens for step in steps] == [num_prompt_tokens] + [4] * 15


def test_blocks_of_beams_that_died_are_free_while_the_others_run(make_llm: MakeLLM) -> None:
    llm = make_llm(enable_prefix_caching=False)
    pool, numbers = llm.engine.scheduler.block_pool, list[int]()
    llm.engine.step_listeners.append(lambda step: numbers.append(pool.num_referenced))
    llm.beam_search([PROMPT], params(ignore_eos=True, max_tokens=32))
    shared = len(PROMPT) // BLOCK_SIZE
    assert max(numbers) <= shared + 4 * (32 // BLOCK_SIZE)
    assert all(one == shared for one in numbers[:1])
    assert min(later - earlier for earlier, later in pairwise(numbers)) < 0


CRAMPED: dict[str, dict[str, Any]] = {
    "little memory": {"kv_cache_memory_bytes": 9 * BYTES_PER_BLOCK},
    "less memory": {"kv_cache_memory_bytes": 6 * BYTES_PER_BLOCK, "enable_prefix_caching": False},
    "little memory and depth 2": {"kv_cache_memory_bytes": 9 * BYTES_PER_BLOCK, "max_steps_in_flight": 2},
    "less memory, depth 2, chunks": {
        "kv_cache_memory_bytes": 6 * BYTES_PER_BLOCK,
        "enable_prefix_caching": False,
        "max_steps_in_flight": 2,
        "max_num_batched_tokens": 5,
    },
}


@pytest.mark.parametrize("cramped", CRAMPED.values(), ids=CRAMPED)
def test_with_less_memory_than_beams_need_they_are_the_same(
    make_llm: MakeLLM, reference: PreTrainedModel, cramped: dict[str, Any]
) -> None:
    llm = make_llm(**cramped)
    prompts = [PROMPT, PROMPT[:5]]
    found = llm.beam_search(prompts, params(max_tokens=20, include_stop_str_in_output=True))
    assert llm.stats().num_preemptions > 0
    for prompt, output in zip(prompts, found, strict=True):
        assert tokens_of(output) == transformers_beams(reference, prompt, 4, 20)[0]


@pytest.mark.parametrize(
    "limits", [{"max_steps_in_flight": 2}, {"max_num_batched_tokens": 3}, {"max_num_seqs": 4}], ids=str
)
def test_whatever_the_limits_the_beams_are_the_same(
    make_llm: MakeLLM, reference: PreTrainedModel, limits: dict[str, Any]
) -> None:
    (found,) = make_llm(**limits).beam_search([PROMPT], params(include_stop_str_in_output=True))
    assert tokens_of(found) == transformers_beams(reference, PROMPT, 4, 16)[0]


def test_several_prompts_are_searched_at_once_as_places_allow(make_llm: MakeLLM, llm: LLM) -> None:
    prompts = [random_prompt(Random(seed)) for seed in range(5)]
    alone = [tokens_of(llm.beam_search([prompt], params())[0]) for prompt in prompts]
    together = make_llm()
    numbers = list[int]()
    together.engine.step_listeners.append(lambda step: numbers.append(len(step.rows)))
    assert [tokens_of(output) for output in together.beam_search(prompts, params())] == alone
    assert max(numbers) == 8


def test_more_beams_than_places_wait_for_each_other_without_end_but_in_turns(make_llm: MakeLLM, llm: LLM) -> None:
    prompts = [random_prompt(Random(seed)) for seed in range(3)]
    wanted = [tokens_of(output) for output in llm.beam_search(prompts, params(3, ignore_eos=True))]
    cramped = make_llm(max_num_seqs=4)
    searches = [
        BeamSearch(cramped.engine, cramped._assembly.inputs, str(index), prompt, params(3, ignore_eos=True))
        for index, prompt in enumerate(prompts)
    ]
    num_steps = sum(1 for _ in run_beam_searches(searches, cramped.engine.step, at_once=3))
    assert [tokens_of(search.output(cramped.get_tokenizer())) for search in searches] == wanted
    assert num_steps < 500
    assert cramped.stats().num_preemptions > 0


def test_a_stream_that_is_open_meanwhile_loses_nothing(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (wanted,) = llm.generate("hello", greedy)
    stream = llm.stream("hello", greedy)
    next(stream)
    found = llm.beam_search([PROMPT], params())
    *_, last = stream
    assert last.outputs[0].token_ids == wanted.outputs[0].token_ids
    assert tokens_of(found[0]) == tokens_of(llm.beam_search([PROMPT], params())[0])


def test_ctrl_c_ends_a_search_and_the_next_one_works(llm: LLM) -> None:
    wanted = tokens_of(llm.beam_search([PROMPT], params())[0])
    last_step_id = llm.stats().num_steps + 4
    llm.engine.step_listeners.append(
        lambda step: signal.raise_signal(signal.SIGINT) if step.step_id == last_step_id else None
    )
    with pytest.raises(KeyboardInterrupt):
        llm.beam_search([PROMPT, PROMPT[:3]], params())
    assert llm.stats().num_steps == last_step_id + 1
    assert_nothing_is_left(llm)
    llm.engine.step_listeners.clear()
    assert tokens_of(llm.beam_search([PROMPT], params())[0]) == wanted


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 0}, "beam_width must be an integer of at least 1, got 0"),
        ({"beam_width": True}, "beam_width must be an integer of at least 1, got True"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": None}, "max_tokens must be an integer of at least 1, got None"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0, got -1.0"),
        ({"length_penalty": math.nan}, "length_penalty must be a finite number, got nan"),
        ({"length_penalty": "long"}, "length_penalty must be a finite number, got 'long'"),
        ({"early_stopping": "soon"}, "early_stopping must be True, False or \"never\", got 'soon'"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"beam_width": 0, "max_tokens": -1}, "beam_width .* max_tokens"),
    ],
)
def test_parameters_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        params(**fields)


def test_more_beams_than_a_batch_holds_are_refused_with_the_numbers(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"beam_width is 9, .* max_num_seqs, 8\. Lower beam_width"):
        llm.beam_search([PROMPT], params(9))


def test_a_prompt_that_cannot_be_served_is_refused_and_none_is_started(llm: LLM) -> None:
    with pytest.raises(RequestError, match="The prompt is empty"):
        llm.beam_search([PROMPT, []], params())
    assert llm.stats().num_steps == 0


def test_sampling_parameters_are_no_beam_search_parameters(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"Beam search takes BeamSearchParams\(\.\.\.\); found SamplingParams"):
        llm.beam_search([PROMPT], SamplingParams())  # type: ignore[arg-type]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.beam_search([], params()) == []
