"""The benchmarks' own arithmetic: what is put beside what, when a request counts as served, what a result holds."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest

from octavo import SamplingParams
from octavo.engine.engine import EngineOutput
from octavo.request import Request

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))  # they are scripts, not a package

comparison, cpu, open_loop, peers, queueing, report, workload = map(
    importlib.import_module, ("comparison", "cpu", "open_loop", "peers", "queueing", "report", "workload")
)


# ------------------------------------------------------------------------------------------------- workloads


def test_workloads_hold_the_tokens_they_say() -> None:
    for name in workload.workload_names():
        content = json.loads((BENCHMARKS / "workloads" / f"{name}.json").read_text())
        loaded = workload.load_workload(name)
        assert (loaded.num_prompt_tokens, loaded.num_output_tokens) == (
            content["prompt_tokens"],
            content["output_tokens"],
        )


def test_unknown_workload_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no workload 'w9' .* w1, w2"):
        workload.load_workload("w9")


def test_warm_up_shares_no_beginning_with_a_workload() -> None:
    beginnings = {tuple(request.prompt_token_ids[:4]) for request in workload.warm_up_workload().requests}
    for name in workload.workload_names():
        assert not beginnings & {tuple(each.prompt_token_ids[:4]) for each in workload.load_workload(name).requests}


# --------------------------------------------------------------------------------------------------- the loop


class FakeEngine:
    """Each step takes a second of its own clock and gives every request it holds one token."""

    def __init__(self) -> None:
        self.now = 0.0
        self.batch_sizes: list[int] = []
        self._num_tokens_left: dict[str, int] = {}
        self._scheduled: dict[str, float] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._num_tokens_left)

    def add(self, request: Request) -> None:
        self._num_tokens_left[request.request_id] = request.params.max_tokens or 0

    def step(self) -> list[EngineOutput]:
        start, self.now = self.now, self.now + 1
        self.batch_sizes.append(len(self._num_tokens_left))
        outputs = []
        for request_id in list(self._num_tokens_left):
            self._num_tokens_left[request_id] -= 1
            ended = not self._num_tokens_left[request_id]
            outputs.append(
                EngineOutput(
                    request_id=request_id,
                    new_token_ids=[7],
                    finish_reason="length" if ended else None,
                    stop_reason=None,
                    num_cached_tokens=0,
                    first_scheduled_time=self._scheduled.setdefault(request_id, start),
                    num_preemptions=0,
                )
            )
            if ended:
                del self._num_tokens_left[request_id]
        return outputs

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def serve(engine: FakeEngine, stream: Sequence[tuple[float, int]], batch_size: int | None) -> list:
    """`stream` holds (arrival time, output tokens)."""
    requests = [
        Request(
            request_id=str(number),
            prompt_token_ids=[1],
            params=SamplingParams(max_tokens=num_tokens),
            arrival_time=arrival_time,
        )
        for number, (arrival_time, num_tokens) in enumerate(stream)
    ]
    return open_loop.serve(engine, requests, batch_size, clock=lambda: engine.now, sleep=engine.sleep)


def test_continuous_batching_takes_a_request_at_the_next_step() -> None:
    first, second = serve(FakeEngine(), [(0.0, 5), (1.5, 1)], None)
    assert (second.queue_seconds, second.ttft_seconds, second.latency_seconds) == (0.5, 1.5, 1.5)
    assert (first.queue_seconds, first.ttft_seconds, first.latency_seconds) == (0.0, 1.0, 5.0)


def test_static_batching_lets_a_request_wait_for_the_batch_before() -> None:
    first, second = serve(FakeEngine(), [(0.0, 5), (1.5, 1)], 16)
    assert (second.queue_seconds, second.ttft_seconds, second.latency_seconds) == (3.5, 4.5, 4.5)
    assert first.latency_seconds == 5.0


def test_request_of_a_static_batch_has_its_token_early_and_its_answer_with_the_batch() -> None:
    short, long = serve(FakeEngine(), [(0.0, 1), (0.0, 4)], 16)
    assert (short.ttft_seconds, short.latency_seconds, long.latency_seconds) == (1.0, 4.0, 4.0)


def test_static_batches_are_no_larger_than_asked_for() -> None:
    engine = FakeEngine()
    timings = serve(engine, [(0.0, 1)] * 5, 2)
    assert engine.batch_sizes == [2, 2, 1]
    assert [timing.queue_seconds for timing in timings] == [0.0, 0.0, 1.0, 1.0, 2.0]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_idle_engine_waits_for_the_next_arrival(batch_size: int | None) -> None:
    engine = FakeEngine()
    timings = serve(engine, [(2.0, 1), (10.0, 3)], batch_size)
    assert [timing.queue_seconds for timing in timings] == [0.0, 0.0]
    assert [timing.num_output_tokens for timing in timings] == [1, 3]
    assert engine.now == 13.0


def test_poisson_stream_comes_at_its_rate_and_again_the_same() -> None:
    arrivals = list(islice(open_loop.poisson_seconds(4.0, seed=1), 4000))
    assert arrivals == list(islice(open_loop.poisson_seconds(4.0, seed=1), 4000))
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(1000, rel=0.05)


# --------------------------------------------------------------------------------------------------- the tables


def measured(peer: str, tokens_per_second: float, workload: str = "w2", **more: object) -> object:
    return comparison.Measurement(
        **{
            "peer": peer,
            "workload": workload,
            "num_output_tokens": 100,
            "tokens_per_second": tokens_per_second,
            "wall_seconds": 100 / tokens_per_second,
            "load_seconds": 1.5,
            "cpu_seconds": 2.0,
            "peak_rss_bytes": 3 * 2**20,
            **more,
        }
    )


def test_speeds_are_medians_and_their_ratio() -> None:
    rounds = [measured("octavo", speed) for speed in (60.0, 80.0, 70.0)]
    rounds += [measured("transformers", speed) for speed in (10.0, 40.0, 20.0)]
    assert "| w2 | tokens/s | 70.0 (60.0-80.0) | 20.0 (10.0-40.0) | 3.50 |" in comparison.speed_table(rounds)


def test_ratio_of_times_is_turned_so_that_more_is_better() -> None:
    pair = [measured("octavo", 5.0, ttft_seconds=0.1), measured("transformers", 5.0, ttft_seconds=0.2)]
    assert "| w2 | TTFT s | 0.100 | 0.200 | 2.00 |" in comparison.speed_table(pair)


def test_peer_that_was_not_measured_leaves_its_cells_empty() -> None:
    assert "| w2 | tokens/s | 5.0 |  |  |" in comparison.speed_table([measured("octavo", 5.0)])


def test_resources_are_in_their_units() -> None:
    table = comparison.resource_table([measured("octavo", 5.0, kv_waste=0.0314, others_share=0.5)])
    assert table.splitlines()[-1] == "| w2 | octavo | 20.0 | 2.0 | 1.5 | 3 | 3.1% | 50% |"


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    ours = [[1, 2, 3, 4], [1, 2, 3, 4], [5, 6]]
    theirs = [[1, 2, 3, 4], [1, 2, 9, 4], [7, 6]]
    assert comparison.agreement(ours, theirs) == pytest.approx(
        {"first_token": 2 / 3, "common_prefix": (1 + 0.5 + 0) / 3, "whole": 1 / 3}
    )


def test_sampled_outputs_are_not_compared() -> None:
    assert comparison.agreements([measured("octavo", 5.0), measured("transformers", 5.0)]) == {}


def test_rounds_alternate_between_the_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(
        cpu, "run_worker", lambda peer, name, model, args: ran.append((name, peer)) or measured(peer, 5.0)
    )
    args = argparse.Namespace(rounds=2, workloads=["w1", "w2"], peers=["octavo", "transformers"])
    assert len(list(cpu.run_rounds("model", args))) == 8
    assert [peer for _, peer in ran] == ["octavo", "transformers"] * 4
    assert [name for name, _ in ran] == ["w1", "w1", "w2", "w2"] * 2


# -------------------------------------------------------------------------------------------------- the baseline


def test_padded_batches_of_transformers_give_what_each_prompt_gives_alone(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the baseline is Hugging Face transformers")
    transformers.set_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    peer = peers.TransformersPeer(str(tmp_path), "float32", batch_size=2)

    requests = [
        workload.WorkloadRequest(prompt_token_ids=prompt, num_output_tokens=num_tokens)
        for prompt, num_tokens in (([3, 4, 5], 6), ([7], 3), ([9, 8], 5))
    ]
    together = peer.answer(workload.Workload(name="all", description="", requests=requests))
    alone = [peer.answer(workload.Workload(name="one", description="", requests=[each])) for each in requests]
    assert [len(token_ids) for token_ids in together.token_ids] == [6, 3, 5]
    assert together.token_ids == [answer.token_ids[0] for answer in alone]
    assert together.ttft_seconds is None
    assert all(0 < answer.ttft_seconds < answer.wall_seconds for answer in alone)


# --------------------------------------------------------------------------------------------------- the results


def faults(path: Path) -> list[str]:
    """What a result's JSON file lacks, or its Markdown file does not say."""
    result = json.loads(path.read_text())
    text = path.with_suffix(".md").read_text()
    wanted = {"date", "command", "threads", "machine", "versions"}
    wanted |= (
        {"measurements", "agreement"}
        if path.name[len("2026-11-23-") :].startswith("cpu")
        else {"served", "capacity_tokens_per_second"}
    )
    lacking = sorted(wanted - set(result))
    if "commit" not in result.get("versions", {}):
        lacking.append("commit")
    if not (result["date"] in text and result["command"] in text):
        lacking.append("date and command in the text")
    return [f"{path.name} lacks: {what}" for what in lacking]


