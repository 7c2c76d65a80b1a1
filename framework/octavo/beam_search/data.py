"""What a user asks of a beam search and gets back; vLLM's names, transformers' semantics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from octavo.errors import RequestError
from octavo.outputs import Logprob


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams:
    """How to search, checked at construction.

    Attributes:
        beam_width: continuations kept at each step, and sequences returned.
        max_tokens: at most this many output tokens; fewer where max_model_len ends.
        ignore_eos: the model's end-of-sequence tokens are tokens like any other.
        temperature: for vLLM's sake; candidates are ranked by the model's own probabilities whatever it is.
        length_penalty: a finished sequence's score is its log-probability divided by its output's length to this power:
            above 0 long ones gain, below 0 short ones.
        early_stopping: True ends as soon as `beam_width` sequences are finished; False when the best beam, as long as
            it is now, scores below them; "never" when it could not come above them at any length.
        include_stop_str_in_output: the end-of-sequence token is one of `tokens`.

    Raises:
        RequestError: a value is out of its range; every fault is named.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        faults = [
            f"{name} must be an integer of at least 1, got {value!r}"
            for name in ("beam_width", "max_tokens")
            if not _is_integer(value := getattr(self, name)) or value < 1
        ]
        faults += [
            f"{name} must be a finite number{what}, got {value!r}"
            for name, lowest, what in (("temperature", 0.0, " >= 0"), ("length_penalty", -math.inf, ""))
            if not (_is_finite(value := getattr(self, name)) and value >= lowest)
        ]
        faults += [
            f"{name} must be True or False, got {value!r}"
            for name in ("ignore_eos", "include_stop_str_in_output")
            if not isinstance(value := getattr(self, name), bool)
        ]
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            faults.append(f'early_stopping must be True, False or "never", got {self.early_stopping!r}')
        if faults:
            raise RequestError("BeamSearchParams: " + "; ".join(faults))


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchSequence:
    """One of the best sequences.

    Attributes:
        tokens: token ids of prompt and output; the end-of-sequence token only with `include_stop_str_in_output`.
        text: of all of them, special tokens left out.
        cum_logprob: sum of its output tokens' log-probabilities, the end-of-sequence token's included.
        score: what it is ranked by: `cum_logprob` under the length penalty.
        logprobs: for each output token, the end-of-sequence token included, the token itself and the candidates it
            was chosen from.
        finish_reason: "stop" or "length".
        stop_reason: the end-of-sequence token that ended it.
    """

    tokens: list[int]
    text: str
    cum_logprob: float
    score: float
    logprobs: list[dict[int, Logprob]]
    finish_reason: str
    stop_reason: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchOutput:
    """The best sequences of one prompt, best first."""

    sequences: list[BeamSearchSequence]


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
