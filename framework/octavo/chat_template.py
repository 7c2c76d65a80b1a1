"""ChatTemplate: a model's Jinja template, run in a sandbox. It comes with the model, so it is not trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from octavo.errors import CheckpointError, RequestError


class ChatTemplate:
    """A compiled template, with the helpers that templates on Hugging Face's hub expect.

    Raises:
        CheckpointError: the source is not a valid template.
    """

    def __init__(self, source: str) -> None:
        # Here, not above: a quarter of `octavo --help` would be this import.
        from jinja2 import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"The model's chat template is not valid Jinja, line {error.lineno}: {error}"
            ) from error

    def render(self, variables: Mapping[str, object]) -> str:
        """Fill in the template.

        Raises:
            RequestError: the template refuses these messages, or fails on them.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render(variables)
        except TemplateError as error:
            raise RequestError(f"The model's chat template refused the messages: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise RequestError(
                f"The model's chat template failed on the messages: {type(error).__name__}: {error}"
            ) from error


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes <, > and & for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
