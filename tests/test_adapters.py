"""Adapters in the engine, one fact at a time; test_adapter_properties.py checks that the facts hold together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from simulated_adapters import SimulatedEngine

from octavo.builtin.fcfs import FCFSPolicy
from octavo.engine.adapters import AdapterStore
from octavo.errors import AdapterError, ConfigError, EngineDeadError, RequestError
from octavo.lora.adapter import AdapterInfo
from octavo.testing.scheduling_simulation import Simulation, simulated_request

# ------------------------------------------------------------------------------------------------ loading


def test_a_loaded_adapter_tells_what_was_found() -> None:
    engine = SimulatedEngine()
    engine.executor.files["/a"] = "a1"
    loading = engine.engine.load_adapter("a", "/a")
    assert not loading.done()
    engine.read()
    assert loading.result().content_hash == "a1"


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(AdapterError, match="name is a text that is not empty; found ' '"):
        SimulatedEngine().engine.load_adapter(" ", "/a")


def test_a_name_of_another_path_is_refused_with_both_paths() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    with pytest.raises(AdapterError, match="'a' is that of '/a'; '/other' was asked for"):
        engine.engine.load_adapter("a", "/other")


def test_loading_again_from_the_same_path_reads_nothing() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    assert engine.engine.load_adapter("a", "/a").result().content_hash == "a1"
    assert engine.store.num_loads == 1


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    engine = SimulatedEngine()
    engine.load("a", "b")
    with pytest.raises(AdapterError, match=r"no adapter 'c'\. Loaded: 'a', 'b'"):
        engine.engine.adapter("c")


def test_a_name_that_could_not_be_loaded_is_forgotten() -> None:
    engine = SimulatedEngine()
    loading = engine.engine.load_adapter("a", "/nowhere")
    engine.read()
    assert isinstance(loading.exception(), AdapterError)
    assert engine.engine.adapters() == []


def test_a_request_whose_adapter_cannot_be_loaded_ends_with_the_reason() -> None:
    engine = SimulatedEngine()
    engine.engine.load_adapter("a", "/nowhere")
    engine.add("r", "a")
    engine.loader.finish()
    (output,) = engine.step()
    assert (output.finish_reason, output.stop_reason) == ("error", "/nowhere cannot be read.")


def test_an_adapter_that_cannot_be_read_again_keeps_its_name() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=1)
    engine.load("a", "b")
    del engine.executor.files["/a"]
    engine.add("r", "a")
    engine.finish()
    assert engine.reasons == {"r": "error"}
    assert engine.store.request("a").state == "cold"


def test_an_adapter_without_a_request_is_loaded_by_steps_alone() -> None:
    engine = SimulatedEngine()
    engine.executor.files["/a"] = "a1"
    engine.engine.load_adapter("a", "/a")
    assert engine.engine.has_unfinished
    engine.read()
    assert not engine.engine.has_unfinished


def test_an_engine_without_adapters_says_which_setting_serves_them() -> None:
    engine = SimulatedEngine()
    engine.scheduler.adapters = None
    with pytest.raises(ConfigError, match="enable_lora=True"):
        engine.engine.load_adapter("a", "/a")


def test_a_scheduler_without_adapters_refuses_a_request_that_has_one() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    adapter = engine.store.request("a")
    engine.scheduler.adapters = None
    with pytest.raises(RequestError, match="this engine serves none"):
        engine.scheduler.add(simulated_request("r", [1], 1, adapter=adapter))


# ------------------------------------------------------------------------------------------------ the thread


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Reads wait for it."""
    gate = threading.Event()
    yield gate
    gate.set()


def store_that_reads_behind(gate: threading.Event) -> AdapterStore:
    def load(adapter_id: int, path: str) -> AdapterInfo:
        gate.wait()
        if path == "/strange":
            raise OSError("the disk is gone")
        return AdapterInfo(content_hash=path, rank=1, num_bytes=1, modules=())

    return AdapterStore(load, lambda adapter_id: None, max_loras=1, max_cpu_loras=2)


