"""From what a user gives to requests the engine can run: tokens checked, parameters resolved, seeds set."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TypedDict

from octavo.errors import RequestError
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

Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


class InputProcessor:
    """Knows the tokenizer and the model's limits; checks each prompt before the engine sees it."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, max_model_len: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._max_model_len = max_model_len
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
    ) -> Request:
        """The request of the first of `n` completions, those of the others its siblings.

        Their ids are "<request_id>", or with several "<request_id>/<index>".

        Args:
            priority, tenant: what the scheduler policy may rank it by; a lower priority is served earlier.

        Raises:
            RequestError: no tokens, ids outside the vocabulary, no room for one output token, `params` is none, or
                `priority` or `tenant` is of the wrong type.
        """
        self._check(prompt_token_ids)
        self._check_params(params)
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
                eos_token_ids=frozenset() if params.ignore_eos else self._eos_token_ids,
                max_total_tokens=len(prompt_token_ids) + max_tokens,
                arrival_time=time.monotonic(),
                priority=int(priority),
                tenant=tenant,
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
                "token needs room too. Shorten the prompt or raise max_model_len."
            )

    def _check_params(self, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"Sampling parameters are given as SamplingParams(...); found {type(params).__name__}.")
        if wrong := [token_id for token_id in params.stop_token_ids or () if not self._is_token(token_id)]:
            raise RequestError(f"stop_token_ids must be in [0, {self._config.vocab_size}); found {wrong[:5]}.")

    def _is_token(self, token_id: object) -> bool:
        return isinstance(token_id, Integral) and 0 <= int(token_id) < self._config.vocab_size


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
