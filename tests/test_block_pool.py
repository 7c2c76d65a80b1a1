"""The block pool: reference counts, the prefix cache, the order in which free blocks are taken."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from octavo.engine.block_pool import BlockPool, DeferredReleases, extend_hash_chain


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(4, 2)


def cached(pool: BlockPool, *hashes: bytes) -> list[int]:
    """A request's blocks, registered under these hashes."""
    block_ids = pool.allocate(len(hashes))
    assert block_ids is not None
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        pool.register(block_id, block_hash)
    return block_ids


def test_too_many_blocks_are_refused_and_none_taken(pool: BlockPool) -> None:
    assert pool.allocate(5) is None
    assert pool.num_free == 4


def test_a_released_block_keeps_its_content_until_it_is_allocated_again(pool: BlockPool) -> None:
    block_ids = cached(pool, b"a")
    pool.release(block_ids)
    assert pool.lookup([b"a"]) == block_ids
    pool.allocate(4)
    assert pool.lookup([b"a"]) == []


def test_blocks_without_a_hash_are_taken_before_cached_ones(pool: BlockPool) -> None:
    kept = cached(pool, b"a", b"b")
    pool.release(kept)
    taken = pool.allocate(2)
    assert taken is not None
    assert not set(taken) & set(kept)


def test_the_least_recently_used_prefix_is_evicted_first(pool: BlockPool) -> None:
    first, second = cached(pool, b"a", b"b"), cached(pool, b"c", b"d")
    pool.release(first)
    pool.release(second)
    pool.acquire(first)
    pool.release(first)
    assert pool.allocate(2) == second[::-1]


def test_a_prefix_loses_its_tail_before_its_head(pool: BlockPool) -> None:
    block_ids = cached(pool, b"a", b"b", b"c", b"d")
    pool.release(block_ids)
    pool.allocate(1)
    assert pool.lookup([b"a", b"b", b"c", b"d"]) == block_ids[:3]


def test_a_lookup_stops_at_the_first_hash_that_is_not_cached(pool: BlockPool) -> None:
    block_ids = cached(pool, b"a", b"b", b"c")
    assert pool.lookup([b"a", b"x", b"c"]) == block_ids[:1]


def test_a_shared_block_is_free_only_when_its_last_holder_releases_it(pool: BlockPool) -> None:
    block_ids = cached(pool, b"a")
    pool.acquire(block_ids)
    assert pool.reference_count(block_ids[0]) == 2
    pool.release(block_ids)
    assert pool.num_free == 3
    pool.release(block_ids)
    assert pool.num_free == 4


def test_an_acquired_block_is_not_allocated_to_another(pool: BlockPool) -> None:
    block_ids = cached(pool, b"a")
    pool.release(block_ids)
    pool.acquire(pool.lookup([b"a"]))
    assert pool.allocate(4) is None
    assert not set(block_ids) & set(pool.allocate(3) or [])


def test_of_two_blocks_with_one_hash_the_first_stays(pool: BlockPool) -> None:
    first = cached(pool, b"a")
    cached(pool, b"a")
    assert pool.lookup([b"a"]) == first
    assert pool.num_cached == 1


def test_releasing_a_block_twice_is_caught(pool: BlockPool) -> None:
    block_ids = pool.allocate(1)
    assert block_ids is not None
    pool.release(block_ids)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(block_ids)


def test_the_prefix_cache_is_not_reset_while_a_request_holds_a_block(pool: BlockPool) -> None:
    block_ids = cached(pool, b"a")
    assert not pool.reset_prefix_cache()
    assert pool.lookup([b"a"]) == block_ids


def test_a_reset_prefix_cache_is_empty(pool: BlockPool) -> None:
    pool.release(cached(pool, b"a"))
    assert pool.reset_prefix_cache()
    assert pool.lookup([b"a"]) == []
    assert pool.allocate(4) is not None


def test_nothing_is_found_when_prefix_caching_is_off() -> None:
    pool = BlockPool(4, 2, enable_prefix_caching=False)
    cached(pool, b"a")
    assert pool.lookup([b"a"]) == []


def test_blocks_of_a_step_in_flight_are_released_when_it_is_collected(pool: BlockPool) -> None:
    releases = DeferredReleases(pool)
    block_ids = pool.allocate(2)
    assert block_ids is not None
    releases.release(block_ids, last_step_id=1)
    releases.collect(0)
    assert pool.num_free == 2
    releases.collect(1)
    assert pool.num_free == 4


