"""How requests with adapters are scheduled, one fact at a time: what they wait for, and what they find cached."""

from __future__ import annotations

from simulated_adapters import SimulatedEngine, running

from octavo.engine.block_pool import BlockPool
from octavo.engine.prefix_cache import find_prefix
from octavo.interfaces.executor import AdapterPlacement
from octavo.lora.adapter import Adapter, AdapterInfo
from octavo.request import Request
from octavo.testing.scheduling_simulation import simulated_request

# ------------------------------------------------------------------------------------------------ requests


def test_a_request_is_computed_with_its_adapter() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("r", "a")
    engine.finish()
    assert engine.executor.bound["r"][1] == "a1"


def test_a_request_waits_for_its_adapter_while_others_go_on() -> None:
    engine = SimulatedEngine()
    engine.executor.files["/a"] = "a1"
    engine.engine.load_adapter("a", "/a")
    engine.add("with", "a")
    engine.add("without")
    for _ in range(10):
        engine.step()
    assert engine.reasons == {"without": "length"}
    assert engine.alive.keys() == {"with"}


def test_a_request_that_waited_for_its_adapter_keeps_its_place() -> None:
    engine = SimulatedEngine(max_num_seqs=1)
    engine.executor.files["/a"] = "a1"
    engine.engine.load_adapter("a", "/a")
    engine.add("first", "a")
    engine.add("second", max_tokens=2)
    engine.add("third", max_tokens=2)
    engine.step()
    engine.loader.finish()
    engine.step()
    assert engine.reasons == {"second": "length"}
    engine.step()
    assert list(running(engine)) == ["first"]


def test_the_row_of_a_request_names_the_position_and_the_step_places_it() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("r", "a")
    engine.step()
    step = engine.executor.steps[-1]
    assert step.placements == [AdapterPlacement(position=0, adapter_id=0)]
    assert [row.adapter_position for row in step.entering] == [0]


def test_an_adapter_at_a_position_is_not_placed_again() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("r", "a", max_tokens=1)
    engine.finish()
    engine.add("s", "a")
    engine.step()
    assert engine.executor.steps[-1].placements == []


def test_requests_of_more_adapters_than_positions_take_turns() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=3)
    engine.load("a", "b", "c")
    for name in "abc":
        engine.add(name, name)
    engine.step()
    assert list(running(engine)) == ["a"]
    engine.finish()
    assert engine.reasons == dict.fromkeys("abc", "length")


def test_one_that_waits_for_a_position_is_not_overtaken_by_another_adapter() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=2)
    engine.load("a", "b")
    engine.add("a1", "a", max_tokens=4)
    engine.step()
    engine.add("b1", "b")
    engine.add("a2", "a", max_tokens=8)
    engine.add("base", max_tokens=8)
    engine.step()
    assert list(running(engine)) == ["a1", "base"]


def test_the_least_recently_used_adapter_loses_its_position() -> None:
    engine = SimulatedEngine(max_loras=2, max_cpu_loras=3)
    engine.load("a", "b", "c")
    for name in ("a", "b", "a", "c"):
        engine.add(f"r{engine._arrivals}", name, max_tokens=1)
        engine.finish()
    assert {status.name: status.state for status in engine.store.statuses()} == {
        "a": "placed",
        "b": "host",
        "c": "placed",
    }


def test_siblings_share_their_firsts_adapter() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("r", "a", siblings=2)
    engine.finish()
    assert engine.executor.bound["r"] == engine.executor.bound["r/1"] == engine.executor.bound["r/2"]


def test_a_fork_has_its_origins_position() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    origin = engine.add("r", "a", chosen_outside=True, max_tokens=8)
    engine.step()
    fork = simulated_request("f", origin.prompt_token_ids, 8, chosen_outside=True, adapter=origin.adapter)
    engine.executor.requests["f"] = fork
    engine.engine.fork("r", fork)
    for request_id in ("r", "f"):
        engine.engine.extend(request_id, 1)
    engine.engine.step()
    assert [row.adapter_position for row in engine.executor.steps[-1].entering] == [0]


def test_one_that_awaits_a_choice_gives_its_position_to_another_when_nothing_else_can_go_on() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=2)
    engine.load("a", "b")
    engine.add("idle", "a", chosen_outside=True, max_tokens=8)
    engine.step()
    engine.add("r", "b")
    engine.step()
    assert list(running(engine)) == ["r"]


def test_a_preempted_request_gets_its_adapter_placed_again() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=2, num_blocks=8, max_num_seqs=2)
    engine.load("a")
    for request_id in ("r", "s"):
        engine.add(request_id, "a", prompt=tuple(map(ord, request_id * 3)), max_tokens=10)
    engine.finish()
    assert engine.scheduler.num_preemptions
    assert engine.reasons == {"r": "length", "s": "length"}


def test_an_adapters_numbers_are_those_of_its_requests() -> None:
    engine = SimulatedEngine(max_num_seqs=1)
    engine.load("a")
    engine.add("r", "a")
    engine.add("s", "a")
    engine.step()
    (status,) = engine.engine.adapters()
    assert (status.num_requests, status.num_hits, status.position) == (2, 2, 0)


