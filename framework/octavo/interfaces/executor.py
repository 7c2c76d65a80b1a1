"""Executor socket, and the plain data that crosses it: a step goes in, its sampled tokens come out. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from octavo.errors import AdapterError
from octavo.interfaces.manifest import Manifest
from octavo.lora.adapter import AdapterInfo
from octavo.outputs import TokenLogprobs
from octavo.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRow:
    """A request that enters the batch (first time, or again after preemption): all the runner must know of it.

    Attributes:
        token_ids: every known token, prompt and output.
        num_prompt_tokens: how many of them are the prompt.
        params: as the user gave them, checked.
        seed, sample_index: what the random draw is keyed with.
        stop_token_ids: the ids that may not be sampled before `params.min_tokens` outputs.
        bad_words_token_ids: token sequences that may not be completed.
        chosen_outside: its samples are not kept; each token comes with a later row.
        adapter_position: the device position of its LoRA adapter; None: it has none.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    sample_index: int
    stop_token_ids: tuple[int, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    chosen_outside: bool = False
    adapter_position: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterPlacement:
    """Before the step, the adapter that was loaded as `adapter_id` takes a device position, whoever had it."""

    position: int
    adapter_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCopy:
    """Before the step, block `source` is copied to `target`, which takes its place at `index` of the block table."""

    index: int
    source: int
    target: int


class ScheduledRow(NamedTuple):
    """What one request does in one step. A tuple, for one is made for every request in every step: name its fields.

    Attributes:
        num_computed_tokens: position of its first token in this step.
        num_tokens: tokens to compute; 0 only for a fork.
        new_block_ids: blocks to append to its block table (all of them when it enters).
        samples: whether its last token in this step yields a new token.
        token_ids: its last tokens of this step, where the runner does not know them: chosen outside, or drafts.
            Tokens known neither to the engine nor given here are the runner's own samples.
        num_drafts: how many of `token_ids` are guesses. The row samples after the token before them and after each;
            what it samples is kept up to the first that differs from the guess.
        copied_blocks: blocks it shares and is about to write to.
        forked_from: the request of this step whose last token's logits it samples from, computing nothing itself.
    """

    request_id: str
    num_computed_tokens: int
    num_tokens: int
    new_block_ids: list[int]
    samples: bool
    token_ids: tuple[int, ...] = ()
    num_drafts: int = 0
    copied_blocks: tuple[BlockCopy, ...] = ()
    forked_from: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step's work. Order of effect: leave, place adapters, enter, copy blocks, compute rows.

    Attributes:
        leaving: request ids whose rows the runner forgets (ended, aborted, preempted).
        placements: of adapters that requests entering use.
        entering: requests that are new to the runner.
        rows: what is computed; empty when the step only carries news. A fork comes after the row it is forked from.
    """

    step_id: int
    leaving: list[str] = field(default_factory=list)
    placements: list[AdapterPlacement] = field(default_factory=list)
    entering: list[NewRow] = field(default_factory=list)
    rows: list[ScheduledRow] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What a step gave, by request id.

    Attributes:
        token_ids: of the rows that sample: one token; with drafts, those accepted and one more.
        logprobs: one for each of these tokens, of requests whose params ask for logprobs.
        prompt_logprobs: of requests whose params ask for them, one for each prompt token whose predecessor was
            computed in this step, in order.
        draft_token_ids: a proposer's guesses of what comes next.
    """

    step_id: int
    token_ids: dict[str, list[int]]
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    draft_token_ids: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorReport:
    """What start-up found.

    Attributes:
        num_blocks: KV blocks that fit.
        kv_cache_bytes, weight_bytes: memory taken.
        adapter_bytes: of the positions for LoRA adapters.
        phases: name and seconds of each start-up phase.
    """

    num_blocks: int
    kv_cache_bytes: int
    weight_bytes: int
    adapter_bytes: int = 0
    phases: tuple[tuple[str, float], ...] = ()


class Executor(ABC):
    """Runs steps on one device or many. Constructed with no arguments, then started once."""

    @abstractmethod
    def start(self, manifest: Manifest, on_failure: Callable[[BaseException], None]) -> ExecutorReport:
        """Load the model and allocate the KV cache exactly as `manifest` says."""

    @abstractmethod
    def submit(self, step: Step) -> object:
        """Begin a step and return a handle; steps take effect in the order submitted."""

    @abstractmethod
    def collect(self, handle: object) -> StepOutput:
        """Wait for a submitted step and return its tokens."""

    @abstractmethod
    def check(self) -> None:
        """Raise EngineDeadError, naming the cause, when the executor can no longer work."""

    @abstractmethod
    def stop(self) -> None:
        """Free everything. May be called twice."""

    def load_adapter(self, adapter_id: int, path: str) -> AdapterInfo:
        """Read a LoRA adapter into the host's memory, where placements find it; slow.

        The only call that may come from another thread, while steps go on.

        Raises:
            AdapterError: it cannot be served; nothing was kept of it.
        """
        raise AdapterError(f"{type(self).__name__} serves no LoRA adapters.")

    def drop_adapter(self, adapter_id: int) -> None:
        """Free a loaded adapter's memory; no request that will be submitted uses it. An unknown id is no error."""
        return None
