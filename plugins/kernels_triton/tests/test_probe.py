"""Where the Triton kernels are chosen."""

from __future__ import annotations

import pytest
import torch

from octavo.plugins.host import discover
from octavo.plugins.registry import Registry
from octavo.plugins.specs import Need

CPU, CUDA = Need(device="cpu", dtype="bfloat16"), Need(device="cuda", dtype="bfloat16")


@pytest.mark.parametrize(("need", "chosen"), [(CPU, "builtin/torch"), (CUDA, "kernels-triton/triton")])
def test_auto_takes_it_on_a_gpu_and_plain_torch_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, need: Need, chosen: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Registry(discover()).select("kernels", need).full_name == chosen
