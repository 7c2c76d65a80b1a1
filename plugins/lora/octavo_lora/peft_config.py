"""What an adapter's configuration says of a base: which modules it changes, with which rank and scaling.

peft's own class and matching decide; here every field of `LoraConfig` is either served, of training alone, or refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from octavo.errors import AdapterError
from octavo.interfaces import LoraBase

ALL_LINEAR = "all-linear"

_STRICT = ConfigDict(strict=True)
_RANK = Annotated[int, Field(ge=1)]
_ALPHA = Annotated[float, Field(allow_inf_nan=False)]
_NAMES: TypeAdapter[Any] = TypeAdapter(list[str] | str | None, config=_STRICT)
_FLAG: TypeAdapter[Any] = TypeAdapter(bool, config=_STRICT)

SERVED: Mapping[str, TypeAdapter[Any]] = {
    "r": TypeAdapter(_RANK, config=_STRICT),
    "lora_alpha": TypeAdapter(_ALPHA, config=_STRICT),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "bias": TypeAdapter(Literal["none", "all", "lora_only"], config=_STRICT),
    "lora_bias": _FLAG,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": TypeAdapter(list[int] | int | None, config=_STRICT),
    "layers_pattern": _NAMES,
    "rank_pattern": TypeAdapter(dict[str, _RANK] | None, config=_STRICT),
    "alpha_pattern": TypeAdapter(dict[str, _ALPHA] | None, config=_STRICT),
    "modules_to_save": TypeAdapter(list[str] | None, config=_STRICT),
    "ensure_weight_tying": _FLAG,
}
"""Fields that outputs depend on, with what they may be. The hash of an adapter's content is of these."""

NOT_OUTPUTS = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        # Of bases that keep a weight transposed, which BaseWeight never is.
        "fan_in_fan_out",
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)
"""Fields of training, of files and names, and of what is refused by another field."""

REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "an activated LoRA changes only the tokens after its invocation",
    "arrow_config": "Arrow routes each token to several adapters",
    "kasa_config": "KaSA changes the base's own weights and puts a diagonal between the two matrices",
    "layer_replication": "it repeats layers of the base",
    "megatron_config": "its layers are Megatron's",
    "monteclora_config": "its weights are drawn at random",
    "target_parameters": "it changes parameters that are no linear's or embedding's weight, as fused experts",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "use_bdlora": "its matrices are block-diagonal, stored by block",
    "use_qalora": "it pools its inputs by quantization group",
}
"""Fields that change outputs as nothing here computes, with the reason."""

_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_UNSET: tuple[object, ...] = (None, False, "", [], {})


