"""Workloads: the token ids, output lengths and sampling that every engine is given alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "workloads"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkloadRequest:
    """One prompt. Its output has exactly `num_output_tokens`: end-of-sequence tokens are ignored.

    Attributes:
        n: completions of the prompt.
        temperature: 0 is greedy.
    """

    prompt_token_ids: list[int]
    num_output_tokens: int
    n: int = 1
    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests in order of arrival; they arrive all at once unless the benchmark says otherwise."""

    name: str
    description: str
    requests: list[WorkloadRequest]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.num_output_tokens * request.n for request in self.requests)

    @property
    def greedy(self) -> bool:
        return all(request.temperature == 0 for request in self.requests)


def workload_names() -> list[str]:
    """Every workload there is."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_workload(name: str, num_requests: int | None = None) -> Workload:
    """Read workloads/<name>.json, its first `num_requests` or all.

    Raises:
        ValueError: there is no such workload.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"There is no workload {name!r} in {FOLDER}; there are: {', '.join(workload_names())}.")
    content = json.loads(path.read_text())
    return Workload(
        name=name,
        description=content["description"],
        requests=[
            WorkloadRequest(
                prompt_token_ids=request["prompt"],
                num_output_tokens=request["max_tokens"],
                n=request.get("n", 1),
                temperature=request.get("temperature", 0.0),
            )
            for request in content["requests"][:num_requests]
        ],
    )


def warm_up_workload() -> Workload:
    """A few tokens that no workload starts with: they start threads and kernels and leave no prefix to be found."""
    prompts = [list(range(start, start + 32)) for start in (1000, 2000)]
    return Workload(
        name="warm-up",
        description="two requests, 32 in / 4 out, greedy",
        requests=[WorkloadRequest(prompt_token_ids=prompt, num_output_tokens=4) for prompt in prompts],
    )