def wait_for(store: AdapterStore) -> None:
    while store.is_loading:
        store.wait(1.0)
        store.poll()


def test_loading_does_not_wait_for_the_disk(gate: threading.Event) -> None:
    store = store_that_reads_behind(gate)
    loading = store.load("a", "/a")
    assert store.poll() == []
    assert not loading.done()
    gate.set()
    wait_for(store)
    assert loading.result().content_hash == "/a"


def test_waiting_ends_when_the_time_is_over(gate: threading.Event) -> None:
    store = store_that_reads_behind(gate)
    store.load("a", "/a")
    start = time.monotonic()
    store.wait(0.01)
    assert time.monotonic() - start < 5


def test_whatever_reading_raises_is_the_adapters_fault(gate: threading.Event) -> None:
    store = store_that_reads_behind(gate)
    gate.set()
    loading = store.load("a", "/strange")
    wait_for(store)
    with pytest.raises(AdapterError, match="'a' could not be read from '/strange': OSError: the disk is gone"):
        loading.result()


def test_stopping_ends_the_thread_and_everyones_waiting(gate: threading.Event) -> None:
    store = store_that_reads_behind(gate)
    loadings = [store.load("a", "/a"), store.load("b", "/b")]
    gate.set()
    store.stop()
    assert all(isinstance(loading.exception(), EngineDeadError) for loading in loadings)
    assert store._loader._thread is not None
    assert not store._loader._thread.is_alive()


def test_a_load_cannot_be_cancelled(gate: threading.Event) -> None:
    assert not store_that_reads_behind(gate).load("a", "/a").cancel()


# ------------------------------------------------------------------------------------------------ come and go


def test_a_reload_leaves_running_requests_with_the_old_weights() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("old", "a", max_tokens=8)
    engine.step()
    engine.executor.files["/a"] = "a2"
    engine.engine.load_adapter("a", "/a", replace=True)
    engine.read()
    engine.add("new", "a", max_tokens=8)
    engine.finish()
    assert (engine.executor.bound["old"][1], engine.executor.bound["new"][1]) == ("a1", "a2")
    assert list(engine.executor.loaded.values()) == ["a2"]


def test_the_old_version_serves_until_the_new_one_is_read() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.executor.files["/a"] = "a2"
    engine.engine.load_adapter("a", "/a", replace=True)
    engine.add("r", "a")
    engine.step()
    assert engine.executor.bound["r"][1] == "a1"


def test_a_reload_that_fails_leaves_the_old_one_serving() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    del engine.executor.files["/a"]
    loading = engine.engine.load_adapter("a", "/a", replace=True)
    engine.read()
    assert isinstance(loading.exception(), AdapterError)
    engine.add("r", "a")
    engine.finish()
    assert engine.reasons == {"r": "length"}


def test_a_request_bound_before_a_reload_and_added_after_it_gets_the_new_version() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    request = simulated_request("r", [1, 2], 2, adapter=engine.engine.adapter("a"))
    engine.engine.load_adapter("a", "/a", replace=True)
    engine.read()
    engine.engine.add(request)
    assert request.adapter is engine.store.request("a")


def test_a_request_bound_before_an_unload_and_added_after_it_is_refused() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    request = simulated_request("r", [1, 2], 2, adapter=engine.engine.adapter("a"))
    engine.engine.unload_adapter("a")
    with pytest.raises(AdapterError, match="no adapter 'a'"):
        engine.engine.add(request)


def test_an_unloaded_adapters_memory_is_free_at_once_without_requests() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    assert engine.engine.unload_adapter("a").done()
    assert engine.executor.loaded == {}


def test_unloading_lets_requests_run_to_their_end() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("r", "a", max_tokens=8)
    engine.step()
    unloading = engine.engine.unload_adapter("a")
    assert not unloading.done()
    engine.finish()
    assert unloading.done()
    assert engine.reasons == {"r": "length"}
    assert engine.executor.loaded == {}


