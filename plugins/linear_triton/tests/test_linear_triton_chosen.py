"""Where the Triton kernels of packed weights are chosen."""

from __future__ import annotations

import pytest
import torch

from octavo.plugins.host import discover
from octavo.plugins.registry import Registry
from octavo.plugins.specs import LinearKernelNeed


@pytest.mark.parametrize("form", ["affine", "lookup"])
def test_auto_takes_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the plan is for another machine
    need = LinearKernelNeed(device="cuda", dtype="bfloat16", form=form)
    assert Registry(discover()).select("linear_kernel", need).full_name == f"linear-triton/triton-{form}"


@pytest.mark.parametrize("form", ["affine", "lookup"])
def test_cpu_is_refused_and_told_of_the_interpreter(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    need = LinearKernelNeed(device="cpu", dtype="bfloat16", form=form)
    answers = {one.spec.name: one.reasons for one in Registry(discover()).ask("linear_kernel", need)}
    (reason,) = answers[f"triton-{form}"]
    assert "TRITON_INTERPRET=1" in reason
