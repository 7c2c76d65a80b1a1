"""The prompts of a measurement: random token ids by a seed, or the texts of a file."""

from __future__ import annotations

import json
import random
from collections.abc import Collection
from pathlib import Path

from octavo.errors import ConfigError


def random_prompts(
    num_prompts: int, num_tokens: int, vocab_size: int, seed: int, avoid: Collection[int] = ()
) -> list[list[int]]:
    """So many prompts of one length, no two alike in their first block, so that the prefix cache is of no help.

    Args:
        avoid: ids that are not drawn: special tokens.
    """
    draws = random.Random(seed)
    token_ids = [token_id for token_id in range(vocab_size) if token_id not in avoid]
    return [draws.choices(token_ids, k=num_tokens) for _ in range(num_prompts)]


def read_prompts(path: Path, num_prompts: int | None = None) -> list[str]:
    """The first prompts of a file: one on each line; in a .jsonl file each line is {"prompt": text}.

    Raises:
        ConfigError: it cannot be read, or has too few prompts.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a dataset: {type(error).__name__}: {error}. A dataset is a text file with a "
            'prompt on each line, or a .jsonl file with {"prompt": text} on each line.'
        ) from error
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"{path} has no prompts, or some that are no text.")
    if num_prompts is not None and len(prompts) < num_prompts:
        raise ConfigError(f"{path} has {len(prompts)} prompts; --num-prompts asks for {num_prompts}.")
    return prompts[:num_prompts]
