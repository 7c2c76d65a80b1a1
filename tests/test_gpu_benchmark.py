"""benchmarks/gpu.py: the whole of it in Triton's interpreter, what it counts, and Octavo found uninstalled."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.interfaces.attention import AttentionParameters
from octavo.interfaces.executor import ScheduledRow, Step
from octavo.plugins.specs import AttentionNeed

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))  # they are scripts, not a package

gpu, environment, kernels_check, lengths, part, profile, scene, step_times, tables = map(
    importlib.import_module,
    (
        "gpu",
        *(f"gpu_parts.{name}" for name in ("environment", "kernels_check", "lengths", "part", "profile", "scene")),
        "gpu_parts.step_times",
        "gpu_parts.tables",
    ),
)


# ------------------------------------------------------------------------------------------------ the whole run


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], str]:
    """The process, its JSON and its Markdown."""
    path = tmp_path_factory.mktemp("gpu") / "result"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, json.loads(Path(f"{path}.json").read_text()), Path(f"{path}.md").read_text()


def test_whole_script_runs_in_the_interpreter_and_finds_nothing_wrong(tiny_run: Any) -> None:
    done, result, _ = tiny_run
    assert result["not_run"] == []
    assert done.returncode == 0, done.stderr[-2000:]


def test_run_fills_every_table_but_the_one_of_gpu_kernels(tiny_run: Any) -> None:
    _, result, _ = tiny_run
    assert {table.name for table in tables.TABLES} - set(result["tables"]) == {"longest"}
    attention, linears = {"triton-flash", "triton-paged"}, {"triton-affine", "triton-lookup"}
    assert {row["kernel"] for row in result["tables"]["correctness"]} == {"triton", *attention, *linears}
    assert {row["kernel"] for row in result["tables"]["linears"]} == linears
    assert {row["model"] for row in result["tables"]["tokens"]} == {"llama", "qwen2"}


def test_tiny_run_says_that_it_measures_nothing_and_judges_no_target(tiny_run: Any) -> None:
    _, result, text = tiny_run
    assert result["is_measurement"] is False
    assert "**No measurement.**" in text
    assert [row for rows in result["tables"].values() for row in rows if row.get("met") is not None] == []


def test_result_says_on_what_and_how_it_was_made(tiny_run: Any) -> None:
    _, result, text = tiny_run
    assert result["command"].startswith("python benchmarks/gpu.py --device cpu --tiny")
    assert {"octavo", "torch", "triton", "transformers", "numpy", "python", "commit"} <= set(result["versions"])
    assert set(result["part_seconds"]) == {process.name for group in gpu.GROUPS for process in group}
    assert result["command"] in text


def test_machine_without_a_gpu_is_told_what_can_be_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"no NVIDIA GPU.*--device cpu --tiny"):
        gpu.main()


# ------------------------------------------------------------------------------------ parts that fail or run late


@pytest.fixture
def one_part(tmp_path: Path) -> Any:
    return part.Part(
        name="a part",
        device="cpu",
        tiny=True,
        quick=False,
        num_layers=2,
        scratch=tmp_path,
        seconds=60.0,
        output=tmp_path / "rows.jsonl",
    )


def test_case_that_fails_is_reported_and_the_next_has_its_turn(one_part: Any) -> None:
    one_part.attempt("first", lambda: 1 / 0)
    one_part.attempt("second", lambda: one_part.add("engine", value=1.0))
    fault, row = part.read_lines(one_part.output)
    assert (fault["not_run"], fault["failed"]) == ("first", True)
    assert "ZeroDivisionError" in fault["reason"]
    assert row == {"table": "engine", "row": {"value": 1.0}}


def test_case_that_time_does_not_allow_is_not_begun(one_part: Any) -> None:
    one_part.attempt("long", lambda: one_part.add("engine", value=1.0), seconds=61.0)
    (line,) = part.read_lines(one_part.output)
    assert (line["not_run"], line["failed"]) == ("long", False)
    assert "of the part's 60 seconds were left" in line["reason"]


def test_rows_of_a_part_that_was_killed_while_writing_are_read_but_the_last(one_part: Any) -> None:
    one_part.add("engine", value=1.0)
    with one_part.output.open("a") as file:
        file.write('{"table": "engi')
    assert [line["row"] for line in part.read_lines(one_part.output)] == [{"value": 1.0}]


def test_part_that_crashes_or_hangs_leaves_its_rows_and_those_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "crashes": "import os, pathlib; pathlib.Path(OUTPUT).write_text(ROW); os.abort()",
        "hangs": "import time, pathlib; pathlib.Path(OUTPUT).write_text(ROW); time.sleep(600)",
        "works": "import pathlib; pathlib.Path(OUTPUT).write_text(ROW)",
    }
    row = json.dumps({"table": "engine", "row": {"measure": "decode"}}) + "\n"

    def command(args: object, process: Any, seconds: float, scratch: Path) -> list[str]:
        program = programs[process.name].replace("OUTPUT", repr(str(scratch / f"{process.name}.jsonl")))
        return [sys.executable, "-c", program.replace("ROW", repr(row))]

    monkeypatch.setattr(gpu, "worker_command", command)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", -4.0)
    run = gpu.Run(args=argparse.Namespace(quick=False, tiny=False), circumstances={}, path=tmp_path / "result")
    group = [gpu.Process(name=name, module="", seconds=6.0, quick_seconds=1.0) for name in programs]
    gpu.run_group(run, group, tmp_path, dict(os.environ), 100.0)
    assert len(run.rows["engine"]) == 3
    assert {line["not_run"]: line["reason"].split(";")[0] for line in run.not_run} == {
        "crashes": "it ended with status -6",
        "hangs": "it did not end in its time and was ended",
    }


def test_part_for_which_no_time_is_left_is_not_started(tmp_path: Path) -> None:
    run = gpu.Run(args=argparse.Namespace(quick=False, tiny=False), circumstances={}, path=tmp_path / "result")
    late = gpu.Process(name="late", module="", seconds=60.0, quick_seconds=30.0)
    gpu.run_group(run, [late], tmp_path, {}, 7.0)
    assert [(line["not_run"], line["reason"]) for line in run.not_run] == [("late", "7 seconds were left")]


# ------------------------------------------------------------------------------------------ found uninstalled


@pytest.fixture
def wheels(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "nowhere_installed-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("nowhere_installed.py", "VALUE = 5\n")
    return folder


def test_plugins_of_the_checkout_are_found_without_being_installed(tmp_path: Path) -> None:
    path = environment.python_path(tmp_path / "made", tmp_path / "no wheels")
    code = (
        "import sys; sys.path = [one for one in sys.path if 'site-packages' not in one]\n"
        "from importlib.metadata import entry_points, version\n"
        "from importlib.util import find_spec\n"
        "assert find_spec('octavo') and find_spec('octavo_model_qwen')\n"
        "print(version('octavo'), *sorted(one.name for one in entry_points(group='octavo')))"
    )
    environ = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    version, *names = done.stdout.split()
    assert version == importlib.metadata.version("octavo")
    assert names == sorted(folder.parent.name.replace("_", "-") for folder in ROOT.glob("plugins/*/pyproject.toml"))


def test_wheels_are_unpacked_where_one_of_them_is_not_installed(tmp_path: Path, wheels: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    environment.unpack_missing(wheels, site)
    assert (site / "nowhere_installed.py").exists()


def test_wheels_are_left_alone_where_all_are_installed(tmp_path: Path, wheels: Path) -> None:
    next(wheels.iterdir()).rename(wheels / "pluggy-0.1-py3-none-any.whl")
    environment.unpack_missing(wheels, tmp_path)
    assert not (tmp_path / "nowhere_installed.py").exists()


def test_wheels_for_another_python_are_refused_with_what_to_type(tmp_path: Path, wheels: Path) -> None:
    next(wheels.iterdir()).rename(wheels / "nowhere_installed-1.0-cp39-cp39-manylinux2014_x86_64.whl")
    with pytest.raises(SystemExit, match=r'make gpu-wheels ARGS="--python-version 3\.\d+"'):
        environment.unpack_missing(wheels, tmp_path)


# -------------------------------------------------------------------------------------------------- what it counts


def test_conversations_have_the_lengths_that_are_stated() -> None:
    given = lengths.conversations(1000, 32000)
    inputs, outputs = ([len(one.prompt_token_ids) for one in given], [one.num_output_tokens for one in given])
    assert 195 < sum(inputs) / 1000 < 205
    assert 195 < sum(outputs) / 1000 < 210
    assert (min(inputs + outputs), max(inputs + outputs)) == (4, 1024)


def test_conversations_are_the_same_in_every_run_and_a_sample_is_their_beginning() -> None:
    assert lengths.conversations(200, 1000) == lengths.conversations(200, 1000)


def test_decode_speed_is_of_the_longest_stretch_in_which_just_these_requests_decode() -> None:
    times = step_times.StepTimes()
    for rows, tokens in [(2, 40), *[(2, 2)] * 8, (3, 3), *[(2, 2)] * 3]:
        times(Step(step_id=0, rows=[_row(1)] * (rows - 1) + [_row(tokens - rows + 1)]))
    times.times = [float(index) * 0.5 for index in range(len(times.times))]
    speed, num_steps = times.decode_speed(2)
    assert (speed, num_steps) == (4.0, 5)  # of eight steps a quarter is left out; 2 tokens each half second


def test_decode_speed_is_0_where_they_never_decode_together() -> None:
    assert step_times.StepTimes().decode_speed(4) == (0.0, 0)


def _row(num_tokens: int) -> ScheduledRow:
    return ScheduledRow(request_id="r", num_computed_tokens=0, num_tokens=num_tokens, new_block_ids=[], samples=True)


def test_gpu_is_busy_while_at_least_one_kernel_runs() -> None:
    spans = [(0, 10), (5, 10), (12, 2), (20, 5)]  # two that overlap, one inside them, one apart
    assert profile.busy_microseconds([{"ts": start, "dur": length} for start, length in spans]) == 20


def test_profile_tells_idle_time_and_each_kind_of_work(one_part: Any) -> None:
    kernel = {"cat": "kernel", "dur": 30.0}
    events = [
        {**kernel, "name": "nvjet_tst_gemm", "ts": 0.0},
        {**kernel, "name": "paged_decode_kernel", "ts": 40.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 90.0, "dur": 10.0},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 500.0},
    ]
    profile.report(one_part, batch=1, num_steps=2, events=events)
    rows = {line["row"].get("what"): line["row"] for line in part.read_lines(one_part.output)}
    assert rows["GPU idle"]["share"] == pytest.approx(0.3)
    assert rows["GPU idle"]["met"] is False
    assert [rows[what]["us_per_step"] for what in ("matrix products", "attention", "copies")] == [15.0, 15.0, 5.0]


# ---------------------------------------------------------------------------------------- what it compares with


def test_scene_agrees_with_the_reference_backend_on_mixed_padded_steps() -> None:
    need = AttentionNeed(
        device="cpu",
        dtype="float32",
        features=frozenset({"prefill", "decode"}),
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        block_size=16,
    )
    backend = scene.make_backend("torch", need)
    made = scene.make_scene(backend, [(5, 1), (33, 1), (0, 9), (20, 17)], "cpu", num_padding=2)
    parameters = AttentionParameters(scale=0.125)
    wanted = made.wanted(parameters)
    before = tuple(buffer.clone() for buffer in made.cache)
    state = scene.make_state(backend, made.layout)
    backend.plan(made.layout, state)
    found = backend.forward(made.query, made.key, made.value, made.cache, state, parameters)
    padding = wanted.isnan().any(dim=1)
    assert padding.nonzero().flatten().tolist() == [2, 3]
    assert (found[~padding] - wanted[~padding]).abs().max() < 2e-5
    assert made.fault_of_cache(before, keys_rotated=False) == ""


def test_scene_finds_a_slot_that_was_not_written_and_one_that_was_written_wrongly() -> None:
    need = AttentionNeed(device="cpu", dtype="float32", num_heads=2, num_kv_heads=1, head_dim=64, block_size=16)
    made = scene.make_scene(scene.make_backend("torch", need), [(5, 1)], "cpu")
    before = tuple(buffer.clone() for buffer in made.cache)
    assert made.fault_of_cache(before, keys_rotated=True) == "a key was not written"
    for buffer, new in zip(made.cache, (made.key, made.value), strict=True):
        buffer.flatten(0, 1)[made.layout.slot_mapping] = new
    assert made.fault_of_cache(before, keys_rotated=False) == ""
    made.cache[1][0, 0] = 1.0
    assert made.fault_of_cache(before, keys_rotated=False) == "a value was written where none belongs"


@pytest.mark.parametrize("rule", kernels_check.RULES)
def test_sampling_reference_accepts_the_reference_kernels_and_no_other_token(rule: str) -> None:
    _, kernels = kernels_check.make_kernels("cpu", "float32", "torch")
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)) * 4
    inputs = kernels_check.sampling_inputs(8, rule, "cpu")
    found = kernels.sample(logits, inputs)
    assert float(kernels_check.score_errors(logits, inputs, found).max()) < kernels_check.SCORE_ERROR
    assert float(kernels_check.score_errors(logits, inputs, (found + 1) % 500).min()) > kernels_check.SCORE_ERROR
