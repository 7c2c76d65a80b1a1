"""SqueezeLLM: the weights of each output channel become 2 ** bits values, chosen so that the loss feels it least.

plain folder -> sensitivities -> outliers aside, k-means of each channel -> [folder in SqueezeLLM's format].

Source: Kim et al. 2023, SqueezeLLM, arXiv:2306.07629.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.cluster import KMeans  # type: ignore[import-untyped]
from torch import Tensor
from transformers import AutoModelForCausalLM

from octavo.errors import CheckpointError, ConfigError
from octavo.packing import WORD_BITS, pack_rows
from octavo_quantize.progress import Progress

Vector: TypeAlias = NDArray[np.float64]

BITS = (3, 4)

_SENSITIVE_SHARE = 1 / 9
"""Of the outliers, those that are there for their sensitivity: 0.05 % of 0.45 % in the paper, section 4.2."""
_OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""The tokenizer's and the configuration's, copied as they are."""
_LEAST_WEIGHT = 1e-6
"""Of a channel's mean sensitivity: a weight that the loss does not feel still counts, and gets a value near its own."""


def quantize_squeezellm(
    folder: Path,
    output: Path,
    *,
    bits: int,
    sparsity: float = 0.0,
    samples: Sequence[Sequence[int]],
    seed: int = 0,
    num_processes: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Quantise every linear of a plain Hugging Face folder but the head, and write a folder in SqueezeLLM's format.

    Args:
        folder: config.json, safetensors and a tokenizer, not quantized yet.
        output: made, or written into: model.safetensors, config.json, quant_config.json, the tokenizer's files.
        bits: of a code, 3 or 4.
        sparsity: share of each linear's weights that are kept beside the codes as they are, [0, 1).
        samples: token ids of texts like those the model is for, two or more each. The gradients of the language-model
            loss over them, in float32, say how sensitive the loss is to each weight.
        seed: of the k-means.
        num_processes: that share the k-means; None takes all cores.

    Raises:
        ConfigError: bits, sparsity or samples are out of their ranges.
        CheckpointError: the folder is no plain model, or a linear's inputs do not fill whole words.
    """
    if bits not in BITS:
        raise ConfigError(f"SqueezeLLM stores 3 or 4 bits; found bits={bits}.")
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is a share of the weights, from 0 to below 1; found {sparsity}.")
    if not samples or min(map(len, samples)) < 2:
        raise ConfigError("SqueezeLLM needs samples of two or more tokens each, for a loss to have gradients.")
    tensors = _read_plain(folder)
    sensitivities = measure_sensitivities(folder, samples, progress)
    with Parallel(n_jobs=num_processes or -1) as parallel:
        for done, (prefix, sensitivity) in enumerate(sensitivities.items()):
            progress("k-means", done, len(sensitivities))
            weight = _weight_of(prefix, tensors, bits)
            found = quantize_linear(weight, sensitivity, bits=bits, sparsity=sparsity, seed=seed, parallel=parallel)
            tensors |= {f"{prefix}.{name}": tensor for name, tensor in found.items()}
        progress("k-means", len(sensitivities), len(sensitivities))
    _write(folder, output, tensors, bits)


def measure_sensitivities(
    folder: Path, samples: Sequence[Sequence[int]], progress: Progress = lambda what, done, total: None
) -> dict[str, Tensor]:
    """The sum of squared gradients of each sample's mean loss, by a linear's name without ".weight", the head apart.

    It is the diagonal of the Fisher information, which stands for the loss's second derivatives (section 4.1).

    Returns:
        [out_features, in_features] float32 each, of linears in the model's order.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            found[name] = torch.zeros_like(module.weight)
            module.weight.requires_grad_(True)
            hook = _adder(found[name])
            module.weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    for done, sample in enumerate(samples):
        progress("sensitivities", done, len(samples))
        input_ids = torch.tensor([list(sample)])
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    progress("sensitivities", len(samples), len(samples))
    return found


def quantize_linear(
    weight: Tensor,
    sensitivity: Tensor,
    *,
    bits: int,
    sparsity: float = 0.0,
    seed: int = 0,
    parallel: Parallel | None = None,
) -> dict[str, Tensor]:
    """One linear's tensors in SqueezeLLM's format, by the suffix of their names.

    W[n, k] = lookup_table[n, code[n, k]] + S[n, k], where S holds the outliers, less the value their codes stand for,
    which is the one nearest 0.

    Args:
        weight: [out_features, in_features], any floating dtype; in_features * bits a multiple of 32.
        sensitivity: like `weight`, float32, not negative.

    Returns:
        qweight: [in_features * bits / 32, out_features] int32; the codes, packed along the inputs.
        lookup_table: [out_features, 2 ** bits] float32, ascending in each row.
        rows, cols, vals: [out_features + 1] int32, [num_outliers] int32 and float32, S in compressed sparse rows; only
            where there are outliers.
    """
    weight = weight.float()
    outliers = find_outliers(weight, sensitivity, sparsity)
    channels = (
        delayed(cluster)(weight[row][kept].double().numpy(), sensitivity[row][kept].double().numpy(), 2**bits, seed)
        for row, kept in enumerate(~outliers)
    )
    table = torch.from_numpy(np.stack((parallel or Parallel(n_jobs=1))(channels))).float()
    codes = torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, weight.masked_fill(outliers, 0.0))
    found = {"qweight": pack_rows(codes.T, bits), "lookup_table": table}
    if outliers.any():
        rows = torch.nn.functional.pad(outliers.sum(dim=1).cumsum(dim=0), (1, 0))
        found |= {
            "rows": rows.int(),
            "cols": outliers.nonzero()[:, 1].int(),
            "vals": (weight - table.gather(1, codes))[outliers],
        }
    return found


