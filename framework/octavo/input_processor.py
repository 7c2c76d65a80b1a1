"""From what a user gives to requests the engine can run: tokens checked, parameters resolved, seeds set."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TypedDict

from octavo.errors import ConfigError, RequestError
from octavo.lora.adapter import Adapter
from octavo.model_config import ModelConfig
from octavo.request import Request
from octavo.sampling_params import MAX_SEED, SamplingParams
from octavo.tokenizer import Tokenizer


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]


MAX_PRIORITY = 2**31 - 1

_RECOMMENDED = {name: name for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")}
_RECOMMENDED["max_new_tokens"] = "max_tokens"
"""Keys of generation_config.json and the fields of SamplingParams they are the defaults of."""

Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


class InputProcessor:
    """Knows the tokenizer and the model's limits; checks each prompt before the engine sees it."""

    def __init__(
        self, tokenizer: Tokenizer, config: ModelConfig, max_model_len: int, seed: int, max_logprobs: int = 20
    ) -> None:
        """Args as the settings of these names; `seed` is of the seeds given to requests that bring none."""
        self._tokenizer = tokenizer
        self._config = config
        self._max_model_len = max_model_len
        self._max_logprobs = max_logprobs
        self._eos_token_ids = frozenset(filter(self._is_token, config.eos_token_ids))
        self._seeds = random.Random(seed)

    def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text if it was text, token ids); special tokens are added to text as the tokenizer says.

        Raises:
            RequestError: it is none of the forms of `Prompt`.
        """
        content: object = prompt
        if isinstance(prompt, Mapping):
            content = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if isinstance(content, str):
            return content, self._tokenizer.encode(content)
        is_bytes = isinstance(content, (bytes, bytearray, memoryview))  # sequences of integers, but never tokens
        if isinstance(content, Sequence) and not is_bytes and all(isinstance(token_id, int) for token_id in content):
            return None, list(content)
        found = f"keys {sorted(prompt)}" if isinstance(prompt, Mapping) else type(prompt).__name__
        raise RequestError(
            f"A prompt is a text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'; found {found}."
        )

    def request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        tenant: str | None = None,
        adapter: Adapter | None = None,
    ) -> Request:
        """The request of the first of `n` completions, those of the others its siblings.

        Their ids are "<request_id>", or with several "<request_id>/<index>".

        Args:
            prompt_token_ids: whole; the request's own are what `truncate_prompt_tokens` leaves of them.
            priority, tenant: what the scheduler policy may rank it by; a lower priority is served earlier.
            adapter: the LoRA adapter it is answered with.

        Raises:
            RequestError: no tokens, ids outside the vocabulary, no room for one output token, `params` is none or
                cannot be served by this model, or `priority` or `tenant` is of the wrong type.
        """
        self._check_params(params)
        prompt_token_ids = self._truncate(prompt_token_ids, params.truncate_prompt_tokens)
        self._check(prompt_token_ids)
        eos_token_ids = frozenset() if params.ignore_eos else self._eos_token_ids
        bad_words_token_ids = self._bad_words(params.bad_words or ())
        self._check_choice(params, eos_token_ids, bad_words_token_ids)
        _check_rank(priority, tenant)
        seed = params.seed if params.seed is not None else self._seeds.randrange(MAX_SEED)
        room = self._max_model_len - len(prompt_token_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        first, *others = (
            Request(
                request_id=child_id(request_id, index, params.n),
                prompt_token_ids=prompt_token_ids,
                params=params,
                seed=seed,
                sample_index=index,
                stop_token_ids=frozenset(params.stop_token_ids or ()),
                eos_token_ids=eos_token_ids,
                max_total_tokens=len(prompt_token_ids) + max_tokens,
                arrival_time=time.monotonic(),
                priority=int(priority),
                tenant=tenant,
                bad_words_token_ids=bad_words_token_ids,
                adapter=adapter,
            )
            for index in range(params.n)
        )
        first.siblings = others
        return first

    def _check(self, prompt_token_ids: list[int]) -> None:
        if not prompt_token_ids:
            raise RequestError("The prompt is empty: at least one token is needed.")
        if wrong := [token_id for token_id in prompt_token_ids if not 0 <= token_id < self._config.vocab_size]:
            raise RequestError(f"Token ids must be in [0, {self._config.vocab_size}); found {wrong[:5]}.")
        if len(prompt_token_ids) >= self._max_model_len:
            raise RequestError(
                f"The prompt has {len(prompt_token_ids)} tokens; max_model_len is {self._max_model_len} and one output "
                "token needs room too. Shorten the prompt, or raise max_model_len or kv_cache_memory_bytes."
            )

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"Sampling parameters are given as SamplingParams(...); found {type(params).__name__}.")
        vocab_size, faults = self._config.vocab_size, []
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            if wrong := [token_id for token_id in getattr(params, name) or () if not self._is_token(token_id)]:
                faults.append(f"{name} must be in [0, {vocab_size}); found {wrong[:5]}.")
        most = vocab_size if self._max_logprobs == -1 else self._max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            if asked is not None and (vocab_size if asked == -1 else asked) > most:
                faults.append(f"{name}={asked} was asked for; max_logprobs allows {most}.")
        if faults:
            raise RequestError(" ".join(faults))

    def _check_choice(
        self, params: SamplingParams, eos_token_ids: frozenset[int], bad_words: tuple[tuple[int, ...], ...]
    ) -> None:
        """Something must be left to sample."""
        if params.allowed_token_ids is None:
            return
        left = set(params.allowed_token_ids).difference(word[0] for word in bad_words if len(word) == 1)
        if not left:
            raise RequestError("bad_words leaves nothing of allowed_token_ids that could be sampled.")
        if params.min_tokens and left <= eos_token_ids.union(params.stop_token_ids or ()):
            raise RequestError(
                f"Every token that allowed_token_ids and bad_words leave ends the output, and min_tokens is "
                f"{params.min_tokens}: nothing could be sampled."
            )

    def _truncate(self, prompt_token_ids: list[int], num_tokens: int | None) -> list[int]:
        """The last `num_tokens`, at -1 as many as leave room for one output token; all of them at None."""
        if num_tokens is None:
            return prompt_token_ids
        kept = self._max_model_len - 1 if num_tokens == -1 else num_tokens
        return prompt_token_ids[max(0, len(prompt_token_ids) - kept) :]

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word's tokens as it begins a text and as it follows a space, the latter where that is another ending."""
        found: list[tuple[int, ...]] = []
        for word in words:
            bare = word.lstrip(" ")
            alone, spaced = (tuple(self._tokenizer.encode(text, False)) for text in (bare, " " + bare))
            if not bare:
                alone = tuple(self._tokenizer.encode(word, False))
            if not alone or not all(map(self._is_token, alone + spaced)):
                raise RequestError(f"bad_words: {word!r} has no tokens in the model's vocabulary.")
            found.append(alone)
            if bare and spaced[-len(alone) :] != alone:
                found.append(spaced)
        return tuple(dict.fromkeys(found))

    def _is_token(self, token_id: object) -> bool:
        return isinstance(token_id, Integral) and 0 <= int(token_id) < self._config.vocab_size


