"""octavo bench: the field's numbers from times, prompts by a seed or from a file, the table and the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_model import MAX_POSITIONS, SPECIAL_TOKENS, write_tiny_llama

from octavo import SamplingParams
from octavo.bench.measure import Spread, measure_latency, measure_throughput, spread
from octavo.bench.prompts import random_prompts, read_prompts
from octavo.cli import bench, main
from octavo.errors import ConfigError
from octavo.input_processor import Prompt
from octavo.outputs import CompletionOutput, RequestMetrics, RequestOutput

TTFT, GAP = 0.5, 0.125


class FakeLLM:
    """Gives every prompt `num_tokens`, the first after TTFT and each other after GAP, on a clock of its own."""

    def __init__(self, num_tokens: int) -> None:
        self.now = 1000.0
        self.num_tokens = num_tokens
        self.batches: list[list[Prompt]] = []

    def clock(self) -> float:
        return self.now

    def generate(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams, *, use_tqdm: bool
    ) -> list[RequestOutput]:
        self.batches.append(list(prompts))
        outputs = [self._output(prompt) for prompt in prompts]
        for _ in self._run(outputs):
            pass
        return outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams) -> Iterator[RequestOutput]:
        self.batches.append([prompt])
        output = self._output(prompt)
        for _ in self._run([output]):
            yield output

    def _output(self, prompt: Any) -> RequestOutput:
        return RequestOutput(
            request_id="0",
            prompt=None,
            prompt_token_ids=list(prompt),
            outputs=[CompletionOutput(index=0)],
            finished=False,
            metrics=RequestMetrics(arrival_time=self.now),
        )

    def _run(self, outputs: list[RequestOutput]) -> Iterator[None]:
        for index in range(self.num_tokens):
            self.now += GAP if index else TTFT
            for output in outputs:
                assert output.metrics is not None
                output.outputs[0].token_ids.append(index)
                output.metrics.last_token_time = self.now
                if index == 0:
                    output.metrics.first_token_time = self.now
            yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of the test's own."""
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))


# -------------------------------------------------------------------------------------------------- arithmetic


def test_throughput_is_sums_over_the_time_of_all() -> None:
    llm = FakeLLM(num_tokens=5)
    measured = measure_throughput(llm, [[1] * 6, [2] * 4], SamplingParams(), llm.clock)
    seconds = TTFT + 4 * GAP
    assert measured.elapsed_seconds == seconds == 1.0
    assert (measured.num_prompts, measured.num_prompt_tokens, measured.num_output_tokens) == (2, 10, 10)
    assert (measured.requests_per_second, measured.output_tokens_per_second) == (2.0, 10.0)
    assert measured.total_tokens_per_second == 20.0
    assert measured.ttft_seconds == Spread(mean=TTFT, median=TTFT, p99=TTFT)
    assert measured.tpot_seconds == Spread(mean=GAP, median=GAP, p99=GAP)


def test_a_single_token_has_no_time_for_each_after_the_first() -> None:
    llm = FakeLLM(num_tokens=1)
    assert measure_throughput(llm, [[1]], SamplingParams(), llm.clock).tpot_seconds is None


def test_latency_is_of_whole_batches() -> None:
    llm = FakeLLM(num_tokens=5)
    measured = measure_latency(llm, [[[1], [2]], [[3], [4]]], SamplingParams(), llm.clock)
    assert llm.batches == [[[1], [2]], [[3], [4]]]
    assert measured.latencies_seconds == (1.0, 1.0)
    assert measured.latency_seconds == Spread(mean=1.0, median=1.0, p99=1.0)
    assert (measured.batch_size, measured.num_output_tokens) == (2, 20)
    assert measured.itl_seconds is None


def test_batches_of_one_are_streamed_and_their_gaps_pooled() -> None:
    llm = FakeLLM(num_tokens=5)
    measured = measure_latency(llm, [[[1]], [[2]]], SamplingParams(), llm.clock)
    assert measured.latencies_seconds == (1.0, 1.0)
    assert measured.itl_seconds == Spread(mean=GAP, median=GAP, p99=GAP)
    assert measured.ttft_seconds.mean == TTFT


def test_spread_is_mean_median_and_the_99th_percentile() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0]) == Spread(mean=2.5, median=2.5, p99=pytest.approx(3.97))
    assert spread([7.0]) == Spread(mean=7.0, median=7.0, p99=7.0)


# ------------------------------------------------------------------------------------------------------ prompts


