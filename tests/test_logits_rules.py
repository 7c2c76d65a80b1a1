"""The built-in logits rules: each against a slow, plain reference, in any order of entering and leaving."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo import SamplingParams
from octavo.builtin.logits_rules import AllowedTokens, BadWords, LogitBias, MinTokens, Penalties
from octavo.config import PluginsConfig
from octavo.interfaces import LogitsRule, NewRow, RuleLimits
from octavo.plugins.registry import default_registry
from octavo.plugins.specs import LogitsRuleSpec, Need

VOCAB_SIZE, NUM_ROWS = 13, 6
LIMITS = RuleLimits(max_num_requests=NUM_ROWS, vocab_size=VOCAB_SIZE, device="cpu")


@dataclass
class One:
    """A request as a reference sees it: its parameters and its tokens, nothing incremental."""

    params: SamplingParams
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    def new_row(self, request_id: str = "x") -> NewRow:
        return NewRow(
            request_id=request_id,
            token_ids=self.prompt + self.output,
            num_prompt_tokens=len(self.prompt),
            params=self.params,
            seed=0,
            sample_index=0,
            stop_token_ids=self.stop_token_ids,
            bad_words_token_ids=self.bad_words,
        )


def allowed_tokens(one: One, logits: list[float]) -> list[float]:
    allowed = one.params.allowed_token_ids
    return [x if allowed is None or token_id in allowed else -math.inf for token_id, x in enumerate(logits)]


def bad_words(one: One, logits: list[float]) -> list[float]:
    def completes(token_id: int) -> bool:
        text = [*one.output, token_id]
        return any(len(word) <= len(text) and text[-len(word) :] == list(word) for word in one.bad_words)

    return [-math.inf if completes(token_id) else x for token_id, x in enumerate(logits)]


def min_tokens(one: One, logits: list[float]) -> list[float]:
    too_early = len(one.output) < one.params.min_tokens
    return [-math.inf if too_early and token_id in one.stop_token_ids else x for token_id, x in enumerate(logits)]


def logit_bias(one: One, logits: list[float]) -> list[float]:
    return [x + (one.params.logit_bias or {}).get(token_id, 0.0) for token_id, x in enumerate(logits)]


def penalties(one: One, logits: list[float]) -> list[float]:
    penalised = []
    for token_id, x in enumerate(logits):
        if token_id in one.prompt + one.output:
            x = x / one.params.repetition_penalty if x > 0 else x * one.params.repetition_penalty
        count = one.output.count(token_id)
        penalised.append(x - one.params.frequency_penalty * count - one.params.presence_penalty * (count > 0))
    return penalised


RULES: list[tuple[type[LogitsRule], Callable[[One, list[float]], list[float]]]] = [
    (AllowedTokens, allowed_tokens),
    (BadWords, bad_words),
    (MinTokens, min_tokens),
    (LogitBias, logit_bias),
    (Penalties, penalties),
]

tokens = st.integers(0, VOCAB_SIZE - 1)
params = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, -2.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    logit_bias=st.none() | st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=4),
    allowed_token_ids=st.none() | st.lists(tokens, min_size=1, max_size=5),
    min_tokens=st.integers(0, 4),
    max_tokens=st.none(),
)
requests = st.builds(
    One,
    params=params,
    prompt=st.lists(tokens, min_size=1, max_size=6),
    output=st.lists(tokens, max_size=5),
    stop_token_ids=st.lists(tokens, max_size=3, unique=True).map(tuple),
    bad_words=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
)


def position(one: One) -> int:
    return len(one.prompt) + len(one.output)


def check(rule: LogitsRule, reference: Callable[[One, list[float]], list[float]], rows: dict[int, One]) -> None:
    """`rows` are those under the rule: their logits become the reference's, the others stay to the bit."""
    logits = torch.randn(NUM_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(len(rows))) * 5
    order = sorted(rows, key=lambda row: (row * 5) % 7)  # the batch's order is not the rows'
    changed = logits.clone()
    indices = [NUM_ROWS - 1 - place for place in range(len(order))]
    rule.apply(changed, indices, order, [position(rows[row]) for row in order])
    wanted = logits.double()
    for index, row in zip(indices, order, strict=True):
        wanted[index] = torch.tensor(reference(rows[row], wanted[index].tolist()), dtype=torch.float64)
    torch.testing.assert_close(changed.double(), wanted, rtol=1e-5, atol=1e-5)
    untouched = [index for index in range(NUM_ROWS) if index not in indices]
    assert torch.equal(changed[untouched], logits[untouched])


@pytest.mark.parametrize(("rule", "reference"), RULES, ids=lambda each: each.__name__)
@given(events=st.lists(st.tuples(st.integers(0, NUM_ROWS - 1), requests, st.lists(tokens, max_size=3)), max_size=20))
@settings(deadline=None, max_examples=60, derandomize=True, database=None)
def test_a_rule_is_its_reference_whoever_enters_samples_and_leaves(
    rule: type[LogitsRule],
    reference: Callable[[One, list[float]], list[float]],
    events: list[tuple[int, One, list[int]]],
) -> None:
    made, rows, under = rule(LIMITS), dict[int, One](), set[int]()
    for row, one, sampled in events:
        if row not in rows:  # it enters
            rows[row] = One(one.params, one.prompt, list(one.output), one.stop_token_ids, one.bad_words)
            if made.add(row, rows[row].new_row()):
                under.add(row)
        elif sampled:
            rows[row].output += sampled
            if row in under:
                made.accept(row, sampled)
        else:
            if row in under:
                made.remove(row)
            del rows[row]
            under.discard(row)
        if under:
            check(made, reference, {row: rows[row] for row in under})
        for row in rows.keys() - under:  # a rule may pass over only what it would not change
            assert reference(rows[row], [1.0] * VOCAB_SIZE) == [1.0] * VOCAB_SIZE


