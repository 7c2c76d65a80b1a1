"""How far quantising is, as one bar of tqdm for each of its parts on standard error; none where that is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeAlias

from tqdm import tqdm

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the part ("k-means"), how much of it is done, and of how much."""


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """What to call; a part's bar is closed when the next part begins, and at the end."""
    bars: dict[str, tqdm[NoReturn]] = {}

    def show(part: str, num_done: int, total: int) -> None:
        if part not in bars:
            close()
            bars[part] = tqdm(total=total, desc=part, disable=None)
        bars[part].update(num_done - bars[part].n)

    def close() -> None:
        for bar in bars.values():
            bar.close()

    try:
        yield show
    finally:
        close()
