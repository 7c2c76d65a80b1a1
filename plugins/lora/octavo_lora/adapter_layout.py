"""AdapterLayout: which tensor of an adapter's file is what to which module, checked against the base by sizes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from octavo.errors import AdapterError
from octavo.interfaces import LoraBase, LoraLimits, LoraModule
from octavo_lora.peft_config import PeftAdapter, listing

Role = Literal["a", "b", "magnitude", "lora_bias", "bias", "weight"]
"""`bias` is the module's own, trained; `lora_bias` that of B."""

_PREFIX = "base_model.model."
_OF_EMBEDDING: Mapping[str, Role] = {".lora_embedding_A": "a", ".lora_embedding_B": "b"}
_OF_LINEAR: Mapping[str, Role] = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_B.bias": "lora_bias"}
# The longer first: every one of them ends in ".weight" or ".bias", or in nothing of the kind.
_ROLES: Mapping[str, Role] = {
    **_OF_EMBEDDING,
    **_OF_LINEAR,
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.weight": "weight",
    ".base_layer.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}
_OF_TRAINING = ".lora_velora_embed"
_OF_LORA: tuple[Role, ...] = ("a", "b", "magnitude", "lora_bias")
_MOST_FAULTS = 50


class AdapterLayout:
    """Raises all faults together.

    Args:
        shapes: of the tensors of the file.

    Raises:
        AdapterError: no module of the base is targeted, or tensors fit not the base, the configuration or the limits.

    Attributes:
        warnings: on what one of file, configuration and base has and another has not.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], adapter: PeftAdapter, base: LoraBase, limits: LoraLimits
    ) -> None:
        self.adapter = adapter
        self._base = base
        self._limits = limits
        self._shapes = shapes
        self._keys: dict[str, dict[Role, str]] = {}
        if not adapter.targets and not adapter.saved:
            raise self._nothing_matched("none of them is among")
        faults = [fault for key in shapes for fault in self._sort(key)]
        self.warnings = self._compare_with_targets()
        if not faults and not self._keys:
            raise self._nothing_matched("its file has no weights for any of")
        for name, keys in self._keys.items():
            faults.extend(self._faults(base.modules[name], keys))
        faults.extend(self._faults_of_saved())
        if faults:
            told = faults[:_MOST_FAULTS]
            if len(faults) > _MOST_FAULTS:
                told.append(f"and {len(faults) - _MOST_FAULTS} more")
            raise AdapterError(f"The adapter cannot be served on {' or '.join(base.names)}: {'; '.join(told)}.")

    @property
    def changed(self) -> Sequence[str]:
        """Modules that the file has tensors for, in the order of the base."""
        return [name for name in self._base.modules if name in self._keys]

    def has(self, module: str, role: Role) -> bool:
        return role in self._keys.get(module, {})

    def key(self, module: str, role: Role) -> str:
        """The name that a tensor has in the file."""
        return self._keys[module][role]

    def used_keys(self) -> set[str]:
        return {key for keys in self._keys.values() for key in keys.values()}

    def perhaps_unchanged(self, module: str) -> bool:
        """Whether its whole weight is in the file, but maybe the base's: peft saves it along with matrices for it."""
        return self.has(module, "weight") and module not in self.adapter.saved

    def _sort(self, key: str) -> list[str]:
        """Put a tensor where it belongs, or say why it belongs nowhere."""
        shape = list(self._shapes[key])
        if key.endswith(_OF_TRAINING):
            return []
        suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(_PREFIX):
            return [f"{key} is {shape}, and peft saves no tensor of such a name for LoRA"]
        name, role = key.removeprefix(_PREFIX).removesuffix(suffix), _ROLES[suffix]
        module = self._base.modules.get(name)
        if module is None:
            return [f"{key} is {shape}, and the base has no module {name!r} that adapters can change"]
        if (suffix in _OF_EMBEDDING and module.kind != "embedding") or (
            suffix in _OF_LINEAR and module.kind == "embedding"
        ):
            return [f"{key} is {shape}, and {name} of the base is {_KINDS[module.kind]}"]
        if role in self._keys.setdefault(name, {}):
            return [f"{key} is {shape}, and {self._keys[name][role]} is the same of {name} again"]
        self._keys[name][role] = key
        return []

    def _compare_with_targets(self) -> list[str]:
        """Pass over matrices that the configuration does not target, as peft does; say what else is not there."""
        adapter = self.adapter
        targets = set(adapter.targets)
        if adapter.ensure_weight_tying and any(self._base.modules[t].kind == "embedding" for t in targets):
            targets |= {module.name for module in self._base.modules.values() if module.kind == "head"}
        untargeted = [name for name in self.changed if name not in targets and self.has(name, "a")]
        for name in untargeted:
            rest = {role: key for role, key in self._keys.pop(name).items() if role not in _OF_LORA}
            if rest:
                self._keys[name] = rest
        without = [name for name in adapter.targets if not self.has(name, "a")]
        warnings = [
            ("It targets modules that its file has no weights for", without),
            ("It targets names that no module of the base has", adapter.idle_targets()),
            ("Its file has weights for modules that it does not target, passed over as in peft", untargeted),
        ]
        return [f"{text}: {listing(names)}." for text, names in warnings if names]

    def _faults(self, module: LoraModule, keys: Mapping[Role, str]) -> list[str]:
        faults = self._faults_of_roles(module, keys)
        rank, most = self.adapter.rank(module.name), self._limits.max_lora_rank
        if "a" in keys and rank > most:
            faults.append(
                f"{module.name} has rank {rank}, and max_lora_rank is {most}: start with --max-lora-rank {rank} or more"
            )
        for role, key in keys.items():
            wanted, found = _wanted_shape(module, role, rank), self._shapes[key]
            if found != wanted:
                faults.append(f"{key} is {list(found)}, and base and configuration want {list(wanted)}")
                faults[-1] += _vocabularies(module, role, found, wanted)
        return faults

    def _faults_of_roles(self, module: LoraModule, keys: Mapping[Role, str]) -> list[str]:
        faults = []
        if any(role in keys for role in _OF_LORA):
            wanted = {
                "a": True,
                "b": True,
                "magnitude": self.adapter.use_dora,
                "lora_bias": self.adapter.lora_bias,
            }
            faults = [
                f"{module.name} has {'no' if want else 'a'} {_SPOKEN[role]}, and the configuration wants "
                f"{'one' if want else 'none'}"
                for role, want in wanted.items()
                if (role in keys) is not want
            ]
        if "bias" in keys and not module.has_bias:
            faults.append(f"{keys['bias']} is there, and {module.name} of the base has no bias")
        if "weight" in keys and module.kind == "linear":
            faults.append(f"{keys['weight']} is a linear's whole weight: only an embedding's or head's can be served")
        return faults

    def _faults_of_saved(self) -> list[str]:
        faults = []
        for name in self.adapter.saved:
            if not self.has(name, "weight"):
                faults.append(f"modules_to_save names {name}, and the file has no weight of it")
            elif self._base.modules[name].kind != "linear" and not self._limits.modules_to_save:
                faults.append(whole_module_refused(name))
        return faults

    def _nothing_matched(self, how: str) -> AdapterError:
        ends = sorted({name.rpartition(".")[2] for name in self._base.modules})
        example = next(iter(self._base.modules), "none")
        return AdapterError(
            "The adapter changes no module of this base: its configuration targets "
            f"{self.adapter.targets_said}, and {how} the base's modules, "
            f"which end in {', '.join(ends)} (the first is {example!r}). "
            "Serve it with the base that it was trained on."
        )


def whole_module_refused(name: str) -> str:
    return (
        f"it brings a whole {name} of its own, which takes memory at every position: such are served with the setting "
        "lora_modules_to_save"
    )


_KINDS = {"linear": "a linear", "head": "a linear (the head)", "embedding": "an embedding"}
_SPOKEN: Mapping[str, str] = {
    "a": "lora_A",
    "b": "lora_B",
    "magnitude": "lora_magnitude_vector",
    "lora_bias": "bias of lora_B",
}
_VOCABULARY_AXIS = {("embedding", "a"): 1, ("embedding", "weight"): 0} | {
    ("head", role): 0 for role in ("b", "weight", "magnitude", "lora_bias", "bias")
}


def _wanted_shape(module: LoraModule, role: Role, rank: int) -> tuple[int, ...]:
    ins, outs = module.in_features, module.out_features
    if role == "a":
        return rank, ins
    if role == "b":
        return outs, rank
    if role == "weight":
        return (ins, outs) if module.kind == "embedding" else (outs, ins)
    return (outs,)


def _vocabularies(module: LoraModule, role: Role, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What a wrong size means where it is the vocabulary's."""
    axis = _VOCABULARY_AXIS.get((module.kind, role))
    if axis is None or len(found) != len(wanted) or found[axis] == wanted[axis]:
        return ""
    return f" (the adapter's vocabulary has {found[axis]} tokens, the base's {wanted[axis]})"
