"""Tokenizer: text to token ids and back, chat messages to the model's text. First and last station of a request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from octavo.chat_template import ChatTemplate
    from octavo.interfaces.checkpoint import TokenizerData

Message = Mapping[str, Any]


class Tokenizer:
    """A model's tokenizer. It has no state of a request: one object serves all threads.

    Attributes:
        vocab_size: ids are 0 .. vocab_size - 1, added tokens included.
        special_ids: ids that stand for no text, such as beginning and end of sequence.
        bos_token_id, eos_token_id, pad_token_id, unk_token_id: None when the model has none.
    """

    def __init__(self, data: TokenizerData) -> None:
        self._tokenizer = data.tokenizer
        self._tokenizer.no_truncation()  # some files carry their training's length limit and padding
        self._tokenizer.no_padding()
        self._special_tokens = dict(data.special_tokens)
        self._chat_template = _compile(data.chat_template)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")
        self.unk_token_id = self._special_id("unk_token")
        self._pieces: dict[int, bytes] = {}
        kinds = _decoder_kinds(self._tokenizer.decoder)
        if whole_text := kinds & {"BPEDecoder", "CTC"}:
            raise CheckpointError(
                f"This tokenizer decodes with {', '.join(whole_text)}, whose text depends on all tokens at once; text "
                "that is streamed token by token cannot be made with it."
            )
        self._alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._anchor: tuple[list[int], str] | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` puts beginning and end around it where the model wants them.

        Raises:
            RequestError: `text` is not text: half of a surrogate pair is in it, which JSON can bring.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise _not_text([text]) from error

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all cores. Raises what `encode` raises."""
        try:
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise _not_text(texts) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids outside the vocabulary are skipped, halves of characters become U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it ("Ġworld"), not as text; None outside the vocabulary."""
        return self._tokenizer.id_to_token(token_id)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The conversation as the text the model was trained on, special tokens included.

        Encode it with `add_special_tokens=False`, as `encode_chat` does, or they are there twice.

        Args:
            messages: {"role": ..., "content": ...} each.
            add_generation_prompt: end with the words that open the assistant's answer.
            variables: more names for the template, such as `tools`.

        Raises:
            RequestError: the model has no template, or its template refuses these messages.
        """
        if self._chat_template is None:
            raise RequestError(
                "This model has no chat template, so it cannot take messages. It is probably a base model: use plain "
                "completion, or serve an instruct model."
            )
        return self._chat_template.render(
            {
                "messages": messages,
                "tools": None,  # templates ask `tools is not none`, which an undefined name would answer with yes
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self._special_tokens,
                **variables,
            }
        )

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object
    ) -> list[int]:
        """Token ids of a conversation. Raises what `apply_chat_template` raises."""
        text = self.apply_chat_template(messages, add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)

    def token_bytes(self, token_id: int, first: bool = False) -> bytes:
        """What a token adds to a text, as UTF-8, perhaps only a part of a character.

        The bytes of a sequence, joined, are its text: so text can be made token by token. Empty for ids outside the
        vocabulary.

        Args:
            first: the token begins the text, where some tokenizers drop a leading space.
        """
        if first:
            return self._make_token_bytes(token_id, first=True)
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make_token_bytes(token_id, first=False)
        return piece

    def _make_token_bytes(self, token_id: int, first: bool) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            if all(character in self._alphabet for character in token):
                return bytes(self._alphabet[character] for character in token)
            return token.encode()
        if self._byte_fallback and (value := _fallback_byte(token)) is not None:
            return bytes([value])
        if first:
            return self.decode([token_id], skip_special_tokens=False).encode()
        anchor, text = self._find_anchor()
        return self.decode([*anchor, token_id], skip_special_tokens=False).removeprefix(text).encode()

    def _find_anchor(self) -> tuple[list[int], str]:
        """A token of plain text, and its text, to put before another, so that the other does not begin the text."""
        if self._anchor is None:
            texts = ((token_id, self.decode([token_id])) for token_id in range(self.vocab_size))
            self._anchor = next((([token_id], text) for token_id, text in texts if text.isalnum()), ([], ""))
        return self._anchor

    def _special_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)


def _not_text(texts: Sequence[object]) -> RequestError:
    for text in texts:
        if not isinstance(text, str):
            return RequestError(f"A text to encode must be a string, not {type(text).__name__}.")
        if half := next((character for character in text if "\ud800" <= character <= "\udfff"), None):
            return RequestError(
                f"The text has half of a surrogate pair (U+{ord(half):04X}), which stands for no character."
            )
    return RequestError("The text cannot be encoded.")


def _compile(source: str | None) -> ChatTemplate | None:
    if source is None:
        return None
    from octavo.chat_template import ChatTemplate  # here, not above: Jinja takes longer to import than all the rest

    return ChatTemplate(source)


def _decoder_kinds(decoder: Any) -> set[str]:
    """The names of a decoder and of those it is made of."""
    return set() if decoder is None else set(_kinds(json.loads(decoder.__getstate__())))


def _kinds(state: Mapping[str, Any]) -> Iterator[str]:
    yield str(state.get("type"))
    for part in state.get("decoders", ()):
        yield from _kinds(part)


def _byte_alphabet() -> dict[str, int]:
    """character -> byte, in byte-level vocabularies: printable bytes stand for themselves, the others follow U+0100.

    Source: Radford et al. 2019, GPT-2; the table is part of every byte-level tokenizer since.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _fallback_byte(token: str) -> int | None:
    """The byte that "<0xE2>" stands for; None for any other token."""
    if len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None
