"""Explanation: what was chosen for every socket, what was refused and why, and where each setting is from.

Made from the very Selection an engine is built from, before any weight is read.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from octavo.errors import OctavoError
from octavo.interfaces.manifest import ChosenComponent
from octavo.plan.sizes import Sizer
from octavo.plugins.registry import Candidate, Choice, Choices
from octavo.plugins.specs import SPEC_KINDS, AttentionSpec
from octavo.selection import Selection, select
from octavo.settings import AUTO, DEFAULT, Settings, Source, as_settings

SOCKETS = (
    *("checkpoint", "model", "quantization", "quantization.plain", "linear_kernel"),
    *("attention.prefill", "attention.decode", "kernels"),
    *("scheduler", "executor", "proposer", "logits_rules", "lora", "adapter_resolvers"),
)
"""In the order they are shown; the proposer only when one was asked for, plain linears only where others do them,
what serves adapters only where it is enabled."""


_WIDEST = 40

NOTHING = Choice(kind="proposer", candidates=())
"""What came of a socket that nothing was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedCandidate:
    """One component that was asked. `reasons` are sentences; none and not chosen: another was preferred.

    `priority` is where `auto` ranks it for this socket, for decode and for prefill apart.
    """

    name: str
    summary: str
    plugin: str
    distribution: str
    version: str
    priority: int
    chosen: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedSocket:
    """One socket: every candidate, and the error that starting an engine would raise, if any."""

    name: str
    asked_name: str
    candidates: tuple[ExplainedCandidate, ...]
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedLinears:
    """Quantized linears of one kind, and what multiplies them.

    Attributes:
        names: their checkpoint names, layers' numbers written as "*", those of one product with "+" between.
        weight: what kernels were told of it.
        kernel: the name of the one that serves; None: none does.
        refused: name -> reasons of the kernels that were asked before and cannot serve.
    """

    names: str
    count: int
    weight: str
    kernel: str | None
    refused: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class EffectiveSetting:
    """A value as the engine uses it; `value` is plain data."""

    name: str
    value: object
    source: Source


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """`str()` is the table that `octavo explain` prints.

    Attributes:
        sockets: in the order of SOCKETS.
        linears: which linear kernel serves which quantized linears; empty where the model has none.
        failed_plugins: name -> state, reason and place, of each plugin that is not loaded.
    """

    model: str
    model_path: str
    architecture: str
    sockets: tuple[ExplainedSocket, ...]
    linears: tuple[ExplainedLinears, ...]
    settings: tuple[EffectiveSetting, ...]
    failed_plugins: Mapping[str, str]

    @property
    def can_run(self) -> bool:
        """Whether every socket has a component."""
        return not any(socket.error for socket in self.sockets) and all(one.kernel for one in self.linears)

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        plain = asdict(self)
        plain["settings"] = [
            {"name": one.name, "value": one.value, "source": one.source.kind, "from": one.source.detail}
            for one in self.settings
        ]
        return plain

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(
    model: str | None = None, *, config: str | os.PathLike[str] | Settings | None = None, **settings: Any
) -> Explanation:
    """What LLM with these arguments would choose, and why; nothing is loaded.

    Raises:
        ConfigError: a setting is wrong. That a component cannot serve is in the explanation.
        ModelNotFoundError, CheckpointError: the model is not there or not readable.
    """
    read = as_settings(model, config, settings)
    return explain_selection(select(read.config, weights=False), read)


def explain_selection(selection: Selection, settings: Settings) -> Explanation:
    """A selection as an explanation."""
    linears = tuple(_linears(selection))
    return Explanation(
        model=selection.config.model,
        model_path=str(selection.files.path),
        architecture=selection.files.model_config.architecture,
        sockets=tuple(_sockets(selection, {one.kernel for one in linears})),
        linears=linears,
        settings=tuple(_effective(selection, settings)),
        failed_plugins={plugin.name: plugin.fault for plugin in selection.registry.failed_plugins},
    )


