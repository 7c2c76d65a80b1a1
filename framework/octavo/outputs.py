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


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position.

    Attributes:
        logprob: natural logarithm of its probability, by the logits before any rule or temperature.
        rank: among the vocabulary, 1 is the most probable.
        decoded_token: the text that it adds where it stands: whole characters only, so a token that holds the beginning
            of one adds nothing, and the token that completes it adds all of it. None without `detokenize`.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One completion.

    Attributes:
        index: 0 .. n-1.
        text: the text so far; never half a character.
        token_ids: the tokens so far, the ending token included.
        cumulative_logprob: sum of the logprobs of `token_ids`; None when logprobs were not asked for.
        logprobs: for each token by token id itself, first, and the most probable ones, best first; None when they were
            not asked for.
        finish_reason: "stop", "length", "abort", "error" (its LoRA adapter could not be read; `stop_reason` says why),
            or None while it runs.
        stop_reason: the stop string or token id that ended it; None for end-of-sequence or length.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """Times of one prompt, all its completions together: seconds of `time.monotonic()`, None until it happened.

    Attributes:
        first_scheduled_time: its first step was made; until then it waited.
        first_token_time, last_token_time: the first, and so far the last, of any completion's tokens.
        num_preemptions: how often the completion that was preempted most had to be computed again.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0

    @property
    def queue_seconds(self) -> float | None:
        """From arrival to the first step."""
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def ttft_seconds(self) -> float | None:
        """Time to first token, from arrival."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def decode_seconds(self) -> float | None:
        """From the first token to the last."""
        return _between(self.first_token_time, self.last_token_time)

    @property
    def e2e_seconds(self) -> float | None:
        """From arrival to the last token."""
        return _between(self.arrival_time, self.last_token_time)


@dataclass(kw_only=True, slots=True)
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        prompt: its text, when it was text.
        prompt_logprobs: for each prompt token, as in CompletionOutput.logprobs; None for the first, which nothing
            predicts. There with the first output token, when they were asked for.
        num_cached_tokens: prompt tokens whose keys and values came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
