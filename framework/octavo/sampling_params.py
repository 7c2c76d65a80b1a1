"""SamplingParams: how one request draws its tokens and when it ends. vLLM's names, ranges and defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from octavo.errors import RequestError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample, checked at construction.

    Attributes:
        n: completions to return for the prompt, >= 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches this, (0, 1].
        top_k: keep this many most probable tokens; 0 or -1 keeps all.
        seed: makes the draw reproducible; None takes a fresh one.
        max_tokens: at most this many output tokens; None up to the context's end.
        min_tokens: end-of-sequence tokens are not sampled before this many.
        stop: strings that end the output, not part of it unless `include_stop_str_in_output`.
        stop_token_ids: token ids that end the output.
        ignore_eos: go on after the model's end-of-sequence tokens.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: False returns token ids only, with empty text.

    Raises:
        RequestError: a value is out of its range, or two contradict each other; every fault is named.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        faults = _type_faults(self) or _faults(self)
        if faults:
            raise RequestError("SamplingParams: " + "; ".join(faults))
        object.__setattr__(self, "stop", _strings(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))

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


def _type_faults(params: SamplingParams) -> list[str]:
    """Numbers given as something else; a bool is no number, an integer is a float."""
    faults = []
    for name in ("n", "top_k", "seed", "max_tokens", "min_tokens"):
        value = getattr(params, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            faults.append(f"{name} must be an integer, got {value!r}")
    for name in ("temperature", "top_p"):
        value = getattr(params, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            faults.append(f"{name} must be a number, got {value!r}")
    stop = params.stop
    if not (stop is None or isinstance(stop, Sequence)) or any(not isinstance(string, str) for string in stop or ()):
        faults.append(f"stop must be a text or several, got {stop!r}")
    return faults


def _faults(params: SamplingParams) -> list[str]:
    faults = []
    if params.n < 1:
        faults.append(f"n must be at least 1, got {params.n}")
    if not math.isfinite(params.temperature) or params.temperature < 0:
        faults.append(f"temperature must be a finite number >= 0, got {params.temperature}")
    if not 0 < params.top_p <= 1:
        faults.append(f"top_p must be in (0, 1], got {params.top_p}")
    if params.top_k < -1:
        faults.append(f"top_k must be -1 or 0 (all tokens) or at least 1, got {params.top_k}")
    if params.seed is not None and not -MAX_SEED - 1 <= params.seed <= MAX_SEED:
        faults.append(f"seed must fit 64 bits, got {params.seed}")
    if params.max_tokens is not None and params.max_tokens < 1:
        faults.append(f"max_tokens must be at least 1 or None, got {params.max_tokens}")
    if params.min_tokens < 0:
        faults.append(f"min_tokens must be at least 0, got {params.min_tokens}")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        faults.append(f"min_tokens ({params.min_tokens}) is above max_tokens ({params.max_tokens})")
    strings = _strings(params.stop)
    if any(not string for string in strings):
        faults.append("stop must not hold an empty string")
    if strings and not params.detokenize:
        faults.append("stop strings need the text: set detokenize=True or use stop_token_ids")
    return faults
