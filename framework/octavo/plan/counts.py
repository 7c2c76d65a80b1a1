"""Plan: every number that follows from what a device holds, how much it can hold and what the settings ask for."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.plan.sizes import RankSizes
from octavo.runner.kv_cache import (
    DeviceMemory,
    blocks_for,
    kv_cache_budget,
    kv_cache_rule,
    num_kv_blocks,
    num_needed_blocks,
    too_few_blocks,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """A change of one setting with which it would fit, and beyond which it would not.

    Attributes:
        setting: of EngineConfig, or "memory", which only a plan knows.
        value: the least, or the most, that does.
    """

    setting: str
    value: int | float | str
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Bytes are of one device; `num_ranks` devices hold as much each.

    Attributes:
        config: as asked; `device`, `dtype`, `max_model_len` are what its "auto" came to.
        memory: of one device, before anything is loaded.
        memory_is_given: by the user, rather than found on this machine.
        max_loras: positions for LoRA adapters.
        tokens_per_request: a typical length to count concurrent requests for, too.
        checkpoint_bytes: of the weights as they lie in files; None when there are none yet.
        notes: sentences that change no number.
        advice: what to change when it does not fit, or when a request of max_model_len tokens does not.
    """

    model: str
    architecture: str
    config: EngineConfig
    device: str
    dtype: str
    max_model_len: int
    memory: DeviceMemory
    memory_is_given: bool
    sizes: RankSizes
    max_loras: int
    tokens_per_request: int | None
    checkpoint_bytes: int | None
    notes: tuple[str, ...]
    advice: tuple[Advice, ...] = ()

    @property
    def max_lora_rank(self) -> int:
        return self.config.max_lora_rank

    @property
    def num_ranks(self) -> int:
        return self.sizes.num_ranks

    @property
    def weight_bytes(self) -> int:
        """As ExecutorReport.weight_bytes of a running engine."""
        return self.sizes.weight_bytes

    @property
    def rotary_bytes(self) -> int:
        return self.sizes.rotary_bytes_per_position * self.max_model_len

    @property
    def adapter_bytes(self) -> int:
        return self.sizes.adapter_bytes * self.max_loras

    @property
    def activation_bytes(self) -> int:
        """Estimated, of a GPU: what the largest step needs while it runs. A CPU's come out of what is left."""
        if self.device != "cuda":
            return 0
        num_tokens = self.config.max_num_batched_tokens
        num_samples = min(self.config.max_num_seqs, num_tokens)
        return max(
            num_tokens * self.sizes.activation_bytes_per_token, num_samples * self.sizes.activation_bytes_per_sample
        )

    @property
    def static_bytes(self) -> int:
        """All that lies there beside the KV cache, activations of a GPU included."""
        return self.weight_bytes + self.rotary_bytes + self.adapter_bytes + self.activation_bytes

    @property
    def free_bytes(self) -> int:
        """What is left for the KV cache, on a CPU for activations too; below zero when not even the weights fit."""
        return self.memory.free_bytes - self.static_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return -(-self.sizes.kv_bytes_per_block // self.config.block_size)

    @property
    def kv_cache_budget(self) -> int:
        """Bytes the KV cache may take, by the rule of the engine."""
        free_bytes = self.free_bytes + self.activation_bytes
        memory = DeviceMemory(free_bytes=free_bytes, total_bytes=self.memory.total_bytes)
        return kv_cache_budget(self.config, memory, self.device, self.activation_bytes)

    @property
    def kv_cache_rule(self) -> str:
        """Where the budget is from."""
        return kv_cache_rule(self.config, self.device)

    @property
    def num_blocks(self) -> int:
        return num_kv_blocks(self.config, self.max_model_len, self.kv_cache_budget, self.sizes.kv_bytes_per_block)

    @property
    def kv_cache_bytes(self) -> int:
        """As ExecutorReport.kv_cache_bytes of a running engine."""
        return self.num_blocks * self.sizes.kv_bytes_per_block

    @property
    def num_tokens(self) -> int:
        """That the KV cache has room for."""
        return self.num_blocks * self.config.block_size

    @property
    def longest_context(self) -> int:
        """Tokens of the longest request that is served."""
        return min(self.max_model_len, self.num_tokens)

    @property
    def max_concurrent_requests(self) -> int:
        """Of `longest_context` tokens each."""
        return self.concurrent_requests(self.longest_context) if self.num_blocks else 0

    def concurrent_requests(self, num_tokens: int) -> int:
        """How many requests of so many tokens run at once, none of them preempted."""
        if num_tokens > self.longest_context:
            return 0
        return min(self.config.max_num_seqs, self.num_blocks // blocks_for(self.config, num_tokens))

    @property
    def faults(self) -> tuple[str, ...]:
        """Why an engine could not start, in sentences."""
        if self.free_bytes < 0:
            what = ["weights", "rotary tables", *["adapters"] * bool(self.max_loras)]
            what += ["activations"] * bool(self.activation_bytes)
            return (
                f"{', '.join(what[:-1]).capitalize()} and {what[-1]} take {self.static_bytes:,} bytes of each device, "
                f"and only {self.memory.free_bytes:,} are free.",
            )
        if self.num_blocks < num_needed_blocks(self.config):
            return (too_few_blocks(self.config, self.num_blocks, self.kv_cache_budget, self.sizes.kv_bytes_per_block),)
        if self.kv_cache_bytes > self.free_bytes:
            return (
                f"The KV cache of {self.kv_cache_bytes:,} bytes does not fit beside the {self.static_bytes:,} bytes of "
                f"the rest: {self.free_bytes:,} are free.",
            )
        return ()

    @property
    def fits(self) -> bool:
        """Whether an engine would start."""
        return not self.faults

    @property
    def serves_max_model_len(self) -> bool:
        """Whether it fits, and a request of `max_model_len` tokens does, which an engine wants only when asked for."""
        return self.fits and self.longest_context == self.max_model_len