def _sockets(selection: Selection, serving_kernels: Set[str | None]) -> Iterator[ExplainedSocket]:
    choices: dict[str, Choice | Choices] = {**selection.choices, "logits_rules": selection.logits_rules}
    if selection.config.enable_lora:
        choices["adapter_resolvers"] = selection.adapter_resolvers
    if (kernels := selection.linear_kernels).candidates:  # all that can serve were taken; chosen are those that do
        serving = (replace(one, chosen=one.full_name in serving_kernels) for one in kernels.candidates)
        choices["linear_kernel"] = replace(kernels, candidates=tuple(serving))
    for name in SOCKETS:
        if (choice := choices.get(name)) is not None:
            error = choice.error or (_draft_model_error(selection) if name == "proposer" else None)
            yield ExplainedSocket(
                name=name,
                asked_name=_wishes(selection).get(name, "auto"),
                candidates=tuple(_candidate(one, name) for one in choice.candidates),
                error=None if error is None else str(error),
            )


def _linears(selection: Selection) -> Iterator[ExplainedLinears]:
    choices: list[Choice | Choices] = [*selection.choices.values(), selection.linear_kernels]
    if not selection.linear_kernels.components or any(choice.error for choice in choices):
        return
    same: Counter[tuple[str, str]] = Counter()
    asked: dict[tuple[str, str], Mapping[str, Sequence[str]]] = {}
    for part, reasons in Sizer(selection).linears():
        first, *others = part.prefixes
        names = "+".join([first, *(other.rpartition(".")[2] for other in others)])
        kind = re.sub(r"\.\d+(?=\.)", ".*", names), str(part.facts)
        asked[kind] = reasons
        same[kind] += 1
    for (names, weight), count in same.items():
        reasons = asked[names, weight]
        kernel = next((name for name, against in reasons.items() if not against), None)
        asked_before = list(reasons).index(kernel) if kernel else len(reasons)
        yield ExplainedLinears(
            names=names,
            count=count,
            weight=weight,
            kernel=kernel,
            refused={name: tuple(against) for name, against in islice(reasons.items(), asked_before)},
        )


def _draft_model_error(selection: Selection) -> OctavoError | None:
    """Why the proposer's own model cannot be built, if it has one and cannot."""
    draft_model = selection.draft_model
    if draft_model is None:
        return None
    return next((choice.error for choice in draft_model.choices.values() if choice.error), None)


def _wishes(selection: Selection) -> dict[str, str]:
    config = selection.config
    prefill, decode = config.attention.wishes
    return {
        "quantization": config.quantization.name,
        "linear_kernel": config.linear_kernel.name,
        "kernels": config.kernels.name,
        "attention.prefill": prefill.name,
        "attention.decode": decode.name,
        "scheduler": config.scheduler.name,
        "executor": config.executor.name,
        "proposer": config.proposer.name,
        "logits_rules": ", ".join(wish.name for wish in config.logits_rules) or "auto",
        "lora": config.lora.name,
        "adapter_resolvers": ", ".join(wish.name for wish in config.adapter_resolvers) or "auto",
    }


def _candidate(one: Candidate, socket: str) -> ExplainedCandidate:
    spec = one.spec
    priority = spec.priority_for(socket.partition(".")[2]) if isinstance(spec, AttentionSpec) else spec.priority
    return ExplainedCandidate(
        name=one.spec.name,
        summary=one.spec.summary,
        plugin=one.plugin.name,
        distribution=one.plugin.distribution,
        version=one.plugin.version,
        priority=priority,
        chosen=one.chosen,
        reasons=one.reasons,
    )


# ------------------------------------------------------------------------------------------- effective settings


def _effective(selection: Selection, settings: Settings) -> Iterator[EffectiveSetting]:
    """Every setting, "auto" replaced by what it came to; the components' own options after their component."""
    names = ("device", "dtype", "max_model_len", "max_steps_in_flight")
    found = {name: getattr(selection, name) for name in names} | {"max_cpu_loras": selection.config.num_cpu_loras}
    several = {"logits_rules": selection.logits_rules, "adapter_resolvers": selection.adapter_resolvers}
    components = _wishes(selection)
    for name in type(selection.config).model_fields:
        value: object = getattr(selection.config, name)
        source = settings.source(name)
        if name == "plugins":
            for key, inner in selection.config.plugins.model_dump().items():
                yield EffectiveSetting(name=f"{name}.{key}", value=inner, source=settings.source(f"{name}.{key}"))
        elif name in several:
            chosen = [component.full_name for component in several[name].components]
            yield EffectiveSetting(name=name, value=chosen, source=source if value or not chosen else AUTO)
        elif sockets := [socket for socket in components if socket.partition(".")[0] == name]:
            choices = [selection.choices.get(socket, NOTHING) for socket in sockets]
            if len(sockets) == 2 and choices[0].component == choices[1].component:
                sockets, choices = [name], choices[:1]
            for socket, choice in zip(sockets, choices, strict=True):
                yield from _component_settings(socket, choice, settings)
        elif value in (None, "auto"):
            yield EffectiveSetting(name=name, value=found.get(name, value), source=AUTO if name in found else source)
        else:
            yield EffectiveSetting(name=name, value=value, source=source)


