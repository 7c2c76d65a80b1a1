"""The SqueezeLLM quantiser, read back by a decoder that shares nothing with it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny_model import SIZES, token_ids_of, write_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from octavo import LLM, SamplingParams
from octavo.errors import CheckpointError, ConfigError
from octavo_quantize.squeezellm import (
    cluster,
    find_outliers,
    measure_sensitivities,
    quantize_linear,
    quantize_squeezellm,
    squared_error,
)

SAMPLES = [token_ids_of("some text to be sensitive to"), token_ids_of("and another of its kind")]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), hidden_size=64, intermediate_size=128, dtype="bfloat16")


@pytest.fixture(scope="module")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized")
    quantize_squeezellm(folder, output, bits=4, sparsity=0.01, samples=SAMPLES, num_processes=1)
    return output


@pytest.fixture
def linear() -> tuple[Tensor, Tensor]:
    """A weight [24, 96] of bfloat16's values and its sensitivities, over many orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator).bfloat16()
    sensitivity = torch.randn(24, 96, generator=generator).exp().square() * 1e-9
    return weight, sensitivity


def codes_of(qweight: Tensor, bits: int) -> NDArray[np.int64]:
    """[out_features, in_features], read bit by bit from each output's words."""
    words = qweight.numpy().view(np.uint32).T.copy()  # [out_features, words]
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def decode(tensors: dict[str, Tensor], prefix: str, bits: int) -> NDArray[np.float32]:
    """W[n, k] = lookup_table[n, code[n, k]] + S[n, k], in float32 as a kernel adds it."""
    codes = codes_of(tensors[f"{prefix}qweight"], bits)
    weight = np.take_along_axis(tensors[f"{prefix}lookup_table"].numpy(), codes, axis=1)
    if f"{prefix}rows" in tensors:
        rows, cols, vals = (tensors[f"{prefix}{name}"].numpy() for name in ("rows", "cols", "vals"))
        for n in range(len(weight)):
            for at in range(rows[n], rows[n + 1]):
                weight[n, cols[at]] += vals[at]
    return weight


def weighted_error(weight: Tensor, sensitivity: Tensor, decoded: NDArray[np.float32]) -> float:
    return float((sensitivity.double().numpy() * (weight.double().numpy() - decoded) ** 2).sum())


# ------------------------------------------------------------------------------------------------------ k-means


@pytest.mark.parametrize("seed", range(20))
def test_k_means_is_never_worse_than_a_uniform_grid(seed: int) -> None:
    random = np.random.default_rng(seed)
    near_a_grid = random.integers(16, size=200) + 0.01 * random.standard_normal(200)
    for values in (near_a_grid, random.standard_normal(200), random.standard_cauchy(200) * 1e-8):
        weights = 10.0 ** random.uniform(-12, 0, size=200)
        grid = np.linspace(values.min(), values.max(), 16)
        found = squared_error(values, weights, cluster(values, weights, 16, seed))
        assert found <= squared_error(values, weights, grid)


def test_k_means_comes_nearer_to_the_weights_that_count() -> None:
    values, weights = np.arange(100.0), np.ones(100)
    weights[70:74] = 1e6
    centroids = cluster(values, weights, 8)
    assert all(np.abs(centroids - value).min() < 0.5 for value in values[70:74])


@pytest.mark.parametrize("distinct", [[], [0.5], [-1.0, 0.25, 2.0]])
def test_fewer_values_than_clusters_are_kept_as_they_are(distinct: list[float]) -> None:
    values = np.repeat(np.array(distinct), 9)
    centroids = cluster(values, np.ones_like(values), 8)
    assert centroids.shape == (8,)
    assert set(centroids) == set(distinct or [0.0])


def test_duplicates_count_together() -> None:
    values = np.array([0.0] * 99 + [1.0, 10.0])
    assert cluster(values, np.ones(101), 2) == pytest.approx([0.01, 10.0])


@pytest.mark.parametrize("num_felt", [0, 1, 5])
def test_values_that_the_loss_does_not_feel_get_centroids_too(num_felt: int) -> None:
    values = np.linspace(-1.0, 1.0, 64)
    weights = np.zeros(64)
    weights[:num_felt] = 1.0
    centroids = cluster(values, weights, 8)
    assert len(set(centroids)) == 8
    assert np.abs(values[:, None] - centroids).min(axis=1).max() < 0.5


