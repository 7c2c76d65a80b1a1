"""Compiled loops over few rows, and what happens where nothing can be compiled."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_scene import Scene, make_adapter, wanted

from octavo_lora import native
from octavo_lora.torch_backend import TorchLora

POSITIONS = [0] * 9 + [1] * 70 + [-1, 2, 2, 2]
"""Tiles that are full, and not; one adapter of more rows than are left to the loops; one row without."""


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    native.add_rows_by_adapter.cache_clear()
    yield
    native.add_rows_by_adapter.cache_clear()


def make_scene() -> Scene:
    scene = Scene(in_features=100, outs=(300, 7), max_rank=20, dtype=torch.bfloat16)
    scene.adapters = [
        make_adapter(scene, (20, 3), seed=1),
        make_adapter(scene, (5, 5), seed=2),
        make_adapter(scene, (0, 17), seed=3, scale=True, shift=True),
    ]
    return scene


def computed(scene: Scene, backend: TorchLora) -> torch.Tensor:
    x, output = scene.inputs(len(POSITIONS))
    backend.plan(np.array(POSITIONS, np.int32))
    return backend.apply(scene.slot, x, output.clone())


def check(found: torch.Tensor, scene: Scene) -> None:
    expected = wanted(scene, POSITIONS, *scene.inputs(len(POSITIONS)))
    assert (found.double() - expected).abs().max() <= 1e-2 * expected.abs().max()


def test_loops_are_compiled_once_and_round_the_output_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        return  # then the two tests below say all there is
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scene = make_scene()
    found = computed(scene, scene.backend(TorchLora))
    check(found, scene)
    few = [row for row, position in enumerate(POSITIONS) if position in (0, 2)]
    expected = wanted(scene, POSITIONS, *scene.inputs(len(POSITIONS)))[few]
    # Half a step of bfloat16, and float32 sums.
    assert ((found[few].double() - expected).abs() <= expected.abs() * 2**-8 + 1e-4).all()
    (library,) = tmp_path.rglob("*.so")
    made = library.stat().st_mtime_ns
    native.add_rows_by_adapter.cache_clear()
    assert native.add_rows_by_adapter() is not None
    assert library.stat().st_mtime_ns == made


def test_without_a_compiler_torch_computes_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    scene = make_scene()
    with caplog.at_level(logging.WARNING):
        check(computed(scene, scene.backend(TorchLora)), scene)
    assert "no C++ compiler" in caplog.text


def test_compiler_that_fails_is_said_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    with caplog.at_level(logging.WARNING):
        assert native.add_rows_by_adapter() is None
    assert "/bin/false could not make" in caplog.text
