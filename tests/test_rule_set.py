"""RuleSet: each rule hears of the requests that ask for it, and of no others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo import SamplingParams
from octavo.interfaces import LogitsRule, NewRow, RuleLimits
from octavo.interfaces.kernels import SamplingInputs
from octavo.runner.rules import RuleSet
from octavo.runner.step_inputs import Samples

LIMITS = RuleLimits(max_num_requests=8, vocab_size=4, device="cpu")


class Recorder(LogitsRule):
    """Applies to requests whose `extra_args` name it; adds to each logit what it is called, and notes what it hears."""

    def __init__(self, name: str, adds: float, looks_back: bool = False) -> None:
        super().__init__(LIMITS)
        self.name, self.adds, self.looks_back = name, adds, looks_back
        self.heard: list[tuple[str, int, object]] = []

    def add(self, row: int, request: NewRow) -> bool:
        asked = self.name in (request.params.extra_args or {})
        if asked:
            self.heard.append(("add", row, request.request_id))
        return asked

    def remove(self, row: int) -> None:
        self.heard.append(("remove", row, None))

    def accept(self, row: int, token_ids: Sequence[int]) -> None:
        self.heard.append(("accept", row, tuple(token_ids)))

    def apply(self, logits: Tensor, indices: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> None:
        self.heard += [("apply", row, position) for row, position in zip(rows, positions, strict=True)]
        logits[list(indices)] = logits[list(indices)] * 2 + self.adds


def request(request_id: str, *rules: str) -> NewRow:
    params = SamplingParams(extra_args=dict.fromkeys(rules, True))
    return NewRow(request_id=request_id, token_ids=[1], num_prompt_tokens=1, params=params, seed=0, sample_index=0)


def samples(rows: Sequence[int], positions: Sequence[int] | None = None) -> Samples:
    size = len(rows)
    zeros, none = torch.zeros(size), torch.zeros(size, dtype=torch.int32)
    return Samples(
        tokens=torch.arange(size),
        request_ids=[str(row) for row in rows],
        rows=np.array(rows),
        device_rows=torch.tensor(rows),
        entries=np.zeros(size, np.int64),
        positions=np.array(positions if positions is not None else [1] * size),
        drafts={},
        inputs=SamplingInputs(
            temperature=zeros,
            top_p=zeros,
            min_p=zeros,
            top_k=none,
            seed=none.long(),
            sample_index=none,
            position=none,
            all_greedy=True,
            any_top_k=False,
            any_top_p=False,
            any_min_p=False,
        ),
    )


def test_a_batch_in_which_nobody_asks_gets_the_very_same_logits() -> None:
    rules = RuleSet([Recorder("a", 1.0)])
    rules.enter(0, request("x"))
    logits = torch.zeros(1, 4)
    assert rules.apply(logits, samples([0])) is logits
    assert not rules.any


def test_a_step_without_the_rows_that_ask_gets_the_very_same_logits() -> None:
    rules = RuleSet([Recorder("a", 1.0)])
    rules.enter(0, request("x", "a"))
    logits = torch.zeros(1, 4)
    assert rules.apply(logits, samples([1])) is logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_change_a_float32_copy_for_logprobs_are_of_the_model_s_own_logits(dtype: torch.dtype) -> None:
    rules = RuleSet([Recorder("a", 1.0)])
    rules.enter(0, request("x", "a"))
    logits = torch.zeros(2, 4, dtype=dtype)
    changed = rules.apply(logits, samples([0, 1]))
    assert changed.tolist() == [[1.0] * 4, [0.0] * 4]
    assert changed.dtype == torch.float32
    assert not logits.any()


def test_rules_apply_one_after_another_in_their_order() -> None:
    rules = RuleSet([Recorder("a", 1.0), Recorder("b", 5.0)])
    rules.enter(0, request("x", "a", "b"))
    rules.enter(1, request("y", "b"))
    assert rules.apply(torch.zeros(2, 4), samples([1, 0]))[:, 0].tolist() == [5.0, 7.0]


def test_a_row_with_drafts_comes_with_each_of_its_positions() -> None:
    rule = Recorder("a", 1.0)
    rules = RuleSet([rule])
    rules.enter(3, request("x", "a"))
    rules.apply(torch.zeros(4, 4), samples([2, 3, 3, 3], [9, 4, 5, 6]))
    assert rule.heard[1:] == [("apply", 3, 4), ("apply", 3, 5), ("apply", 3, 6)]


def test_a_row_looks_back_when_one_of_its_rules_does() -> None:
    rules = RuleSet([Recorder("a", 1.0), Recorder("b", 1.0, looks_back=True)])
    for row, names in enumerate([(), ("a",), ("b",), ("a", "b")]):
        rules.enter(row, request(str(row), *names))
    assert [rules.looks_back_at([row]) for row in range(4)] == [False, False, True, True]
    rules.leave("2")
    assert not rules.looks_back_at([2])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["enter", "leave", "accept"]), st.integers(0, 7), st.sets(st.sampled_from("ab"), max_size=2)
        )
    )
)
@settings(deadline=None, derandomize=True, database=None)
def test_a_rule_hears_of_a_row_exactly_while_a_request_that_asks_has_it(
    events: list[tuple[str, int, set[str]]],
) -> None:
    recorders = {name: Recorder(name, 0.0) for name in "ab"}
    rules, asked = RuleSet(list(recorders.values())), dict[int, set[str]]()
    wanted: dict[str, list[tuple[str, int, object]]] = {"a": [], "b": []}
    for number, (what, row, names) in enumerate(events):
        if what == "enter" and row not in asked:
            rules.enter(row, request(str(row), *names))
            asked[row] = names
            for name in names:
                wanted[name].append(("add", row, str(row)))
        elif what == "leave":
            rules.leave(str(row))
            for name in asked.pop(row, ()):
                wanted[name].append(("remove", row, None))
        elif what == "accept" and row in asked:
            rules.accept(row, [number])
            for name in asked[row]:
                wanted[name].append(("accept", row, (number,)))
        assert rules.any == any(asked.values())
    assert {name: recorder.heard for name, recorder in recorders.items()} == wanted
