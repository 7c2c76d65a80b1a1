"""WeightLoader: every tensor reaches who asked for it, and every fault of a checkpoint is named at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.errors import CheckpointError, ConfigError
from octavo.nn.weights import Shard, WeightLoader


def expecting(**shapes: tuple[int, ...]) -> tuple[WeightLoader, dict[str, Tensor]]:
    """A loader for float32 tensors of these names and shapes, and where they arrive."""
    loader, received = WeightLoader(), dict[str, Tensor]()
    for name, shape in shapes.items():
        loader.expect(name, shape, torch.float32, lambda tensor, name=name: received.__setitem__(name, tensor))
    return loader, received


def test_a_tensor_arrives_in_the_dtype_that_was_asked_for() -> None:
    loader, received = expecting(a=(2, 3))
    loader.load([("a", torch.full((2, 3), 1.5, dtype=torch.float16))])
    torch.testing.assert_close(received["a"], torch.full((2, 3), 1.5))
    assert loader.num_bytes == 2 * 3 * 4


def test_two_layers_may_ask_for_one_tensor() -> None:
    loader, received = expecting(a=(2,))
    loader.expect("a", (2,), torch.float32, lambda tensor: received.__setitem__("again", tensor))
    loader.load([("a", torch.ones(2))])
    assert received["a"].data_ptr() == received["again"].data_ptr()


def test_tensors_of_ignored_names_are_passed_over() -> None:
    loader, received = expecting(a=(1,))
    tensors = [("layers.3.rotary_emb.inv_freq", torch.ones(8)), ("a", torch.ones(1)), ("lm_head.weight", torch.ones(9))]
    loader.load(tensors, ignored=("*.rotary_emb.inv_freq", "lm_head.weight"))
    assert list(received) == ["a"]


def test_missing_unexpected_and_misshapen_tensors_are_named_in_one_error() -> None:
    loader, _ = expecting(a=(2, 3), b=(4,), c=(5,))
    with pytest.raises(CheckpointError) as caught:
        loader.load([("a", torch.ones(3, 2)), ("b", torch.ones(4)), ("stranger", torch.ones(1))])
    message = str(caught.value)
    assert "1 tensors are missing: c" in message
    assert "1 tensors have no place in this model: stranger" in message
    assert "1 tensors have the wrong shape: a is [3, 2], the configuration makes it [2, 3]" in message


def test_of_many_missing_tensors_some_are_named_and_all_are_counted() -> None:
    loader, _ = expecting(**{f"layer_{index}": (1,) for index in range(50)})
    with pytest.raises(CheckpointError, match=r"50 tensors are missing: layer_0, .*layer_7 \.\.\.\.$"):
        loader.load([])


def test_headers_alone_show_the_faults_that_loading_would_find() -> None:
    tensors = {"a": torch.ones(3, 2), "b": torch.ones(4), "stranger": torch.ones(1)}
    messages = []
    for judge in (
        lambda loader: loader.load(tensors.items()),
        lambda loader: loader.check({name: tuple(tensor.shape) for name, tensor in tensors.items()}),
    ):
        loader, _ = expecting(a=(2, 3), b=(4,), c=(5,))
        with pytest.raises(CheckpointError) as caught:
            judge(loader)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_headers_that_fit_are_no_fault() -> None:
    loader, received = expecting(a=(2, 3))
    loader.check({"a": (2, 3), "rotary.inv_freq": (4,)}, ignored=("*.inv_freq",))
    assert received == {}


def test_what_is_expected_weighs_what_is_loaded() -> None:
    loader, _ = expecting(a=(2, 3), b=(4,))
    loader.expect("a", (2, 3), torch.bfloat16, lambda tensor: None)
    expected_bytes = loader.expected_bytes
    loader.load([("a", torch.ones(2, 3)), ("b", torch.ones(4))])
    assert expected_bytes == loader.num_bytes == 6 * 4 + 4 * 4 + 6 * 2


def test_a_shard_is_cut_along_its_axis_and_rounded_up() -> None:
    assert Shard(axis=1, num_shards=4).shape((5, 10, 7)) == (5, 3, 7)


def test_one_device_of_several_holds_its_shard() -> None:
    loader = WeightLoader()
    loader.expect("a", (8, 6), torch.float16, lambda tensor: None, Shard(axis=0, num_shards=4))
    assert loader.expected_bytes == 2 * 6 * 2


def test_cut_tensors_are_not_loaded_whole() -> None:
    loader = WeightLoader()
    loader.expect("a", (8, 6), torch.float16, lambda tensor: None, Shard(axis=0, num_shards=4))
    with pytest.raises(ConfigError, match=r"shared by several devices .* Set tensor_parallel_size to 1"):
        loader.load([("a", torch.ones(8, 6))])
