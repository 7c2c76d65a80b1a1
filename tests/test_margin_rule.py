"""The margin rule itself: it forgives a tie and nothing else."""

from __future__ import annotations

import json

import pytest
from margin_rule import WORKLOADS, Reference, check, read_references

REFERENCE = Reference(
    name="w/0", prompt_token_ids=[7], token_ids=[1, 2, 3, 4, 5], margins=[0.5, 0.0009, 0.001, 0.0001, 2.0]
)
TRUE_NEXT = {(7, *REFERENCE.token_ids[:step]): token_id for step, token_id in enumerate(REFERENCE.token_ids)}


def next_tokens(token_lists: list[list[int]]) -> list[int]:
    """A variant whose next tokens are the reference's."""
    return [TRUE_NEXT[tuple(token_ids)] for token_ids in token_lists]


def next_tokens_wrong_at(step: int) -> object:
    """A variant that, given the reference's tokens, errs at one step."""
    return lambda token_lists: [
        99 if len(token_ids) == step + 1 else token_id
        for token_ids, token_id in zip(token_lists, next_tokens(token_lists), strict=True)
    ]


def test_equal_tokens_pass() -> None:
    check([REFERENCE], [[1, 2, 3, 4, 5]], next_tokens)


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_wrong_token_where_the_margin_is_large_is_caught(step: int) -> None:
    found = [*REFERENCE.token_ids]
    found[step] = 99
    with pytest.raises(AssertionError, match=rf"w/0, step {step}: wanted token {step + 1}, found 99, margin "):
        check([REFERENCE], [found], next_tokens)


def test_a_difference_where_the_margin_is_small_is_accepted_and_all_that_follows_from_it() -> None:
    check([REFERENCE], [[1, 50, 51, 52, 53]], next_tokens)


@pytest.mark.parametrize("step", [2, 4])
def test_a_wrong_token_after_an_accepted_difference_is_caught(step: int) -> None:
    with pytest.raises(AssertionError, match=rf"step {step}: .* found 99, .*, given the reference's tokens before it"):
        check([REFERENCE], [[1, 50, 3, 4, 5]], next_tokens_wrong_at(step))


def test_another_tie_after_an_accepted_difference_is_accepted() -> None:
    check([REFERENCE], [[1, 50, 3, 4, 5]], next_tokens_wrong_at(3))


def test_a_large_margin_before_the_tie_is_not_forgiven() -> None:
    with pytest.raises(AssertionError, match="step 0"):
        check([REFERENCE], [[99, 50, 3, 4, 5]], next_tokens)


@pytest.mark.parametrize("found", [[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]])
def test_too_few_or_too_many_tokens_are_caught(found: list[int]) -> None:
    with pytest.raises(AssertionError, match=f"w/0: {len(found)} tokens, wanted 5"):
        check([REFERENCE], [found], next_tokens)


def test_every_broken_request_is_named() -> None:
    other = Reference(name="w/1", prompt_token_ids=[8], token_ids=[1], margins=[1.0])
    with pytest.raises(AssertionError, match=r"w/0, step 4: .*\nw/1, step 0"):
        check([REFERENCE, other], [[1, 2, 3, 4, 9], [9]], next_tokens)


@pytest.mark.parametrize("workload", ["w2s", "w2"])
def test_recorded_references_have_a_token_and_a_margin_for_each_step_asked_for(workload: str) -> None:
    requests = json.loads((WORKLOADS / f"{workload}.json").read_text())["requests"]
    for request, reference in zip(requests, read_references(workload), strict=True):
        assert len(reference.token_ids) == len(reference.margins) == request["max_tokens"]
