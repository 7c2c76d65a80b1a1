"""One step as tensors: what the batch makes of a step's plain data, and the runner computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from octavo.interfaces.attention import BatchLayout
from octavo.interfaces.kernels import SamplingInputs
from octavo.runner.transfer import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The tokens a step draws. A request with drafts has several, in order of position; the others one.

    Attributes:
        tokens: [num_samples] int64 on the device: the token of the step whose logits each is drawn from; None when they
            are the step's first tokens, in order.
        request_ids: whose each is.
        rows: their rows in the batch, [num_samples] int64 on the host; device_rows: the same on the device.
        entries: how many requests each row had had by then: tells a late sample from one of whom has the row now.
        positions: where in its request each drawn token will stand, [num_samples] int64 on the host.
        drafts: request id -> the guesses that its samples are to be compared with.
    """

    tokens: Tensor | None
    request_ids: list[str]
    rows: Array
    device_rows: Tensor
    entries: Array
    positions: Array
    drafts: Mapping[str, tuple[int, ...]]
    inputs: SamplingInputs

    def of(self, x: Tensor) -> Tensor:
        """[num_tokens, ...] of the step -> [num_samples, ...]."""
        return x[: len(self.rows)] if self.tokens is None else x[self.tokens]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTargets:
    """Prompt tokens whose logprobs are asked for: `token_ids[i]` follows token `first + i` of the step."""

    request_id: str
    first: int
    token_ids: Array
    num_logprobs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """One step as tensors.

    Attributes:
        token_ids: [num_tokens] int64; positions: [num_tokens] int64.
        token_sources: [num_tokens] int64, the row whose last sample a token is, which only the device knows yet, or -1;
            None: all are known.
        layout: where each request's tokens are, for attention.
        samples: what is drawn; None when no row samples.
        prompt_targets: of the requests that want their prompts' logprobs.
        adapter_positions: [num_tokens] int32 on the host, the device position of each token's LoRA adapter or
            NO_ADAPTER; None: no token has one.
        graph_size: of a step padded to that many requests, whose tensors lie where a captured step of the size reads.
    """

    token_ids: Tensor
    token_sources: Tensor | None
    positions: Tensor
    layout: BatchLayout
    samples: Samples | None
    prompt_targets: list[PromptTargets]
    adapter_positions: Array | None = None
    graph_size: int | None = None
