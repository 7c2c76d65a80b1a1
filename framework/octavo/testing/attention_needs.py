"""What AttentionSuite asks of a backend: lengths, sizes and needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from octavo.interfaces.attention import AttentionBackend
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import AttentionNeed
from octavo.testing.suite import installed_components

# (tokens already in the cache, tokens of this step) of each request, around the borders of blocks.
DECODES = ((1, 1), (3, 1), (15, 1), (16, 1), (17, 1), (31, 1), (32, 1), (33, 1), (100, 1), (190, 1))
PREFILLS = ((0, 1), (0, 2), (0, 15), (0, 16), (0, 17), (0, 33), (0, 64))
CHUNKS = ((1, 2), (5, 3), (15, 2), (16, 16), (31, 33), (100, 7))

MORE_TOKENS = 20  # that each request has behind those, for the steps after

PHASES = frozenset({"prefill", "decode"})
DTYPES = ("float32", "bfloat16", "float16")
HEAD_SIZES = (64, 72, 128)  # 72: no power of two, and 72 ** -0.5 is no round number
BLOCK_SIZES = (16, 32, 8)
WINDOWS = (1, 16, 17, 30)
CAPS = (1.5, 20.0)
LAYER_VALUES: dict[str, tuple[object, ...]] = {"sliding_window": WINDOWS[2:], "logit_softcap": CAPS}
HEADS = ((6, 2), (4, 4), (4, 1), (8, 2))  # (query heads, key/value heads): groups of 3, 1, 4 and 4


def build_partner(candidate: Candidate, need: AttentionNeed) -> AttentionBackend:
    """Another installed backend, with its default options."""
    backend: AttentionBackend = installed_components().component(candidate, {}).build(need)
    return backend


def variations(need: AttentionNeed, **choices: Sequence[object]) -> Iterator[AttentionNeed]:
    """The need with every combination of these fields; "heads" is (num_heads, num_kv_heads)."""
    for values in itertools.product(*choices.values()):
        fields: dict[str, Any] = dict(zip(choices, values, strict=True))
        if "heads" in fields:
            fields["num_heads"], fields["num_kv_heads"] = fields.pop("heads")
        yield replace(need, **fields)


def in_words(need: AttentionNeed) -> str:
    return (
        f"{need.num_heads} query heads over {need.num_kv_heads}, head size {need.head_dim}, "
        f"block size {need.block_size}, {need.dtype}"
    )
