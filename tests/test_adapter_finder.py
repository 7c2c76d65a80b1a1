"""AdapterFinder: resolvers in their order, and what is said when none knows the name."""

from __future__ import annotations

import pytest

from octavo.adapter_finder import AdapterFinder
from octavo.errors import AdapterError
from octavo.interfaces import AdapterResolver


class Known(AdapterResolver):
    def __init__(self, **paths: str) -> None:
        self.paths = paths
        self.asked: list[tuple[str, str]] = []

    def resolve(self, base_model: str, name: str) -> str | None:
        self.asked.append((base_model, name))
        return self.paths.get(name)


class Broken(AdapterResolver):
    def resolve(self, base_model: str, name: str) -> str | None:
        raise ConnectionError("secret-host:8080 is down")


def test_the_first_resolver_that_knows_a_name_gives_its_path() -> None:
    first, second = Known(), Known(french="/adapters/french")
    assert AdapterFinder([("a/first", first), ("b/second", second)], "demo").find("french") == "/adapters/french"
    assert first.asked == [("demo", "french")]


def test_no_resolver_is_asked_after_one_that_knows_the_name() -> None:
    second = Known()
    AdapterFinder([("a/first", Known(french="x")), ("b/second", second)], "demo").find("french")
    assert second.asked == []


def test_a_name_that_nobody_knows_is_refused_with_who_was_asked() -> None:
    with pytest.raises(AdapterError, match=r"no adapter 'french'\. a/first, b/second found none"):
        AdapterFinder([("a/first", Known()), ("b/second", Known())], "demo").find("french")


def test_without_resolvers_an_unknown_name_is_refused_with_what_to_do() -> None:
    with pytest.raises(AdapterError, match=r"no adapter 'french'\. Load it first"):
        AdapterFinder([], "demo").find("french")


def test_a_resolver_that_fails_is_named_but_what_it_said_is_only_in_the_cause() -> None:
    with pytest.raises(
        AdapterError, match=r"'french' could not be looked for: a/broken raised ConnectionError\.$"
    ) as info:
        AdapterFinder([("a/broken", Broken())], "demo").find("french")
    assert isinstance(info.value.__cause__, ConnectionError)
