"""A scheduler policy watched at every call: what it answers, what it touches, what it is told and what it keeps."""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from octavo.interfaces.scheduling import SchedulerPolicy
from octavo.request import Request


class CheckedPolicy(SchedulerPolicy):
    """Passes every call on to `policy` and checks both sides: the policy's answers, and what the scheduler tells it."""

    def __init__(self, policy: SchedulerPolicy) -> None:
        self.policy = policy
        self.dynamic = policy.dynamic
        self._served: dict[str, tuple[int, int]] = {}  # prompt and output tokens of the unfinished requests

    def key(self, request: Request, now: float) -> Any:
        """The policy's key; it must equal itself, which NaN does not."""
        self._served.setdefault(request.request_id, (0, 0))
        with _left_alone(request):
            key = self.policy.key(request, now)
        assert key == key, f"key() gave {key!r}, which does not equal itself and so has no place in an order"
        check_metrics(self.policy.metrics())
        return key

    def victim(self, running: Sequence[Request]) -> Request:
        """The policy's victim, one of those it was given."""
        given = list(running)
        with _left_alone(*given):
            victim = self.policy.victim(running)
        assert [id(request) for request in running] == [id(request) for request in given], "victim() changed its list"
        assert any(victim is request for request in given), "victim() returned none of the requests it was given"
        return victim

    def served(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Adds up what a request received."""
        prompt, output = self._served[request.request_id]
        self._served[request.request_id] = prompt + num_prompt_tokens, output + num_output_tokens
        with _left_alone(request):
            self.policy.served(request, num_prompt_tokens, num_output_tokens)
        check_metrics(self.policy.metrics())

    def ended(self, request: Request) -> None:
        """By now the policy was told of each token once."""
        num_prompt_tokens, num_output_tokens = self._served.pop(request.request_id)
        assert num_output_tokens == len(request.output_token_ids)
        assert bool(num_output_tokens) <= num_prompt_tokens <= len(request.prompt_token_ids)
        with _left_alone(request):
            self.policy.ended(request)
        check_metrics(self.policy.metrics())

    def metrics(self) -> Mapping[str, float]:
        """The policy's own."""
        return self.policy.metrics()


def check_metrics(metrics: object) -> None:
    """Whether these are metrics: names, each with a finite number."""
    assert isinstance(metrics, Mapping), f"metrics() gave {metrics!r}, not a mapping of names to numbers"
    for name, value in metrics.items():
        assert isinstance(name, str), f"metrics() has the name {name!r}, which is no text"
        is_finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        assert is_finite, f"metrics() gives {name} = {value!r}, not a finite number"


def request_fields(request: Request) -> dict[str, object]:
    """Every field of a request, lists copied, to be compared later."""
    values = {field.name: getattr(request, field.name) for field in fields(request)}
    return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}


def num_entries_kept(policy: SchedulerPolicy) -> int:
    """How many entries the containers have that can be reached from a policy, and how many objects there are.

    Classes, functions and modules, and what they hold, are left out.
    """
    found: dict[int, object] = {}
    waiting: list[object] = [policy]
    while waiting:
        one = waiting.pop()
        if id(one) not in found and not isinstance(one, (type, ModuleType, FunctionType, BuiltinFunctionType)):
            found[id(one)] = one
            waiting += gc.get_referents(one)
    return sum(len(one) if isinstance(one, (Mapping, Set, list, tuple, deque)) else 1 for one in found.values())


@contextmanager
def _left_alone(*requests: Request) -> Iterator[None]:
    before = [request_fields(request) for request in requests]
    yield
    for request, fields_before in zip(requests, before, strict=True):
        fields_now = request_fields(request)
        changed = [name for name, value in fields_before.items() if fields_now[name] != value]
        assert changed == [], f"the policy changed {', '.join(changed)} of request {request.request_id!r}"
