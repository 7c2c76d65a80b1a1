"""SamplingParams: vLLM's names and defaults, and every fault named at once."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest

from octavo import SamplingParams
from octavo.errors import RequestError


def test_defaults_are_vllms() -> None:
    assert asdict(SamplingParams()) == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "bad_words": (),
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "logit_bias": None,
        "allowed_token_ids": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "truncate_prompt_tokens": None,
        "extra_args": None,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_k": -2},
        {"seed": 2**63},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"stop": ["a", ""]},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named_with_what_was_found(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(RequestError, match=rf"^SamplingParams: {name} must ") as caught:
        SamplingParams(**fields)
    assert name == "stop" or str(value) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"top_k": -1},
        {"top_p": 1e-9},
        {"max_tokens": None},
        {"max_tokens": None, "min_tokens": 100},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"stop": "a"},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges_are_allowed(fields: dict[str, Any]) -> None:
    SamplingParams(**fields)


def test_all_faults_are_named_together() -> None:
    with pytest.raises(RequestError, match=r"n must .*; temperature must .*; top_p must "):
        SamplingParams(n=0, temperature=-1, top_p=2)


def test_contradictions_are_refused() -> None:
    with pytest.raises(RequestError, match=r"min_tokens \(9\) is above max_tokens \(8\)"):
        SamplingParams(min_tokens=9, max_tokens=8)
    with pytest.raises(RequestError, match="stop strings need the text"):
        SamplingParams(stop="x", detokenize=False)


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == SamplingParams(stop=["END"]).stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


def test_only_temperature_0_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_params_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong", [{"temperature": "hot"}, {"max_tokens": 2.5}, {"n": True}, {"stop": 5}, {"stop": ["a", 1]}, {"seed": "7"}]
)
def test_a_value_of_another_type_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        SamplingParams(**wrong)