def _component_settings(socket: str, choice: Choice, settings: Settings) -> Iterator[EffectiveSetting]:
    component: ChosenComponent | None = choice.component
    side_source, own_source = settings.source(f"{socket}.name"), settings.source(f"{socket.partition('.')[0]}.name")
    source = side_source if side_source is not DEFAULT else own_source
    yield EffectiveSetting(
        name=socket,
        value=None if component is None else component.full_name,
        source=AUTO if source is DEFAULT and choice is not NOTHING else source,
    )
    for option, value in (component.options if component is not None else {}).items():
        side_source = settings.source(f"{socket}.{option}")
        own_source = settings.source(f"{socket.partition('.')[0]}.{option}")
        yield EffectiveSetting(
            name=f"{socket}.{option}", value=value, source=side_source if side_source is not DEFAULT else own_source
        )


# -------------------------------------------------------------------------------------------------------- text


def _noun(socket: str) -> str:
    kind = socket.partition(".")[0]
    return SPEC_KINDS[kind if kind in SPEC_KINDS else kind.removesuffix("s")].noun


def _lines(explanation: Explanation) -> Iterator[str]:
    yield f"{explanation.model}: {explanation.architecture}, {explanation.model_path}"
    name_width = max(len(_label(one)) for socket in explanation.sockets for one in socket.candidates)
    origin_width = max(len(_origin(one)) for socket in explanation.sockets for one in socket.candidates)
    for socket in explanation.sockets:
        asked = "" if socket.asked_name == "auto" else f", {socket.asked_name!r} was asked for"
        yield f"\n{_noun(socket.name)} ({socket.name}){asked}"
        for one in socket.candidates:
            mark = "*" if one.chosen else " "
            yield f"  {mark} {_label(one):<{name_width}}  {_origin(one):<{origin_width}}  {_verdict(one, socket)}"
        if not socket.candidates:
            yield "    none installed"
        if socket.error:
            yield f"  ! {socket.error}"
    if explanation.linears:
        yield "\nquantized linears"
        yield from _linear_lines(explanation.linears)
    if explanation.failed_plugins:
        yield "\nplugins that are not loaded"
        yield from (f"  {name}: {fault}" for name, fault in explanation.failed_plugins.items())
    yield "\nsettings"
    rows = [(one.name, _shown(one.value), str(one.source)) for one in explanation.settings]
    # A long list takes the room it needs, without pushing every other row's source away.
    widths = [max(len(row[column]) for row in rows if len(row[column]) <= _WIDEST) for column in (0, 1)]
    yield from (f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {source}" for name, value, source in rows)


def _linear_lines(linears: Sequence[ExplainedLinears]) -> Iterator[str]:
    rows = [
        (
            f"{one.count} x {one.names}",
            one.weight,
            one.kernel or "no kernel serves",
            "; ".join(f"not {other}: {', '.join(reasons)}" for other, reasons in one.refused.items()),
        )
        for one in linears
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for names, weight, kernel, refused in rows:
        yield f"  {names:<{widths[0]}}  {weight:<{widths[1]}}  {kernel:<{widths[2]}}  {refused}".rstrip()


def _verdict(one: ExplainedCandidate, socket: ExplainedSocket) -> str:
    if one.chosen or one.reasons:
        return f"chosen: {one.summary}" if one.chosen else "; ".join(one.reasons)
    if socket.name == "linear_kernel":
        return "could serve; no quantized linear of this model is left for it"
    chosen = [other.priority for other in socket.candidates if other.chosen]
    if socket.asked_name != "auto" or len(chosen) != 1:
        return "could serve"
    return f"could serve; its priority is {one.priority}, the chosen one's {chosen[0]}"


def _label(one: ExplainedCandidate) -> str:
    return f"{one.plugin}/{one.name}"


def _origin(one: ExplainedCandidate) -> str:
    return f"{one.distribution} {one.version}"


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={one}" for key, one in value.items()) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
