"""HuggingFaceCheckpoint: folders as the hub has them, and one clear sentence for each way they can be incomplete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from octavo.builtin.hf_checkpoint import HuggingFaceCheckpoint
from octavo.errors import CheckpointError

WEIGHTS = {f"layer.{index}.weight": torch.full((2, 3), float(index)) for index in range(4)}
INDEX = "model.safetensors.index.json"


def write_json(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint, its weights in one file."""
    write_json(tmp_path, "config.json", {"architectures": ["LlamaForCausalLM"], "hidden_size": 8})
    write_json(
        tmp_path, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    )
    Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same in two files, the index naming which tensor lies where, and a stray file that it does not name."""
    (folder / "model.safetensors").unlink()
    names = sorted(WEIGHTS)
    shards = {"model-1-of-2.safetensors": names[:1], "model-2-of-2.safetensors": names[1:]}
    for file, held in shards.items():
        save_file({name: WEIGHTS[name] for name in held}, folder / file)
    write_json(folder, INDEX, {"weight_map": {name: file for file, held in shards.items() for name in held}})
    save_file({"stray": torch.zeros(1)}, folder / "consolidated.safetensors")
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return dict(HuggingFaceCheckpoint(str(folder)).tensors())


def assert_whole(tensors: Mapping[str, torch.Tensor]) -> None:
    assert sorted(tensors) == sorted(WEIGHTS)
    assert all(torch.equal(tensors[name], WEIGHTS[name]) for name in WEIGHTS)


# ------------------------------------------------------------------------------------------- weights


def test_weights_in_one_file_are_read(folder: Path) -> None:
    assert_whole(read(folder))


def test_index_alone_decides_which_files_are_read(sharded: Path) -> None:
    assert_whole(read(sharded))


def test_index_wins_over_a_single_file(sharded: Path) -> None:
    save_file({"other": torch.zeros(1)}, sharded / "model.safetensors")
    assert_whole(read(sharded))


def test_tensors_come_one_at_a_time(folder: Path) -> None:
    tensors = HuggingFaceCheckpoint(str(folder)).tensors()
    assert next(tensors)[0] in WEIGHTS
    assert len(list(tensors)) == len(WEIGHTS) - 1


def test_missing_shards_are_named_before_anything_is_read(sharded: Path) -> None:
    (sharded / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2 files .* model-2-of-2\.safetensors"):
        HuggingFaceCheckpoint(str(sharded)).tensors()


def test_shard_without_a_promised_tensor_is_refused(sharded: Path) -> None:
    save_file({"layer.3.weight": torch.zeros(1)}, sharded / "model-2-of-2.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors .* layer\.1\.weight, layer\.2\.weight"):
        read(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_index_that_names_nothing_is_refused(folder: Path, index: object) -> None:
    write_json(folder, INDEX, index)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        read(folder)


def test_index_cannot_lead_out_of_the_folder(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    write_json(inner, INDEX, {"weight_map": {"a": "../model.safetensors"}})
    with pytest.raises(CheckpointError, match="lacks 1 of the 1 files"):
        read(inner)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, -1])
def test_file_that_was_cut_short_is_refused(folder: Path, num_bytes: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short or damaged"):
        read(folder)


HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    "content",
    [
        (len(HEADER) + 100).to_bytes(8, "little") + HEADER,
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"{", b"[") + bytes(8),
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"F32", b"F33") + bytes(8),
        len(HEADER).to_bytes(8, "little") + HEADER.replace(b"[0,8]", b"[8,0]") + bytes(8),
        len(HEADER).to_bytes(8, "little") + HEADER + bytes(7),
        len(HEADER).to_bytes(8, "little") + HEADER + bytes(9),
        b"PK\x03\x04" + bytes(1000),
        b"<!DOCTYPE html><title>404 Not Found</title>",
    ],
    ids=["header too short", "no JSON", "no dtype", "no range", "data too short", "data too long", "zip", "web page"],
)
def test_file_that_is_no_whole_safetensors_file_is_refused_in_one_sentence(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is cut short or damaged \(.*\); fetch it again\."
    ) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="is cut short or damaged"):
        HuggingFaceCheckpoint(str(folder)).tensor_headers()


def test_file_that_shrinks_while_it_is_read_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({"a": torch.zeros(1), "b": torch.zeros(100_000)}, path)
    tensors = HuggingFaceCheckpoint(str(folder)).tensors()
    next(tensors)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was cut short while it was read"):
        list(tensors)


def test_dtype_that_torch_lacks_is_named(folder: Path) -> None:
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(1))
    with pytest.raises(CheckpointError, match="stores a as F4, which this torch has no type for"):
        read(folder)
    assert HuggingFaceCheckpoint(str(folder)).tensor_headers()["a"].num_bytes == 1


def test_every_dtype_arrives_as_it_was_stored(folder: Path) -> None:
    tensors = {
        "whole": torch.arange(-3, 3, dtype=torch.int16).view(2, 3),
        "half": torch.tensor([[1.5], [-2.0]], dtype=torch.bfloat16),
        "eighth": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
        "number": torch.tensor(3.0, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4),
    }
    save_file(tensors, folder / "model.safetensors")
    found = read(folder)
    assert sorted(found) == sorted(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].double(), tensor.double())


def test_a_tensor_that_is_kept_outlives_its_file(folder: Path) -> None:
    name, tensor = next(HuggingFaceCheckpoint(str(folder)).tensors())
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(tensor, WEIGHTS[name])


@pytest.mark.parametrize("file", ["model-1-of-2.safetensors", "model.safetensors"])
def test_folder_in_place_of_a_file_is_as_good_as_nothing(sharded: Path, file: str) -> None:
    if file == "model.safetensors":
        (sharded / INDEX).unlink()
    (sharded / file).unlink(missing_ok=True)
    (sharded / file).mkdir()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 2 files|has no weights: neither model\.safetensors nor"):
        read(sharded)


def test_note_that_git_lfs_left_is_explained(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"Python pickles \(pytorch_model\.bin\).*convert them to safetensors"):
        read(folder)


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        read(folder)


def test_path_must_be_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        HuggingFaceCheckpoint(str(folder / "config.json"))


# ------------------------------------------------------------------------------------------- headers


def test_headers_tell_shape_dtype_and_bytes_of_each_tensor(folder: Path) -> None:
    save_file(
        {
            "wide": torch.zeros(3, 5, dtype=torch.bfloat16),
            "scales": torch.zeros(7, dtype=torch.float8_e4m3fn),
            "mask": torch.zeros(2, 2, dtype=torch.bool),
            "packed": torch.zeros(4, 1, dtype=torch.int32),
            "number": torch.tensor(1.0),
        },
        folder / "model.safetensors",
    )
    headers = HuggingFaceCheckpoint(str(folder)).tensor_headers()
    assert {name: (one.shape, one.dtype, one.num_bytes) for name, one in headers.items()} == {
        "wide": ((3, 5), "BF16", 3 * 5 * 2),
        "scales": ((7,), "F8_E4M3", 7),
        "mask": ((2, 2), "BOOL", 4),
        "packed": ((4, 1), "I32", 4 * 4),
        "number": ((), "F32", 4),
    }


def test_headers_are_those_of_the_tensors_that_are_read(sharded: Path) -> None:
    headers = HuggingFaceCheckpoint(str(sharded)).tensor_headers()
    assert {name: (header.shape, header.num_bytes) for name, header in headers.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in read(sharded).items()
    }


def test_folder_with_a_configuration_alone_has_no_headers(sharded: Path) -> None:
    for path in sharded.glob("*.safetensors"):
        path.unlink()
    assert HuggingFaceCheckpoint(str(sharded)).tensor_headers() == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model-2-of-2.safetensors").unlink(), "lacks 1 of the 2 files"),
        (lambda folder: (folder / "model-2-of-2.safetensors").write_bytes(b""), "cut short or damaged"),
    ],
)
def test_headers_of_incomplete_weights_are_refused(
    sharded: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceCheckpoint(str(sharded)).tensor_headers()


# ------------------------------------------------------------------------------------------- configuration


def test_configuration_is_read(folder: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(str(folder))
    assert checkpoint.config()["hidden_size"] == 8
    assert checkpoint.generation_config() == {}
    write_json(folder, "generation_config.json", {"eos_token_id": [1, 2]})
    assert checkpoint.generation_config() == {"eos_token_id": [1, 2]}


def test_missing_configuration_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        HuggingFaceCheckpoint(str(folder)).config()


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_configuration_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json (cannot be read as JSON|holds a list)"):
        HuggingFaceCheckpoint(str(folder)).config()


# ------------------------------------------------------------------------------------------- tokenizer


def test_special_tokens_are_strings_or_have_a_content(folder: Path) -> None:
    data = HuggingFaceCheckpoint(str(folder)).tokenizer()
    assert data.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert data.tokenizer.encode("a").ids == [2]
    assert data.chat_template is None


def test_special_tokens_of_older_repositories_are_read(folder: Path) -> None:
    write_json(folder, "special_tokens_map.json", {"unk_token": "a", "bos_token": "other"})
    special_tokens = HuggingFaceCheckpoint(str(folder)).tokenizer().special_tokens
    assert special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "a"}


@pytest.mark.parametrize(
    "template", ["plain", [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]]
)
def test_chat_template_is_one_or_the_default_of_several(folder: Path, template: object) -> None:
    write_json(folder, "tokenizer_config.json", {"chat_template": template})
    assert HuggingFaceCheckpoint(str(folder)).tokenizer().chat_template == "plain"


def test_chat_template_in_a_file_of_its_own_wins(folder: Path) -> None:
    write_json(folder, "tokenizer_config.json", {"chat_template": "config"})
    write_json(folder, "chat_template.json", {"chat_template": "json"})
    assert HuggingFaceCheckpoint(str(folder)).tokenizer().chat_template == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert HuggingFaceCheckpoint(str(folder)).tokenizer().chat_template == "jinja"


def test_missing_tokenizer_says_what_is_needed(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, which is needed .* name another tokenizer"):
        HuggingFaceCheckpoint(str(folder)).tokenizer()
    (folder / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model \(sentencepiece\) is there"):
        HuggingFaceCheckpoint(str(folder)).tokenizer()


def test_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        HuggingFaceCheckpoint(str(folder)).tokenizer()


def test_tokenizer_is_read_without_torch_and_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    code = (
        "import sys; from octavo.builtin.hf_checkpoint import HuggingFaceCheckpoint; "
        "HuggingFaceCheckpoint(sys.argv[1]).tokenizer(); print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------------------------------- quantized checkpoints


def test_configuration_of_config_json_wins_over_a_file_beside_it(folder: Path) -> None:
    write_json(folder, "config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    write_json(folder, "quantize_config.json", {"bits": 8})
    assert HuggingFaceCheckpoint(str(folder)).config()["quantization_config"] == {"quant_method": "gptq", "bits": 4}


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_quantization_config_of_older_tools_is_read_from_a_file_beside_config_json(folder: Path, name: str) -> None:
    write_json(folder, name, {"w_bit": 4})
    assert HuggingFaceCheckpoint(str(folder)).config()["quantization_config"] == {"w_bit": 4}


def test_plain_checkpoint_has_no_quantization_config(folder: Path) -> None:
    assert "quantization_config" not in HuggingFaceCheckpoint(str(folder)).config()


def test_single_file_of_another_name_is_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
    assert_whole(read(folder))


def test_of_several_files_without_an_index_none_is_taken(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    save_file(WEIGHTS, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"Which of one\.safetensors, two\.safetensors is meant"):
        read(folder)


def test_one_shard_alone_is_not_taken_for_the_whole(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="has no weights"):
        read(folder)