def default_sampling_params(source: str, generation_config: Mapping[str, object]) -> SamplingParams:
    """What is sampled with when a caller gives no SamplingParams.

    Args:
        source: the setting `generation_config`: "auto" takes what the model's authors recommend, "none" does not.
        generation_config: the keys of generation_config.json.

    Raises:
        ConfigError: the file's values are out of their ranges.
    """
    if source == "none":
        return SamplingParams()
    fields = {
        field: generation_config[key]
        for key, field in _RECOMMENDED.items()
        if generation_config.get(key) is not None  # many files write null for "not set"
    }
    try:
        return SamplingParams(**fields)  # type: ignore[arg-type]
    except RequestError as error:
        raise ConfigError(
            f"generation_config.json recommends what cannot be sampled with: {error}. Set generation_config='none' to "
            "pass over it."
        ) from error


def _check_rank(priority: object, tenant: object) -> None:
    is_integer = isinstance(priority, Integral) and not isinstance(priority, bool)
    if not is_integer or abs(int(priority)) > MAX_PRIORITY:  # type: ignore[call-overload]
        raise RequestError(
            f"A priority is an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}, lower is served earlier; "
            f"found {priority!r}."
        )
    if tenant is not None and not isinstance(tenant, str):
        raise RequestError(f"A tenant is a text, the name of who asks, or None; found {tenant!r}.")


def child_id(request_id: str, index: int, n: int) -> str:
    """The engine's id of completion `index` of `n`."""
    return request_id if n == 1 else f"{request_id}/{index}"
