"""IncrementalDetokenizer: output tokens to text as they come, and the stop strings in it.

Two rules make a stream safe to show: nothing of a character before its last byte is there, and nothing of what may
turn out to be a stop string.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence

from octavo.sampling_params import SamplingParams
from octavo.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes of UTF-8; so at most this many tokens can hold the beginning of one
_decoder_class = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """The text of one completion.

    Each token adds its bytes to a UTF-8 decoder that keeps an unfinished character back, so the work is the same for
    every token, however long the text. Joined, what `update` returned is `text`.

    Attributes:
        stop_reason: the stop string that was found.
        num_tokens: tokens made into text; after a stop string, those up to the one that completed it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._matchers = [_StopString(string) for string in params.stop_strings]
        self._decoder = _decoder_class("replace")
        self._shown: list[str] = []
        self._held = ""  # the tail that may begin a stop string
        self.stop_reason: str | None = None
        self.num_tokens = 0
        special = tokenizer.special_ids if not params.spaces_between_special_tokens else frozenset[int]()
        self._closed_up = special - self._skipped  # special tokens that follow one another without a space
        self._last_token_id = prompt_token_ids[-1] if prompt_token_ids else -1
        self._at_start = all(token_id in self._skipped for token_id in prompt_token_ids)
        self._prompt_cut = self._begin_after(prompt_token_ids)

    @property
    def text(self) -> str:
        """All that was returned so far."""
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def update(self, token_ids: Sequence[int], finished: bool = False) -> str:
        """Take new tokens, return the text that has become safe to show.

        Args:
            token_ids: in order; without the token that ended the output, when that should not be text.
            finished: these are the last: nothing is kept back any more.
        """
        if self.stop_reason is not None or not self._params.detokenize:
            return ""
        if self._matchers:
            new = self._decode_until_stop(token_ids, finished)
        else:
            self.num_tokens += len(token_ids)
            new = self._decode(token_ids, finished)
        if new:
            self._shown.append(new)
        return new

    def _decode_until_stop(self, token_ids: Sequence[int], finished: bool) -> str:
        """One token at a time, so that the same stop string is found however the tokens are cut into updates."""
        shown = ""
        for token_id in token_ids:
            self.num_tokens += 1
            shown += self._look_for_stop(self._decode((token_id,), last=False))
            if self.stop_reason is not None:
                return shown
        if finished:
            shown += self._look_for_stop(self._decode((), last=True))
            if self.stop_reason is None:
                shown, self._held = shown + self._held, ""
        return shown

    def _look_for_stop(self, new: str) -> str:
        """What of the held tail and `new` can be shown. The match that ends first counts; of two, the longer."""
        text = self._held + new
        start = len(self._held)
        may_stop = self.num_tokens > self._params.min_tokens
        for index, character in enumerate(new):
            found = [matcher.string for matcher in self._matchers if matcher.step(character)]
            if found and may_stop:
                self.stop_reason, self._held = max(found, key=len), ""
                end = start + index + 1
                return text[: end if self._params.include_stop_str_in_output else end - len(self.stop_reason)]
        keep = 0 if self._params.include_stop_str_in_output else max(matcher.matched for matcher in self._matchers)
        shown = len(text) - keep
        self._held = text[shown:]
        return text[:shown]

    def _decode(self, token_ids: Sequence[int], last: bool) -> str:
        skipped, token_bytes = self._skipped, self._tokenizer.token_bytes
        kept = [token_id for token_id in token_ids if token_id not in skipped]
        pieces = list(map(token_bytes, kept))
        if self._at_start and kept:
            self._at_start = False
            pieces[0] = token_bytes(kept[0], first=True)
        if self._closed_up and kept:
            pairs = itertools.pairwise((self._last_token_id, *kept))
            pieces = [
                (self._tokenizer.id_to_token(pair[1]) or "").encode() if self._closed_up.issuperset(pair) else piece
                for pair, piece in zip(pairs, pieces, strict=True)
            ]
            self._last_token_id = kept[-1]
        new = b"".join(pieces)
        text = self._decoder.decode(new, last)
        if self._prompt_cut and text:
            # The prompt ends inside a character. When the output does not complete it, its U+FFFD is the prompt's.
            self._prompt_cut = False
            text = text.removeprefix("\ufffd")
        return text

    def _begin_after(self, prompt_token_ids: Sequence[int]) -> bool:
        """Give the decoder the prompt's last bytes; whether they leave a character unfinished."""
        tail: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if token_id not in self._skipped:
                tail.append(token_id)
            if len(tail) == _LONGEST_CHARACTER:
                break
        self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, reversed(tail))))
        return bool(self._decoder.getstate()[0])


class _StopString:
    """One stop string, looked for character by character, each character once (Knuth, Morris and Pratt 1977).

    Attributes:
        matched: length of the longest beginning of the string that the text now ends with.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._fallback = _fallbacks(string)

    def step(self, character: str) -> bool:
        """Take the text's next character; whether the string is now complete."""
        matched = self.matched
        if matched == len(self.string):
            matched = self._fallback[-1]
        while matched and self.string[matched] != character:
            matched = self._fallback[matched - 1]
        if self.string[matched] == character:
            matched += 1
        self.matched = matched
        return matched == len(self.string)


def _fallbacks(string: str) -> list[int]:
    """[i]: length of the longest proper beginning of `string` that string[: i + 1] ends with."""
    lengths = [0] * len(string)
    matched = 0
    for index in range(1, len(string)):
        while matched and string[matched] != string[index]:
            matched = lengths[matched - 1]
        if string[matched] == string[index]:
            matched += 1
        lengths[index] = matched
    return lengths
