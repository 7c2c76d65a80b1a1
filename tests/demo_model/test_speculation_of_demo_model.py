"""Speculation on a trained model: a proposer that looks back finds much, and the output is the reference's."""

from __future__ import annotations

from typing import Any

import margin_rule
import pytest

from octavo import LLM, SamplingParams

PLUGIN = """
    from octavo import ProposerSpec, hookimpl

    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [ProposerSpec(name="looks-back", target="looks_back.proposer:LooksBack")]
"""
PROPOSER = '''
from octavo.interfaces.proposer import Proposer


class LooksBack(Proposer):
    """What followed the last two tokens where they stood before."""

    def propose(self, continuations):
        return [self.guess(one.token_ids.tolist(), one.max_drafts) for one in continuations]

    def guess(self, token_ids, max_drafts):
        for end in range(len(token_ids) - 1, 1, -1):
            if token_ids[end - 2 : end] == token_ids[-2:]:
                return token_ids[end : end + max_drafts]
        return []
'''
TEXT = (
    "The lighthouse at Skagen was built in 1858. Its keeper, Anna Holm, wrote a letter every evening to her sister in "
    "Aarhus, telling her about the ships, the birds and the weather."
)


@pytest.fixture
def llm(site_packages: Any) -> LLM:
    """The demo model, as the references were recorded: in float32."""
    file = site_packages.install("looks-back", PLUGIN, module="looks_back")
    (file.parent / "proposer.py").write_text(PROPOSER)
    return LLM("demo", dtype="float32", max_model_len=2048, max_num_seqs=8, proposer="looks-back")


def test_greedy_tokens_with_guesses_are_the_references(llm: LLM) -> None:
    with llm:
        references = margin_rule.read_references("w2s")
        found = margin_rule.token_ids_of(margin_rule.generate(llm, references))
        margin_rule.check(references, found, margin_rule.next_tokens_of(llm))
        assert llm.stats().num_accepted_drafts


def test_a_text_that_is_repeated_takes_less_than_half_the_steps(llm: LLM) -> None:
    with llm:
        ask = [{"role": "user", "content": f"Repeat this text word for word, nothing else:\n\n{TEXT}"}]
        llm.chat(ask, SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True))
        stats = llm.stats()
        assert stats.num_steps < 16
        assert stats.num_accepted_drafts > 0.5 * stats.num_drafts
