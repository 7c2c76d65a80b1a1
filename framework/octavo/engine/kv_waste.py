"""KV waste: how much of the memory that running requests hold stores no token, over the steps so far."""

from __future__ import annotations

from collections.abc import Iterable

from octavo.engine.block_pool import BlockPool, DeferredReleases
from octavo.request import Request


class KVWaste:
    """1 - tokens stored / token slots over the distinct blocks running requests hold, measured after each step.

    Blocks shared by several count once, cached ones that nobody holds not at all.
    """

    def __init__(self, block_pool: BlockPool, releases: DeferredReleases) -> None:
        self._pool = block_pool
        self._releases = releases
        self._sum, self._num_steps = 0.0, 0
        self._sharers: set[Request] = set()  # their last block may be shared before it is full

    @property
    def mean(self) -> float:
        """Over all steps measured; 0 before the first."""
        return self._sum / self._num_steps if self._num_steps else 0.0

    def watch(self, *requests: Request) -> None:
        """These share a block that may be partly filled."""
        self._sharers.update(requests)

    def measure(self, running: Iterable[Request]) -> None:
        """Take in one step."""
        pool, releases = self._pool, self._releases
        num_blocks = releases.num_blocks_held_by_others()
        if not num_blocks:
            return
        num_stored = sum([request.num_computed_tokens + request.num_in_flight_tokens for request in running])
        num_repeats = pool.num_references - releases.num_references - num_blocks
        num_stored -= num_repeats * pool.block_size  # as if only full blocks were shared
        if self._sharers:
            num_stored += self._empty_slots_counted_as_repeats()
        self._sum += 1 - num_stored / (num_blocks * pool.block_size)
        self._num_steps += 1

    def _empty_slots_counted_as_repeats(self) -> int:
        """Slots still empty in partly filled blocks, once for each request beyond the first that holds the block."""
        block_size = self._pool.block_size
        holders: dict[int, list[Request]] = {}
        num_empty: dict[int, int] = {}
        for request in self._sharers:
            index, num_filled = divmod(request.num_scheduled_tokens, block_size)
            if num_filled and index < len(request.block_ids):
                block_id = request.block_ids[index]
                if self._pool.reference_count(block_id) > 1:
                    holders.setdefault(block_id, []).append(request)
                    num_empty[block_id] = block_size - num_filled
        self._sharers = {request for requests in holders.values() for request in requests}
        return sum((len(requests) - 1) * num_empty[block_id] for block_id, requests in holders.items())
