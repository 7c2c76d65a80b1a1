"""What a model is calibrated on and what it is evaluated on: two texts that share no paragraph.

By default both are Python's own language reference, which comes with every Python.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from octavo.errors import ConfigError

EVALUATED_TOPICS = ("execmodel", "assignment", "comparisons", "calls", "import", "objects", "identifiers")
"""Of pydoc: what the committed evaluation text, benchmarks/texts/perplexity.txt, is made of too."""


def evaluation_text() -> str:
    """Some 56 kB of prose with a little code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in EVALUATED_TOPICS)


def calibration_text() -> str:
    """Every other topic, some 300 kB; each paragraph once, and none that is evaluated: topics quote each other."""
    from pydoc_data.topics import topics

    paragraphs = {one.strip(): one for name in sorted(topics) for one in topics[name].split("\n\n")}
    for one in evaluation_text().split("\n\n"):
        paragraphs.pop(one.strip(), None)
    return "\n\n".join(paragraphs.values())


def read_text(path: Path, option: str) -> str:
    """A text file that an option names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read: {error}. Give a text file in UTF-8.") from error


def cut_samples(tokenizer: Tokenizer, text: str, num_samples: int, sample_tokens: int) -> list[list[int]]:
    """As many samples of consecutive tokens, evenly over the text and none overlapping another.

    Returns:
        [num_samples][sample_tokens] token ids, without special tokens.

    Raises:
        ConfigError: the text has fewer tokens.
    """
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    apart = len(token_ids) // num_samples
    if apart < sample_tokens:
        raise ConfigError(
            f"{num_samples} samples of {sample_tokens} tokens need {num_samples * sample_tokens:,} tokens, and the "
            f"calibration text has {len(token_ids):,}. Give a longer one with --calibration, or lower --num-samples or "
            "--sample-tokens."
        )
    return [token_ids[start : start + sample_tokens] for start in range(0, num_samples * apart, apart)]
