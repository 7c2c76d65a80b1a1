"""The draw kernel, and the whole of `sample`, draw what plain torch draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.builtin.torch_kernels import TorchKernels, gumbel_noise
from octavo.errors import ShapeError
from octavo.interfaces import SamplingInputs
from octavo.plugins.specs import Need
from octavo.testing.drawn_tokens import sampling_inputs
from octavo_kernels_triton.kernels.sample_draw import gumbel, hashed_uniform, perturbed_scores_reference, sample_draw
from octavo_kernels_triton.sampling import sample


def by_torch(logits: Tensor, inputs: SamplingInputs) -> list[int]:
    return TorchKernels(Need(device="cpu")).sample(logits, inputs).tolist()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ROWS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-38, 0.6, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 0, 1, 20]),
        "top_p": st.sampled_from([1.0, 1.0, 0.5, 0.95]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "sample_index": st.integers(0, 1000),
        "position": st.integers(0, 2**31 - 1),
    }
)


@given(
    rows=st.lists(ROWS, min_size=1, max_size=4),
    vocab_size=st.sampled_from([7, 50, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.0, 1.0, 5.0]),
    share_masked=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_rows_draw_what_torch_draws(
    rows: list[dict[str, float]], vocab_size: int, dtype: torch.dtype, scale: float, share_masked: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(len(rows), vocab_size, generator=generator)).to(dtype)
    logits[torch.rand(logits.shape, generator=generator) < share_masked] = float("-inf")
    inputs = sampling_inputs(len(rows), **{name: [row[name] for row in rows] for name in rows[0]})
    assert sample(logits, inputs).tolist() == by_torch(logits, inputs)


@triton.jit
def gumbel_kernel(uniform_ptr, out_ptr, size: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(out_ptr + index, gumbel(tl.load(uniform_ptr + index)))


@triton.jit
def noise_kernel(seed_ptr, sample_index_ptr, position_ptr, out_ptr, size: tl.constexpr):
    token_ids = tl.arange(0, size)
    seed, sample_index, position = tl.load(seed_ptr), tl.load(sample_index_ptr), tl.load(position_ptr)
    tl.store(out_ptr + token_ids, gumbel(hashed_uniform(seed, sample_index, position, token_ids)))


def test_logarithms_are_right_to_the_last_bits() -> None:
    size = 65536
    small = torch.logspace(-33, 0, size // 2, base=2.0)
    uniform = torch.cat([small, 1 - small]).clamp(2.0**-33, 1 - 2.0**-24)
    found = torch.empty(size)
    gumbel_kernel[(1,)](uniform, found, size=size)
    exact = -torch.log(-torch.log1p(-uniform.double()))
    torch.testing.assert_close(found.double(), exact, rtol=1.2e-7, atol=2.5e-7)


@pytest.mark.parametrize("seed", [0, 12345, -1, -(2**63), 2**40 + 7])
def test_the_noise_is_that_of_plain_torch(seed: int) -> None:
    inputs, found = sampling_inputs(1, seed=seed, sample_index=3, position=2**31 - 1), torch.empty(65536)
    noise_kernel[(1,)](inputs.seed, inputs.sample_index, inputs.position, found, size=len(found))
    torch.testing.assert_close(found, gumbel_noise(inputs, len(found))[0], rtol=2.5e-7, atol=5e-7)
    exact = perturbed_scores_reference(torch.zeros(1, len(found)), inputs, None)[0]
    torch.testing.assert_close(found.double(), exact, rtol=1.2e-7, atol=2.5e-7)


def test_equal_logits_are_drawn_by_the_noise_alone() -> None:
    logits, inputs = torch.zeros(64, 300), sampling_inputs(64, seed=12345, position=range(64))
    drawn = sample_draw(logits, inputs, None, block=512).tolist()
    assert drawn == by_torch(logits, inputs)
    assert drawn == perturbed_scores_reference(logits, inputs, None).argmax(dim=1).tolist()
    assert len(set(drawn)) > 50


@pytest.mark.parametrize("greedy", [True, False])
def test_the_best_token_is_found_in_any_chunk(greedy: bool) -> None:
    tokens = [0, 15, 16, 31, 49]
    logits = torch.zeros(5, 50)
    logits[range(5), tokens] = 60.0
    inputs = sampling_inputs(5, temperature=0.0 if greedy else 1.0)
    assert sample_draw(logits, inputs, None, block=16).tolist() == tokens


def test_greedy_takes_the_first_of_equals_across_chunks() -> None:
    logits = torch.zeros(3, 50)
    logits[1, [20, 40]] = 1.0
    logits[2] = float("-inf")
    assert sample_draw(logits, sampling_inputs(3, temperature=0.0), None, block=16).tolist() == [0, 20, 0]


def test_rows_of_temperature_0_stand_beside_others() -> None:
    logits = normal(4, 50)
    inputs = sampling_inputs(4, temperature=[0.0, 1.5, 0.0, 1.5], seed=range(4))
    drawn = sample_draw(logits, inputs, None, block=16).tolist()
    assert drawn == by_torch(logits, inputs)
    assert drawn[::2] == logits[::2].argmax(dim=1).tolist()


def test_what_lies_below_the_threshold_is_not_drawn() -> None:
    logits = normal(32, 50)
    threshold = logits.topk(3, dim=1).values[:, 2].contiguous()
    drawn = sample_draw(logits, sampling_inputs(32, seed=range(32)), threshold, block=64)
    assert (logits.gather(1, drawn.unsqueeze(1)).squeeze(1) >= threshold).all()
    assert (drawn != logits.argmax(dim=1)).any()


def test_a_threshold_leaves_greedy_rows_alone() -> None:
    logits = normal(2, 50)
    drawn = sample_draw(logits, sampling_inputs(2, temperature=[0.0, 1.0]), torch.full((2,), 9.0), block=16)
    assert drawn[0] == logits[0].argmax()


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    logits, limits = normal(4, 300), {"seed": [3, 1, 2, 4], "top_p": [0.9, 1.0, 0.5, 0.9], "top_k": [0, 0, 9, 4]}
    together = sample(logits, sampling_inputs(4, **limits)).tolist()
    for row in range(4):
        alone = sampling_inputs(1, **{name: column[row] for name, column in limits.items()})
        assert sample(logits[row : row + 1], alone).tolist() == together[row : row + 1]


def test_rows_are_read_where_they_lie() -> None:
    wide = normal(6, 70)
    logits, inputs = wide[::2, 3:53], sampling_inputs(3, seed=range(3), top_k=5)
    assert sample(logits, inputs).tolist() == by_torch(logits, inputs)


def test_columns_that_are_not_contiguous_are_read_too() -> None:
    logits, inputs = normal(50, 3).T, sampling_inputs(3, seed=range(3), top_p=0.9)
    assert sample(logits, inputs).tolist() == by_torch(logits, inputs)


def test_inputs_may_be_slices_of_one_buffer() -> None:
    logits, inputs = normal(3, 50), sampling_inputs(3, seed=range(3), temperature=[0.5, 1.0, 2.0])
    shifted = torch.cat([torch.zeros(1), inputs.temperature])[1:]
    assert sample(logits, replace(inputs, temperature=shifted)).tolist() == by_torch(logits, inputs)


def test_all_greedy_rows_read_no_temperature() -> None:
    logits = normal(2, 50)
    inputs = replace(sampling_inputs(2, temperature=1.0, top_k=3), all_greedy=True)
    assert sample(logits, inputs).tolist() == logits.argmax(dim=1).tolist()


def test_no_rows_draw_no_tokens() -> None:
    assert sample(torch.zeros(0, 50), sampling_inputs(0)).shape == (0,)


def test_inputs_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ShapeError, match="one entry for each sample"):
        sample(torch.zeros(3, 50), sampling_inputs(2))
