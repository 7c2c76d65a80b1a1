"""Norms, gated activations and sampling against their formulas in float64, on random data."""

from __future__ import annotations

from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from gpu_parts.part import Part
from gpu_parts.scene import registry
from octavo.builtin.torch_kernels import gumbel_noise
from octavo.interfaces.kernels import Activation, Kernels, SamplingInputs
from octavo.plugins.specs import Need

# Of what is read: rounding the output is half of the last bit, relative to the value.
RELATIVE_ERRORS = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}
SCORE_ERROR = 1e-3
"""A token drawn is right when its score, logit / temperature + noise, is within this of the best."""

DTYPES = ("bfloat16", "float16", "float32")
EPS = 1e-5
RULES = ("greedy", "plain", "top-k", "top-p", "min-p", "all")


def make_kernels(device: str, dtype: str, name: str = "auto") -> tuple[str, Kernels]:
    """An installed set of kernels, as the engine makes it, and its name."""
    need = Need(device=device, dtype=dtype)
    chosen = registry().select("kernels", need, name)
    return chosen.name, chosen.build(need)


def run(part: Part) -> None:
    for dtype in part.choose(DTYPES, DTYPES[:1], DTYPES[:1]):
        part.attempt(f"kernels in {dtype}", partial(_check_dtype, part, dtype))


def _check_dtype(part: Part, dtype: str) -> None:
    name, kernels = make_kernels(part.device, dtype)
    for shape in part.choose(((1, 4096), (256, 4096), (33, 5120), (7, 3000)), ((256, 4096),), ((3, 100),)):
        for with_residual in (False, True):
            check = partial(_check_norm, part, name, kernels, dtype, shape, with_residual)
            part.attempt(f"{name}: add_rms_norm {dtype} {shape}", check)
    for shape in part.choose(((1, 14336), (256, 14336), (33, 18944), (7, 3000)), ((256, 14336),), ((3, 100),)):
        for activation in get_args(Activation):
            check = partial(_check_activation, part, name, kernels, dtype, shape, activation)
            part.attempt(f"{name}: {activation} {dtype} {shape}", check)
    for shape in part.choose(((64, 128256), (7, 151936), (256, 32000)), ((64, 128256),), ((4, 300),)):
        for rule in part.choose(RULES, RULES, ("greedy", "plain", "all")):
            check = partial(_check_sampling, part, name, kernels, dtype, shape, rule)
            part.attempt(f"{name}: sample {rule} {dtype} {shape}", check)


def _draw(shape: tuple[int, ...], dtype: str, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))


def _report(part: Part, name: str, case: str, dtype: str, error: float, tolerance: float, fault: str = "") -> None:
    ok = not fault and error <= tolerance
    part.add("correctness", kernel=name, case=case, dtype=dtype, error=error, tolerance=tolerance, ok=ok, fault=fault)


