"""Prompt lookup against a slow, plain reference, and how long it takes."""

from __future__ import annotations

import timeit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from octavo_proposer_ngram.options import NgramOptions
from octavo_proposer_ngram.proposer import look_up


def look_up_plainly(token_ids: list[int], shortest: int, longest: int, max_drafts: int) -> list[int]:
    """One token at a time: the guess so far is part of the text, and the place once found is gone on from."""
    for length in range(longest, shortest - 1, -1):
        for end in range(len(token_ids) - 1, length - 1, -1):  # the latest place first; not the last tokens themselves
            if token_ids[end - length : end] == token_ids[len(token_ids) - length :]:
                text = list(token_ids)
                for position in range(end, end + max_drafts):
                    text.append(text[position])
                return text[len(token_ids) :]
    return []


@given(
    token_ids=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)).map(sorted),
    max_drafts=st.integers(1, 8),
)
def test_it_finds_what_the_plain_reference_finds(token_ids: list[int], lengths: list[int], max_drafts: int) -> None:
    shortest, longest = lengths
    found = look_up(np.array(token_ids), shortest, longest, max_drafts)
    assert found == look_up_plainly(token_ids, shortest, longest, max_drafts)


@pytest.mark.parametrize(
    ("token_ids", "guess"),
    [
        pytest.param([1, 2, 3, 4, 5, 1, 2], [3, 4, 5], id="what followed"),
        pytest.param([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], [4, 9, 1], id="the latest place"),
        pytest.param([7, 1, 2, 3, 9, 8, 1, 2, 4, 9, 7, 1, 2], [3, 9, 8], id="the longest match before the latest"),
        pytest.param([5, 1, 2, 1, 2], [1, 2, 1], id="a loop is gone round"),
        pytest.param([1, 2, 3, 4, 2], [], id="too short a match"),
        pytest.param([1], [], id="one token"),
    ],
)
def test_it_guesses(token_ids: list[int], guess: list[int]) -> None:
    assert look_up(np.array(token_ids), 2, 3, 3) == guess


@pytest.mark.parametrize("num_different", [1000, 4, 1])
def test_it_takes_far_less_than_a_step(num_different: int) -> None:
    """10 to 35 µs on the machine of README.md; ten times that is still nothing beside a step."""
    token_ids = np.random.default_rng(0).integers(0, num_different, 2048)
    seconds = min(timeit.repeat(lambda: look_up(token_ids, 5, 5, 4), number=100, repeat=5)) / 100
    assert seconds < 300e-6


@pytest.mark.parametrize(
    ("given_options", "lengths"),
    [
        ({}, (5, 5)),
        ({"prompt_lookup_max": 3}, (3, 3)),
        ({"prompt_lookup_min": 2}, (2, 2)),
        ({"prompt_lookup_min": 2, "prompt_lookup_max": 4}, (2, 4)),
    ],
)
def test_one_length_stands_for_the_other(given_options: dict[str, int], lengths: tuple[int, int]) -> None:
    assert NgramOptions(**given_options).lengths == lengths


def test_a_least_length_above_the_most_is_refused_with_both() -> None:
    with pytest.raises(ValidationError, match="prompt_lookup_min=4 is more than prompt_lookup_max=2"):
        NgramOptions(prompt_lookup_min=4, prompt_lookup_max=2)
