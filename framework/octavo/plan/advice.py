"""What to change when a plan does not fit: for each setting alone, exactly how far."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace

from octavo.plan.counts import Advice, Plan
from octavo.plan.sizes import MOST_RANKS, RankSizes
from octavo.runner.kv_cache import DeviceMemory, blocks_for, num_needed_blocks


def advise(
    plan: Plan,
    sizes_of: Callable[[int], RankSizes | None],
    can_run: Callable[[int], bool],
    in_bfloat16: Callable[[], Plan],
) -> Iterator[Advice]:
    """Every setting that, changed alone, makes it fit; or, if it fits, makes the longest request fit.

    Args:
        sizes_of: for so many devices; None when they cannot share the model.
        can_run: whether an executor is installed for so many devices.
        in_bfloat16: the same plan in that dtype.
    """
    wanted: Callable[[Plan], bool] = (lambda one: one.serves_max_model_len) if plan.fits else (lambda one: one.fits)
    if wanted(plan):
        return
    yield from _more_devices(plan, wanted, sizes_of, can_run)
    yield from _shorter_requests(plan, wanted)
    yield from _kv_cache(plan, wanted)
    if plan.dtype == "float32" and wanted(in_bfloat16()):
        yield Advice(setting="dtype", value="bfloat16", sentence="Set dtype to bfloat16, half the size of float32.")
    yield from _fewer_adapters(plan, wanted)
    yield from _larger_devices(plan, wanted)


def _more_devices(
    plan: Plan,
    wanted: Callable[[Plan], bool],
    sizes_of: Callable[[int], RankSizes | None],
    can_run: Callable[[int], bool],
) -> Iterator[Advice]:
    for num_ranks in range(plan.num_ranks + 1, MOST_RANKS + 1):
        sizes = sizes_of(num_ranks)
        if sizes is not None and wanted(replace(plan, sizes=sizes)):
            needs = "" if can_run(num_ranks) else "; no executor installed here runs so many"
            yield Advice(
                setting="tensor_parallel_size",
                value=num_ranks,
                sentence=f"Raise tensor_parallel_size to {num_ranks} devices with as much memory each{needs}.",
            )
            return


def _shorter_requests(plan: Plan, wanted: Callable[[Plan], bool]) -> Iterator[Advice]:
    if plan.fits or plan.kv_cache_bytes > max(0, plan.free_bytes):
        return  # the length is what one wants, or not what is too much

    def too_long(length: int) -> bool:
        config = plan.config.model_copy(update={"max_model_len": length})
        return not wanted(replace(plan, config=config, max_model_len=length))

    longest = _first(1, plan.max_model_len, too_long) - 1
    if longest:
        yield Advice(
            setting="max_model_len", value=longest, sentence=f"Lower max_model_len to at most {longest:,} tokens."
        )


def _kv_cache(plan: Plan, wanted: Callable[[Plan], bool]) -> Iterator[Advice]:
    def with_bytes(num_bytes: int) -> Plan:
        return replace(plan, config=plan.config.model_copy(update={"kv_cache_memory_bytes": num_bytes}))

    per_block = plan.sizes.kv_bytes_per_block
    if plan.kv_cache_bytes > plan.free_bytes:
        most = plan.free_bytes // per_block * per_block
        if most > 0 and wanted(with_bytes(most)):
            yield Advice(
                setting="kv_cache_memory_bytes",
                value=most,
                sentence=f"Lower kv_cache_memory_bytes to at most {most:,}.",
            )
        return
    needed = blocks_for(plan.config, plan.max_model_len) if plan.fits else num_needed_blocks(plan.config)
    least = needed * per_block
    # On a GPU the rule's own share is the most: what it leaves free, activations need.
    default = replace(plan, config=plan.config.model_copy(update={"kv_cache_memory_bytes": None})).kv_cache_budget
    most = default if plan.device == "cuda" else plan.free_bytes
    if least <= most and wanted(with_bytes(least)):
        yield Advice(
            setting="kv_cache_memory_bytes",
            value=least,
            sentence=f"Set kv_cache_memory_bytes to at least {least:,}.",
        )


def _fewer_adapters(plan: Plan, wanted: Callable[[Plan], bool]) -> Iterator[Advice]:
    most = _first(0, plan.max_loras, lambda number: not wanted(replace(plan, max_loras=number))) - 1
    if 0 <= most < plan.max_loras:
        yield Advice(setting="max_loras", value=most, sentence=f"Lower max_loras to at most {most}.")


def _larger_devices(plan: Plan, wanted: Callable[[Plan], bool]) -> Iterator[Advice]:
    def does(num_bytes: int) -> bool:
        return wanted(replace(plan, memory=DeviceMemory(free_bytes=num_bytes, total_bytes=num_bytes)))

    needed = blocks_for(plan.config, plan.max_model_len) * plan.sizes.kv_bytes_per_block
    enough = 2 * (plan.static_bytes + max(needed, plan.kv_cache_bytes)) + 1  # for the share of any rule
    if does(enough):
        least = _first(0, enough, does)
        yield Advice(
            setting="memory",
            value=least,
            sentence=f"Use {'a device' if plan.num_ranks == 1 else 'devices'} with at least {least:,} free bytes.",
        )


def _first(low: int, high: int, does: Callable[[int], bool]) -> int:
    """The least number of low .. high for which `does`, false below and true above; high + 1 when there is none."""
    return low + bisect_left(range(low, high + 1), True, key=does)
