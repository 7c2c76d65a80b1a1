"""The tool's own .pt: read as tensors only, chosen for the folders it lies in, refused when it is something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_llama

from octavo import HuggingFaceCheckpoint
from octavo.errors import CheckpointError
from octavo.plugins.registry import default_registry
from octavo.selection import choose_checkpoint
from octavo_quant_squeezellm.checkpoint import SqueezeLLMCheckpoint

STATE: dict[str, Any] = {
    "model.layers.0.mlp.up_proj.qweight": torch.arange(12, dtype=torch.int32).view(4, 3),
    "model.layers.0.mlp.up_proj.lookup_table": torch.linspace(-1, 1, 48).view(3, 16),
    "model.norm.weight": torch.ones(32, dtype=torch.bfloat16),
    "sparse_threshold.model.layers.0.mlp.up_proj": 7,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    torch.save(STATE, tmp_path / "sq-w4.pt")
    return tmp_path


# ------------------------------------------------------------------------------------------------ what is read


def test_tensors_are_those_of_the_state_dict_and_numbers_are_left_out(folder: Path) -> None:
    tensors = dict(SqueezeLLMCheckpoint(str(folder)).tensors())
    wanted = {name: value for name, value in STATE.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == wanted.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, wanted[name])] == []


def test_headers_name_shapes_types_and_bytes_as_safetensors_does(folder: Path) -> None:
    headers = SqueezeLLMCheckpoint(str(folder)).tensor_headers()
    facts = {name.rpartition(".")[2]: (each.shape, each.dtype, each.num_bytes) for name, each in headers.items()}
    assert facts == {
        "qweight": ((4, 3), "I32", 48),
        "lookup_table": ((3, 16), "F32", 192),
        "weight": ((32,), "BF16", 64),
    }


def test_tensors_are_copies_that_do_not_hold_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: dict[str, torch.Tensor] = {}
    load = torch.load

    def record(*args: Any, **kwargs: Any) -> object:
        mapped.update(load(*args, **kwargs))
        return mapped

    monkeypatch.setattr(torch, "load", record)
    tensors = dict(SqueezeLLMCheckpoint(str(folder)).tensors())
    assert [name for name, tensor in tensors.items() if tensor.data_ptr() == mapped[name].data_ptr()] == []


def test_tensors_are_contiguous_however_they_were_saved(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.qweight"
    torch.save(STATE | {name: STATE[name].T.contiguous().T}, folder / "sq-w4.pt")
    tensors = dict(SqueezeLLMCheckpoint(str(folder)).tensors())
    assert tensors[name].is_contiguous()
    assert torch.equal(tensors[name], STATE[name])


def test_configuration_and_tokenizer_are_the_folder_s(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(STATE, tmp_path / "sq-w4.pt")
    checkpoint = SqueezeLLMCheckpoint(str(tmp_path))
    assert checkpoint.config()["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.generation_config() == json.loads((tmp_path / "generation_config.json").read_text())
    assert checkpoint.tokenizer().special_tokens["bos_token"] == "<s>"


# ----------------------------------------------------------------------------------------------- when it is chosen


def chosen(folder: Path) -> str:
    return choose_checkpoint(default_registry(), folder).get().name


def test_folder_with_one_pt_is_chosen(folder: Path) -> None:
    assert chosen(folder) == "squeezellm-pt"


def test_folder_with_safetensors_is_not(folder: Path) -> None:
    (folder / "model.safetensors").touch()
    assert chosen(folder) == "huggingface"


def test_folder_with_bin_is_not_and_is_told_that_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    for name in ("pytorch_model.bin", "optimizer.pt"):
        (tmp_path / name).touch()
    checkpoint = choose_checkpoint(default_registry(), tmp_path).get()
    assert checkpoint.name == "huggingface"
    with pytest.raises(CheckpointError, match=r"only as Python pickles \(optimizer\.pt, pytorch_model\.bin\)"):
        HuggingFaceCheckpoint(str(tmp_path)).tensor_headers()


def test_folder_with_bin_beside_the_pt_is_not(folder: Path) -> None:
    (folder / "pytorch_model.bin").touch()
    assert chosen(folder) == "huggingface"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state_0.pt", "training_args.pt"])
def test_folder_whose_one_pt_is_of_a_training_run_is_not(folder: Path, name: str) -> None:
    (folder / "sq-w4.pt").rename(folder / name)
    assert chosen(folder) == "huggingface"


def test_folder_with_two_pts_is_not(folder: Path) -> None:
    (folder / "other.pt").touch()
    assert chosen(folder) == "huggingface"


def test_folder_without_config_is_not(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert choose_checkpoint(default_registry(), folder).error is not None


def test_reasons_say_what_was_found(folder: Path) -> None:
    (folder / "other.pt").touch()
    with pytest.raises(CheckpointError, match=r"has 2 \.pt files \(other\.pt, sq-w4\.pt\)"):
        SqueezeLLMCheckpoint(str(folder))


# ------------------------------------------------------------------------------------------------ what is refused


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda file: torch.save({"a": Fraction(1, 2)}, file), "opening it would run Python code"),
    "a list": (lambda file: torch.save([torch.ones(2)], file), "holds a list; wanted is a state dict"),
    "plain weights": (
        lambda file: torch.save({"model.norm.weight": torch.ones(2)}, file),
        r"none of its 1 entries \(model\.norm\.weight\) is a lookup_table",
    ),
    "a training state": (
        lambda file: torch.save({"epoch": 3, "model": STATE}, file),
        r"none of its 2 entries \(epoch, model\) is a lookup_table",
    ),
    "a note of Git LFS": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "the old format": (
        lambda file: torch.save(STATE, file, _use_new_zipfile_serialization=False),
        "of a torch before 1.6",
    ),
    "a file cut short": (truncate, "cut short"),
    "nothing": (lambda file: file.write_bytes(b""), "cut short"),
    "complex numbers": (
        lambda file: torch.save(STATE | {"x": torch.ones(2, dtype=torch.complex128)}, file),
        r"stores x as torch\.complex128",
    ),
}


@pytest.mark.parametrize(("write", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_other_files_are_refused_with_a_reason(folder: Path, write: Callable[[Path], object], said: str) -> None:
    write(folder / "sq-w4.pt")
    with pytest.raises(CheckpointError, match=said) as caught:
        SqueezeLLMCheckpoint(str(folder)).tensor_headers()
    assert str(folder / "sq-w4.pt") in str(caught.value)


def test_code_in_a_pickle_is_not_run(folder: Path) -> None:
    torch.save({"a.lookup_table": Runs(folder / "ran")}, folder / "sq-w4.pt")
    with pytest.raises(CheckpointError):
        SqueezeLLMCheckpoint(str(folder)).tensor_headers()
    assert not (folder / "ran").exists()


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)
