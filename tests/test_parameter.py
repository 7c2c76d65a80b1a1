"""LayerFactory.parameter: a tensor of the checkpoint that is in no other layer."""

from __future__ import annotations

import pytest
import torch

from octavo.builtin.torch_attention import TorchAttention
from octavo.builtin.torch_kernels import TorchKernels
from octavo.builtin.unquantized import Unquantized
from octavo.errors import CheckpointError
from octavo.interfaces import LinearKernels
from octavo.nn.factory import DeviceLayerFactory
from octavo.nn.weights import WeightLoader
from octavo.plugins.specs import AttentionNeed


def factory_for(loader: WeightLoader, dtype: torch.dtype = torch.float32, num_ranks: int = 1) -> DeviceLayerFactory:
    need = AttentionNeed(num_heads=2, num_kv_heads=2, head_dim=4, block_size=16)
    return DeviceLayerFactory(
        Unquantized({}, dtype, "cpu", {}, LinearKernels({})),
        TorchAttention(need),
        TorchKernels(need),
        loader,
        num_ranks,
    )


def test_a_parameter_is_the_checkpoints_tensor_in_the_models_dtype() -> None:
    loader = WeightLoader()
    scale = factory_for(loader, torch.bfloat16).parameter("model.norm.scale", (2, 3))
    given = torch.randn(2, 3)
    loader.load([("model.norm.scale", given)])
    assert torch.equal(scale(), given.bfloat16())


def test_a_parameter_of_another_shape_is_refused_by_name() -> None:
    loader = WeightLoader()
    factory_for(loader).parameter("model.norm.scale", (3,))
    with pytest.raises(CheckpointError, match=r"model\.norm\.scale is \[4\], the configuration makes it \[3\]"):
        loader.load([("model.norm.scale", torch.randn(4))])


def test_a_parameter_is_whole_on_every_device_and_counted() -> None:
    loader = WeightLoader()
    factory = factory_for(loader, num_ranks=2)
    factory.parameter("model.norm.scale", (2, 3))
    assert [one.shard for one in loader.expected["model.norm.scale"]] == [None]
    assert factory.num_weights == 6
