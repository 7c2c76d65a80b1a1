"""Folders, ids and files that are no adapter's: each is refused, says why, and takes no time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import LIMITS, ModelBase, edit_tensors, save_adapter, tiny_llama

from octavo.errors import AdapterError
from octavo_lora.adapter_files import MAX_CONFIG_BYTES
from octavo_lora.adapter_layout import AdapterLayout
from octavo_lora.hub import CONFIG_FILE, WEIGHTS_FILE
from octavo_lora.reader import read_adapter

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    save_adapter(folder, target_modules=["q_proj"])
    return folder


def refusal(path: object) -> str:
    with pytest.raises(AdapterError) as refused:
        read_adapter(str(path), ModelBase(tiny_llama()), LIMITS)
    return str(refused.value)


def test_a_file_is_no_adapter(adapter: Path) -> None:
    assert "is a file" in refusal(adapter / CONFIG_FILE)


@pytest.mark.parametrize(
    "path", ["/nowhere/at/all", "./missing", "with a\0in/it", "x" * 5000, "a/" + "y" * 300, "", "~nobody-here/a"]
)
def test_a_path_that_leads_nowhere_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(path)


def test_an_id_offline_is_refused_and_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refusal("some-org/some-adapter")
    assert "HF_HUB_OFFLINE" in message
    assert str(tmp_path / "cache") in message


def test_an_id_is_fetched(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, **_: str(adapter))
    info = read_adapter("some-org/some-adapter", ModelBase(tiny_llama()), LIMITS).info
    assert info.rank == 4


def test_a_folder_here_is_never_taken_for_an_id(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter.parent.parent)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    (Path("org") / "name").mkdir(parents=True)
    assert CONFIG_FILE in refusal("org/name")


def test_a_folder_without_configuration_is_refused(adapter: Path) -> None:
    (adapter / CONFIG_FILE).unlink()
    assert f"has no {CONFIG_FILE}" in refusal(adapter)


def test_a_folder_without_weights_is_refused(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).unlink()
    assert f"has no {WEIGHTS_FILE}" in refusal(adapter)


def test_pickled_weights_are_refused(adapter: Path) -> None:
    (adapter / WEIGHTS_FILE).unlink()
    torch.save({}, adapter / "adapter_model.bin")
    assert "pickle" in refusal(adapter)


CONFIGS: dict[str, tuple[bytes, str]] = {
    "garbage": (os.urandom(64), "no JSON"),
    "empty": (b"", "no JSON"),
    "half of it": (b'{"peft_type": "LO', "no JSON"),
    "a list": (b"[1, 2]", "holds a JSON list"),
    "nested too deep": (b"[" * 200_000, "no JSON"),
    "a number of a million digits": (b'{"r": ' + b"9" * 1_000_000 + b"}", "no JSON"),
    "half a character": (b'{"peft_type": "\\ud800"}', "no JSON"),
    "a pointer": (LFS_POINTER, "Git LFS pointer"),
    "huge": (b" " * (MAX_CONFIG_BYTES + 1), "more than"),
    "nothing of peft's": (b"{}", "None"),
    "prefix tuning": (b'{"peft_type": "PREFIX_TUNING"}', "'PREFIX_TUNING'"),
    "another method": (b'{"peft_type": "ADALORA", "r": 8}', "'ADALORA'"),
}


@pytest.mark.parametrize(("data", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_is_none_is_refused(adapter: Path, data: bytes, said: str) -> None:
    (adapter / CONFIG_FILE).write_bytes(data)
    assert said in refusal(adapter)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("source", ["/dev/zero", "/dev/tty", "/tmp"])
def test_what_is_no_regular_file_is_refused(adapter: Path, name: str, source: str) -> None:
    (adapter / name).unlink()
    (adapter / name).symlink_to(source)
    assert "no regular file" in refusal(adapter)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_pipe_that_nobody_writes_to_is_refused(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    assert "no regular file" in refusal(adapter)


def first_half(data: bytes) -> bytes:
    return data[: len(data) // 2]


WEIGHTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (first_half, "no whole safetensors file"),
    "in its header": (lambda data: data[:20], "no whole safetensors file"),
    "empty": (lambda data: b"", "no whole safetensors file"),
    "garbage": (lambda data: os.urandom(400), "no whole safetensors file"),
    "a pointer": (lambda data: LFS_POINTER, "Git LFS pointer"),
    "a header of no end": (lambda data: b"\xff" * 8 + data[8:], "no whole safetensors file"),
}


@pytest.mark.parametrize(("change", "said"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_no_whole_file_are_refused(adapter: Path, change: Callable[[bytes], bytes], said: str) -> None:
    file = adapter / WEIGHTS_FILE
    file.write_bytes(change(file.read_bytes()))
    assert said in refusal(adapter)


@pytest.mark.parametrize("header", [b'{"a": [1]}', b"[1]", b'{"\\ud800": {"shape": [1]}}', b'{"a": {"shape": ["x"]}}'])
def test_a_header_of_another_form_is_refused(adapter: Path, header: bytes) -> None:
    (adapter / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    assert "its header cannot be read" in refusal(adapter)


def test_a_file_that_is_shortened_while_it_is_read_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorten(*arguments: object) -> AdapterLayout:
        os.truncate(adapter / WEIGHTS_FILE, 2000)
        return AdapterLayout(*arguments)

    monkeypatch.setattr("octavo_lora.reader.AdapterLayout", shorten)
    with pytest.raises(AdapterError, match="no whole safetensors file"):
        read_adapter(str(adapter), ModelBase(tiny_llama()), LIMITS)


def test_weights_of_integers_are_refused(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: {key: tensor.to(torch.int8) for key, tensor in tensors.items()})
    with pytest.raises(AdapterError, match=r"is of torch\.int8"):
        read_adapter(str(adapter), ModelBase(tiny_llama()), LIMITS)


def content_hash(folder: Path) -> str:
    return read_adapter(str(folder), ModelBase(tiny_llama()), LIMITS).info.content_hash


def test_the_content_hash_is_the_same_in_another_folder(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "copy")
    config = json.loads((adapter / CONFIG_FILE).read_text())
    shuffled = dict(reversed(config.items())) | {"base_model_name_or_path": "tiny-llama", "inference_mode": False}
    (tmp_path / "copy" / CONFIG_FILE).write_text(json.dumps(shuffled, indent=7))
    assert content_hash(tmp_path / "copy") == content_hash(adapter)
    assert len(content_hash(adapter)) == 64


def test_the_content_hash_is_another_for_another_scaling(adapter: Path) -> None:
    before = content_hash(adapter)
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 7}))
    assert content_hash(adapter) != before


def test_the_content_hash_is_another_for_one_other_weight(adapter: Path) -> None:
    before = content_hash(adapter)
    edit_tensors(adapter, lambda tensors: next(iter(tensors.values()))[0, 0].add_(0.125))
    assert content_hash(adapter) != before
