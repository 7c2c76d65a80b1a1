"""What to change when a plan does not fit: for each setting alone, exactly how far."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace

from octavo.plan.counts import Advice, Plan
from octavo.plan.sizes import MOST_RANKS, RankSizes
from octavo.runner.kv_cache import MOST_HUNDREDTHS, DeviceMemory, blocks_for

Goal = Callable[[Plan], bool]
Found = tuple[str, int | float | str, str, Plan] | None
"""A setting, the least change of it that does, a sentence, and the plan that results."""


def advise(
    plan: Plan,
    sizes_of: Callable[[int], RankSizes | None],
    can_run: Callable[[int], bool],
    in_bfloat16: Callable[[], Plan],
) -> Iterator[Advice]:
    """Every setting that, changed alone, makes the longest request fit, or failing that lets an engine start.

    Args:
        sizes_of: for so many devices; None when they cannot share the model.
        can_run: whether an executor is installed for so many devices.
        in_bfloat16: the same plan in that dtype.
    """
    goals: list[Goal] = [lambda one: one.serves_max_model_len]
    if not plan.fits:
        goals.append(lambda one: one.fits)
    if goals[0](plan):
        return
    for look in (
        lambda goal: _more_devices(plan, goal, sizes_of, can_run),
        lambda goal: _shorter_requests(plan, goal),
        lambda goal: _more_of_the_gpu(plan, goal),
        lambda goal: _fewer_requests(plan, goal),
        lambda goal: _kv_cache(plan, goal),
        lambda goal: _narrower(plan, goal, in_bfloat16),
        lambda goal: _fewer_adapters(plan, goal),
        lambda goal: _larger_devices(plan, goal),
    ):
        if found := next(filter(None, map(look, goals)), None):
            setting, value, sentence, then = found
            if not then.serves_max_model_len:
                sentence += f" Requests may then have up to {then.longest_context:,} tokens."
            yield Advice(setting=setting, value=value, sentence=sentence)


def _more_devices(
    plan: Plan, goal: Goal, sizes_of: Callable[[int], RankSizes | None], can_run: Callable[[int], bool]
) -> Found:
    for num_ranks in range(plan.num_ranks + 1, MOST_RANKS + 1):
        if (sizes := sizes_of(num_ranks)) is not None and goal(then := replace(plan, sizes=sizes)):
            needs = "" if can_run(num_ranks) else "; no executor installed here runs so many"
            sentence = f"Raise tensor_parallel_size to {num_ranks} devices with as much memory each{needs}."
            return "tensor_parallel_size", num_ranks, sentence, then
    return None


def _shorter_requests(plan: Plan, goal: Goal) -> Found:
    if plan.fits or plan.kv_cache_bytes > max(0, plan.free_bytes):
        return None  # the length is what one wants, or not what is too much

    def shortened(length: int) -> Plan:
        config = plan.config.model_copy(update={"max_model_len": length})
        return replace(plan, config=config, max_model_len=length)

    most = _first(1, plan.max_model_len, lambda length: not goal(shortened(length))) - 1
    if not most:
        return None
    return "max_model_len", most, f"Lower max_model_len to at most {most:,} tokens.", shortened(most)


def _more_of_the_gpu(plan: Plan, goal: Goal) -> Found:
    def using(hundredths: int) -> Plan:
        config = plan.config.model_copy(update={"gpu_memory_utilization": hundredths / 100})
        return replace(plan, config=config)

    least = _first(int(100 * plan.config.gpu_memory_utilization) + 1, MOST_HUNDREDTHS, lambda one: goal(using(one)))
    if plan.device != "cuda" or least > MOST_HUNDREDTHS:
        return None
    share = least / 100
    return "gpu_memory_utilization", share, f"Raise gpu_memory_utilization to at least {share:g}.", using(least)


def _fewer_requests(plan: Plan, goal: Goal) -> Found:
    if not plan.activation_bytes or plan.config.kv_cache_memory_bytes is not None:
        return None

    def limited(number: int) -> Plan:
        return replace(plan, config=plan.config.model_copy(update={"max_num_seqs": number}))

    most = _first(1, plan.config.max_num_seqs, lambda number: not goal(limited(number))) - 1
    if not most:
        return None
    return (
        "max_num_seqs",
        most,
        f"Lower max_num_seqs to at most {most:,}, which draw their tokens at once.",
        limited(most),
    )


def _kv_cache(plan: Plan, goal: Goal) -> Found:
    def given(num_bytes: int | None) -> Plan:
        return replace(plan, config=plan.config.model_copy(update={"kv_cache_memory_bytes": num_bytes}))

    per_block = plan.sizes.kv_bytes_per_block
    if plan.kv_cache_bytes > plan.free_bytes:
        most = plan.free_bytes // per_block * per_block
        then = given(most)
        if most <= 0 or not goal(then):
            return None
        return "kv_cache_memory_bytes", most, f"Lower kv_cache_memory_bytes to at most {most:,}.", then
    # On a GPU the rule's own share is the most: what it leaves free, activations need.
    most = given(None).kv_cache_budget if plan.device == "cuda" else max(0, plan.free_bytes)
    least = per_block * _first(1, most // per_block, lambda number: goal(given(number * per_block)))
    if least > most:
        return None
    return "kv_cache_memory_bytes", least, f"Set kv_cache_memory_bytes to at least {least:,}.", given(least)


def _narrower(plan: Plan, goal: Goal, in_bfloat16: Callable[[], Plan]) -> Found:
    if plan.dtype != "float32" or not goal(then := in_bfloat16()):
        return None
    return "dtype", "bfloat16", "Set dtype to bfloat16, half the size of float32.", then


def _fewer_adapters(plan: Plan, goal: Goal) -> Found:
    most = _first(0, plan.max_loras, lambda number: not goal(replace(plan, max_loras=number))) - 1
    if not 0 <= most < plan.max_loras:
        return None
    if not most:
        return "enable_lora", most, "Turn enable_lora off.", replace(plan, max_loras=0)
    return "max_loras", most, f"Lower max_loras to at most {most}.", replace(plan, max_loras=most)


def _larger_devices(plan: Plan, goal: Goal) -> Found:
    def with_memory(num_bytes: int) -> Plan:
        return replace(plan, memory=DeviceMemory(free_bytes=num_bytes, total_bytes=num_bytes))

    cache_bytes = max(blocks_for(plan.config, plan.max_model_len) * plan.sizes.kv_bytes_per_block, plan.kv_cache_bytes)
    share = min(0.5, plan.config.gpu_memory_utilization)  # of any rule, at least
    enough = int((plan.static_bytes + cache_bytes + 1) / share) + 1
    least = _first(0, enough, lambda num_bytes: goal(with_memory(num_bytes)))
    if least > enough:
        return None
    what = "a device" if plan.num_ranks == 1 else "devices"
    return "memory", least, f"Use {what} with at least {least:,} free bytes.", with_memory(least)


def _first(low: int, high: int, does: Callable[[int], bool]) -> int:
    """The least number of low .. high for which `does`, false below and true above; high + 1 when there is none."""
    return low + bisect_left(range(low, high + 1), True, key=does)
