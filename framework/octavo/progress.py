"""Progress bars on standard error for what takes long, by tqdm; nothing is shown where that is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

from octavo.outputs import RequestOutput

_SECONDS_BETWEEN = 0.1


class ProgressBar(Protocol):
    """What is used of tqdm's."""

    def update(self, n: int) -> object:
        """Go on by n units."""

    def set_postfix_str(self, s: str, refresh: bool) -> object:
        """Text behind the bar, shown with the next update when it is not refreshed."""

    def close(self) -> object:
        """Leave the bar as it stands."""


MakeBar = Callable[..., ProgressBar]
"""Called as tqdm is, with total=, desc= and unit=."""


@contextmanager
def progress_bar(
    description: str, total: int, unit: Literal["B", "prompt"], make_bar: MakeBar | None = None
) -> Iterator[ProgressBar]:
    """A bar of `total` units, closed at the end; without a terminal, and without a `make_bar`, one that is not shown.

    Args:
        make_bar: makes the bar in tqdm's place, shown or not as it likes.
    """
    if make_bar is not None:
        bar = make_bar(total=total, desc=description, unit=unit)
    else:
        from tqdm import tqdm

        is_bytes = unit == "B"
        # disable=None: when standard error is no terminal
        bar = tqdm(total=total, desc=description, unit=unit, unit_scale=is_bytes, unit_divisor=1024, disable=None)
    try:
        yield bar
    finally:
        bar.close()


Show = Callable[[Sequence[RequestOutput]], None]


@contextmanager
def generation_bar(num_prompts: int, use_tqdm: bool | MakeBar) -> Iterator[Show]:
    """A bar of finished prompts and the tokens a second they are given; yields what to call after each step.

    Args:
        use_tqdm: False is no bar; or what makes it in tqdm's place.
    """
    if use_tqdm is False:
        yield lambda outputs: None
        return
    start = next_time = time.monotonic()
    num_finished = 0
    shown: Sequence[RequestOutput] = ()
    with progress_bar("Generating", num_prompts, "prompt", None if use_tqdm is True else use_tqdm) as bar:

        def show(outputs: Sequence[RequestOutput]) -> None:
            nonlocal next_time, num_finished, shown
            shown = outputs
            if (now := time.monotonic()) < next_time:
                return
            next_time = now + _SECONDS_BETWEEN
            num_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
            bar.set_postfix_str(f"{num_tokens / max(now - start, 1e-9):,.1f} tokens/s", refresh=False)
            num_before, num_finished = num_finished, sum(output.finished for output in outputs)
            bar.update(num_finished - num_before)

        try:
            yield show
        finally:
            next_time = start
            show(shown)
