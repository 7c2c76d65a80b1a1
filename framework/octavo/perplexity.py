"""Perplexity of a text under a model: how many tokens it hesitates between, on average, before each one of the text.

text -> windows -> LLM, prompt logprobs -> [Perplexity].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.errors import ConfigError, RequestError
from octavo.llm import LLM
from octavo.progress import MakeBar, progress_bar
from octavo.sampling_params import SamplingParams

_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, ignore_eos=True, detokenize=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """What was measured.

    Attributes:
        value: exp of the mean negative logprob of the scored tokens.
        num_tokens: of the text; each window's first is read but not scored.
        num_scored_tokens: over which the mean is taken.
        num_windows: whole ones and the rest.
        window: tokens of a whole window.
    """

    value: float
    num_tokens: int
    num_scored_tokens: int
    num_windows: int
    window: int


def perplexity(
    llm: LLM,
    text: str | Sequence[int],
    window: int | None = 256,
    max_tokens: int | None = None,
    *,
    make_bar: MakeBar | None = None,
) -> Perplexity:
    """exp(-mean(log p(token | the tokens before it in its window))), each token after a window's first being scored.

    The text's tokens are cut into consecutive windows that share none, and each window is read without what is before
    it; nothing is put at its beginning. The last may be shorter; one token that is left alone is not read. So
    transformers gives the same number, up to rounding:

        token_ids = tokenizer(text)["input_ids"][:max_tokens]
        windows = [token_ids[start : start + window] for start in range(0, len(token_ids), window)]
        losses = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in windows of two or more tokens]
        perplexity = exp(sum(losses) / sum(ids.shape[1] - 1))

    Args:
        text: to read, or its token ids. The tokenizer puts its special tokens around it, where the model wants them.
        window: tokens of a window; None takes the longest the engine has room for, max_model_len - 1: one output token
            needs room too.
        max_tokens: of the text, its first ones; None reads all of it.
        make_bar: makes the progress bar, as tqdm is called; by default tqdm, where standard error is a terminal.

    Raises:
        ConfigError: `window` is below 2 or above what the engine has room for, or `max_tokens` is below 2.
        RequestError: the text has fewer than two tokens, or ids outside the vocabulary.

    Source: Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks.
    """
    longest = llm.manifest.max_model_len - 1
    window = longest if window is None else window
    if not 2 <= window <= longest:
        raise ConfigError(
            f"A window has 2 to {longest} tokens, as max_model_len is {longest + 1} and one output token needs room "
            f"too; found {window}."
        )
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens must be 2 or more, for one token to be scored; found {max_tokens}.")
    token_ids = (llm.get_tokenizer().encode(text) if isinstance(text, str) else list(text))[:max_tokens]
    if len(token_ids) < 2:
        raise RequestError(f"Perplexity needs two or more tokens; the text has {len(token_ids)}.")
    windows = [token_ids[start : start + window] for start in range(0, len(token_ids) - 1, window)]
    logprobs = _logprobs(llm, windows, make_bar)
    return Perplexity(
        value=math.exp(-math.fsum(logprobs) / len(logprobs)),
        num_tokens=sum(map(len, windows)),
        num_scored_tokens=len(logprobs),
        num_windows=len(windows),
        window=window,
    )


def _logprobs(llm: LLM, windows: Sequence[list[int]], make_bar: MakeBar | None) -> list[float]:
    """Of every token but the windows' first ones; as many windows at a time as fill a step."""
    at_once = max(1, llm.config.max_num_batched_tokens // len(windows[0]))
    logprobs = []
    with progress_bar("Perplexity", len(windows), "prompt", make_bar) as bar:
        for start in range(0, len(windows), at_once):
            prompts = windows[start : start + at_once]
            for output in llm.generate(prompts, _PARAMS, use_tqdm=False):
                assert output.prompt_logprobs is not None
                for token_id, found in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
                    if found is not None:
                        logprobs.append(found[token_id].logprob)
            bar.update(len(prompts))
    return logprobs
