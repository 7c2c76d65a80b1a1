"""Both policies, with their default options, do what every scheduler policy must."""

from __future__ import annotations

from octavo.testing import SchedulerSuite


class TestPriority(SchedulerSuite):
    component = "scheduler-fair/priority"
    starvation_free = True


class TestFair(SchedulerSuite):
    component = "scheduler-fair/fair"
    starvation_free = True