# --------------------------------------------------------------------------------------------------- one linear


@pytest.mark.parametrize("bits", [3, 4])
def test_decoded_weights_are_the_nearest_of_their_channel(linear: tuple[Tensor, Tensor], bits: int) -> None:
    weight, sensitivity = linear
    found = quantize_linear(weight, sensitivity, bits=bits)
    tables = found["lookup_table"].numpy()
    assert tables.shape == (24, 2**bits)
    assert found["qweight"].shape == (96 * bits // 32, 24)
    distances = np.abs(weight.float().numpy()[:, :, None] - tables[:, None, :]).min(axis=2)
    assert np.abs(weight.float().numpy() - decode(found, "", bits)) == pytest.approx(distances, abs=1e-6)


@pytest.mark.parametrize("sparsity", [0.001, 0.05, 0.9])
def test_outliers_are_restored(linear: tuple[Tensor, Tensor], sparsity: float) -> None:
    weight, sensitivity = linear
    decoded = torch.from_numpy(decode(quantize_linear(weight, sensitivity, bits=4, sparsity=sparsity), "", 4))
    outliers = find_outliers(weight, sensitivity, sparsity)
    assert torch.equal(decoded.bfloat16()[outliers], weight[outliers])
    torch.testing.assert_close(decoded[outliers], weight.float()[outliers], rtol=2**-22, atol=0.0)


def test_outliers_stand_where_their_codes_mean_the_value_nearest_0(linear: tuple[Tensor, Tensor]) -> None:
    weight, sensitivity = linear
    found = quantize_linear(weight, sensitivity, bits=4, sparsity=0.05)
    outliers = find_outliers(weight, sensitivity, 0.05).numpy()
    dense = np.take_along_axis(found["lookup_table"].numpy(), codes_of(found["qweight"], 4), axis=1)
    nearest_0 = np.abs(found["lookup_table"].numpy()).min(axis=1, keepdims=True)
    assert (np.abs(dense) == nearest_0)[outliers].all()


def test_outliers_make_the_rest_cheaper(linear: tuple[Tensor, Tensor]) -> None:
    weight, sensitivity = linear
    without, with_them = (
        weighted_error(weight, sensitivity, decode(quantize_linear(weight, sensitivity, bits=3, sparsity=one), "", 3))
        for one in (0.0, 0.02)
    )
    assert with_them < without


def test_outliers_are_the_most_sensitive_and_the_largest() -> None:
    weight, sensitivity = torch.zeros(10, 20), torch.zeros(10, 20)
    weight[2, 3:11] = -torch.arange(1.0, 9.0)
    weight[4, 5] = 9.0
    sensitivity[4, 5], sensitivity[7, 1] = 2.0, 1.0
    assert find_outliers(weight, sensitivity, 9 / 200).nonzero().tolist() == [*([2, k] for k in range(3, 11)), [4, 5]]


def test_without_sparsity_there_are_no_outliers(linear: tuple[Tensor, Tensor]) -> None:
    assert set(quantize_linear(*linear, bits=4)) == {"qweight", "lookup_table"}


def test_one_seed_is_one_result(linear: tuple[Tensor, Tensor]) -> None:
    first, second = (quantize_linear(*linear, bits=3, sparsity=0.01, seed=7) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------- sensitivities


def test_sensitivities_are_the_samples_squared_gradients(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weight = model.get_submodule(name).weight
    expected = torch.zeros_like(weight)
    for sample in SAMPLES:
        logits = model(torch.tensor([sample])).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(sample[1:]))
        expected += torch.autograd.grad(loss, weight)[0] ** 2
    torch.testing.assert_close(measure_sensitivities(folder, SAMPLES)[name], expected)


def test_every_linear_but_the_head_has_sensitivities(folder: Path) -> None:
    assert [name.rpartition(".")[2] for name in measure_sensitivities(folder, SAMPLES[:1])] == [*PROJECTIONS] * 2


# ----------------------------------------------------------------------------------------------- a whole folder


def test_folder_has_the_format_s_tensors(quantized: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    prefix = "model.layers.1.self_attn.o_proj"
    found = {name.rpartition(".")[2]: tensor.dtype for name, tensor in tensors.items() if name.startswith(prefix)}
    floats, integers = torch.float32, torch.int32
    assert found == {"qweight": integers, "lookup_table": floats, "rows": integers, "cols": integers, "vals": floats}


def test_what_is_no_linear_is_kept_as_it_was(folder: Path, quantized: Path) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (folder, quantized))
    kept = {name for name in before if not name.endswith("_proj.weight")}
    assert kept == {name for name in after if name.endswith("weight") and not name.endswith("qweight")}
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in kept)


def test_every_linear_comes_near_its_weights(folder: Path, quantized: Path) -> None:
    before, after = (load_file(path / "model.safetensors") for path in (folder, quantized))
    for name, weight in before.items():
        if name.endswith("_proj.weight"):
            error = torch.from_numpy(decode(after, name.removesuffix("weight"), 4)) - weight.float()
            assert error.norm() < 0.15 * weight.float().norm()


def test_folder_says_its_bits_and_has_a_tokenizer(folder: Path, quantized: Path) -> None:
    assert json.loads((quantized / "quant_config.json").read_text()) == {"wbits": 4}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (quantized / name).read_bytes() == (folder / name).read_bytes()


def test_weights_in_several_files_are_read(folder: Path, quantized: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "parts", max_shard_size="50kB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").exists()
    quantize_squeezellm(tmp_path / "parts", tmp_path / "out", bits=4, sparsity=0.01, samples=SAMPLES, num_processes=1)
    whole, of_parts = (load_file(path / "model.safetensors") for path in (quantized, tmp_path / "out"))
    assert whole.keys() == of_parts.keys()
    assert all(torch.equal(whole[name], of_parts[name]) for name in whole)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_progress_is_told(folder: Path, tmp_path: Path) -> None:
    told = list[tuple[str, int, int]]()
    quantize_squeezellm(
        folder, tmp_path, bits=4, samples=SAMPLES, num_processes=1, progress=lambda *step: told.append(step)
    )
    assert told == [("sensitivities", done, 2) for done in range(3)] + [("k-means", done, 14) for done in range(15)]


if find_spec("octavo_quant_squeezellm"):  # the package that reads the format may be installed without this one

    def test_engine_computes_with_the_decoded_weights(folder: Path, quantized: Path, tmp_path: Path) -> None:
        tensors = load_file(quantized / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, module in model.named_modules():
            if f"{name}.qweight" in tensors:
                module.weight.data.copy_(torch.from_numpy(decode(tensors, f"{name}.", 4)))
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        with LLM(str(quantized), dtype="float32", attention="torch", kernels="torch") as llm:
            (output,) = llm.generate([SAMPLES[0]], params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        found = [at[token] for at, token in zip(output.prompt_logprobs[1:], SAMPLES[0][1:], strict=True) if at]
        with torch.no_grad():
            logprobs = model(torch.tensor([SAMPLES[0]])).logits[0].log_softmax(dim=-1)
        expected = logprobs[:-1].gather(1, torch.tensor(SAMPLES[0][1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor([one.logprob for one in found]), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 2}, "3 or 4 bits; found bits=2"),
        ({"sparsity": 1.0}, "below 1; found 1.0"),
        ({"samples": []}, "two or more tokens"),
        ({"samples": [[1, 2], [3]]}, "two or more tokens"),
    ],
)
def test_settings_out_of_their_ranges_are_refused(
    folder: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_squeezellm(folder, tmp_path, **{"bits": 4, "samples": SAMPLES} | settings)  # type: ignore[arg-type]


def test_folder_that_is_quantized_already_is_refused(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_squeezellm(quantized, tmp_path, bits=4, samples=SAMPLES)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        quantize_squeezellm(tmp_path, tmp_path / "out", bits=4, samples=SAMPLES)


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        quantize_squeezellm(tmp_path, tmp_path / "out", bits=4, samples=SAMPLES)


def test_inputs_that_fill_no_whole_words_are_refused(tmp_path: Path) -> None:
    assert SIZES["hidden_size"] == 48
    folder = write_tiny_llama(tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has 48 inputs, which at 3 bits"):
        quantize_squeezellm(folder, tmp_path / "out", bits=3, samples=SAMPLES, num_processes=1)
