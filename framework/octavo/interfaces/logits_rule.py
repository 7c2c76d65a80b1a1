"""LogitsRule socket: changes the logits of the requests that ask for it, over the whole batch at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from octavo.interfaces.executor import NewRow


@dataclass(frozen=True, kw_only=True, slots=True)
class RuleLimits:
    """Maximal sizes, known at start; `device` is where logits are."""

    max_num_requests: int
    vocab_size: int
    device: str


class LogitsRule(ABC):
    """Penalties, biases, masks. Constructed once with its limits; `row` is a number below `max_num_requests`.

    Attributes:
        looks_back: whether what it does depends on the tokens sampled so far. Requests under such a rule are not
            speculated on, so that `apply` always sees every token before.
    """

    looks_back: bool = False

    def __init__(self, limits: RuleLimits) -> None:
        self.limits = limits

    @abstractmethod
    def add(self, row: int, request: NewRow) -> bool:
        """A request enters; False when it asks nothing of this rule, which then hears no more of it.

        `request.token_ids` beyond the prompt are tokens it sampled before a preemption.
        """

    @abstractmethod
    def remove(self, row: int) -> None:
        """A request for which `add` said True has left."""

    @abstractmethod
    def apply(self, logits: Tensor, indices: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> None:
        """Change logits in place.

        Args:
            logits: [num_samples, vocab_size] float32, before temperature; only those at `indices` may be changed.
            indices: where in `logits` the requests under this rule are.
            rows: whose they are; one row may come several times, with its positions in order.
            positions: of the token each is to become; the prompt's first token is at 0.
        """

    def accept(self, row: int, token_ids: Sequence[int]) -> None:
        """These tokens were sampled and kept for a row under this rule."""
        return None
