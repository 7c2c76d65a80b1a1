"""A request's dealings with the prefix cache: its hash chain, the blocks it finds there and those it offers."""

from __future__ import annotations

from octavo.engine.block_pool import BlockPool, extend_hash_chain
from octavo.request import Request


def find_prefix(pool: BlockPool, request: Request) -> list[int]:
    """The cached blocks a request's tokens begin with, but never of its last token: that one must be computed.

    Nor of a prompt whose logprobs are asked for: those must be computed too.
    """
    if request.params.prompt_logprobs is not None:
        return []
    _extend_hashes(pool, request)
    return pool.lookup(request.block_hashes[: (request.num_tokens - 1) // pool.block_size])


def register_full_blocks(pool: BlockPool, request: Request) -> None:
    """Offer the blocks that steps made so far fill with known tokens; a placeholder's block waits for its token."""
    num_full = min(request.num_scheduled_tokens, request.num_tokens) // pool.block_size
    if num_full > request.num_registered_blocks:
        if pool.enable_prefix_caching:
            _extend_hashes(pool, request)
            for index in range(request.num_registered_blocks, num_full):
                pool.register(request.block_ids[index], request.block_hashes[index])
        request.num_registered_blocks = num_full


def _extend_hashes(pool: BlockPool, request: Request) -> None:
    if pool.enable_prefix_caching and request.num_tokens >= (len(request.block_hashes) + 1) * pool.block_size:
        token_ids = request.token_ids_from(len(request.block_hashes) * pool.block_size)
        extend_hash_chain(request.block_hashes, token_ids, pool.block_size, request.cache_salt)
