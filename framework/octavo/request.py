"""Request: one sequence on its way through the engine. No torch here."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from octavo.lora.adapter import Adapter
from octavo.outputs import TokenLogprobs
from octavo.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """What the scheduler knows of one sequence. There are no phases: a request has tokens, of which
    `num_computed_tokens` have their keys and values in the cache, and more to compute.

    Attributes:
        request_id: unique in the engine.
        prompt_token_ids, output_token_ids: known tokens.
        params: how to sample; `seed` here is always set.
        sample_index: which of the prompt's n completions this is.
        stop_token_ids: the user's ids that end it; the one met becomes `stop_reason`.
        eos_token_ids: the model's ids that end it, empty when they are ignored.
        max_total_tokens: prompt and output may not exceed this.
        arrival_time: seconds of the engine's clock.
        priority, tenant: for scheduler policies.
        cache_salt: keeps its prefix-cache entries apart from others'.
        bad_words_token_ids: token sequences that may not be completed.
        siblings: requests with the same prompt that wait for this one to compute it, then share its blocks.
        chosen_outside: its samples are not kept; whoever added it chooses each token (a beam).
        adapter: the version of a LoRA adapter it is answered with; its siblings and forks have the same.
        stop_reason: the user's token that ended it; of finish_reason "error" a sentence that says why.
        num_computed_tokens: tokens whose step has been collected.
        num_in_flight_tokens: tokens in steps submitted and not yet collected.
        num_placeholder_tokens: output tokens those steps will sample, unknown until collected.
        num_unsent_tokens: last tokens that were chosen outside and that the runner has not had yet.
        draft_token_ids: guesses of what comes next, to be verified by its next step.
        prompt_logprobs: of the prompt tokens computed so far, until they are handed over.
        block_ids: its blocks, in order of position; one block may belong to several requests.
        num_sent_blocks: its leading blocks that the runner knows of.
        block_hashes: hash chain of its full blocks, extended as tokens become known.
        hashed_adapter: content hash of the adapter that `block_hashes` are made with.
        holds_adapter: it has started, and keeps its adapter in memory until it ends.
        num_registered_blocks: its leading blocks already offered to, or taken from, the prefix cache.
        last_step_id: the last step with a row of this request.
        epoch: how often it was preempted; a step in flight from an earlier epoch is dropped.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int = 0
    sample_index: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    max_total_tokens: int = 2**31
    arrival_time: float = 0.0
    priority: int = 0
    tenant: str | None = None
    cache_salt: bytes = b""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    siblings: list[Request] = field(default_factory=list)
    chosen_outside: bool = False
    adapter: Adapter | None = None

    output_token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_placeholder_tokens: int = 0
    num_unsent_tokens: int = 0
    draft_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_sent_blocks: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    hashed_adapter: str | None = None
    holds_adapter: bool = False
    num_registered_blocks: int = 0
    last_step_id: int = -1
    epoch: int = 0
    first_scheduled_time: float | None = None

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens computed or on their way: the position the next step starts at."""
        return self.num_computed_tokens + self.num_in_flight_tokens

    @property
    def num_tokens_to_schedule(self) -> int:
        """Tokens (placeholders included) that no step has taken yet."""
        return self.num_tokens + self.num_placeholder_tokens - self.num_scheduled_tokens

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def all_token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids

    def token_ids_from(self, start: int) -> list[int]:
        """Known tokens from position `start` on."""
        num_prompt_tokens = len(self.prompt_token_ids)
        if start >= num_prompt_tokens:
            return self.output_token_ids[start - num_prompt_tokens :]
        return self.prompt_token_ids[start:] + self.output_token_ids
