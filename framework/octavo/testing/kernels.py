"""KernelsSuite: what every kernel set must do, checked against the formulas in float64.

    class TestMine(KernelsSuite):
        component = "my-plugin/mine"

A set that runs in an interpreter here says `small = True`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from octavo.interfaces.kernels import Activation, Kernels, SamplingInputs
from octavo.plugins.specs import KernelsSpec, Need
from octavo.testing.drawn_tokens import border_positions, describe, draw, sampling_inputs
from octavo.testing.suite import Suite

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
EPS = 1e-6


class KernelsSuite(Suite):
    """The conformance of a kernel set.

    Attributes:
        device: where its tests run. A set that needs a GPU says "cuda", and its tests are skipped elsewhere with
            `pytestmark = pytest.mark.skipif(...)`.
        small: take fewer and smaller cases.
        tolerances: largest error of a number as a share of it, by the model's dtype: in float32 a few roundings, else
            one, upwards or downwards.
    """

    kind = "kernels"
    device: ClassVar[str] = "cpu"
    small: ClassVar[bool] = False
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 5e-6, "bfloat16": 8e-3, "float16": 1e-3}

    # ---------------------------------------------------------------------------------------- what is under test

    def make(self, dtype: str) -> Kernels:
        """The set for a model's dtype, as the engine makes it."""
        kernels: Kernels = self.build(Need(device=self.device, dtype=dtype))
        return kernels

    def spec(self) -> KernelsSpec:
        """What the component says of itself."""
        spec = self.candidate().spec
        assert isinstance(spec, KernelsSpec)
        return spec

    def dtypes(self) -> list[str]:
        """The model's dtypes that it accepts here."""
        need = Need(device=self.device)
        accepted = [dtype for dtype in DTYPES if not self.spec().why_not(replace(need, dtype=dtype))]
        assert accepted, f"it refuses every dtype on {self.device!r}: {'; '.join(self.spec().why_not(need))}"
        return accepted

    @pytest.fixture(autouse=True)
    def _one_thread(self) -> Iterator[None]:
        """Threads of many small operations wait for each other longer than they compute."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    @pytest.fixture(autouse=True)
    def _generator(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    @property
    def vocab_size(self) -> int:
        """Not a power of two."""
        return 300 if self.small else 3000

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Tensor:
        """Values of a normal distribution, on the device."""
        values = scale * torch.randn(shape, generator=self.generator)
        return values.to(getattr(torch, dtype)).to(self.device)

    # ------------------------------------------------------------------------------------------------- contract

    def test_is_a_kernel_set(self) -> None:
        for dtype in self.dtypes():
            assert isinstance(self.make(dtype), Kernels)

    def test_refusals_are_sentences(self) -> None:
        need = Need(device=self.device, dtype=self.dtypes()[0])
        for each in (replace(need, dtype="float64"), replace(need, device="xpu"), replace(need, device="cuda")):
            for reason in self.spec().why_not(each):
                assert len(reason.split()) > 2, f"{reason!r} does not explain why it refuses {each}"
                assert not reason.startswith("its probe"), f"{reason} (asked with {each})"

    # ----------------------------------------------------------------------------------------------------- norm

    @pytest.mark.parametrize("with_residual", [False, True], ids=["without residual", "with residual"])
    def test_norm_equals_the_formula(self, with_residual: bool) -> None:
        sizes = (7, 64, 100) if self.small else (1, 7, 64, 100, 576, 4096)
        for dtype in self.dtypes():
            for size in sizes:
                for shape in ((3, size), (1, size), (5, 3, size)):
                    hidden = self.normal(*shape, dtype=dtype)
                    residual = self.normal(*shape, dtype=dtype) if with_residual else None
                    self.check_norm(hidden, residual, self.normal(size, dtype=dtype))

    def test_norm_of_slices_of_a_stacked_output_equals_the_formula(self) -> None:
        num_tokens, num_heads, head_dim = 3, 2, 64
        for dtype in self.dtypes():
            stacked = self.normal(num_tokens, 4 * num_heads * head_dim, dtype=dtype)
            _, left, right, _ = stacked.chunk(4, dim=1)
            weight = self.normal(num_heads * head_dim, dtype=dtype)
            self.check_norm(left, None, weight)
            self.check_norm(left, right, weight)
            heads = [slice_.view(num_tokens, num_heads, head_dim) for slice_ in (left, right)]
            self.check_norm(heads[0], None, weight[:head_dim])
            self.check_norm(heads[0], heads[1], weight[:head_dim])

    def test_norm_with_float32_weights_answers_in_the_model_s_dtype(self) -> None:
        for dtype in self.dtypes():
            for residual in (None, self.normal(3, 100, dtype=dtype)):
                self.check_norm(self.normal(3, 100, dtype=dtype), residual, 1 + self.normal(100, scale=0.1))

    def test_squares_are_summed_in_float32(self) -> None:
        for dtype in self.dtypes():
            large = 2e4 if dtype == "float16" else 1e15  # whose squares are too large for float16
            small_and_large = torch.where(torch.arange(500, device=self.device) < 1, 16.0, 1.0).to(dtype=_torch(dtype))
            self.check_norm(self.normal(2, 500, dtype=dtype).clamp(-3, 3) * large, None, self.normal(500, dtype=dtype))
            self.check_norm(small_and_large.expand(2, -1), None, self.normal(500, dtype=dtype))

    def test_eps_keeps_small_rows_small(self) -> None:
        for dtype in self.dtypes():
            for scale in (0.0, 1e-3, 1e-4):  # of which eps is nothing, half and nearly all of the root's argument
                hidden = self.normal(2, 100, dtype=dtype, scale=scale)
                self.check_norm(hidden, None, self.normal(100, dtype=dtype))
                self.check_norm(hidden, hidden, self.normal(100, dtype=dtype))

    def test_norm_of_no_tokens_is_of_no_tokens(self) -> None:
        for dtype in self.dtypes():
            for shape in ((0, 64), (0, 4, 64)):
                nothing = self.normal(*shape, dtype=dtype)
                for residual in (None, nothing):
                    self.check_norm(nothing, residual, self.normal(64, dtype=dtype))

    def check_norm(self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float = EPS) -> None:
        """Compare both results with the formula, and the arguments with what they were."""
        dtype = _name(hidden)
        given = [None if each is None else each.clone() for each in (hidden, residual, weight)]
        found, total = self.make(dtype).add_rms_norm(hidden, residual, weight, eps)
        for before, after in zip(given, (hidden, residual, weight), strict=True):
            assert before is None or (after is not None and torch.equal(before, after)), "it changed its arguments"
        what = f"{list(hidden.shape)} {dtype}, {'no' if residual is None else 'a'} residual, {_name(weight)} weights"
        wanted_total = hidden.double() if residual is None else hidden.double() + residual.double()
        self.check(f"total ({what})", total, wanted_total, wanted_total.abs(), dtype)
        # Of the total as it was rounded: what the next layer adds to is what is normalised here.
        exact = total.double()
        wanted = exact / (exact.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()
        self.check(f"norm ({what})", found, wanted, wanted.abs(), dtype)

    def check(self, what: str, found: Tensor, wanted: Tensor, scale: Tensor, dtype: str) -> None:
        """Errors are at most the tolerance's share of `scale`."""
        assert found.dtype == _torch(dtype), f"{what}: {dtype} is wanted, found {_name(found)}"
        assert found.shape == wanted.shape, f"{what}: {list(wanted.shape)} is wanted, found {list(found.shape)}"
        assert found.isfinite().all(), f"{what}: not finite"
        allowed = self.tolerances[dtype] * scale + torch.finfo(_torch(dtype)).smallest_normal
        share = ((found.double() - wanted).abs() / allowed).flatten()
        worst = int(share.argmax()) if len(share) else 0
        assert (share <= 1).all(), (
            f"{what}: {wanted.flatten()[worst]:.8g} is wanted, found {found.flatten()[worst]:.8g}, "
            f"wrong by {share[worst]:.2g} times what is allowed"
        )

    # ----------------------------------------------------------------------------------------- gated activation

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activation_equals_the_formula(self, activation: Activation) -> None:
        for dtype in self.dtypes():
            for size in (1, 100) if self.small else (1, 7, 100, 1024, 3000):
                for num_tokens in (1, 3):
                    gate, up = (self.normal(num_tokens, size, dtype=dtype, scale=3.0) for _ in range(2))
                    self.check_activation(activation, gate, up)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activation_of_slices_of_a_stacked_output_equals_the_formula(self, activation: Activation) -> None:
        for dtype in self.dtypes():
            gate, up = self.normal(3, 200, dtype=dtype, scale=3.0).chunk(2, dim=1)
            self.check_activation(activation, gate, up)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activation_of_large_values_is_finite(self, activation: Activation) -> None:
        for dtype in self.dtypes():
            gate = torch.tensor([[-3e4, -200.0, -20.0, -0.0, 0.0, 20.0, 200.0, 3e4]], device=self.device)
            self.check_activation(activation, gate.to(_torch(dtype)), torch.full_like(gate, 2.0).to(_torch(dtype)))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activation_of_no_tokens_is_of_no_tokens(self, activation: Activation) -> None:
        for dtype in self.dtypes():
            self.check_activation(activation, self.normal(0, 64, dtype=dtype), self.normal(0, 64, dtype=dtype))

    def check_activation(self, activation: Activation, gate: Tensor, up: Tensor) -> None:
        """Compare with the formula, and the arguments with what they were."""
        dtype = _name(gate)
        given = gate.clone(), up.clone()
        found = self.make(dtype).gated_activation(activation, gate, up)
        assert torch.equal(gate, given[0]), "it changed the gate"
        assert torch.equal(up, given[1]), "it changed the other half"
        exact = gate.double()
        activated = functional.silu(exact) if activation == "silu" else functional.gelu(exact, approximate="tanh")
        # 1 + tanh(x) loses digits where tanh is near -1; what is left there is nothing beside the gate.
        scale = (exact * up.double()).abs()
        self.check(f"{activation} ({list(gate.shape)} {dtype})", found, activated * up.double(), scale, dtype)

    # ------------------------------------------------------------------------------------------------- sampling

    def test_greedy_takes_the_largest_logit_and_the_first_of_equals(self) -> None:
        for dtype in self.dtypes():
            logits = self.normal(4, self.vocab_size, dtype=dtype).clamp(max=3.0)
            logits[1, [5, self.vocab_size // 2, self.vocab_size - 1]] = 10.0
            logits[2] = 0.0
            logits[3, :] = float("-inf")
            logits[3, self.vocab_size - 1] = -1e4
            found = self.sample(logits, sampling_inputs(4, self.device, temperature=0.0))
            assert found == logits.float().cpu().numpy().argmax(axis=1).tolist()

    def test_draws_equal_the_formula(self) -> None:
        for dtype in self.dtypes():
            num_rows = 8 if self.small else 60
            # Far from 0, where sums in half precision would have large steps.
            logits = self.normal(num_rows, self.vocab_size, dtype=dtype, scale=3.0) + 50
            self.check_draws(logits, self.varied_inputs(num_rows, top_k=0, top_p=1.0, min_p=0.0))
            self.check_draws(logits, self.varied_inputs(num_rows))

    @pytest.mark.parametrize(
        "limits",
        [
            {"top_k": 1},
            {"top_k": 10},
            {"top_p": 0.6},
            {"top_p": 1e-6},
            {"min_p": 0.3},
            {"min_p": 1.0},
            {"top_k": 12, "top_p": 0.7},  # top-p is of what top-k left
            {"top_k": 6, "top_p": 0.9, "min_p": 0.2},
        ],
        ids=lambda limits: " ".join(f"{name}={value:g}" for name, value in limits.items()),
    )
    def test_limits_keep_exactly_the_right_tokens(self, limits: dict[str, float]) -> None:
        """Rows whose noise is best for a token just inside the border, and for one just outside."""
        logits = self.border_logits()
        positions = border_positions(logits, limits, 1 if self.small else 4)
        inputs = sampling_inputs(len(positions), self.device, position=positions, **limits)
        self.check_draws(logits.expand(len(positions), -1), inputs)

    def test_tokens_as_probable_as_the_last_one_kept_are_kept(self) -> None:
        logits = self.border_logits()
        order = logits.argsort(descending=True)
        logits[order[3:7]] = logits[order[5]].item()
        for limits in ({"top_k": 5}, {"top_p": 0.35}):
            positions = border_positions(logits, limits, 3)
            inputs = sampling_inputs(len(positions), self.device, position=positions, **limits)
            self.check_draws(logits.expand(len(positions), -1), inputs)

    def test_min_p_is_of_the_tempered_distribution(self) -> None:
        logits = torch.tensor([[0.0, -1.0, -20.0]], device=self.device)
        positions = border_positions(logits[0] / 2, {"top_k": 1}, 1)
        for temperature in (1.0, 2.0):  # at which the second is kept
            limits = {"position": positions, "temperature": temperature, "min_p": 0.5}
            self.check_draws(logits.expand(len(positions), -1), sampling_inputs(len(positions), self.device, **limits))

    def test_masked_tokens_are_never_drawn(self) -> None:
        logits = torch.full((4, self.vocab_size), float("-inf"), device=self.device)
        logits[:, [3, 50, self.vocab_size - 1]] = torch.tensor([0.0, 0.5, -0.5], device=self.device)
        limits = {"top_k": [0, 5, 0, 2], "top_p": [1.0, 0.999, 0.5, 1.0], "min_p": [0.0, 0.0, 0.1, 0.0]}
        self.check_draws(logits, sampling_inputs(4, self.device, seed=range(4), **limits))

    def test_rows_of_temperature_0_stand_beside_others(self) -> None:
        logits = self.normal(6, self.vocab_size)
        inputs = sampling_inputs(6, self.device, temperature=[0.0, 1.5] * 3, seed=range(6), top_k=[0, 0, 40, 40, 1, 1])
        self.check_draws(logits, inputs)

    @pytest.mark.parametrize("temperature", [1e-38, 1e-10, 1e-3, 1e30])
    def test_extreme_temperatures_are_drawn_at(self, temperature: float) -> None:
        logits = self.normal(3, self.vocab_size, scale=3.0)
        inputs = sampling_inputs(3, self.device, temperature=temperature, seed=range(3), top_p=0.9)
        self.check_draws(logits, inputs)

    def test_a_row_draws_the_same_alone_and_in_any_batch(self) -> None:
        num_rows = 5 if self.small else 30
        logits = self.normal(num_rows, self.vocab_size, scale=3.0)
        inputs = self.varied_inputs(num_rows)
        together = self.sample(logits, inputs)
        order = torch.randperm(num_rows, generator=self.generator)
        assert self.sample(logits[order.to(self.device)], _rows(inputs, order)) == [together[row] for row in order]
        for row in range(num_rows):
            alone = self.sample(logits[row : row + 1], _rows(inputs, torch.tensor([row])))
            assert alone == together[row : row + 1], f"alone it draws another token ({describe(inputs, row)})"

    def test_draws_follow_the_softmax(self) -> None:
        """By chi-square over 8 tokens, 7 degrees of freedom; the draws are hashes, the same in every run."""
        num_draws = 64 if self.small else 4096
        logits = torch.tensor([-1.0, 0.0, 1.0, 2.0, 0.5, 0.5, -0.5, 1.5], device=self.device)
        inputs = sampling_inputs(num_draws, self.device, position=range(1, num_draws + 1), temperature=1.5)
        found = self.sample(logits.expand(num_draws, -1), inputs)
        wanted = (logits.double().cpu() / 1.5).softmax(dim=0).numpy() * num_draws
        counts = np.bincount(found, minlength=8)
        assert ((counts - wanted) ** 2 / wanted).sum() < 29.9, f"drawn {counts.tolist()}, expected {wanted.round()}"

    def border_logits(self) -> Tensor:
        """Twenty tokens of nearby probability, scattered over a vocabulary of others that have next to none."""
        scattered = torch.randperm(self.vocab_size, generator=self.generator)[:20]
        logits = self.normal(self.vocab_size).clamp(-3, 3) - 20
        logits[scattered.to(self.device)] = torch.linspace(0, 2, 20, device=self.device)
        return logits

    def varied_inputs(self, num_rows: int, **columns: Any) -> SamplingInputs:
        """Rows that differ in everything, some greedy, some with each limit off."""
        row = torch.arange(num_rows)
        varied = {
            "temperature": row % 5 * 0.4,
            "seed": (row - num_rows // 2) * 0x1234_5678_9ABC,
            "sample_index": row % 4,
            "position": row * 37 % 100_000,
            "top_k": row % 3 * 3,
            "top_p": 1 - row % 2 * 0.2,
            "min_p": row % 7 * 0.01,
        }
        return sampling_inputs(num_rows, self.device, **(varied | columns))

    def sample(self, logits: Tensor, inputs: SamplingInputs) -> list[int]:
        """The tokens drawn; the logits must be what they were."""
        given = logits.clone()
        found = self.make(_name(logits)).sample(logits, inputs)
        assert torch.equal(logits, given), "it changed the logits"
        assert found.dtype == torch.int64, f"int64 is wanted, found {_name(found)}"
        assert found.shape == logits.shape[:1], f"one token for each row is wanted, found {list(found.shape)}"
        tokens: list[int] = found.tolist()
        return tokens

    def check_draws(self, logits: Tensor, inputs: SamplingInputs) -> None:
        """Compare with the formula, wherever rounding cannot decide."""
        found, wanted = self.sample(logits, inputs), draw(logits, inputs)
        assert wanted.sure.mean() > 0.9, "of this scene too much is left to rounding"
        for row in np.flatnonzero(wanted.sure):
            assert found[row] == wanted.token_ids[row], (
                f"row {row} of {len(found)}: token {wanted.token_ids[row]} is wanted, found {found[row]} "
                f"({describe(inputs, row)}, {_name(logits)})"
            )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _torch(dtype: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, dtype)
    return found


def _rows(inputs: SamplingInputs, rows: Tensor) -> SamplingInputs:
    """The inputs of these rows, with the flags that hold for them."""
    columns = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    chosen = {name: column.cpu()[rows] for name, column in columns.items() if isinstance(column, Tensor)}
    return sampling_inputs(len(rows), str(inputs.seed.device), **chosen)
