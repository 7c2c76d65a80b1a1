"""A request's dealings with the prefix cache: its hash chain, the blocks it finds there and those it offers."""

from __future__ import annotations

import struct
from hashlib import blake2b

from octavo.engine.block_pool import HASH_BYTES, BlockPool, extend_hash_chain
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
    if not pool.enable_prefix_caching:
        return
    adapter = request.adapter
    if adapter is not None and (info := adapter.info) is not None and request.hashed_adapter != info.content_hash:
        request.block_hashes.clear()  # read again while the request waited, the files may be others
        request.hashed_adapter = info.content_hash
    if request.num_tokens >= (len(request.block_hashes) + 1) * pool.block_size:
        token_ids = request.token_ids_from(len(request.block_hashes) * pool.block_size)
        if request.hashed_adapter is None or request.block_hashes:
            extend_hash_chain(request.block_hashes, token_ids, pool.block_size, request.cache_salt)
        else:
            chain = [_adapter_root(request.cache_salt, request.hashed_adapter)]
            request.block_hashes += extend_hash_chain(chain, token_ids, pool.block_size)[1:]


def _adapter_root(cache_salt: bytes, content_hash: str) -> bytes:
    """What an adapter's chains begin with, in place of a salt's: the length of the salt says where it ends, and the
    digest's personalisation that there is an adapter. Equal in every process."""
    content = content_hash.encode()
    parts = struct.pack("<QQ", len(cache_salt), len(content)) + cache_salt + content
    return blake2b(parts, digest_size=HASH_BYTES, person=b"octavo adapter").digest()
