"""The sampler: the right set of tokens, the right distribution, and a draw that depends on its own row only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.builtin import torch_kernels
from octavo.builtin.torch_kernels import TorchKernels, gumbel_noise
from octavo.interfaces.kernels import SamplingInputs
from octavo.plugins.specs import Need

sample = TorchKernels(Need(device="cpu", dtype="float32")).sample

EULER_GAMMA = 0.5772156649
CHI_SQUARE_7 = 29.9  # 7 degrees of freedom: exceeded by one in ten thousand


def inputs(num_samples: int = 1, **columns: Any) -> SamplingInputs:
    """Rows that differ in what is given as a sequence: `inputs(3, seed=[1, 2, 3], top_k=2)`."""

    def column(name: str, default: float, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(columns.pop(name, default)).to(dtype).expand(num_samples).clone()

    temperature = column("temperature", 1.0, torch.float32)
    top_p = column("top_p", 1.0, torch.float32)
    top_k = column("top_k", 0, torch.int32)
    min_p = column("min_p", 0.0, torch.float32)
    made = SamplingInputs(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        top_k=top_k,
        seed=column("seed", 0, torch.int64),
        sample_index=column("sample_index", 0, torch.int32),
        position=column("position", 1, torch.int32),
        all_greedy=not temperature.any(),
        any_top_k=bool(top_k.any()),
        any_top_p=bool((top_p < 1).any()),
        any_min_p=bool((min_p > 0).any()),
    )
    assert not columns
    return made


def draws(logits: Sequence[float], num_draws: int, **columns: Any) -> Counter[int]:
    """What one row of logits gives at positions 1, 2, 3, ..."""
    rows = torch.tensor(logits).expand(num_draws, -1).clone()
    columns.setdefault("position", range(1, num_draws + 1))
    return Counter(sample(rows, inputs(num_draws, **columns)).tolist())


# ------------------------------------------------------------------------------------------------- which tokens


def test_temperature_0_takes_the_largest_logit() -> None:
    logits = torch.randn(50, 100)
    assert sample(logits.clone(), inputs(50, temperature=0.0)).tolist() == logits.argmax(dim=-1).tolist()


def test_greedy_rows_and_drawn_rows_share_a_step() -> None:
    logits, seeds = torch.randn(40, 100), range(40)
    mixed = sample(logits.clone(), inputs(40, temperature=[0.0, 1.0] * 20, seed=seeds))
    drawn = sample(logits.clone(), inputs(40, seed=seeds))
    assert mixed[::2].tolist() == logits[::2].argmax(dim=-1).tolist()
    assert mixed[1::2].tolist() == drawn[1::2].tolist()


def kept_by(logits: Sequence[float], top_k: int, top_p: float, min_p: float = 0.0) -> set[int] | None:
    """The slow, plain reference: min-p, then top-k, then top-p, each over what is left; None when rounding could
    decide otherwise."""
    order = sorted(range(len(logits)), key=lambda token_id: -logits[token_id])
    ratios = [math.exp(logits[token_id] - max(logits)) for token_id in order]
    if any(abs(ratio - min_p) < 1e-4 for ratio in ratios[1:]):
        return None
    order = [token_id for token_id, ratio in zip(order, ratios, strict=True) if ratio >= min_p]
    if top_k:
        border = logits[order[min(top_k, len(order)) - 1]]
        order = [token_id for token_id in order if logits[token_id] >= border]
    total = sum(math.exp(logits[token_id]) for token_id in order)
    mass = 0.0
    for token_id in order:
        if abs(mass - top_p) < 1e-4:
            return None
        if mass >= top_p:
            break
        mass += math.exp(logits[token_id]) / total
        border = logits[token_id]
    return {token_id for token_id in order if logits[token_id] >= border}


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(
    logits=st.lists(st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.3, 0.6, 1.0]), min_size=1, max_size=6),
    top_k=st.integers(0, 7),
    top_p=st.floats(0.01, 1.0),
    min_p=st.just(0.0) | st.floats(0.0, 1.0),
)
def test_min_p_top_k_and_top_p_leave_exactly_the_right_tokens(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    kept = kept_by(logits, top_k, top_p, min_p)
    if kept is not None:  # the least probable has 2 %, so 2,048 draws find it
        assert set(draws(logits, 2048, top_k=top_k, top_p=top_p, min_p=min_p)) == kept


def test_top_p_is_of_what_min_p_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.15, 0.15]).log().tolist()
    assert set(draws(logits, 500, top_p=0.69)) == {0, 1}
    assert set(draws(logits, 500, min_p=0.5, top_p=0.56)) == {0}  # 4/7 of what is left
    assert set(draws(logits, 500, min_p=0.5, top_p=0.58)) == {0, 1}


def test_min_p_is_of_the_tempered_distribution() -> None:
    logits = [0.0, -1.0]
    assert set(draws(logits, 500, min_p=0.5)) == {0}
    assert set(draws(logits, 500, min_p=0.5, temperature=2.0)) == {0, 1}


def test_a_min_p_of_1_keeps_the_most_probable_tokens() -> None:
    assert set(draws([1.0, 0.999, 1.0, -5.0], 200, min_p=1.0)) == {0, 2}


def test_each_row_has_its_own_min_p() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).repeat(4000, 1)
    drawn = sample(logits, inputs(4000, min_p=[0.0, 0.3, 0.1, 1.0] * 1000, seed=range(4000)))
    assert [set(drawn[row::4].tolist()) for row in range(4)] == [{0, 1, 2, 3}, {0, 1}, {0, 1, 2}, {0}]


def test_draws_within_min_p_top_k_and_top_p_follow_the_softmax_of_what_is_left() -> None:
    logits, num_draws = [0.0, 1.0, 2.0, 0.5, 0.7, -0.5, 1.5, -3.0], 20_000
    kept = kept_by([logit / 0.8 for logit in logits], 5, 0.85, 0.1)
    assert kept is not None
    assert 1 < len(kept) < 5
    counts = draws(logits, num_draws, temperature=0.8, top_k=5, top_p=0.85, min_p=0.1)
    chosen = sorted(kept)
    wanted = (torch.tensor([logits[token_id] for token_id in chosen]).double() / 0.8).softmax(dim=0) * num_draws
    pairs = zip(chosen, wanted.tolist(), strict=True)
    assert sum((counts[token_id] - count) ** 2 / count for token_id, count in pairs) < CHI_SQUARE_7
    assert set(counts) == kept


def test_each_row_has_its_own_top_k_and_top_p() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).repeat(4000, 1)
    drawn = sample(logits, inputs(4000, top_k=[0, 2, 0, 3] * 1000, top_p=[1.0, 1.0, 0.7, 0.5] * 1000, seed=range(4000)))
    assert [set(drawn[row::4].tolist()) for row in range(4)] == [{0, 1, 2, 3}, {0, 1}, {0, 1}, {0}]


def test_a_row_without_top_p_keeps_its_least_probable_token_beside_one_with(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.tensor([0.0, -30.0, -40.0]).repeat(2, 1)  # in float32 the first has all the probability
    monkeypatch.setattr(torch_kernels, "gumbel_noise", lambda inputs, vocab_size: torch.tensor([0.0, 0.0, 1e6]))
    assert sample(rows, inputs(2, top_p=[1.0, 0.9])).tolist() == [2, 0]


# ----------------------------------------------------------------------------------------------- how probable


@pytest.mark.parametrize("keyed_by", ["position", "seed", "sample_index"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax(keyed_by: str, temperature: float) -> None:
    logits, num_draws = [-1.0, 0.0, 1.0, 2.0, 0.5, 0.5, -0.5, 1.5], 20_000
    columns = {"position": 1, keyed_by: range(1, num_draws + 1), "temperature": temperature}
    counts = draws(logits, num_draws, **columns)
    wanted = (torch.tensor(logits).double() / temperature).softmax(dim=0) * num_draws
    chi_square = sum((counts[token_id] - count) ** 2 / count for token_id, count in enumerate(wanted.tolist()))
    assert chi_square < CHI_SQUARE_7


def test_the_noise_is_gumbels() -> None:
    noise = gumbel_noise(inputs(100, position=range(100)), 10_000)
    assert noise.mean().item() == pytest.approx(EULER_GAMMA, abs=0.005)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.01)


# ------------------------------------------------------------------------------------------ what it depends on


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 200, generator=generator)
    columns = {
        "seed": torch.arange(30) * 7919 - 90_000,
        "sample_index": torch.arange(30) % 4,
        "position": torch.arange(30) % 11,
        "top_k": torch.arange(30) % 3 * 20,
        "top_p": 1 - torch.arange(30) % 2 * 0.2,
        "min_p": torch.arange(30) % 7 * 0.01,
        "temperature": torch.arange(30) % 5 * 0.5,
    }
    together = sample(logits.clone(), inputs(30, **columns))
    order = torch.randperm(30, generator=generator)
    shuffled = sample(logits[order], inputs(30, **{name: column[order] for name, column in columns.items()}))
    alone = [
        sample(logits[row : row + 1].clone(), inputs(1, **{name: column[row] for name, column in columns.items()}))
        for row in range(30)
    ]
    assert shuffled.tolist() == together[order].tolist()
    assert torch.cat(alone).tolist() == together.tolist()


def test_a_shard_of_the_vocabulary_has_that_slice_of_the_noise() -> None:
    rows = inputs(5, seed=range(5), position=range(3, 8))
    whole = gumbel_noise(rows, 1000)
    torch.testing.assert_close(gumbel_noise(rows, 300, first_token_id=400), whole[:, 400:700], rtol=0, atol=0)


def test_seed_sample_index_and_position_each_give_other_noise() -> None:
    rows = inputs(
        9,
        seed=[5, 6, -5, 5 + 2**32, 5, 5, 5, 0, 1],
        sample_index=[0, 0, 0, 0, 1, 0, 2, 0, 0],
        position=[7, 7, 7, 7, 7, 8, 7, 0, 0],
    )
    correlations = torch.corrcoef(gumbel_noise(rows, 50_000)).fill_diagonal_(0.0)
    assert correlations.abs().max() < 0.02


# ------------------------------------------------------------------------------------------------- at the edge


def test_noise_is_finite_also_for_the_largest_hash() -> None:
    position, token_id = 582_203, 24  # their hash is within 128 of 2^32, which float32 rounds to 2^32
    noise = gumbel_noise(inputs(position=position), 100)
    assert noise.isfinite().all()
    assert noise[0, token_id] == noise.min()


def test_the_only_token_left_is_drawn_whatever_its_noise() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 24] = 1.0
    assert sample(logits, inputs(position=582_203, top_k=1)).item() == 24


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-10])
@pytest.mark.parametrize("offset", [0.0, 500.0, -500.0])
def test_the_smallest_temperatures_are_greedy(temperature: float, offset: float) -> None:
    logits = [offset + logit for logit in (0.0, 1.0, 3.0, 2.0)]
    assert set(draws(logits, 50, temperature=temperature, top_p=0.9)) == {2}


def test_a_huge_temperature_draws_evenly() -> None:
    counts = draws([-50.0, 0.0, 50.0, 20.0], 4000, temperature=1e30)
    assert all(900 < counts[token_id] < 1100 for token_id in range(4))


def test_a_tiny_top_p_keeps_the_most_probable_token() -> None:
    assert set(draws([0.0, 1.0, 0.9], 100, top_p=1e-50)) == {1}


def test_a_top_k_above_the_vocabulary_keeps_all() -> None:
    assert draws([0.0, 1.0, 0.9], 500, top_k=2**31 - 1) == draws([0.0, 1.0, 0.9], 500)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1, 0])
def test_the_most_extreme_seeds_draw_fairly(seed: int) -> None:
    counts = draws([0.0, 0.0], 4000, seed=seed)
    assert 1850 < counts[0] < 2150


def test_half_precision_logits_are_drawn_from_in_float32() -> None:
    logits = torch.randn(20, 100).bfloat16()
    rows = inputs(20, seed=range(20), temperature=0.6, top_p=0.9)
    assert sample(logits.clone(), rows).tolist() == sample(logits.float(), rows).tolist()
