"""The margin rule: when greedy tokens count as equal to a recorded reference.

Two correct programs add floats in different orders, so where the two best logits all but tie they may choose
differently, and every token after that differs too. So tokens must equal the reference's as long as both continue the
same text; where the reference's margin is under MARGIN, or the one that a test allows, they may part; and after they
have, the rest of the reference is checked step by step: given the prompt and the reference's tokens so far, the next
token must be the reference's wherever the margin allows only one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo import LLM, RequestOutput, SamplingParams

MARGIN = 1e-3
"""Two float32 logits nearer to each other than this may change places with the order of additions."""

GOLDEN = Path(__file__).parent / "golden"
WORKLOADS = Path(__file__).parent.parent / "benchmarks" / "workloads"

NextTokens = Callable[[list[list[int]]], list[int]]
"""The greedy next token of each of many token lists: the variant under test, asked step by step."""

Adapters = str | Sequence[str | None] | None
"""The LoRA adapter of all requests, or of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What the reference answered to one request.

    Attributes:
        margins: at each step, how far the logit of the token chosen was above the second best.
    """

    name: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    margins: list[float]


def read_references(workload: str) -> list[Reference]:
    """benchmarks/workloads/WORKLOAD.json with the answers of tests/golden/demo-WORKLOAD.json."""
    requests = json.loads((WORKLOADS / f"{workload}.json").read_text())["requests"]
    answers = json.loads((GOLDEN / f"demo-{workload}.json").read_text())["requests"]
    assert [request["id"] for request in requests] == [answer["id"] for answer in answers]
    return [
        Reference(
            name=f"{workload}/{request['id']}",
            prompt_token_ids=request["prompt"],
            token_ids=answer["token_ids"],
            margins=answer["margins"],
        )
        for request, answer in zip(requests, answers, strict=True)
    ]


def check(
    references: Sequence[Reference],
    found: Sequence[Sequence[int]],
    next_tokens: NextTokens,
    margin: float = MARGIN,
) -> None:
    """Compare each request's tokens with its reference by the margin rule.

    Args:
        margin: logits nearer to each other than this may change places.

    Raises:
        AssertionError: naming every request that breaks it, with the step, both tokens and the margin.
    """
    faults: list[str] = []
    parted: list[tuple[Reference, int]] = []
    for reference, token_ids in zip(references, found, strict=True):
        if len(token_ids) != len(reference.token_ids):
            faults.append(f"{reference.name}: {len(token_ids)} tokens, wanted {len(reference.token_ids)}")
            continue
        step = _first_difference(reference.token_ids, token_ids)
        if step is None:
            continue
        if reference.margins[step] < margin:
            parted += [(reference, later) for later in _later_steps(reference, step, margin)]
        else:
            faults.append(_fault(reference, step, token_ids[step]))
    asked = next_tokens([reference.prompt_token_ids + reference.token_ids[:step] for reference, step in parted])
    for (reference, step), token_id in zip(parted, asked, strict=True):
        if token_id != reference.token_ids[step]:
            faults.append(_fault(reference, step, token_id) + ", given the reference's tokens before it")
    assert not faults, "\n".join(faults)


def greedy(max_tokens: int) -> SamplingParams:
    """Greedy, past end-of-sequence tokens, tokens only: how references are recorded and compared."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def generate(llm: LLM, references: Sequence[Reference], adapter: Adapters = None) -> list[RequestOutput]:
    """The references' requests, all at once: as many greedy tokens for each as the reference has."""
    return llm.generate(
        [reference.prompt_token_ids for reference in references],
        [greedy(len(reference.token_ids)) for reference in references],
        adapter=adapter,
    )


def token_ids_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def next_tokens_of(llm: LLM, adapter: str | None = None) -> NextTokens:
    """Ask `llm` for the greedy next token of many token lists."""

    def next_tokens(token_lists: list[list[int]]) -> list[int]:
        return [token_ids[0] for token_ids in token_ids_of(llm.generate(token_lists, greedy(1), adapter=adapter))]

    return next_tokens


def _first_difference(wanted: Sequence[int], found: Sequence[int]) -> int | None:
    pairs = zip(wanted, found, strict=True)
    return next((step for step, (one, other) in enumerate(pairs) if one != other), None)


def _later_steps(reference: Reference, step: int, margin: float) -> Iterator[int]:
    """The steps after `step` at which the margin allows only one token."""
    for later in range(step + 1, len(reference.margins)):
        if reference.margins[later] >= margin:
            yield later


def _fault(reference: Reference, step: int, found: int) -> str:
    margin, wanted = reference.margins[step], reference.token_ids[step]
    return f"{reference.name}, step {step}: wanted token {wanted}, found {found}, margin {margin:.6f}"
