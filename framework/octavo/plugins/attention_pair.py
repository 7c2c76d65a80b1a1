"""Prefill and decode attention, chosen apart and yet together: the two share one KV cache, so one KV layout."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from octavo.errors import UnavailableComponentError
from octavo.plugins.registry import Candidate, Choice, Registry
from octavo.plugins.specs import AttentionNeed, AttentionSpec

if TYPE_CHECKING:
    from octavo.config import ComponentConfig

PHASES = ("prefill", "decode")


def choose_attention(
    registry: Registry, need: AttentionNeed, wishes: tuple[ComponentConfig, ComponentConfig]
) -> tuple[Choice, Choice]:
    """The backends for (prefill, decode), each with every candidate and its reasons.

    Of all pairs that share a layout, `auto` takes the one with the highest sum of priorities; one backend for both
    before two of the same rank, then by name. A name is kept to: then only the other side is chosen.
    """
    needs = tuple(replace(need, features=need.features | {phase}) for phase in PHASES)
    choices = tuple(
        registry.choose("attention", each, wish.name, {} if wish.name == "auto" else wish.options)
        for each, wish in zip(needs, wishes, strict=True)
    )
    if any(choice.error for choice in choices):
        return choices[0], choices[1]
    able = [
        [one for one in choice.candidates if (one.chosen if wish.name != "auto" else not one.reasons)]
        for choice, wish in zip(choices, wishes, strict=True)
    ]
    pairs = [(prefill, decode) for prefill in able[0] for decode in able[1] if _share_layout(prefill, decode)]
    if not pairs:
        return _refused(choices[0], able), _refused(choices[1], able)
    pair = min(pairs, key=_rank)
    final = [
        registry.choose("attention", each, one.full_name, wish.options)
        for each, one, wish in zip(needs, pair, wishes, strict=True)
    ]
    return _with_layout_reasons(final[0], pair[1], "decode"), _with_layout_reasons(final[1], pair[0], "prefill")


def _rank(pair: tuple[Candidate, Candidate]) -> tuple[int, bool, str, str]:
    prefill, decode = pair
    priority = _priority(prefill, "prefill") + _priority(decode, "decode")
    return -priority, prefill.full_name != decode.full_name, prefill.full_name, decode.full_name


def _priority(candidate: Candidate, phase: str) -> int:
    assert isinstance(candidate.spec, AttentionSpec)
    return candidate.spec.priority_for(phase)


def _layout(candidate: Candidate) -> str:
    """The name of its layout; of its own, when it publishes none."""
    assert isinstance(candidate.spec, AttentionSpec)
    return candidate.spec.kv_layout or candidate.full_name


def _share_layout(one: Candidate, other: Candidate) -> bool:
    return one.full_name == other.full_name or _layout(one) == _layout(other)


def _refused(choice: Choice, able: list[list[Candidate]]) -> Choice:
    sides = (
        f"for {phase} {' or '.join(f'{one.full_name} ({_layout(one)})' for one in side)}"
        for phase, side in zip(PHASES, able, strict=True)
    )
    error = UnavailableComponentError(
        "Prefill and decode attention read one KV cache, but no two of these share a KV layout: "
        f"{'; '.join(sides)}. Choose two of one layout, or one backend for both."
    )
    candidates = tuple(replace(one, chosen=False) for one in choice.candidates)
    return Choice(kind=choice.kind, candidates=candidates, error=error)


def _with_layout_reasons(choice: Choice, partner: Candidate, phase: str) -> Choice:
    """Say of candidates that could serve but for the other side's layout that this is why they were not taken."""
    candidates = tuple(
        one
        if one.chosen or one.reasons or _share_layout(one, partner)
        else replace(
            one,
            reasons=(
                f"its KV layout is {_layout(one)!r}; {partner.full_name}, chosen for {phase}, has {_layout(partner)!r}",
            ),
        )
        for one in choice.candidates
    )
    return replace(choice, candidates=candidates)
