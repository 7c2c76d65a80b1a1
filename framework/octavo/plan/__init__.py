"""Plan: what an engine would hold in memory, counted from config.json and headers before any weight is read.

    from octavo import EngineConfig
    from octavo.plan import make_plan

    plan = make_plan(EngineConfig(model="./Llama-3-8B", device="cuda"), memory_bytes=24 * 2**30)
    print(plan.weight_bytes, plan.num_blocks, plan.fits)

It asks the very components an engine would be built from, so the two cannot count differently.
"""

from octavo.plan.counts import Advice as Advice
from octavo.plan.counts import Plan as Plan
from octavo.plan.make import make_plan as make_plan
from octavo.plan.sizes import RankSizes as RankSizes
