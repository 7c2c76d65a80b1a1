"""Settings: one EngineConfig from a file, the environment and what was given by name, and where each value is from.

All ways in lead through one tree: LLM(attention={"name": "triton", "num_kv_splits": 8}), the flags
`--attention triton --attention.num-kv-splits 8`, OCTAVO_ATTENTION__NUM_KV_SPLITS=8, and the same keys in YAML.
What is given by name goes before the environment, the environment before the file, the file before the defaults.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from octavo.config import ComponentConfig, EngineConfig
from octavo.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "OCTAVO_"
CONFIG_FILE = "OCTAVO_CONFIG"
_SHORT_NAMES = {
    "OCTAVO_PLUGINS": ("plugins", "allow"),
    "OCTAVO_DISABLE_PLUGINS": ("plugins", "deny"),
    "OCTAVO_STRICT_PLUGINS": ("plugins", "strict"),
}
_COMPONENTS = tuple(
    name
    for name, info in EngineConfig.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, ComponentConfig)
)
_COLLECTIONS = tuple(
    name
    for name, info in EngineConfig.model_fields.items()
    if isinstance(info.get_default(call_default_factory=True), (tuple, dict))
)
_SIDES = ("prefill", "decode")  # of attention: components within a component

Keys = tuple[str, ...]


class Source(NamedTuple):
    """Where a value is from.

    Attributes:
        kind: "default", "file", "environment", "flag", "argument" (of LLM), or "auto": found by the engine.
        detail: the file, the variable, the flag.
    """

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.detail}".strip()


DEFAULT = Source("default")
AUTO = Source("auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A configuration and, by dotted name, the source of every value that is not a default."""

    config: EngineConfig
    sources: Mapping[str, Source] = field(default_factory=dict)

    def source(self, name: str) -> Source:
        """Where the value of "dtype" or "attention.num_kv_splits" is from."""
        return self.sources.get(name, DEFAULT)


def read_settings(
    given: Mapping[str, object],
    config_file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    given_as: str = "argument",
) -> Settings:
    """Put together what a file, the environment and the caller say.

    Args:
        given: fields of EngineConfig by name.
        config_file: a YAML file; without it the one OCTAVO_CONFIG names, if any.
        given_as: the kind of source `given` is: "argument", or "flag" with details like "--max-model-len".

    Raises:
        ConfigError: unknown settings (the nearest name is given), wrong values, an unreadable file.
    """
    config_file = config_file or environ.get(CONFIG_FILE) or None
    values: dict[Keys, object] = {}
    sources: dict[Keys, Source] = {}
    layers = [
        [] if config_file is None else list(_from_file(Path(config_file))),
        list(_from_environment(environ)),
        [(path, value, Source(given_as, _flag(path, given_as))) for path, value in _leaves(given)],
    ]
    for layer in layers:
        _lay_over(values, sources, layer)
    config = EngineConfig.create(_sources={path[0]: str(source) for path, source in sources.items()}, **_tree(values))
    return Settings(config=config, sources={".".join(path): source for path, source in sources.items()})


def as_settings(
    model: str | None, config: str | os.PathLike[str] | Settings | None, given: Mapping[str, object]
) -> Settings:
    """What LLM and its kin are constructed with: settings already read, or arguments over a file and the environment.

    Raises:
        ConfigError: as `read_settings`; or arguments beside settings already read.
    """
    if model is not None:
        given = {"model": model, **given}
    if not isinstance(config, Settings):
        return read_settings(given, config)
    if given:
        raise ConfigError(f"config holds settings already read; {', '.join(given)} cannot be given beside it.")
    return config


def parse_value(text: str) -> object:
    """A component's option from a flag or a variable, read as in the YAML file: 8, true, text, [1, 2], {a: 1}."""
    import yaml

    try:
        value: object = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if value is None else value


def parse_collection(name: str, text: str) -> object:
    """A plain setting from a flag or a variable: the text, or where a list or mapping belongs, that read as in YAML."""
    return parse_value(text) if name in _COLLECTIONS and text.startswith(("[", "{")) else text


# ------------------------------------------------------------------------------------------------------ layers


