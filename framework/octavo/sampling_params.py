"""SamplingParams: how one request draws its tokens and when it ends. vLLM's names, ranges and defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from octavo.errors import RequestError

MAX_SEED = 2**63 - 1
_MAX_N = 16384


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample, checked at construction.

    Attributes:
        n: completions to return for the prompt, 1 to 16384.
        presence_penalty: taken from the logits of tokens already in the output, [-2, 2].
        frequency_penalty: taken from them as often as they are there, [-2, 2].
        repetition_penalty: divides (a negative logit: multiplies) those of tokens in prompt or output, > 0; 1 is off.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches this, (0, 1].
        top_k: keep this many most probable tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this many times as probable as the most probable one, [0, 1].
        seed: makes the draw reproducible; None or -1 takes a fresh one.
        stop: strings that end the output, not part of it unless `include_stop_str_in_output`.
        stop_token_ids: token ids that end the output.
        bad_words: strings that the output does not complete: the last token of one is not sampled behind its others.
        ignore_eos: go on after the model's end-of-sequence tokens.
        max_tokens: at most this many output tokens; None up to the context's end.
        min_tokens: end-of-sequence and stop tokens are not sampled before this many.
        logprobs: report this many most probable tokens beside each sampled one, with logarithms of probabilities;
            -1 is the whole vocabulary, None reports none.
        prompt_logprobs: likewise for each prompt token but the first. The prompt is then computed whole, without the
            prefix cache.
        logit_bias: token id -> added to its logit, clamped to [-100, 100].
        allowed_token_ids: nothing else is sampled.
        detokenize: False returns token ids only, with empty text.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: False takes out the spaces that some tokenizers put between two special tokens;
            of use only where `skip_special_tokens` is False.
        truncate_prompt_tokens: keep only this many last prompt tokens; -1 keeps what max_model_len allows.
        extra_args: for plugins' logits rules.

    Raises:
        RequestError: a value is out of its range, or two contradict each other; every fault is named.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    extra_args: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        faults = _type_faults(self) or _faults(self)
        if faults:
            raise RequestError("SamplingParams: " + "; ".join(faults))
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if self.logit_bias is not None:  # keys are strings where they come from JSON
            bias = {int(token_id): min(100.0, max(-100.0, float(value))) for token_id, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return _strings(self.stop)


def _strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """An integer is a float, a bool is no number."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _are(values: object, is_one: Callable[[object], bool]) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, (str, bytes)) and all(map(is_one, values))


_INTEGERS = ("n", "top_k", "min_tokens")
_INTEGERS_OR_NONE = ("seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")
_NUMBERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
_SWITCHES = (
    *("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"),
    "spaces_between_special_tokens",
)


def _type_faults(params: SamplingParams) -> list[str]:
    faults = []
    for name in (*_INTEGERS, *_INTEGERS_OR_NONE):
        value = getattr(params, name)
        if not (_is_integer(value) or (value is None and name in _INTEGERS_OR_NONE)):
            faults.append(f"{name} must be an integer, got {value!r}")
    for name in _NUMBERS:
        if not _is_number(value := getattr(params, name)):
            faults.append(f"{name} must be a number, got {value!r}")
    for name in _SWITCHES:
        if not isinstance(value := getattr(params, name), bool):
            faults.append(f"{name} must be True or False, got {value!r}")
    if not (params.stop is None or isinstance(params.stop, str) or _are(params.stop, _is_text)):
        faults.append(f"stop must be a text or several, got {params.stop!r}")
    if not (params.bad_words is None or _are(params.bad_words, _is_text)):
        faults.append(f"bad_words must be a list of texts, got {params.bad_words!r}")
    for name in ("stop_token_ids", "allowed_token_ids"):
        value = getattr(params, name)
        if not (value is None or _are(value, _is_integer)):
            faults.append(f"{name} must be a list of token ids, got {value!r}")
    bias = params.logit_bias
    if bias is not None and not (
        isinstance(bias, Mapping) and all(map(_is_token_key, bias)) and all(map(_is_number, bias.values()))
    ):
        faults.append(f"logit_bias must map token ids to numbers, got {bias!r}")
    if not (params.extra_args is None or isinstance(params.extra_args, Mapping)):
        faults.append(f"extra_args must be a mapping, got {params.extra_args!r}")
    return faults


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_token_key(key: object) -> bool:
    """A token id, or one written as text: JSON has no other keys."""
    return _is_integer(key) or (isinstance(key, str) and key.isdecimal())


def _faults(params: SamplingParams) -> list[str]:
    faults = []
    if not 1 <= params.n <= _MAX_N:
        faults.append(f"n must be in [1, {_MAX_N}], got {params.n}")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= getattr(params, name) <= 2:
            faults.append(f"{name} must be in [-2, 2], got {getattr(params, name)}")
    if not 0 < params.repetition_penalty < math.inf:
        faults.append(f"repetition_penalty must be greater than 0, got {params.repetition_penalty}")
    if not math.isfinite(params.temperature) or params.temperature < 0:
        faults.append(f"temperature must be a finite number >= 0, got {params.temperature}")
    if not 0 < params.top_p <= 1:
        faults.append(f"top_p must be in (0, 1], got {params.top_p}")
    if params.top_k < -1:
        faults.append(f"top_k must be -1 or 0 (all tokens) or at least 1, got {params.top_k}")
    if not 0 <= params.min_p <= 1:
        faults.append(f"min_p must be in [0, 1], got {params.min_p}")
    if params.seed is not None and not -MAX_SEED - 1 <= params.seed <= MAX_SEED:
        faults.append(f"seed must fit 64 bits, got {params.seed}")
    if params.max_tokens is not None and params.max_tokens < 1:
        faults.append(f"max_tokens must be at least 1 or None, got {params.max_tokens}")
    if params.min_tokens < 0:
        faults.append(f"min_tokens must be at least 0, got {params.min_tokens}")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        faults.append(f"min_tokens ({params.min_tokens}) is above max_tokens ({params.max_tokens})")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and value < -1:
            faults.append(f"{name} must be at least 0, or -1 for the whole vocabulary, got {value}")
    truncate = params.truncate_prompt_tokens
    if truncate is not None and truncate < 1 and truncate != -1:
        faults.append(f"truncate_prompt_tokens must be at least 1, or -1 for max_model_len, got {truncate}")
    strings = _strings(params.stop)
    if any(not string for string in strings):
        faults.append("stop must not hold an empty string")
    if strings and not params.detokenize:
        faults.append("stop strings need the text: set detokenize=True or use stop_token_ids")
    if any(not word for word in params.bad_words or ()):
        faults.append("bad_words must not hold an empty string")
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        faults.append("allowed_token_ids must not be empty: nothing could be sampled")
    if any(not math.isfinite(value) for value in (params.logit_bias or {}).values()):
        faults.append("logit_bias must hold finite numbers")
    return faults
