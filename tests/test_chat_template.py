"""ChatTemplate: what templates on the hub rely on, and what they must not be able to do."""

from __future__ import annotations

from datetime import datetime

import pytest

from octavo.chat_template import ChatTemplate
from octavo.errors import CheckpointError, RequestError


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source).render(variables)


def test_lines_of_statements_leave_no_trace() -> None:
    assert render("  {% if true %}\nyes\n  {% endif %}\nend") == "yes\nend"


def test_loops_can_be_left_and_continued() -> None:
    source = (
        "{% for n in range(9) %}{% if n == 1 %}{% continue %}{% endif %}{% if n == 4 %}{% break %}{% endif %}{{ n }}"
    )
    assert render(source + "{% endfor %}") == "023"


def test_json_is_neither_escaped_for_html_nor_for_ascii() -> None:
    assert render("{{ value | tojson }}", value={"a": "<가 & 'b'>"}) == '{"a": "<가 & \'b\'>"}'
    assert render("{{ value | tojson(indent=1) }}", value=[1]) == "[\n 1\n]"


def test_template_knows_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_marks_for_training_are_ignored() -> None:
    assert render("a{% generation %}{{ b }}{% endgeneration %}c", b="b") == "abc"


def test_refusal_of_the_template_is_the_request_s_fault() -> None:
    with pytest.raises(RequestError, match="refused the messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_failure_in_the_template_is_the_request_s_fault() -> None:
    with pytest.raises(RequestError, match="failed on the messages: TypeError"):
        render("{{ messages[0].content + 'x' }}", messages=[{"content": 3}])


def test_source_that_is_no_template_is_the_checkpoint_s_fault() -> None:
    with pytest.raises(CheckpointError, match="not valid Jinja, line 2"):
        ChatTemplate("fine\n{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ range(10**12) | list }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        render(source, messages=[])
