"""SamplingParams: vLLM's names and defaults, and every fault named at once."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict
from typing import Any

import numpy as np
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
        {"n": 16385},
        {"presence_penalty": 2.1},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": float("nan")},
        {"min_p": -0.01},
        {"min_p": 1.01},
        {"min_p": float("nan")},
        {"top_p": float("nan")},
        {"logprobs": -2},
        {"prompt_logprobs": -2},
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": -2},
        {"bad_words": [""]},
        {"allowed_token_ids": []},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: float("inf")}},
        {"seed": -(2**63) - 1},
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
    assert isinstance(value, (list, dict)) or str(value) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 16384},
        {"temperature": 0.0},
        {"temperature": 1e-45},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 1e-9},
        {"repetition_penalty": 100},
        {"min_p": 0},
        {"min_p": 1},
        {"top_k": 2**40},
        {"logprobs": 0, "prompt_logprobs": -1},
        {"truncate_prompt_tokens": 1},
        {"truncate_prompt_tokens": -1},
        {"min_tokens": 16},
        {"allowed_token_ids": [0]},
        {"logit_bias": {}},
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
    "wrong",
    [
        *({name: value} for name in ("n", "top_k", "min_tokens") for value in (True, 2.5, "2", None)),
        *(
            {name: value}
            for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
            for value in (True, 2.5, "7")
        ),
        *(
            {name: value}
            for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
            for value in (True, "hot", None)
        ),
        *(
            {name: value}
            for name in (
                "include_stop_str_in_output",
                "ignore_eos",
                "detokenize",
                "skip_special_tokens",
                "spaces_between_special_tokens",
            )
            for value in (1, "yes", None)
        ),
        *({"stop": value} for value in (5, ["a", 1], b"a")),
        *({"bad_words": value} for value in ("word", 5, ["a", 1])),
        *(
            {name: value}
            for name in ("stop_token_ids", "allowed_token_ids")
            for value in (5, "12", [1.0], ["1"], [True])
        ),
        *({"logit_bias": value} for value in ([1], {"a": 1.0}, {1: "x"}, {-1.5: 1.0}, {"-1": 1.0}, {1: None})),
        {"extra_args": [1]},
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_by_name(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(RequestError, match=rf"^SamplingParams: {name} must .*, got ") as caught:
        SamplingParams(**wrong)
    assert repr(value) in str(caught.value)


def test_integers_are_numbers_and_numpy_s_are_integers() -> None:
    fields: dict[str, Any] = {"n": np.int64(2), "seed": np.int32(3), "stop_token_ids": [np.int64(4)]}
    params = SamplingParams(temperature=1, top_p=1, **fields)
    assert (params.n, params.seed, params.stop_token_ids) == (2, 3, (4,))


def test_a_seed_of_minus_1_is_no_seed() -> None:
    assert SamplingParams(seed=-1).seed is None


def test_logit_bias_takes_json_s_keys_and_is_clamped() -> None:
    bias: dict[Any, float] = {"7": 5, 8: -1000.0, 9: 1000}
    params = SamplingParams(logit_bias=bias)
    assert params.logit_bias == {7: 5.0, 8: -100.0, 9: 100.0}


def test_lists_are_copied() -> None:
    words, allowed, bias = ["a"], [1], {1: 1.0}
    params = SamplingParams(bad_words=words, allowed_token_ids=allowed, logit_bias=bias, stop=words)
    words.append("b")
    allowed.append(2)
    bias[2] = 1.0
    assert (params.bad_words, params.allowed_token_ids, params.logit_bias, params.stop) == (
        ("a",),
        (1,),
        {1: 1.0},
        ("a",),
    )
