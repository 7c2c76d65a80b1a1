"""Whether transformers has an architecture that can be served, read from its source and without importing it.

Every start asks this, also for models that another component serves; importing transformers' models takes seconds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from octavo.errors import PluginError
from octavo.plugins.specs import ModelNeed


def why_not(need: ModelNeed) -> list[str]:
    """What is against serving this architecture; what only its configuration tells is found when it is built."""
    package = _package()
    installed = f"transformers {version('transformers')}"
    causal = {
        name: model_type
        for model_type, names in _table(package / "models/auto/modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
        for name in ([names] if isinstance(names, str) else names)
    }
    if need.architecture not in causal:
        return [
            f"{need.architecture} is none of the decoder-only language models of {installed}: "
            "models with an encoder or of images and sounds are not served"
        ]
    source = _modeling_source(package, causal[need.architecture])
    reasons = []
    if "_is_stateful = True" in source:
        reasons.append(f"{need.architecture} keeps a recurrent state beside its keys and values, or instead of them")
    elif "_supports_attention_backend = True" not in source:
        reasons.append(
            f"{need.architecture} does not take its attention from the attention interface of {installed}, "
            "the only way from there to Octavo's KV cache"
        )
    return reasons


def _package() -> Path:
    found = find_spec("transformers")
    assert found is not None, "the spec requires transformers"
    assert found.origin is not None
    return Path(found.origin).parent


def _modeling_source(package: Path, model_type: str) -> str:
    """The file that defines the models of a type; empty when they are defined by another type's."""
    table = package / "models/auto/auto_mappings.py"
    folders: Mapping[str, str] = dict(_table(table, "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"))
    folder = folders.get(model_type, model_type.replace("-", "_"))
    path = package / "models" / folder / f"modeling_{folder}.py"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _table(path: Path, name: str) -> list[tuple[str, str]]:
    """The pairs of a table of transformers.

    Raises:
        PluginError: this version of transformers does not have it there.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(rf"^{name}\b[^=\n]*= OrderedDict\(\n(.*?)^\)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise PluginError(f"{path} has no table {name}: this version of transformers is not known; install another.")
    pairs: list[tuple[str, str]] = ast.literal_eval(found[1].strip())
    return pairs
