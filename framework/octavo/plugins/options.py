"""A component's own options: checked by the pydantic model its spec names, described for help and schema."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, cast

from octavo.errors import ConfigError, PluginError
from octavo.plugins.specs import Spec, load_target

if TYPE_CHECKING:
    from pydantic import BaseModel


def options_model(spec: Spec) -> type[BaseModel] | None:
    """The model that checks a component's options; None when it takes none.

    Raises:
        PluginError: it cannot be imported, or is no pydantic model.
    """
    if spec.options is None:
        return None
    from pydantic import BaseModel  # here, because listing components must not import it

    model: object = load_target(spec.options)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise PluginError(f"{spec.options}, the options of {spec.noun} {spec.name!r}, is no pydantic model: {model!r}")
    return model


def checked_options(spec: Spec, options: Mapping[str, object]) -> Mapping[str, object]:
    """What the component's own model makes of `options`, defaults filled in.

    Raises:
        ConfigError: unknown options (the nearest name is given) and wrong values.
    """
    model = options_model(spec)
    if model is None:
        if options:
            raise ConfigError(f"{spec.noun} {spec.name!r} takes no options, but {', '.join(options)} was given.")
        return {}
    from pydantic import ValidationError

    known = list(model.model_fields)
    for key in options:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{spec.noun} {spec.name!r} has no option {key!r}. It takes: {', '.join(known)}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
    try:
        checked = model.model_validate(options)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise ConfigError(f"Options of {spec.noun} {spec.name!r}: {faults}") from error
    return cast(Mapping[str, object], checked.model_dump())
