"""Executor socket, and the plain data that crosses it: a step goes in, its sampled tokens come out. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.interfaces.manifest import Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class NewRow:
    """A request that enters the batch (first time, or again after preemption): all the runner must know of it.

    Attributes:
        token_ids: every known token, prompt and output.
        num_prompt_tokens: how many of them are the prompt.
        temperature, top_p, top_k: as in SamplingParams, checked; top_k 0 is off.
        seed, sample_index: what the random draw is keyed with.
        stop_token_ids, min_tokens: the ids that may not be sampled before min_tokens outputs.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    sample_index: int
    min_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRow:
    """What one request does in one step.

    Attributes:
        num_computed_tokens: position of its first token in this step.
        num_tokens: tokens to compute, >= 1; those not known to the engine are the runner's own samples.
        new_block_ids: blocks to append to its block table (all of them when it enters).
        samples: whether its last token in this step yields a new token.
    """

    request_id: str
    num_computed_tokens: int
    num_tokens: int
    new_block_ids: list[int]
    samples: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step's work. Order of effect: leave, enter, rows.

    Attributes:
        leaving: request ids whose rows the runner forgets (ended, aborted, preempted).
        entering: requests that are new to the runner.
        rows: what is computed; empty when the step only carries news.
    """

    step_id: int
    leaving: list[str] = field(default_factory=list)
    entering: list[NewRow] = field(default_factory=list)
    rows: list[ScheduledRow] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """Sampled tokens of one step, for the rows with `samples`, by request id."""

    step_id: int
    token_ids: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorReport:
    """What start-up found.

    Attributes:
        num_blocks: KV blocks that fit.
        kv_cache_bytes, weight_bytes: memory taken.
        phases: name and seconds of each start-up phase.
    """

    num_blocks: int
    kv_cache_bytes: int
    weight_bytes: int
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