def _check_norm(
    part: Part, name: str, kernels: Kernels, dtype: str, shape: tuple[int, int], with_residual: bool
) -> None:
    hidden, weight = _draw(shape, dtype, part.device), _draw(shape[1:], dtype, part.device, seed=1)
    residual = _draw(shape, dtype, part.device, seed=2) if with_residual else None
    y, total = kernels.add_rms_norm(hidden, residual, weight, EPS)
    exact = hidden.double() if residual is None else hidden.double() + residual.double()
    # Kernels may take the norm of the sum before it is rounded, or after.
    wanted = exact * (exact.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight.double()
    error = max(_relative_error(y, wanted), _relative_error(total, exact))
    case = f"add_rms_norm {list(shape)}{', residual' if with_residual else ''}"
    _report(part, name, case, dtype, error, 4 * RELATIVE_ERRORS[dtype])


def _check_activation(
    part: Part, name: str, kernels: Kernels, dtype: str, shape: tuple[int, int], activation: Activation
) -> None:
    stacked = _draw((shape[0], 2 * shape[1]), dtype, part.device)
    gate, up = stacked.chunk(2, dim=-1)  # slices, as a stacked linear makes them
    found = kernels.gated_activation(activation, gate, up)
    exact = gate.double()
    activated = functional.silu(exact) if activation == "silu" else functional.gelu(exact, approximate="tanh")
    wanted = activated * up.double()
    # Kernels may round the activation before the product.
    _report(
        part, name, f"{activation} {list(shape)}", dtype, _relative_error(found, wanted), 4 * RELATIVE_ERRORS[dtype]
    )


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest; values near 0 are taken for 0.1."""
    return float(((found.double() - wanted).abs() / wanted.abs().clamp(min=0.1)).max())


def sampling_inputs(num_samples: int, rule: str, device: str) -> SamplingInputs:
    """Inputs under which every row draws by this rule; of "all", each row by other numbers, some of them greedy."""

    def floats(value: float) -> Tensor:
        return torch.full((num_samples,), value, device=device)

    temperature, top_p, min_p = floats(0.0 if rule == "greedy" else 0.8), floats(1.0), floats(0.0)
    top_k = torch.zeros(num_samples, dtype=torch.int32, device=device)
    rows = torch.arange(num_samples, device=device)
    if rule in ("top-k", "all"):
        top_k = (rows % 3 * 25).int() if rule == "all" else torch.full_like(top_k, 50)
    if rule in ("top-p", "all"):
        top_p = torch.where(rows % 2 == 0, 0.9, 1.0) if rule == "all" else floats(0.9)
    if rule in ("min-p", "all"):
        min_p = torch.where(rows % 5 == 0, 0.05, 0.0) if rule == "all" else floats(0.05)
    if rule == "all":
        temperature = torch.where(rows % 4 == 3, 0.0, 0.5 + rows / num_samples)
    return SamplingInputs(
        temperature=temperature.float(),
        top_p=top_p.float(),
        min_p=min_p.float(),
        top_k=top_k,
        seed=rows.long() * 2654435761 * 2**20 + 12345,  # above 2**32: both halves of a seed are hashed
        sample_index=(rows % 2).int(),
        position=(rows + 7).int(),
        all_greedy=rule == "greedy",
        any_top_k=rule in ("top-k", "all"),
        any_top_p=rule in ("top-p", "all"),
        any_min_p=rule in ("min-p", "all"),
    )


def _check_sampling(part: Part, name: str, kernels: Kernels, dtype: str, shape: tuple[int, int], rule: str) -> None:
    logits = _draw(shape, dtype, part.device) * 4
    before = logits.clone()
    inputs = sampling_inputs(shape[0], rule, part.device)
    found = kernels.sample(logits, inputs)
    fault = "" if torch.equal(logits, before) else "it changes the logits"
    if not fault and not torch.equal(found, kernels.sample(logits, inputs)):
        fault = "a second draw with the same key is another"
    error = float(score_errors(logits, inputs, found).max())
    _report(part, name, f"sample, {rule} {list(shape)}", dtype, error, SCORE_ERROR, fault)


def score_errors(logits: Tensor, inputs: SamplingInputs, found: Tensor) -> Tensor:
    """By how much the token found for each row falls short of the best, [num_samples] float64.

    Infinite where it is not among those that the rules leave. The borders of top-p and min-p are sums and quotients of
    floats: a token within a millionth of one may be in or out.
    """
    is_greedy = inputs.temperature == 0
    scores = logits.double() / torch.where(is_greedy, 1.0, inputs.temperature).double().unsqueeze(1)
    noisy = scores + torch.where(is_greedy.unsqueeze(1), 0.0, gumbel_noise(inputs, logits.shape[1]).double())
    surely, perhaps = (_kept(scores, inputs, slack) for slack in (1e-6, -1e-6))
    surely, perhaps = surely | is_greedy.unsqueeze(1), perhaps | is_greedy.unsqueeze(1)
    best = noisy.masked_fill(~surely, -torch.inf).amax(dim=-1)
    return best - noisy.masked_fill(~perhaps, -torch.inf).gather(1, found.unsqueeze(1)).squeeze(1)


def _kept(scores: Tensor, inputs: SamplingInputs, slack: float) -> Tensor:
    """Which tokens min-p, top-k and top-p leave, in that order, [num_samples, vocab_size] bool; ties are kept.

    A positive slack leaves out those at the borders.
    """
    probabilities = scores.softmax(dim=-1)
    largest = probabilities.amax(dim=-1, keepdim=True)
    kept = probabilities >= largest * inputs.min_p.double().unsqueeze(1) * (1 + slack)
    left = scores.masked_fill(~kept, -torch.inf)
    vocab_size = scores.shape[1]
    top_k = torch.where(inputs.top_k > 0, inputs.top_k, vocab_size).clamp(max=vocab_size).long().unsqueeze(1)
    ordered = left.sort(dim=-1, descending=True).values
    left = left.masked_fill(left < ordered.gather(1, top_k - 1), -torch.inf)
    ordered = left.sort(dim=-1, descending=True).values
    mass = ordered.softmax(dim=-1)
    top_p = inputs.top_p.double().unsqueeze(1)
    before = mass.cumsum(dim=-1) - mass
    count = (before < torch.where(top_p < 1, top_p - slack, 2.0)).sum(dim=-1, keepdim=True).clamp(min=1)
    return (left >= ordered.gather(1, count - 1)) & (left > -torch.inf)