def find_outliers(weight: Tensor, sensitivity: Tensor, sparsity: float) -> Tensor:
    """The weights that are kept as they are: the most sensitive ones, and of the others the largest magnitudes.

    Returns:
        [out_features, in_features] bool, round(sparsity * weights) of them True.
    """
    total = round(sparsity * weight.numel())
    outliers = torch.zeros(weight.numel(), dtype=torch.bool)
    outliers[sensitivity.flatten().topk(round(_SENSITIVE_SHARE * total)).indices] = True
    magnitudes = weight.flatten().abs().masked_fill(outliers, -1.0)
    outliers[magnitudes.topk(total - int(outliers.sum())).indices] = True
    return outliers.view(weight.shape)


def cluster(values: Vector, weights: Vector, num_clusters: int, seed: int = 0) -> Vector:
    """The centroids of a weighted k-means, which lessen sum(weights * (values - nearest centroid) ** 2).

    Args:
        values: [num_values], perhaps with duplicates, perhaps none at all.
        weights: [num_values], not negative.

    Returns:
        [num_clusters] ascending, never worse than a uniform grid from the least to the largest value. Where there are
        no more distinct values than clusters, these values, the last repeated.
    """
    distinct, where = np.unique(values, return_inverse=True)
    if distinct.size <= num_clusters:
        distinct = distinct if distinct.size else np.zeros(1)
        return np.concatenate([distinct, np.full(num_clusters - distinct.size, distinct[-1])])
    mean = weights.mean()
    relative = np.maximum(weights / mean, _LEAST_WEIGHT) if mean > 0 else np.ones_like(weights)
    weights = np.bincount(where, relative).astype(np.float64)
    scale = float(np.abs(distinct).max())  # k-means in units of it: squares of small weights would vanish
    points = distinct / scale
    grid = np.linspace(points[0], points[-1], num_clusters)
    centroids = _k_means(points, weights, num_clusters, "k-means++", seed)
    if squared_error(points, weights, centroids) > squared_error(points, weights, grid):
        centroids = _k_means(points, weights, num_clusters, grid[:, None], seed)
    return centroids * scale


def squared_error(values: Vector, weights: Vector, centroids: Vector) -> float:
    """sum(weights * (values - nearest centroid) ** 2); the centroids ascend."""
    nearest = centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)]
    return float((weights * (values - nearest) ** 2).sum())


def _k_means(points: Vector, weights: Vector, num_clusters: int, start: str | Vector, seed: int) -> Vector:
    k_means = KMeans(num_clusters, init=start, n_init=1, random_state=seed)
    centroids: Vector = k_means.fit(points[:, None], sample_weight=weights).cluster_centers_[:, 0]
    centroids.sort()
    return centroids


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's squared gradient, and frees it: all of them at once would be one more model."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.addcmul_(parameter.grad, parameter.grad)
        parameter.grad = None

    return add


# --------------------------------------------------------------------------------------------------------- files


def _read_plain(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder that is not quantized yet, as they are stored."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{folder} has no config.json: give a plain model's folder in Hugging Face's format.")
    found = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    if found or (folder / "quant_config.json").exists():
        raise CheckpointError(f"{folder} is quantized already; give the folder of the plain model that it was made of.")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: the weights must be there as safetensors.")
        with safe_open(folder / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    return tensors


def _weight_of(prefix: str, tensors: dict[str, Tensor], bits: int) -> Tensor:
    """Take a linear's weight out of the checkpoint's tensors."""
    weight = tensors.pop(f"{prefix}.weight", None)
    if weight is None:
        raise CheckpointError(
            f"transformers loads a linear {prefix!r}, but the checkpoint has no tensor {prefix}.weight: models whose "
            "weights are renamed when they are loaded cannot be quantised by this method."
        )
    if weight.shape[1] * bits % WORD_BITS:
        raise CheckpointError(
            f"{prefix}.weight has {weight.shape[1]} inputs, which at {bits} bits fill no whole number of "
            f"{WORD_BITS}-bit words; SqueezeLLM has no other layout."
        )
    return weight


def _write(folder: Path, output: Path, tensors: Mapping[str, Tensor], bits: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for pattern in _OTHER_FILES:
        for file in folder.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, output / file.name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output / "model.safetensors")
    (output / "quant_config.json").write_text(json.dumps({"wbits": bits}) + "\n", encoding="utf-8")
