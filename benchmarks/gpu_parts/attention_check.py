"""Attention kernels against attention in float64, on random data: dtypes, head sizes, groups, windows, fp8, lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_parts.part import Part
from gpu_parts.scene import Lengths, Scene, make_backend, make_scene, make_state, rotary_of
from octavo.interfaces.attention import AttentionBackend, AttentionParameters
from octavo.plugins.specs import AttentionNeed

# Largest error of an output whose values are drawn from a normal distribution; those of octavo.testing's suite. An
# fp8 cache is compared with the formula over what it holds, but may round the other way where a quotient is a tie.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3, "fp8 cache": 1e-1}

DECODES: Lengths = [(n, 1) for n in (1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 1000, 4095, 8191)]
MANY_DECODES: Lengths = [(1 + 61 * n % 2000, 1) for n in range(64)]
PREFILLS: Lengths = [(0, n) for n in (1, 2, 15, 16, 17, 64, 127, 128, 129, 1000)]
CHUNKS: Lengths = [(1, 2), (15, 2), (16, 16), (100, 7), (1000, 512), (4096, 129)]
MIXED: Lengths = [*DECODES[::3], *CHUNKS[::2], *PREFILLS[::3]]
SHORT: Lengths = [(3, 1), (16, 1), (300, 1), (0, 17), (130, 40)]

TINY: Lengths = [(5, 1), (17, 1), (0, 5), (16, 3)]

PLAIN: dict[str, Any] = {"dtype": "bfloat16", "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 16}
TINY_PLAIN: dict[str, Any] = {**PLAIN, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One scene; what differs from PLAIN is its name."""

    what: str
    lengths: Lengths
    changes: dict[str, Any]
    num_padding: int = 0
    rotates: bool = False

    def need(self, plain: dict[str, Any], device: str) -> AttentionNeed:
        fields = {**plain, **self.changes}
        features = {"prefill", "decode"}
        features |= {name for name in ("sliding_window", "logit_softcap") if fields.get(name) is not None}
        features |= {"fp8_kv_cache"} if fields.get("kv_cache_dtype") == "fp8" else set()
        return AttentionNeed(device=device, features=frozenset(features), **fields)


def cases(part: Part) -> Iterator[Case]:
    """Those that serve Llama-3-8B first; each line after them compiles kernels of its own."""
    if part.tiny:
        yield Case(what="mixed, padding, rotation", lengths=TINY, changes={}, num_padding=1, rotates=True)
        yield Case(what="mixed, float32", lengths=TINY, changes={"dtype": "float32"})
        yield Case(what="fp8 cache", lengths=TINY[1::2], changes={"kv_cache_dtype": "fp8"})
        return
    yield Case(what="decodes", lengths=DECODES, changes={})
    yield Case(what="64 decodes, padding", lengths=MANY_DECODES, changes={}, num_padding=3)
    yield Case(what="prefills", lengths=PREFILLS, changes={})
    yield Case(what="chunks", lengths=CHUNKS, changes={})
    yield Case(what="mixed, padding", lengths=MIXED, changes={}, num_padding=3)
    yield Case(what="mixed, rotation", lengths=MIXED, changes={}, rotates=True)
    yield Case(what="fp8 cache, mixed", lengths=MIXED, changes={"kv_cache_dtype": "fp8"}, rotates=True)
    yield Case(what="float32, mixed", lengths=MIXED, changes={"dtype": "float32", "head_dim": 64}, rotates=True)
    if part.quick:
        return
    more: tuple[dict[str, Any], ...] = (
        {"dtype": "float16"},
        {"num_heads": 28, "num_kv_heads": 4},
        {"num_heads": 8, "num_kv_heads": 8, "head_dim": 64},
        {"num_heads": 8, "num_kv_heads": 1, "head_dim": 256},
        {"block_size": 32},
        {"block_size": 64},
        {"sliding_window": 128},
        {"logit_softcap": 30.0},
        {"num_heads": 8, "num_kv_heads": 2, "head_dim": 80},
        {"num_heads": 8, "num_kv_heads": 2, "head_dim": 96},
        {"sliding_window": 100, "logit_softcap": 20.0, "num_heads": 8, "num_kv_heads": 4, "head_dim": 256},
        {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64},
        {"num_heads": 8, "num_kv_heads": 2, "head_dim": 72},
    )
    for changes in more:
        yield Case(
            what=", ".join(f"{k} {v}" for k, v in changes.items()), lengths=[*SHORT, (2049, 70)], changes=changes
        )


def run(part: Part, backend_name: str) -> None:
    """Every case for one backend, serving both prefill and decode."""
    plain = TINY_PLAIN if part.tiny else PLAIN
    for case in cases(part):
        part.attempt(
            f"{backend_name}: {case.what}",
            partial(_check, part, case, backend_name, plain),
            seconds=0 if part.tiny else 2,
        )


def _check(part: Part, case: Case, name: str, plain: dict[str, Any]) -> None:
    need = case.need(plain, part.device)
    backend = make_backend(name, need)
    scene = make_scene(backend, case.lengths, part.device, num_padding=case.num_padding)
    parameters = AttentionParameters(
        scale=need.head_dim**-0.5, sliding_window=need.sliding_window, logit_softcap=need.logit_softcap
    )
    rotary = rotary_of(scene.layout, need.head_dim, scene.query.dtype) if case.rotates else None
    wanted = scene.wanted(parameters, rotary)
    before = tuple(buffer.clone() for buffer in scene.cache)
    found = _step(backend, scene, parameters, rotary)
    fault = scene.fault_of_cache(before, keys_rotated=case.rotates)
    if not fault and not bool(found.isfinite().all()):
        fault = "the output is not finite everywhere"
    real = ~wanted.isnan().any(dim=1)
    error = float((found[real].double() - wanted[real]).abs().max())
    tolerance = TOLERANCES["fp8 cache" if need.kv_cache_dtype == "fp8" else str(need.dtype)]
    part.add(
        "correctness",
        kernel=name,
        case=case.what,
        dtype=need.dtype,
        error=error,
        tolerance=tolerance,
        ok=not fault and error <= tolerance,
        fault=fault,
    )


def _step(
    backend: AttentionBackend,
    scene: Scene,
    parameters: AttentionParameters,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    state = make_state(backend, scene.layout)
    backend.plan(scene.layout, state)
    tensors = scene.query, scene.key, scene.value
    if rotary is None:
        return backend.forward(*tensors, scene.cache, state, parameters)
    return backend.rotate_and_forward(*tensors, rotary, scene.cache, state, parameters)
