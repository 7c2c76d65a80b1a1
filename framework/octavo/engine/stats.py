"""Numbers of a running engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A moment's view.

    Attributes:
        num_waiting, num_running: requests.
        num_steps: steps submitted since start.
        busy_seconds: time spent in steps since start.
        num_output_tokens: tokens sampled and kept, or chosen outside, since start.
        num_preemptions: since start.
        num_drafts: tokens a proposer guessed and the model verified, since start.
        num_accepted_drafts: those that the model would have sampled too; what is kept of a step is one more.
        num_blocks, block_size: of the KV cache.
        kv_usage: share of the blocks that requests hold, 0 to 1.
        kv_usage_peak: its highest since start.
        kv_waste: 1 - tokens stored / token slots over the blocks that running requests hold, mean over all steps.
        num_prefix_cache_queries, num_prefix_cache_hits: prompt tokens looked for in the prefix cache and found there,
            since start; prompts computed again after a preemption do not count.
        num_adapters_in_memory, num_adapters_placed: LoRA adapters in the host's memory, the one being read included;
            and at device positions.
        num_adapter_loads, num_adapter_evictions: into and from the host's memory, since start.
        policy_metrics: the scheduler policy's own numbers, by name.
    """

    num_waiting: int
    num_running: int
    num_steps: int
    busy_seconds: float
    num_output_tokens: int
    num_preemptions: int
    num_drafts: int
    num_accepted_drafts: int
    num_blocks: int
    block_size: int
    kv_usage: float
    kv_usage_peak: float
    kv_waste: float
    num_prefix_cache_queries: int = 0
    num_prefix_cache_hits: int = 0
    num_adapters_in_memory: int = 0
    num_adapters_placed: int = 0
    num_adapter_loads: int = 0
    num_adapter_evictions: int = 0
    policy_metrics: Mapping[str, float] = field(default_factory=dict)
