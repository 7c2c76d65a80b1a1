"""The engines that cpu.py compares, behind one door: load a model, answer a workload.

Each engine is imported when it is built, so that a process holds one of them only.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workload import Workload, WorkloadRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A workload's outputs and how long they took.

    Attributes:
        token_ids: of every completion, in the workload's order; exactly the tokens the workload asks for.
        wall_seconds: from handing over the requests to the last token.
        ttft_seconds: to the first token, of a single stream only.
    """

    token_ids: list[list[int]]
    wall_seconds: float
    ttft_seconds: float | None = None


class Peer(ABC):
    """An engine with a model loaded."""

    @abstractmethod
    def answer(self, workload: Workload) -> Answer:
        """Generate every output of the workload."""

    def details(self) -> dict[str, str]:
        """What of it ran, for the record."""
        return {}

    def kv_waste(self) -> float | None:
        """Share of the KV memory held by running requests that stored no token, mean over steps; None if not known."""
        return None


class OctavoPeer(Peer):
    """Octavo as a Python user has it: `LLM.generate`, and `LLM.stream` for a single stream."""

    def __init__(self, model: str, dtype: str, settings: Mapping[str, Any]) -> None:
        from octavo import LLM

        self._llm = LLM(**{"model": model, "dtype": dtype, "device": "cpu", **settings})

    def answer(self, workload: Workload) -> Answer:
        from octavo import SamplingParams

        params = [
            SamplingParams(
                n=request.n,
                temperature=request.temperature,
                max_tokens=request.num_output_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for request in workload.requests
        ]
        prompts = [request.prompt_token_ids for request in workload.requests]
        first_token_time = None
        start = time.perf_counter()
        if is_single_stream(workload):
            for output in self._llm.stream(prompts[0], params[0]):
                first_token_time = first_token_time or time.perf_counter()
                outputs = [output]
        else:
            outputs = self._llm.generate(prompts, params)
        end = time.perf_counter()
        return Answer(
            token_ids=[completion.token_ids for output in outputs for completion in output.outputs],
            wall_seconds=end - start,
            ttft_seconds=None if first_token_time is None else first_token_time - start,
        )

    def details(self) -> dict[str, str]:
        """The component chosen of each kind."""
        return {kind: chosen.name for kind, chosen in self._llm.manifest.components.items()}

    def kv_waste(self) -> float:
        return self._llm.stats().kv_waste


class TransformersPeer(Peer):
    """Hugging Face transformers as its users batch by hand: `generate()` over static batches.

    Batches are taken in order of arrival and padded on the left; each runs until its longest output is there, and what
    it generates beyond a request's own length is thrown away.
    """

    def __init__(self, model: str, dtype: str, batch_size: int) -> None:
        self._transformers: Any = importlib.import_module("transformers")
        auto_model = self._transformers.AutoModelForCausalLM
        self._model = auto_model.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()
        # generate() takes from here what its caller leaves open, and end-of-sequence tokens shall stay open.
        self._model.generation_config = self._transformers.GenerationConfig()
        self._batch_size = batch_size

    def answer(self, workload: Workload) -> Answer:
        self._transformers.set_seed(0)
        requests = workload.requests
        batches = [requests[start : start + self._batch_size] for start in range(0, len(requests), self._batch_size)]
        times = _TokenTimes() if is_single_stream(workload) else None
        token_ids: list[list[int]] = []
        start = time.perf_counter()
        for batch in batches:
            token_ids += self._generate(batch, times)
        end = time.perf_counter()
        # A streamer is given the prompt before the first token.
        ttft_seconds = None if times is None else times.seconds[1] - start
        return Answer(token_ids=token_ids, wall_seconds=end - start, ttft_seconds=ttft_seconds)

    def _generate(self, batch: list[WorkloadRequest], streamer: _TokenTimes | None) -> list[list[int]]:
        import torch

        n, temperature = batch[0].n, batch[0].temperature
        assert all((request.n, request.temperature) == (n, temperature) for request in batch)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        longest = max(len(request.prompt_token_ids) for request in batch)
        padded = [[0] * (longest - len(request.prompt_token_ids)) + request.prompt_token_ids for request in batch]
        mask = [[0] * (longest - (length := len(request.prompt_token_ids))) + [1] * length for request in batch]
        with torch.inference_mode():
            output = self._model.generate(
                torch.tensor(padded),
                attention_mask=torch.tensor(mask),
                generation_config=self._transformers.GenerationConfig(
                    max_new_tokens=max(request.num_output_tokens for request in batch),
                    num_return_sequences=n,
                    pad_token_id=0,
                    **sampling,
                ),
                streamer=streamer,
            )
        rows = output[:, longest:].tolist()
        return [row[: batch[index // n].num_output_tokens] for index, row in enumerate(rows)]


class _TokenTimes:
    """A streamer for transformers that only looks at the clock."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: object) -> None:
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass


def is_single_stream(workload: Workload) -> bool:
    """Whether it is one prompt and one completion, where a first token and a pace can be told apart."""
    return len(workload.requests) == 1 and workload.requests[0].n == 1
