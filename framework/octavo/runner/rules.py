"""The logits rules of one engine, and which rows of the batch are under which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.interfaces.executor import NewRow
from octavo.interfaces.logits_rule import LogitsRule
from octavo.runner.step_inputs import Samples


class RuleSet:
    """Tells each rule of the requests that ask for it; a batch in which nobody asks for any costs nothing."""

    def __init__(self, rules: Sequence[LogitsRule]) -> None:
        self._rules = [(rule, set[int]()) for rule in rules]
        self._rows: dict[str, int] = {}  # of the requests under some rule

    def enter(self, row: int, request: NewRow) -> None:
        """A request has got a row."""
        for rule, rows in self._rules:
            if rule.add(row, request):
                rows.add(row)
                self._rows[request.request_id] = row

    def leave(self, request_id: str) -> None:
        """A request's row is free again; unknown ids are of requests under no rule."""
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        for rule, rows in self._rules:
            if row in rows:
                rows.remove(row)
                rule.remove(row)

    def looks_back_at(self, rows: Sequence[int]) -> bool:
        """Whether what any of these rows may sample depends on its samples before."""
        return any(rule.looks_back and not of_rule.isdisjoint(rows) for rule, of_rule in self._rules)

    def apply(self, logits: Tensor, samples: Samples) -> Tensor:
        """Logits after all rules: [num_samples, vocab_size]; the very same when no row is under a rule."""
        if not self._rows:
            return logits
        changed = None
        all_rows = samples.rows.tolist()
        for rule, rows in self._rules:
            indices = [index for index, row in enumerate(all_rows) if row in rows] if rows else []
            if indices:
                if changed is None:
                    changed = logits.to(torch.float32, copy=True)
                rule.apply(changed, indices, samples.rows[indices].tolist(), samples.positions[indices].tolist())
        return logits if changed is None else changed

    def accept(self, row: int, token_ids: Sequence[int]) -> None:
        """A row's samples were kept."""
        for rule, rows in self._rules:
            if row in rows:
                rule.accept(row, token_ids)

    @property
    def any(self) -> bool:
        """Whether any row is under a rule."""
        return bool(self._rows)