def test_results_in_the_repository_are_whole() -> None:
    results = [
        path for kind in ("cpu", "queueing") for path in (BENCHMARKS / "results").glob(f"????-??-??-{kind}*.json")
    ]
    assert [fault for path in results for fault in faults(path)] == []


def test_cpu_result_is_whole(tmp_path: Path) -> None:
    pair = [measured(peer, 5.0, details={"attention": "torch"}, token_ids=[[1, 2]]) for peer in comparison.PEERS]
    circumstances = report.circumstances(threads=2)
    path = report.result_path("cpu", tmp_path)
    report.write_result(path, comparison.result(pair, circumstances), comparison.markdown(pair, circumstances))
    assert faults(Path(f"{path}.json")) == []
    content = json.loads(Path(f"{path}.json").read_text())
    assert content["agreement"]["w2"]["whole"] == 1
    assert all("token_ids" not in row for row in content["measurements"])


def test_queueing_result_is_whole_and_says_static_over_continuous(tmp_path: Path) -> None:
    stream = [(0.0, 5), (1.5, 1)]
    served = {
        name: queueing.summary(open_loop.Served(timings=serve(FakeEngine(), stream, batch_size), seconds=6.0))
        for name, batch_size in (("continuous", None), ("static", 16))
    }
    result = {
        **report.circumstances(threads=2),
        "components": {"attention": "torch"},
        "workload": "w2",
        "num_requests": 2,
        "rounds": 1,
        "load": 0.7,
        "batch_size": 16,
        "capacity_tokens_per_second": 1.0,
        "requests_per_second": 0.2,
        "served": served,
    }
    path = report.result_path("queueing", tmp_path)
    report.write_result(path, result, queueing.markdown(result))
    assert faults(Path(f"{path}.json")) == []
    assert "| queue time s, mean | 0.250 | 1.750 | 7.0 |" in Path(f"{path}.md").read_text()


def test_second_result_of_a_day_does_not_replace_the_first(tmp_path: Path) -> None:
    first = report.result_path("cpu", tmp_path)
    report.write_result(first, {}, "")
    second = report.result_path("cpu", tmp_path)
    assert second.name == f"{first.name}-2"
