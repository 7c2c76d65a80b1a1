"""What AttentionSuite asks of a backend: lengths, sizes and needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from octavo.interfaces.attention import AttentionBackend
from octavo.plugins.registry import Candidate
from octavo.plugins.specs import AttentionNeed
from octavo.testing.suite import installed_components

Lengths = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What is tried of everything: more of it for a backend that is fast, fewer for one that an interpreter runs.

    Attributes:
        decodes, prefills, chunks: (tokens already in the cache, tokens of this step) of each request, around the
            borders of blocks.
        longest_context: what longer ones are cut to.
        heads: (query heads, key/value heads).
        head_sizes, block_sizes: of a backend whose spec says that it takes any.
        num_steps: that follow each other where requests go on.
    """

    decodes: Lengths
    prefills: Lengths
    chunks: Lengths
    longest_context: int
    heads: tuple[tuple[int, int], ...]
    head_sizes: tuple[int, ...]
    block_sizes: tuple[int, ...]
    windows: tuple[int, ...]
    caps: tuple[float, ...]
    num_steps: int

    @property
    def everything(self) -> Lengths:
        return self.decodes + self.chunks + self.prefills


MANY = Shapes(
    decodes=((1, 1), (3, 1), (15, 1), (16, 1), (17, 1), (31, 1), (32, 1), (33, 1), (100, 1), (190, 1)),
    prefills=((0, 1), (0, 2), (0, 15), (0, 16), (0, 17), (0, 33), (0, 64)),
    chunks=((1, 2), (5, 3), (15, 2), (16, 16), (31, 33), (100, 7)),
    longest_context=500,
    heads=((6, 2), (4, 4), (4, 1), (8, 2)),  # groups of 3, 1, 4 and 4
    head_sizes=(64, 72, 128),  # 72: no power of two, and 72 ** -0.5 is no round number
    block_sizes=(16, 32, 8),
    windows=(1, 16, 17, 30),
    caps=(1.5, 20.0),
    num_steps=5,
)
FEW = Shapes(
    decodes=((1, 1), (16, 1), (33, 1)),
    prefills=((0, 1), (0, 17)),
    chunks=((5, 3), (15, 6)),
    longest_context=36,
    heads=((4, 2), (3, 1)),
    head_sizes=(64, 72),
    block_sizes=(16, 32),
    windows=(1, 17),
    caps=(1.5,),
    num_steps=3,
)

MORE_TOKENS = 20  # that each request has behind those, for the steps after

PHASES = frozenset({"prefill", "decode"})
DTYPES = ("float32", "bfloat16", "float16")


def phase_of(num_context_tokens: int, num_tokens: int) -> str:
    """What a request is in a step."""
    return "decode" if num_context_tokens and num_tokens == 1 else "prefill"


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