def _lay_over(
    values: dict[Keys, object], sources: dict[Keys, Source], layer: list[tuple[Keys, object, Source]]
) -> None:
    """Options belong to the component that was named with them: a layer that names another starts anew."""
    for path, value, _ in layer:
        if path[-1] == "name" and path[0] in _COMPONENTS and values.get(path, value) != value:
            for below in [known for known in values if known[: len(path) - 1] == path[:-1]]:
                del values[below], sources[below]
    for path, value, source in layer:
        values[path], sources[path] = value, source


def _from_file(path: Path) -> Iterator[tuple[Keys, object, Source]]:
    import yaml

    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"The configuration file {path} is not YAML: {error}") from error
    if content is None:
        return
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"The configuration file {path} must hold settings by name, as in `max_model_len: 4096`; "
            f"found a {type(content).__name__}."
        )
    for leaf, value in _leaves(content):
        yield leaf, value, Source("file", str(path))


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[Keys, object, Source]]:
    for variable in sorted(environ):
        text, source = environ[variable], Source("environment", variable)
        if variable in _SHORT_NAMES:
            yield _SHORT_NAMES[variable], text, source
            continue
        path = tuple(variable.removeprefix(PREFIX).lower().split("__"))
        if not variable.startswith(PREFIX) or path[0] not in EngineConfig.model_fields:
            _warn_of_misspelling(variable)
            continue
        if len(path) > 1 and path[0] in _COLLECTIONS:
            raise ConfigError(f"{variable} is no setting: give {PREFIX}{path[0].upper()} as a whole.")
        value = parse_value(text) if path[0] in _COMPONENTS else parse_collection(path[0], text)
        for leaf, one in _leaves(_tree({path: value})):
            yield leaf, one, source


def _warn_of_misspelling(variable: str) -> None:
    """A variable may be another program's, or of a later version: no error, but not passed over in silence either."""
    known = [PREFIX + name.upper() for name in EngineConfig.model_fields]
    if variable.startswith(PREFIX) and (near := get_close_matches(variable, known, n=1, cutoff=0.85)):
        logger.warning("The environment variable %s is no setting and is ignored; did you mean %s?", variable, near[0])


# ------------------------------------------------------------------------------------------------ trees and paths


def _leaves(tree: Mapping[str, object]) -> Iterator[tuple[Keys, object]]:
    """A tree of settings as (path, value); "max-model-len" is "max_model_len"; an option's own mapping is a value."""
    for key, value in tree.items():
        name = key.replace("-", "_")
        if name in _COMPONENTS:
            yield from _component_leaves((name,), value)
        elif name == "plugins" and isinstance(value, Mapping):
            yield from (((name, str(inner).replace("-", "_")), one) for inner, one in value.items())
        else:
            yield (name,), value


def _component_leaves(path: Keys, value: object) -> Iterator[tuple[Keys, object]]:
    if value is None or isinstance(value, str):
        default = getattr(EngineConfig.model_fields[path[0]].default, "name", "auto")
        yield (*path, "name"), value or default
    elif isinstance(value, ComponentConfig):
        yield from _component_leaves(path, value.model_dump(exclude_unset=True))
    elif not isinstance(value, Mapping):
        yield path, value  # nothing a component can be: EngineConfig says so
    else:
        for key, option in value.items():
            name = str(key).replace("-", "_")
            if path == ("attention",) and name in _SIDES and option is not None:
                yield from _component_leaves((*path, name), option)
            else:
                yield (*path, name), option


def _tree(values: Mapping[Keys, object]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for path, value in sorted(values.items(), key=lambda item: len(item[0])):
        node = tree
        for key in path[:-1]:
            inner = node.setdefault(key, {})
            if not isinstance(inner, dict):
                break  # a value that is no component; EngineConfig refuses it
            node = inner
        else:
            node[path[-1]] = value
    return tree


def _flag(path: Keys, given_as: str) -> str:
    if given_as != "flag":
        return ""
    shown = path[:-1] if path[-1] == "name" and path[0] in _COMPONENTS else path
    return "--" + ".".join(shown).replace("_", "-")