# ------------------------------------------------------------------------------------------------ memory


def test_the_least_recently_used_is_evicted_and_its_memory_freed() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=2)
    engine.load("a", "b", "c")
    assert engine.executor.loaded == {1: "b1", 2: "c1"}
    assert engine.store.request("a").state == "cold"


def test_an_evicted_adapter_keeps_what_is_known_of_it() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=1)
    engine.load("a", "b")
    info = engine.store.request("a").info
    assert info is not None
    assert info.content_hash == "a1"


def test_a_cold_adapter_is_read_again_when_it_is_asked_for() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=1)
    engine.load("a", "b")
    engine.add("r", "a")
    engine.finish()
    assert engine.reasons == {"r": "length"}
    assert engine.executor.loaded == {0: "a1"}


def test_an_adapter_whose_request_has_started_is_not_evicted() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=1)
    engine.load("a")
    engine.add("r", "a", max_tokens=8)
    engine.step()
    engine.load("b")
    assert engine.store.request("a").in_memory
    assert engine.store.request("b").state == "loading"


def test_steady_traffic_of_one_adapter_does_not_keep_another_out() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=1, max_num_seqs=2)
    engine.load("a")
    engine.executor.files["/b"] = "b1"
    engine.add("hot0", "a", max_tokens=8)
    engine.step()
    engine.engine.load_adapter("b", "/b")
    engine.add("b", "b")
    for number in range(1, 40):
        engine.add(f"hot{number}", "a", max_tokens=8)
        for _ in range(4):
            engine.read()
        if "b" in engine.reasons:
            break
    assert number < 10
    engine.finish()


def test_what_was_read_for_a_request_stays_until_one_has_started() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=1, max_num_seqs=1)
    engine.load("a", "b")
    engine.add("base", max_tokens=20)
    engine.add("a", "a")
    engine.add("b", "b")
    for _ in range(10):
        engine.read()
    assert (engine.store.num_loads, list(engine.executor.loaded.values())) == (2, ["b1"])
    engine.finish()


def test_a_request_bound_to_a_cold_adapter_gets_the_files_that_are_there_when_it_starts() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=1)
    engine.load("a", "b")
    engine.executor.files["/a"] = "a2"
    engine.add("r", "a")
    engine.finish()
    info = engine.store.request("a").info
    assert info is not None
    assert (engine.executor.bound["r"][1], info.content_hash) == ("a2", "a2")


# ------------------------------------------------------------------------------------------------ prefix cache


def request_with(content_hash: str | None, salt: bytes = b"") -> Request:
    request = simulated_request("r", [1, 2, 3, 4, 5], 1, cache_salt=salt)
    if content_hash is not None:
        request.adapter = Adapter(name="a", path="/a", adapter_id=0, info=info_of(content_hash))
    return request


def info_of(content_hash: str) -> AdapterInfo:
    return AdapterInfo(content_hash=content_hash, rank=1, num_bytes=1, modules=())


def hashes(request: Request) -> tuple[bytes, ...]:
    find_prefix(BlockPool(8, 2), request)
    return tuple(request.block_hashes)


def test_equal_contents_share_prefixes_and_others_do_not() -> None:
    assert hashes(request_with("one")) == hashes(request_with("one"))
    different = [request_with(None), request_with("one"), request_with("two"), request_with("one", b"salt")]
    assert len({hashes(request) for request in different}) == 4


def test_where_the_salt_ends_and_the_content_begins_is_part_of_the_hash() -> None:
    assert hashes(request_with("bc", b"a")) != hashes(request_with("c", b"ab"))


def test_the_hashes_with_an_adapter_are_the_same_in_every_process() -> None:
    assert hashes(request_with("one", b"salt"))[0].hex() == "4d6bc60e78feaec85c4135d4c6812892"


def test_a_prefix_grows_as_it_would_be_made_at_once() -> None:
    request = request_with("one")
    hashes(request)
    request.prompt_token_ids += [6, 7, 8]
    longer = request_with("one")
    longer.prompt_token_ids += [6, 7, 8]
    assert hashes(request) == hashes(longer)


def test_hashes_made_before_other_files_were_read_are_forgotten() -> None:
    request = request_with("one")
    before = hashes(request)
    assert request.adapter is not None
    request.adapter.info = info_of("two")
    assert hashes(request) == hashes(request_with("two")) != before


def test_a_reload_of_other_files_finds_nothing_of_the_old_ones() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("r", "a")
    engine.finish()
    engine.executor.files["/a"] = "a2"
    engine.engine.load_adapter("a", "/a", replace=True)
    engine.read()
    engine.add("s", "a")
    engine.finish()
    assert engine.scheduler.num_prefix_cache_hits == 0


def test_a_reload_of_the_same_files_finds_the_old_prefixes() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("r", "a")
    engine.finish()
    engine.engine.load_adapter("a", "/a", replace=True)
    engine.read()
    engine.add("s", "a")
    engine.finish()
    assert engine.scheduler.num_prefix_cache_hits == 4