def test_unloading_can_abort_requests_and_says_so_in_the_next_step() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("running", "a", max_tokens=8)
    engine.step()
    engine.add("waiting", "a")
    assert engine.engine.unload_adapter("a", abort=True).done()
    assert engine.engine.has_unfinished
    ended = {output.request_id: (output.finish_reason, output.stop_reason) for output in engine.step()}
    assert ended == dict.fromkeys(("running", "waiting"), ("abort", "Adapter 'a' was unloaded."))


def test_the_end_of_an_aborted_request_is_not_told_to_another_with_its_id() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.add("r", "a")
    engine.engine.unload_adapter("a", abort=True)
    engine.abort("r")
    engine.add("r", max_tokens=2)
    engine.finish()
    assert engine.reasons == {"r": "length"}


def test_unloading_what_is_being_read_frees_it_when_it_has_been_read() -> None:
    engine = SimulatedEngine()
    engine.executor.files["/a"] = "a1"
    loading = engine.engine.load_adapter("a", "/a")
    unloading = engine.engine.unload_adapter("a")
    assert not unloading.done()
    engine.read()
    assert unloading.done()
    assert isinstance(loading.exception(), AdapterError)
    assert engine.executor.loaded == {}


# ------------------------------------------------------------------------------------------------ pinning


def test_a_pinned_adapter_keeps_memory_and_position() -> None:
    engine = SimulatedEngine(max_loras=2, max_cpu_loras=2)
    engine.load("a")
    engine.engine.pin_adapter("a")
    engine.add("r", "a", max_tokens=1)
    engine.finish()
    for name in "bcd":
        engine.load(name)
        engine.add(name, name, max_tokens=1)
        engine.finish()
    assert engine.store.request("a").position == 0
    assert engine.store.request("a").in_memory


def test_pinning_leaves_one_position_for_the_others() -> None:
    engine = SimulatedEngine(max_loras=2, max_cpu_loras=2)
    engine.load("a", "b")
    engine.engine.pin_adapter("a")
    with pytest.raises(AdapterError, match="1 are, and of max_loras=2 positions one must be left for the others"):
        engine.engine.pin_adapter("b")


def test_another_can_be_pinned_when_one_no_longer_is() -> None:
    engine = SimulatedEngine(max_loras=2, max_cpu_loras=2)
    engine.load("a", "b")
    engine.engine.pin_adapter("a")
    engine.engine.pin_adapter("a", pinned=False)
    engine.engine.pin_adapter("b")
    assert [status.pinned for status in engine.engine.adapters()] == [False, True]


def test_a_pin_is_the_names_and_survives_a_reload() -> None:
    engine = SimulatedEngine()
    engine.load("a")
    engine.engine.pin_adapter("a")
    engine.engine.load_adapter("a", "/a", replace=True)
    engine.read()
    assert [status.pinned for status in engine.engine.adapters()] == [True]


def test_pinning_a_cold_adapter_reads_it() -> None:
    engine = SimulatedEngine(max_loras=2, max_cpu_loras=2)
    engine.load("a", "b", "c")
    engine.engine.pin_adapter("a")
    engine.read()
    assert engine.store.request("a").in_memory


# ------------------------------------------------------------------------------------------------ numbers


def test_stats_count_adapters() -> None:
    engine = SimulatedEngine(max_loras=1, max_cpu_loras=2)
    engine.load("a", "b", "c")
    engine.add("r", "c")
    engine.finish()
    stats = engine.engine.stats()
    assert (stats.num_adapters_in_memory, stats.num_adapters_placed) == (2, 1)
    assert (stats.num_adapter_loads, stats.num_adapter_evictions) == (3, 1)


def test_steps_without_adapters_carry_none() -> None:
    simulation = Simulation(FCFSPolicy(), num_blocks=8)
    simulation.add(simulated_request("r", [1, 2], 2))
    step = simulation.submit()
    assert step is not None
    assert (step.placements, step.entering[0].adapter_position) == ([], None)