@pytest.mark.parametrize(("rule", "reference"), RULES, ids=lambda each: each.__name__)
@given(one=requests, num_before=st.integers(0, 5))
@settings(deadline=None, max_examples=60, derandomize=True, database=None)
def test_a_request_that_enters_again_is_where_it_was_to_the_bit(
    rule: type[LogitsRule], reference: Callable[[One, list[float]], list[float]], one: One, num_before: int
) -> None:
    before, rest = one.output[:num_before], one.output[num_before:]
    stayed, again = rule(LIMITS), rule(LIMITS)
    first = One(one.params, one.prompt, before, one.stop_token_ids, one.bad_words)
    asked = stayed.add(0, first.new_row())
    assert again.add(3, one.new_row()) == asked
    if asked:
        stayed.accept(0, rest)
        logits = torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
        assert torch.equal(applied(stayed, 0, logits, one), applied(again, 3, logits, one))


def applied(rule: LogitsRule, row: int, logits: Tensor, one: One) -> Tensor:
    changed = logits.clone()
    rule.apply(changed, [0], [row], [position(one)])
    return changed


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=lambda each: each.__name__)
def test_a_request_that_asks_nothing_is_under_no_rule(rule: type[LogitsRule]) -> None:
    assert not rule(LIMITS).add(0, One(SamplingParams(), [1, 2, 3], [1], stop_token_ids=(2,)).new_row())


def test_min_tokens_and_the_biases_hold_at_every_draft_of_a_row() -> None:
    one = One(
        SamplingParams(min_tokens=2, logit_bias={3: 2.0}, allowed_token_ids=[1, 3, 5]), [7, 7], stop_token_ids=(5,)
    )
    logits = torch.zeros(3, VOCAB_SIZE)
    for rule in (AllowedTokens(LIMITS), MinTokens(LIMITS), LogitBias(LIMITS)):
        assert rule.add(4, one.new_row())
        rule.apply(logits, [0, 1, 2], [4, 4, 4], [2, 3, 4])
    assert logits[:, [1, 3]].tolist() == [[0.0, 2.0]] * 3
    assert logits[:, 5].tolist() == [-math.inf, -math.inf, 0.0]
    assert logits[:, 0].tolist() == [-math.inf] * 3


def test_only_the_rules_that_look_back_forbid_speculation() -> None:
    assert [rule.looks_back for rule, _ in RULES] == [False, True, False, False, True]


def test_a_bad_word_that_the_prompt_began_may_be_completed() -> None:
    rule, one = BadWords(LIMITS), One(SamplingParams(), [4, 1], bad_words=((1, 2),))
    rule.add(0, one.new_row())
    assert torch.equal(applied(rule, 0, torch.zeros(1, VOCAB_SIZE), one), torch.zeros(1, VOCAB_SIZE))


def test_a_forbidden_token_stays_forbidden_under_penalties() -> None:
    rule = Penalties(LIMITS)
    one = One(SamplingParams(repetition_penalty=0.5, frequency_penalty=-2.0, presence_penalty=-2.0), [1], [1, 1])
    rule.add(0, one.new_row())
    assert (applied(rule, 0, torch.full((1, VOCAB_SIZE), -math.inf), one) == -math.inf).all()


def test_penalties_have_room_for_any_number_of_tokens() -> None:
    limits = RuleLimits(max_num_requests=1, vocab_size=1000, device="cpu")
    rule, one = Penalties(limits), One(SamplingParams(frequency_penalty=1.0), [1])
    rule.add(0, one.new_row())
    for token_id in [*range(0, 1000, 2), *range(0, 1000, 4)]:
        rule.accept(0, [token_id])
    changed = applied(rule, 0, torch.zeros(1, 1000), one)[0]
    assert changed.tolist() == [
        -2.0 if token_id % 4 == 0 else -1.0 if token_id % 2 == 0 else -0.0 for token_id in range(1000)
    ]


def test_a_repetition_penalty_of_one_keeps_nothing_of_the_prompt() -> None:
    rule = Penalties(LIMITS)
    rule.add(0, One(SamplingParams(presence_penalty=1.0), [1, 2, 3]).new_row())
    assert rule._seen[0].size == 0


def test_the_order_is_vllms() -> None:
    chosen = default_registry(PluginsConfig(allow=())).choose_several(
        "logits_rule", Need(device="cpu"), lambda spec: isinstance(spec, LogitsRuleSpec) and spec.always, []
    )
    names = [component.name for component in chosen.get()]
    assert names == ["allowed-tokens", "bad-words", "min-tokens", "logit-bias", "penalties"]