class PeftAdapter:
    """An adapter_config.json, read with peft's class, and what it says of the modules of a base.

    Raises:
        AdapterError: it is no LoRA's, has values that are none, or asks for what cannot be served; all faults together.

    Attributes:
        config: peft's.
        warnings: on what was passed over.
        canonical: JSON of the fields that outputs depend on: equal for equal adapters.
    """

    def __init__(self, raw: Mapping[str, object], base: LoraBase) -> None:
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise AdapterError(
                f"Adapters of peft_type 'LORA' are served; this one's is {kind!r}. Give one trained with LoraConfig."
            )
        known = {field.name: field for field in dataclasses.fields(LoraConfig)}
        if faults := [*_refusals(raw, known), *_wrong_values(raw)]:
            raise AdapterError(f"This adapter's configuration cannot be served: {'; '.join(faults)}.")
        given = {name: raw[name] for name in SERVED if name in raw and name in known}
        try:
            self.config = LoraConfig(**given)  # type: ignore[arg-type]  # _wrong_values has seen to them
        except (ValueError, TypeError) as error:
            raise AdapterError(f"peft refuses this adapter's configuration: {error}") from error
        self.warnings = [*_passed_over(raw, known), *_other_base(raw.get("base_model_name_or_path"), base)]
        self.use_dora = bool(self.config.use_dora)
        self.lora_bias = bool(self.config.lora_bias)
        self.ensure_weight_tying = bool(getattr(self.config, "ensure_weight_tying", False))
        self._base = base
        self._targets_said = self.config.target_modules
        said = {name: getattr(self.config, name, None) for name in SERVED}
        plain = {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in said.items()
            if value is not None and value is not False  # as the fields are that an older peft has not
        }
        self.canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        if self.config.target_modules is None:
            self.config.target_modules = _peft_default_targets(base)  # type: ignore[assignment]  # peft makes sets of them
        elif isinstance(self._targets_said, str) and self._targets_said.lower() == ALL_LINEAR:
            self.config.target_modules = {m.name for m in base.modules.values() if m.kind == "linear"}  # type: ignore[assignment]

    @property
    def targets_said(self) -> str:
        """What the configuration targets, for a message."""
        targets = self._targets_said if self._targets_said is not None else self.config.target_modules
        return repr(targets) if isinstance(targets, str) else listing(sorted(targets or ()))

    @cached_property
    def targets(self) -> Sequence[str]:
        """Modules of the base that the configuration targets, in the base's order, by peft's matching."""
        try:
            return [name for name in self._base.modules if check_target_module_exists(self.config, name)]
        except re.error as error:
            raise AdapterError(
                f"This adapter's configuration has a pattern that is no regular expression: {error}. Correct "
                "target_modules, exclude_modules, layers_pattern or modules_to_save in its adapter_config.json."
            ) from error

    @cached_property
    def saved(self) -> Sequence[str]:
        """Modules of the base that the adapter brings whole, by peft's matching."""
        ends = self.config.modules_to_save or ()
        return [name for name in self._base.modules if any(name.endswith(end) for end in ends)]

    def idle_targets(self) -> list[str]:
        """Entries of target_modules that no module of the base has."""
        if self._targets_said is None or isinstance(self._targets_said, str):
            return []
        names = self._base.modules
        return sorted(
            entry for entry in self._targets_said if not any(n == entry or n.endswith(f".{entry}") for n in names)
        )

    def rank(self, module: str) -> int:
        return int(self._of_pattern("rank_pattern", module, self.config.r))

    def scaling(self, module: str) -> float:
        """What B A is multiplied with: alpha / rank, or alpha / sqrt(rank) of rsLoRA (arXiv:2312.03732)."""
        rank = self.rank(module)
        alpha = self._of_pattern("alpha_pattern", module, self.config.lora_alpha)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def _of_pattern(self, field: str, module: str, otherwise: float) -> float:
        patterns: Mapping[str, float] = getattr(self.config, field) or {}
        try:
            return patterns.get(get_pattern_key(list(patterns), module), otherwise)
        except re.error as error:
            raise AdapterError(
                f"A key of this adapter's {field} is no regular expression: {error}. Correct its adapter_config.json."
            ) from error


def listing(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _refusals(raw: Mapping[str, object], known: Mapping[str, object]) -> list[str]:
    faults = [f"{name} is set: {reason}" for name, reason in REFUSED.items() if raw.get(name) not in _UNSET]
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        faults.append(
            f"init_lora_weights={init!r} subtracted its start from the base's weights, and this base's are whole: save "
            "it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    elif not isinstance(init, bool | None) and init not in _PLAIN_INITS:
        faults.append(f"init_lora_weights={init!r} is not known here, and might have changed the base's weights")
    classified = SERVED.keys() | NOT_OUTPUTS | REFUSED.keys()
    faults.extend(
        f"{name}={raw[name]!r} is not known here, and might change outputs"
        for name in sorted(known.keys() - classified)
        if raw.get(name) not in _UNSET
    )
    return faults


def _wrong_values(raw: Mapping[str, object]) -> list[str]:
    faults = []
    for name, kind in SERVED.items():
        try:
            if name in raw:
                kind.validate_python(raw[name])
        except ValidationError as error:
            faults.append(f"{name}={str(raw[name])[:80]} ({error.errors()[0]['msg']})")
    return faults


def _passed_over(raw: Mapping[str, object], known: Mapping[str, object]) -> list[str]:
    """As peft does with the fields of a newer version, but named."""
    unknown = sorted(raw.keys() - known.keys() - NOT_OUTPUTS - REFUSED.keys())
    return [
        f"peft does not know these keys of the configuration, and they are passed over: {listing(unknown)}."
    ] * bool(unknown)


def _other_base(trained_on: object, base: LoraBase) -> list[str]:
    if not isinstance(trained_on, str) or not trained_on or not base.names:
        return []
    ours = {form for name in base.names for form in _forms(name)}
    if ours & _forms(trained_on):
        return []
    return [f"It was trained on {trained_on!r}; this base is called {' or '.join(map(repr, base.names))}."]


def _forms(name: str) -> set[str]:
    whole = name.rstrip("/").lower()
    return {whole, whole.rpartition("/")[2]}


def _peft_default_targets(base: LoraBase) -> set[str] | str:
    model_type = str(base.config.get("model_type"))
    targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)
    if targets is None:
        raise AdapterError(
            f"This adapter's configuration has no target_modules, and peft has no default ones for model_type "
            f"{model_type!r}. Name them in its adapter_config.json."
        )
    return targets if isinstance(targets, str) else set(targets)
