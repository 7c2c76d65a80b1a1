"""ChatTemplate: a model's Jinja template, run in a sandbox. It comes with the model, so it is not trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo.errors import CheckpointError, RequestError


class ChatTemplate:
    """A compiled template, with the helpers that templates on Hugging Face's hub expect.

    Raises:
        CheckpointError: the source is not a valid template.
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
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
        try:
            return self._template.render(variables)
        except TemplateError as error:
            raise RequestError(f"The model's chat template refused the messages: {error}") from error
        except Exception as error:  # a template is a program: it can fail in any way on what it did not expect
            raise RequestError(
                f"The model's chat template failed on the messages: {type(error).__name__}: {error}"
            ) from error


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks words for training; here only the words count."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way to declare them)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
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
