"""What quantising cost: the perplexity of one text under the model before and after, by `octavo eval perplexity`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import OctavoError


class ReportError(OctavoError, RuntimeError):
    """A model was quantised, but its perplexity could not be measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Of what `octavo eval perplexity --json` prints: the perplexity, and the tokens over which it is a mean."""

    value: float
    num_scored_tokens: int


def compare(model: str, quantized: Path, text: str) -> tuple[Measured, Measured]:
    """The text's perplexity before and after. A process each, one after the other: one model is in memory at a time.

    Raises:
        ReportError: one of them failed; it has said why on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="octavo-perplexity-") as folder:
        file = Path(folder) / "text"
        file.write_text(text, encoding="utf-8")
        return _measure(model, quantized, file), _measure(str(quantized), quantized, file)


def report_lines(model: str, before: Measured, quantized: Path, after: Measured) -> Iterator[str]:
    width = max(len(model), len(str(quantized)))
    yield f"perplexity of {before.num_scored_tokens:,} tokens"
    yield f"  {model:{width}}  {before.value:10.4f}"
    yield f"  {quantized!s:{width}}  {after.value:10.4f}  {after.value / before.value - 1:+.2%}"


def _measure(model: str, quantized: Path, text: Path) -> Measured:
    command = ["-m", "octavo", "eval", "perplexity", model, "--text", str(text), "--json"]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ReportError(
            f"The quantized model is in {quantized}, but the perplexity of {model} could not be measured, for the "
            "reason above. `octavo eval perplexity` measures it once that is mended; --no-report leaves it out."
        )
    found = json.loads(done.stdout)
    return Measured(value=found["value"], num_scored_tokens=found["num_scored_tokens"])
