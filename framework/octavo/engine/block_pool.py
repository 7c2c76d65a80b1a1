"""BlockPool: who holds which KV block, and which blocks hold a prefix worth keeping.

The scheduler's only store of memory: block ids and counts, no tensors.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


class BlockPool:
    """The KV cache's blocks with their reference counts, and the prefix cache over them.

    A block is referenced (some request holds it) or free. A full block may be registered under the hash of
    everything up to its end; it keeps hash and content when it becomes free, until it is allocated again.
    Free blocks are taken in this order: those without a hash, then the least recently used.

    Args:
        num_blocks: blocks in the KV cache, ids 0 to num_blocks - 1.
        block_size: tokens in a block.
        enable_prefix_caching: False makes `register` do nothing and `lookup` find nothing.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        assert num_blocks >= 1
        assert block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._reference_counts = [0] * num_blocks
        self._num_references = 0
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks no request holds; the cached ones among them count, they are evicted when needed."""
        return len(self._free)

    @property
    def num_referenced(self) -> int:
        """Distinct blocks some request holds."""
        return self.num_blocks - len(self._free)

    @property
    def num_references(self) -> int:
        """Sum of the reference counts: a block shared by three requests counts three times."""
        return self._num_references

    @property
    def num_cached(self) -> int:
        """Blocks registered in the prefix cache, referenced or not."""
        return len(self._block_of_hash)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def reference_count(self, block_id: int) -> int:
        """How many requests hold this block."""
        return self._reference_counts[block_id]

    def num_free_among(self, block_ids: Sequence[int]) -> int:
        """How many of these distinct blocks no request holds, so that acquiring them lowers `num_free`."""
        counts = self._reference_counts
        return sum(not counts[block_id] for block_id in block_ids)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take `num_blocks` free blocks, each with one reference; None, with nothing taken, when there are fewer."""
        free = self._free
        if num_blocks > len(free):
            return None
        block_ids = []
        for _ in range(num_blocks):
            block_id, _none = free.popitem(last=False)
            evicted = self._hash_of_block.pop(block_id, None)
            if evicted is not None:
                del self._block_of_hash[evicted]
            self._reference_counts[block_id] = 1
            block_ids.append(block_id)
        self._num_references += num_blocks
        return block_ids

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Add one reference to each block of a prefix hit."""
        counts = self._reference_counts
        for block_id in block_ids:
            if not counts[block_id]:
                del self._free[block_id]
            counts[block_id] += 1
        self._num_references += len(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one reference to each of a request's blocks, listed in order of position.

        The last block is freed first, so that a prefix loses its tail before its head.
        """
        counts, free = self._reference_counts, self._free
        for block_id in reversed(block_ids):
            assert counts[block_id] > 0, f"block {block_id} released more often than it was taken"
            counts[block_id] -= 1
            if not counts[block_id]:
                free[block_id] = None
                if block_id not in self._hash_of_block:
                    free.move_to_end(block_id, last=False)
        self._num_references -= len(block_ids)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Offer a full block to later requests under its hash; of two blocks with one hash the first stays.

        Its content must be written by steps already made, or by the one being made: steps run in order.
        """
        if not self.enable_prefix_caching or block_hash in self._block_of_hash:
            return
        assert self._reference_counts[block_id], f"block {block_id} registered while no request holds it"
        assert block_id not in self._hash_of_block, f"block {block_id} registered under a second hash"
        self._block_of_hash[block_hash] = block_id
        self._hash_of_block[block_id] = block_hash

    def lookup(self, block_hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of a hash chain."""
        block_ids = []
        for block_hash in block_hashes:
            block_id = self._block_of_hash.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix; False, with nothing changed, while a request holds a block.

        A request under way would go on to register blocks that continue a forgotten prefix.
        """
        if self.num_referenced:
            return False
        self._hash_of_block.clear()
        self._block_of_hash.clear()
        return True


class DeferredReleases:
    """Releases the blocks of requests that left, each once the last step that may write to them is collected."""

    def __init__(self, block_pool: BlockPool) -> None:
        self._pool = block_pool
        self._last_collected_step_id = -1
        self._waiting: dict[int, list[list[int]]] = {}  # by the step they wait for

    @property
    def num_references(self) -> int:
        """References still to be given up."""
        return sum(len(block_ids) for entry in self._waiting.values() for block_ids in entry)

    def release(self, block_ids: list[int], last_step_id: int) -> None:
        """Release a request's blocks now, or when its last step is collected if that is still in flight."""
        if last_step_id <= self._last_collected_step_id:
            self._pool.release(block_ids)
        else:
            self._waiting.setdefault(last_step_id, []).append(block_ids)

    def collect(self, step_id: int) -> None:
        """A step was collected, and so was every step before it."""
        self._last_collected_step_id = step_id
        for block_ids in self._waiting.pop(step_id, ()):
            self._pool.release(block_ids)

    def num_blocks_held_by_others(self) -> int:
        """Distinct blocks that some request holds which has not left."""
        references: dict[int, int] = {}
        for entry in self._waiting.values():
            for block_ids in entry:
                for block_id in block_ids:
                    references[block_id] = references.get(block_id, 0) + 1
        pool = self._pool
        return pool.num_referenced - sum(pool.reference_count(block) == num for block, num in references.items())


def extend_hash_chain(
    block_hashes: list[bytes], token_ids: Sequence[int], block_size: int, root: bytes = b""
) -> list[bytes]:
    """Append to `block_hashes` the hashes of the full blocks in `token_ids`, and return it.

    Equal in every process and on every machine: blake2b over the parent's hash and the block's token ids.

    Args:
        block_hashes: the chain so far; extended in place.
        token_ids: the tokens that follow the blocks already hashed; a last partial block is left out.
        root: what else the keys and values depend on (adapter, salt); chains of different roots share nothing.
    """
    parent = block_hashes[-1] if block_hashes else blake2b(root, digest_size=HASH_BYTES, person=b"octavo root").digest()
    pack = struct.Struct(f"<{block_size}q").pack
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        tokens = pack(*token_ids[start : start + block_size])
        parent = blake2b(parent + tokens, digest_size=HASH_BYTES, person=b"octavo block").digest()
        block_hashes.append(parent)
    return block_hashes