def test_blocks_of_a_collected_step_are_released_at_once(pool: BlockPool) -> None:
    releases = DeferredReleases(pool)
    block_ids = pool.allocate(2)
    assert block_ids is not None
    releases.collect(0)
    releases.release(block_ids, last_step_id=0)
    assert pool.num_free == 4


def test_blocks_held_only_by_requests_that_left_are_told_apart(pool: BlockPool) -> None:
    releases = DeferredReleases(pool)
    shared, own = cached(pool, b"a"), cached(pool, b"b")
    pool.acquire(shared)
    releases.release(shared + own, last_step_id=0)
    assert pool.num_referenced == 2
    assert releases.num_blocks_held_by_others() == 1


# ------------------------------------------------------------------------------------------------ hashes


def test_a_hash_chain_grows_as_if_made_at_once() -> None:
    chain = extend_hash_chain([], [1, 2, 3, 4, 5], block_size=2)
    assert len(chain) == 2
    assert extend_hash_chain(chain, [5, 6, 7], block_size=2) == extend_hash_chain([], [1, 2, 3, 4, 5, 6], block_size=2)


def test_equal_blocks_after_different_beginnings_have_different_hashes() -> None:
    assert extend_hash_chain([], [1, 2, 9, 9], 2)[1] != extend_hash_chain([], [2, 1, 9, 9], 2)[1]


def test_equal_tokens_under_different_roots_have_different_hashes() -> None:
    assert extend_hash_chain([], [1, 2], 2, root=b"x") != extend_hash_chain([], [1, 2], 2)


def test_hashes_are_the_same_in_every_process() -> None:
    program = (
        "from octavo.engine.block_pool import extend_hash_chain as chain\n"
        "print(chain([], [1, 2, 3, 128_000], 2, root=b'salt')[1].hex())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "10c491a680d10ee8ddda40a3ef88c328"


# ------------------------------------------------------------------------------------------------ against a model


class PoolMachine(RuleBasedStateMachine):
    """The pool beside a plain model: a list of free blocks in order, a dictionary of hashes."""

    @initialize(num_blocks=st.integers(1, 8))
    def build(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.free = list(range(num_blocks))
        self.hashes: dict[int, bytes] = {}
        self.held: list[list[int]] = []  # what each owner holds

    @rule(num_blocks=st.integers(0, 4))
    def allocate(self, num_blocks: int) -> None:
        block_ids = self.pool.allocate(num_blocks)
        if block_ids is None:
            assert num_blocks > len(self.free)
            return
        assert block_ids == self.free[:num_blocks]
        self.free = self.free[num_blocks:]
        for block_id in block_ids:
            self.hashes.pop(block_id, None)
        self.held.append(block_ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(block_ids)
        for block_id in reversed(block_ids):
            if not any(block_id in other for other in self.held):
                self.free.insert(len(self.free) if block_id in self.hashes else 0, block_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=st.integers(0, 9))
    def register(self, data: st.DataObject, name: int) -> None:
        block_ids = data.draw(st.sampled_from(self.held))
        block_hash = b"%d" % name
        fresh = [block_id for block_id in block_ids if block_id not in self.hashes]
        if fresh:
            self.pool.register(fresh[0], block_hash)
            if block_hash not in self.hashes.values():
                self.hashes[fresh[0]] = block_hash

    @rule(names=st.lists(st.integers(0, 9), max_size=4, unique=True))
    def look_up_and_acquire(self, names: list[int]) -> None:
        by_hash = {block_hash: block_id for block_id, block_hash in self.hashes.items()}
        expected = []
        for name in names:
            if b"%d" % name not in by_hash:
                break
            expected.append(by_hash[b"%d" % name])
        block_ids = self.pool.lookup([b"%d" % name for name in names])
        assert block_ids == expected
        num_free, num_taken = self.pool.num_free, self.pool.num_free_among(block_ids)
        self.pool.acquire(block_ids)
        assert self.pool.num_free == num_free - num_taken
        self.free = [block_id for block_id in self.free if block_id not in block_ids]
        self.held.append(block_ids)

    @rule()
    def reset(self) -> None:
        held = any(self.held)
        assert self.pool.reset_prefix_cache() is not held
        if not held:
            self.hashes = {}

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "pool"):
            return
        owners = Counter(block_id for block_ids in self.held for block_id in block_ids)
        for block_id in range(self.pool.num_blocks):
            assert self.pool.reference_count(block_id) == owners[block_id]
        assert self.pool.num_references == owners.total()
        assert self.pool.num_cached == len(self.hashes)
        assert list(self.pool._free) == self.free


def test_the_pool_behaves_like_its_plain_model() -> None:
    quiet = settings(
        max_examples=100,
        stateful_step_count=40,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(PoolMachine, settings=quiet)
