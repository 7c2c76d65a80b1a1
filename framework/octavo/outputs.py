"""What a user gets back: one RequestOutput a prompt, one CompletionOutput for each of its n completions."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the logits before any rule or temperature.

    Attributes:
        token_ids: the token that is there, then the most probable ones, best first.
        logprobs: of each of them, natural logarithm.
        rank: of the first of them among the vocabulary, 1 is the most probable.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One completion.

    Attributes:
        index: 0 .. n-1.
        text: the text so far; never half a character.
        token_ids: the tokens so far, the ending token included.
        finish_reason: "stop", "length", "abort", or None while it runs.
        stop_reason: the stop string or token id that ended it; None for end-of-sequence or length.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """Times of one request, seconds of `time.monotonic()`; None until it happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        num_cached_tokens: prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
