"""fair: the tenant that was served least goes first, by virtual token counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from octavo.interfaces import SchedulerPolicy
from octavo.request import Request, RequestStatus
from octavo_scheduler_fair.options import FairOptions

MAX_ABSENT_TENANTS = 1024
"""How many tenants without requests are remembered, of those who left with more than others had by then."""


@dataclass(slots=True, eq=False)
class _Place:
    """A request's place in its tenant's line.

    Attributes:
        start: the tenant's counter when the request's turn comes, its charges for outputs apart.
        num_unserved_tokens: prompt tokens the request is still expected to compute.
        begun: whether it was served anything.
    """

    request: Request
    start: float
    num_unserved_tokens: int
    begun: bool = False


@dataclass(slots=True, eq=False)
class _Tenant:
    """One tenant's counter, in virtual tokens divided by its weight.

    The prompts of its requests are booked when they arrive: the next request's place is at `end`, as if all before it
    had been served already. So one step can admit several tenants' requests in turn, though nothing is served yet.

    Attributes:
        input_charge, output_charge: virtual tokens that one token costs.
        end: the counter behind the last request in line, its charges for outputs apart.
        outputs: charged for outputs.
        places: its unfinished requests in the order they arrived.
    """

    input_charge: float
    output_charge: float
    end: float = 0.0
    outputs: float = 0.0
    places: dict[str, _Place] = field(default_factory=dict)

    @property
    def counter(self) -> float:
        """What it was charged for; what is booked and not yet computed is left out."""
        num_unserved_tokens = sum(place.num_unserved_tokens for place in self.places.values())
        return self.end + self.outputs - self.input_charge * num_unserved_tokens

    def arrive(self, request: Request, level: float) -> _Place:
        """Put a request at the end of the line; the counter is lifted to `level` when nobody is waiting in it."""
        last = next(reversed(self.places.values()), None)
        if last is None or last.request.status is not RequestStatus.WAITING:  # then none before it waits either
            self.end = max(self.end, level - self.outputs)
        num_prompt_tokens = len(request.prompt_token_ids)
        place = self.places[request.request_id] = _Place(request, self.end, num_prompt_tokens)
        self.end += self.input_charge * num_prompt_tokens
        return place

    def give_back(self, place: _Place) -> None:
        """What was booked for a prompt and will not be computed: those behind move up."""
        if place.num_unserved_tokens:
            surplus = self.input_charge * place.num_unserved_tokens
            place.num_unserved_tokens = 0
            for behind in reversed(self.places.values()):
                if behind is place:
                    break
                behind.start -= surplus
            self.end -= surplus


class FairPolicy(SchedulerPolicy):
    """Shares the engine by what tenants were served, not by how much they ask for.

    counter(tenant) += (input_weight * prompt tokens + output_weight * output tokens) / weight(tenant)

    The next request is that of the tenant with the smallest counter, first come, first served within a tenant; the
    victim is the latest request of the tenant with the largest. Only computed tokens are charged: what the prefix
    cache holds, and what a preemption makes the engine compute again, is free. Requests without a tenant are one
    tenant together.

    A tenant that joins those who wait is lifted to the level the waiting are served at, so being idle saves nothing
    up. The level is the largest counter at which a request was begun, with that request's first tokens: it rises with
    each, so that even tenants who come once cannot keep the others waiting for ever.

    A tenant without requests is forgotten as soon as its counter is no longer above the level, for it would be lifted
    there anyway; of the others the MAX_ABSENT_TENANTS with the largest counters are remembered; and when no request
    is left at all, everything is forgotten.

    Source: Sheng et al. 2024, Fairness in Serving Large Language Models, arXiv:2401.00588, algorithm 2. The paper
    charges a prompt when it is admitted and lifts to the smallest counter of those who wait. README.md has the bound.
    """

    dynamic = True

    def __init__(self, options: FairOptions) -> None:
        self._options = options
        self._tenants: dict[str | None, _Tenant] = {}
        self._num_requests = 0
        self._level = 0.0
        self._max_tenants = MAX_ABSENT_TENANTS

    def key(self, request: Request, now: float) -> float:
        """Its tenant's counter when all of that tenant's earlier requests have entered."""
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._new_tenant(request.tenant)
        place = tenant.places.get(request.request_id)
        if place is None:
            place = tenant.arrive(request, self._level)
            self._num_requests += 1
        return place.start + tenant.outputs

    def victim(self, running: Sequence[Request]) -> Request:
        """The latest arrival of the tenant with the largest counter."""
        counters = {name: self._tenants[name].counter for name in dict.fromkeys(each.tenant for each in running)}
        name = max(counters, key=lambda each: counters[each])
        candidates = {request.request_id: request for request in running if request.tenant == name}
        return next(candidates[each] for each in reversed(self._tenants[name].places) if each in candidates)

    def served(self, request: Request, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Charge its tenant."""
        tenant = self._tenants[request.tenant]
        place = tenant.places[request.request_id]
        place.start += tenant.input_charge * num_prompt_tokens
        place.num_unserved_tokens -= num_prompt_tokens
        if not place.begun:
            place.begun = True
            self._level = max(self._level, place.start + tenant.outputs)
        if num_output_tokens:
            tenant.outputs += tenant.output_charge * num_output_tokens
            tenant.give_back(place)  # the prompt is done: the rest of it was in the prefix cache

    def ended(self, request: Request) -> None:
        """Take it out of its tenant's line."""
        tenant = self._tenants[request.tenant]
        place = tenant.places[request.request_id]
        tenant.give_back(place)
        del tenant.places[request.request_id]
        self._num_requests -= 1
        if not self._num_requests:
            self._tenants.clear()
            self._level = 0.0
        elif not tenant.places and tenant.counter <= self._level:
            del self._tenants[request.tenant]

    def metrics(self) -> Mapping[str, float]:
        """Of the tenants that have requests: how many, their counters' range and its width (0 when there are none)."""
        counters = [tenant.counter for tenant in self._tenants.values() if tenant.places] or [0.0]
        return {
            "num_active_tenants": float(sum(bool(tenant.places) for tenant in self._tenants.values())),
            "min_counter": min(counters),
            "max_counter": max(counters),
            "counter_difference": max(counters) - min(counters),
        }

    def _new_tenant(self, name: str | None) -> _Tenant:
        if len(self._tenants) >= self._max_tenants:
            self._forget_tenants()
        weight = 1.0 if name is None else self._options.tenant_weights.get(name, 1.0)
        tenant = self._tenants[name] = _Tenant(
            input_charge=self._options.input_weight / weight, output_charge=self._options.output_weight / weight
        )
        return tenant

    def _forget_tenants(self) -> None:
        """Done each time their number has doubled, so that it costs little on the whole."""
        absent = [(tenant.counter, name) for name, tenant in self._tenants.items() if not tenant.places]
        ahead = sorted((entry for entry in absent if entry[0] > self._level), key=lambda entry: -entry[0])
        remembered = {name for _counter, name in ahead[:MAX_ABSENT_TENANTS]}
        for _counter, name in absent:
            if name not in remembered:
                del self._tenants[name]
        self._max_tenants = max(MAX_ABSENT_TENANTS, 2 * len(self._tenants))
