"""Two scheduler policies: priority with aging, and fairness among tenants by virtual token counters."""

from octavo import SchedulerSpec, hookimpl

OCTAVO_API = "1.0"


@hookimpl
def octavo_components() -> list[SchedulerSpec]:
    return [
        SchedulerSpec(
            name="priority",
            summary="Lower priority numbers first; waiting makes up for a higher number, so nobody starves",
            target="octavo_scheduler_fair.priority:PriorityPolicy",
            options="octavo_scheduler_fair.options:PriorityOptions",
            priority=-10,
        ),
        SchedulerSpec(
            name="fair",
            summary="The tenant that was served least goes first, by virtual token counters",
            target="octavo_scheduler_fair.fair:FairPolicy",
            options="octavo_scheduler_fair.options:FairOptions",
            priority=-10,
        ),
    ]