def test_random_prompts_repeat_with_their_seed_and_share_no_beginning() -> None:
    prompts = random_prompts(50, 16, 1000, seed=1, avoid={0, 1})
    assert prompts == random_prompts(50, 16, 1000, seed=1, avoid={0, 1})
    assert prompts != random_prompts(50, 16, 1000, seed=2, avoid={0, 1})
    assert {len(prompt) for prompt in prompts} == {16}
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 50
    assert all(2 <= token_id < 1000 for prompt in prompts for token_id in prompt)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "first\n\nsecond\nthird\n"), ("a.jsonl", '{"prompt": "first"}\n{"prompt": "second", "x": 1}\n')],
)
def test_a_dataset_is_lines_of_text_or_of_json(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name, 2) == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "cannot be read as a dataset"),
        ("a.jsonl", '{"text": "a"}', "cannot be read as a dataset: KeyError"),
        ("a.jsonl", "[1]", "cannot be read as a dataset"),
        ("a.jsonl", '{"prompt": 7}', "some that are no text"),
        ("a.txt", "\n", "has no prompts"),
        ("a.txt", "one", "has 1 prompts; --num-prompts asks for 2"),
        ("b.txt", "", "has no prompts"),
    ],
)
def test_a_bad_dataset_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name, 2)
    with pytest.raises(ConfigError, match="cannot be read as a dataset: FileNotFoundError"):
        read_prompts(tmp_path / "gone.txt")


# ------------------------------------------------------------------------------------------------------ command


def measure(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_throughput_of_a_model_as_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--input-len", "20", "--output-len", "9", "--num-prompts", "5"]
    output = tmp_path / "result.json"
    found = measure(capsys, "throughput", str(folder), *sizes, "--dtype", "float32", "--output", str(output))
    assert json.loads(output.read_text()) == found
    assert (found["measured"], found["model"], found["dtype"]) == ("throughput", str(folder), "float32")
    assert (found["num_prompts"], found["num_prompt_tokens"], found["num_output_tokens"]) == (5, 100, 45)
    assert found["output_tokens_per_second"] == pytest.approx(45 / found["elapsed_seconds"])
    assert found["total_tokens_per_second"] == pytest.approx(145 / found["elapsed_seconds"])
    assert 0 < found["ttft_seconds"]["median"] < found["elapsed_seconds"]
    assert 0 < found["tpot_seconds"]["median"] < found["elapsed_seconds"] / 8
    assert found["machine"]["packages"]["torch"]
    assert found["components"]["model"] == "builtin/llama"
    assert found["engine"]["block_size"] == 16


def test_latency_of_a_model_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--num-iters", "3", "--num-iters-warmup", "2", "--output-len", "6"]
    found = measure(capsys, "latency", str(folder), "--batch-size", "2", *runs)
    assert len(found["latencies_seconds"]) == 3
    assert (found["num_prompt_tokens"], found["num_output_tokens"]) == (3 * 2 * 32, 3 * 2 * 6)
    assert found["itl_seconds"] is None
    assert measure(capsys, "latency", str(folder), "--batch-size", "1", *runs)["itl_seconds"]["mean"] > 0


def test_the_table_has_every_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", str(folder), "--input-len", "9", "--output-len", "4"]) == 0
    printed = capsys.readouterr().out
    for label in ("requests/s", "output tokens/s", "total tokens/s", "TTFT", "TPOT"):
        assert f"\n  {label} " in printed
    runs = ["--batch-size", "1", "--num-iters", "2", "--num-iters-warmup", "0", "--output-len", "4"]
    assert main(["bench", "latency", str(folder), *runs]) == 0
    printed = capsys.readouterr().out
    for label in ("latency", "TTFT", "TPOT", "ITL"):
        assert f"\n  {label} " in printed


def test_warm_up_comes_first_with_prompts_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = FakeLLM(num_tokens=4)
    llm.manifest = llm  # type: ignore[attr-defined]
    llm.config = llm  # type: ignore[attr-defined]
    llm.seed, llm.vocab_size, llm.special_ids = 3, 100, range(len(SPECIAL_TOKENS))  # type: ignore[attr-defined]
    llm.get_tokenizer = lambda: llm  # type: ignore[attr-defined]
    parser = bench.argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(["latency", "--input-len", "8"])
    args.batch_size, args.num_iters_warmup, args.num_iters = 2, 2, 3
    measured = bench._latency(llm, args, SamplingParams())  # type: ignore[arg-type]
    assert len(measured.latencies_seconds) == 3
    assert len(llm.batches) == 5
    assert len({tuple(prompt) for batch in llm.batches for prompt in batch}) == 10  # type: ignore[arg-type]


def test_a_dataset_is_measured_whole(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = tmp_path / "prompts.txt"
    dataset.write_text("abc\nd\n")
    found = measure(capsys, "throughput", str(folder), "--dataset", str(dataset), "--output-len", "3")
    assert (found["num_prompts"], found["num_prompt_tokens"]) == (2, 4 + 2)
    assert found["dataset"] == str(dataset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--batch-size", "2"], "`octavo bench throughput` has no --batch-size"),
        (["latency", "--num-prompts", "2"], "`octavo bench latency` has no --num-prompts"),
        (["throughput", "--dataset", "x", "--input-len", "2"], "--input-len is of random prompts"),
        (["throughput", "--output", "/gone/result.json"], "there is no folder /gone"),
        (["throughput", "--input-len", str(MAX_POSITIONS)], f"more than max_model_len={MAX_POSITIONS}"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, "--model", str(folder)]) == 1
    assert message in capsys.readouterr().err


def test_two_measurements_at_once_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fcntl", reason="this system has no locks of this kind")
    with bench._alone():
        assert main(["bench", "throughput", str(folder)]) == 1
    assert "Another `octavo bench` is running" in capsys.readouterr().err
