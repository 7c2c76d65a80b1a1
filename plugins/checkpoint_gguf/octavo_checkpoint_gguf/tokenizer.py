"""The tokenizer in a GGUF file's metadata, rebuilt with the `tokenizers` library. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from octavo.errors import CheckpointError
from octavo.interfaces.checkpoint import TokenizerData
from octavo_checkpoint_gguf.pre_tokenizers import SPLITTINGS

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type
_SPACE = "▁"  # sentencepiece writes a space so
# Instruct files written before tokenizer.ggml.eot_token_id existed end their turns with these all the same.
_END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")


def read_tokenizer(metadata: Mapping[str, Any]) -> TokenizerData:
    """Build the tokenizer.

    Raises:
        CheckpointError: no tokenizer in the file, or one of a kind that is not known for certain.
    """
    vocabulary = _Vocabulary(metadata)
    kind = metadata.get(_PREFIX + "model")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, vocabulary)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(metadata, vocabulary), True
    else:
        raise CheckpointError(f"tokenizer.ggml.model is {kind!r}; 'gpt2' (byte-level BPE) and 'llama' (SPM) are read.")
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type != _USER_DEFINED)
            for token, token_type in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    _add_ends(tokenizer, metadata, vocabulary, add_bos)
    special_tokens = {
        name: vocabulary.special(key)
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    return TokenizerData(
        tokenizer=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={name: token for name, token in special_tokens.items() if token is not None},
    )


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Every token that ends an answer: of the sequence, of a turn, of a message.

    Raises:
        CheckpointError: the file has no usable vocabulary.
    """
    vocabulary = _Vocabulary(metadata)
    named = [vocabulary.special(name) for name in ("eos", "eot", "eom")]
    ids = {vocabulary.ids[token] for token in named if token is not None}
    ids.update(
        vocabulary.ids[token]
        for token in _END_OF_TURN
        if token in vocabulary.ids and vocabulary.types[vocabulary.ids[token]] == _CONTROL
    )
    return sorted(ids)


class _Vocabulary:
    """tokenizer.ggml.tokens and what belongs to each token, checked.

    Attributes:
        ids: token -> id.
        types: one for each token.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        tokens = metadata.get(_PREFIX + "tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise CheckpointError("the file holds no vocabulary (tokenizer.ggml.tokens).")
        self.tokens: list[str] = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < len(tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise CheckpointError(f"the vocabulary (tokenizer.ggml.tokens) has {twice!r} twice.")
        self.types = self.for_each("token_type") or self._types_of_old_files()

    def for_each(self, name: str) -> list[Any] | None:
        """Metadata with one entry a token; None when there is none."""
        values = self._metadata.get(_PREFIX + name)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) != len(self.tokens):
            raise CheckpointError(f"{_PREFIX}{name} does not have one entry for each of {len(self.tokens)} tokens.")
        return values

    def special(self, name: str) -> str | None:
        """The token of "bos", "eos", ...; None when the file names none."""
        token_id = self._metadata.get(f"{_PREFIX}{name}_token_id")
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            raise CheckpointError(f"{_PREFIX}{name}_token_id is {token_id!r}, outside the vocabulary.")
        return self.tokens[token_id]

    def _types_of_old_files(self) -> list[int]:
        ends = {self.special("bos"), self.special("eos")}
        return [_CONTROL if token in ends else _NORMAL for token in self.tokens]


def _byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Byte-level BPE (GPT-2, Llama 3): the file lists the merges and names how text is cut into words.

    Returns: the tokenizer, and whether text starts with the beginning-of-sequence token unless the file says.
    """
    name = metadata.get(_PREFIX + "pre")
    if name not in SPLITTINGS:
        raise CheckpointError(
            f"tokenizer.ggml.pre is {name!r}, and how that cuts text is not known here; known: "
            f"{', '.join(SPLITTINGS)}. Name a folder or Hugging Face id with the model's tokenizer.json as tokenizer."
        )
    splitting = SPLITTINGS[name]
    merges = metadata.get(_PREFIX + "merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise CheckpointError("a byte-level tokenizer without tokenizer.ggml.merges cannot encode text.")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(_bpe(vocabulary, pairs, ignore_merges=splitting.whole_words))
    if (normalizer := splitting.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.add_bos


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Tokenizer:
    """Sentencepiece BPE (Llama 1 and 2, Mistral): scores say what is merged first, unknown characters become bytes."""
    scores = vocabulary.for_each("scores")
    if scores is None:
        raise CheckpointError("a sentencepiece tokenizer without tokenizer.ggml.scores cannot encode text.")
    costs = {
        token: -score
        for token, score, token_type in zip(vocabulary.tokens, scores, vocabulary.types, strict=True)
        if token_type == _NORMAL
    }
    unknown = vocabulary.special("unknown") or vocabulary.tokens[0]
    model = _bpe(vocabulary, _merges(costs), byte_fallback=True, fuse_unk=True, unk_token=unknown)
    tokenizer = Tokenizer(model)
    leading_space = metadata.get(_PREFIX + "add_space_prefix", True)
    prepend = [normalizers.Prepend(_SPACE)] if leading_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if leading_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocabulary.ids, merges, **options)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"the merges do not fit the vocabulary: {error}") from error


def _merges(costs: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best first.

    Sentencepiece joins the neighbours whose joined token scores highest, and so does BPE with the pairs in the order
    of the joined token's score.

    Args:
        costs: token -> its score, negated; without control, byte and user-defined tokens.
    """
    pairs = []
    for order, (token, cost) in enumerate(costs.items()):
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in costs and (right := token[cut:]) in costs:
                pairs.append((cost, order, left, right))
    pairs.sort()
    return [(left, right) for _, _, left, right in pairs]


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], vocabulary: _Vocabulary, add_bos: bool) -> None:
    """Put beginning and end of sequence around text, as the file wants it."""
    bos, eos = vocabulary.special("bos"), vocabulary.special("eos")
    first = [bos] if bos is not None and metadata.get(_PREFIX + "add_bos_token", add_bos) else []
    last = [eos] if eos is not None and metadata.get(_PREFIX + "add_eos_token", False) else []
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B:1", *last],
            special_tokens=[(token, vocabulary.ids[token]) for token in {*first, *last}],
        )
