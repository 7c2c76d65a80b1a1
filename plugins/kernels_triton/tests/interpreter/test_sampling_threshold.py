"""The threshold kernel keeps exactly what sorting the scores would keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import ShapeError
from octavo.interfaces import SamplingInputs
from octavo.testing.drawn_tokens import kept, sampling_inputs
from octavo_kernels_triton.kernels.sample_draw import MIN_TEMPERATURE
from octavo_kernels_triton.kernels.top_threshold import top_threshold, top_threshold_reference

# Of a probability: what rounding may move across the border of top-p or min-p.
ROUNDING = 3e-6


def scores_of(logits: Tensor, inputs: SamplingInputs) -> Tensor:
    return logits.float() / inputs.temperature.clamp(min=MIN_TEMPERATURE.value).unsqueeze(1)


def check(logits: Tensor, inputs: SamplingInputs, block: int = 32, capacity: int = 64) -> None:
    """What each row keeps is what the formulas keep, give or take tokens that rounding decides on."""
    threshold = top_threshold(logits, inputs, block, capacity)
    scores = scores_of(logits, inputs)
    found = (scores >= threshold.unsqueeze(1)).numpy()
    limits = zip(inputs.top_k.tolist(), inputs.top_p.tolist(), inputs.min_p.tolist(), strict=True)
    for row, (top_k, top_p, min_p) in enumerate(limits):
        if inputs.temperature[row] == 0:
            assert threshold[row] == float("-inf")
            continue
        exact = scores[row].double().numpy()
        fewest, most = (kept(exact, top_k, top_p, min_p, slack) for slack in (ROUNDING, -ROUNDING))
        message = (
            f"row {row}: {found[row].sum()} kept, {fewest.sum()}..{most.sum()} wanted ({top_k=} {top_p=} {min_p=})"
        )
        assert (fewest <= found[row]).all(), message
        assert (found[row] <= most).all(), message


LIMITS = st.tuples(
    st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
    st.sampled_from([0, 0, 1, 3, 40, 299]),
    st.sampled_from([1.0, 1e-6, 0.3, 0.9, 0.95, 0.999]),
    st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
)


@given(
    rows=st.lists(LIMITS, min_size=1, max_size=3),
    vocab_size=st.sampled_from([7, 50, 300]),
    kind=st.sampled_from(["normal", "half", "rounded", "masked", "sorted"]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_row_keeps_what_the_formulas_keep(
    rows: list[tuple[float, int, float, float]], vocab_size: int, kind: str, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(rows), vocab_size, generator=generator)
    match kind:
        case "half":
            logits = logits.half()
        case "rounded":
            logits = logits.round()
        case "masked":
            logits[:, 1::2] = float("-inf")
        case "sorted":
            logits = logits.sort(dim=1).values
    columns = dict(zip(("temperature", "top_k", "top_p", "min_p"), zip(*rows, strict=True), strict=True))
    check(logits, sampling_inputs(len(rows), **columns))


@pytest.mark.parametrize(
    ("scale", "limits"),
    [
        (0.3, {"top_p": 0.9}),  # nearly all tokens
        (1.0, {"top_p": 0.9}),
        (4.0, {"top_p": 0.9}),  # a few
        (1.0, {"top_k": 20, "top_p": 0.95}),
        (1.0, {"top_k": 50_000}),
    ],
    ids=str,
)
def test_a_whole_vocabulary_keeps_what_the_formulas_keep(scale: float, limits: dict[str, float]) -> None:
    logits = (scale * torch.randn(1, 128_256, generator=torch.Generator().manual_seed(1))).bfloat16()
    check(logits, sampling_inputs(1, temperature=0.8, **limits), block=1024, capacity=4096)


def test_equal_logits_are_all_kept() -> None:
    inputs = sampling_inputs(4, top_k=[1, 0, 0, 7], top_p=[1.0, 0.5, 1.0, 1e-6], min_p=[0.0, 0.0, 1.0, 0.5])
    assert (top_threshold(torch.full((4, 300), 2.5), inputs, 16, 32) == 2.5).all()


def test_ties_at_the_border_are_kept() -> None:
    logits = torch.zeros(2, 300)
    logits[:, 5:25], logits[:, 100] = 1.0, 2.0
    assert top_threshold(logits, sampling_inputs(2, top_k=[3, 21]), 16, 32).tolist() == [1.0, 1.0]


def test_quotients_that_round_to_one_score_are_ties() -> None:
    """Of two neighbouring logits, in whose own order the lesser would be left out."""
    temperature = 1.6
    near = torch.arange(torch.tensor(1.5).view(torch.int32).item(), torch.tensor(1.9).view(torch.int32).item(), 1000)
    lesser, greater = near.int().view(torch.float32), (near + 1).int().view(torch.float32)
    pair = int((lesser / temperature == greater / temperature).nonzero()[0])
    logits = torch.full((1, 300), -1.0)
    logits[0, 7], logits[0, 200] = lesser[pair], greater[pair]
    threshold = top_threshold(logits, sampling_inputs(1, temperature=temperature, top_k=1), 16, 32)
    assert (logits / temperature >= threshold).sum() == 2


def test_more_tokens_of_one_place_in_a_block_than_it_has_room_for_are_searched() -> None:
    logits = -10 + torch.randn(1, 3000, generator=torch.Generator().manual_seed(2))
    logits[0, 5::32] += 20  # 94 of them, all in one lane
    check(logits, sampling_inputs(1, top_k=40), block=32, capacity=128)
    check(logits, sampling_inputs(1, top_p=0.7), block=32, capacity=128)


@pytest.mark.parametrize("level", [-3.0, 0.8])
@pytest.mark.parametrize("limits", [{"top_k": 500}, {"top_p": 0.5}], ids=str)
def test_a_sample_unlike_the_rest_does_not_mislead(limits: dict[str, float], level: float) -> None:
    """With a capacity of 64 tokens, the 32 sampled ones of 1,000 are 0..15 and 500..515."""
    logits = (0.3 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(7))).clamp(max=1)
    for start in (0, 500):
        logits[0, start : start + 16] = level + torch.linspace(0, 0.1, 16)
        logits[0, start] = 1.5
    check(logits, sampling_inputs(1, **limits))


def test_rows_that_ask_for_nothing_keep_everything() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    inputs = sampling_inputs(3, temperature=[1.0, 0.0, 1.0], top_k=[0, 3, 50], top_p=[1.0, 0.5, 1.0])
    assert top_threshold(logits, inputs, 16, 32).tolist() == [float("-inf")] * 3


def test_a_top_p_of_0_keeps_the_most_probable_token() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    assert top_threshold(logits, sampling_inputs(1, top_p=0.0), 16, 32) == logits.max()


def test_a_row_of_nothing_but_minus_infinity_keeps_it() -> None:
    logits = torch.full((1, 50), float("-inf"))
    inputs = sampling_inputs(1, top_k=3, top_p=0.9, min_p=0.1)
    assert top_threshold(logits, inputs, 16, 32).item() == float("-inf")


def test_fewer_tokens_than_top_k_are_all_kept() -> None:
    logits = torch.full((1, 300), float("-inf"))
    logits[0, [3, 40, 299]] = torch.tensor([1.0, 2.0, 3.0])
    assert top_threshold(logits, sampling_inputs(1, top_k=5), 16, 32).item() == float("-inf")


@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 1e30])
def test_extreme_temperatures_keep_what_the_reference_keeps(temperature: float) -> None:
    logits = 3 * torch.randn(2, 300, generator=torch.Generator().manual_seed(3))
    inputs = sampling_inputs(2, temperature=temperature, top_k=[9, 0], top_p=[1.0, 0.7])
    threshold = top_threshold(logits, inputs, 16, 32)
    assert threshold.double().tolist() == top_threshold_reference(logits, inputs).tolist()


def test_a_row_has_the_same_threshold_alone_and_in_any_batch() -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(4))
    limits = {"top_k": [0, 5, 60], "top_p": [0.9, 1.0, 0.8]}
    together = top_threshold(logits, sampling_inputs(3, **limits), 16, 32)
    for row in range(3):
        inputs = sampling_inputs(1, **{name: column[row] for name, column in limits.items()})
        assert top_threshold(logits[row : row + 1], inputs, 16, 32) == together[row]


def test_rows_are_read_where_they_lie() -> None:
    wide = torch.randn(4, 70, generator=torch.Generator().manual_seed(5))
    logits, inputs = wide[::2, 3:53], sampling_inputs(2, top_k=5, top_p=0.8)
    assert torch.equal(top_threshold(logits, inputs, 16, 32), top_threshold(logits.clone(), inputs, 16, 32))


def test_the_reference_is_the_formulas() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(6))
    inputs = sampling_inputs(4, temperature=0.5, top_k=[0, 9, 9, 0], top_p=[0.8, 1.0, 0.6, 1.0], min_p=[0, 0, 0.1, 0.2])
    found = scores_of(logits, inputs).double() >= top_threshold_reference(logits, inputs).unsqueeze(1)
    for row in range(4):
        limits = int(inputs.top_k[row]), float(inputs.top_p[row]), float(inputs.min_p[row])
        assert np.array_equal(found[row], kept(scores_of(logits, inputs)[row].double().numpy(), *limits))


def test_limits_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ShapeError, match="one entry for each sample"):
        top_threshold(torch.zeros(3, 50), sampling_inputs(2, top_k=1))
