"""The tokenizer in a GGUF file's metadata, rebuilt with the `tokenizers` library. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from octavo.errors import CheckpointError
from octavo.interfaces.checkpoint import TokenizerData
from octavo_checkpoint_gguf.pre_tokenizers import SPLITTINGS

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _NORMAL = 2, 3, 4, 1
_SPACE = "▁"  # sentencepiece writes a space so
# Instruct files written before tokenizer.ggml.eot_token_id existed end their turns with these all the same.
_END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")


def read_tokenizer(metadata: Mapping[str, Any]) -> TokenizerData:
    """Build the tokenizer.

    Raises:
        CheckpointError: no tokenizer in the file, or one of a kind that is not known for certain.
    """
    kind = metadata.get(_PREFIX + "model")
    tokens = metadata.get(_PREFIX + "tokens")
    if not isinstance(tokens, list) or len(vocabulary := {token: index for index, token in enumerate(tokens)}) != len(
        tokens
    ):
        raise CheckpointError(
            "the file holds no usable vocabulary (tokenizer.ggml.tokens is missing or has duplicates)."
        )
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, vocabulary)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(metadata, tokens, vocabulary), True
    else:
        raise CheckpointError(f"tokenizer.ggml.model is {kind!r}; 'gpt2' (byte-level BPE) and 'llama' (SPM) are read.")
    types = metadata.get(_PREFIX + "token_type") or [_NORMAL] * len(tokens)
    whole = zip(tokens, types, strict=True)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type != _USER_DEFINED)
            for token, token_type in whole
            if token and token_type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    _add_ends(tokenizer, metadata, tokens, add_bos)
    return TokenizerData(
        tokenizer=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens=_special_tokens(metadata, tokens),
    )


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Every token that ends an answer: of the sequence, of a turn, of a message."""
    ids = {metadata.get(f"{_PREFIX}{name}_token_id") for name in ("eos", "eot", "eom")}
    tokens: Sequence[str] = metadata.get(_PREFIX + "tokens") or ()
    types: Sequence[int] = metadata.get(_PREFIX + "token_type") or ()
    control = {token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == _CONTROL}
    ids.update(control.get(token) for token in _END_OF_TURN)
    return sorted(token_id for token_id in ids if token_id is not None)


def _byte_level(metadata: Mapping[str, Any], vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE (GPT-2, Llama 3): the file lists the merges and names how text is cut into words."""
    name = metadata.get(_PREFIX + "pre")
    if name not in SPLITTINGS:
        raise CheckpointError(
            f"tokenizer.ggml.pre is {name!r}, and how that cuts text is not known here; known: "
            f"{', '.join(SPLITTINGS)}. Name the folder or Hugging Face id that holds the model's tokenizer.json as the tokenizer."
        )
    splitting = SPLITTINGS[name]
    merges = metadata.get(_PREFIX + "merges")
    if not isinstance(merges, list):
        raise CheckpointError("a byte-level tokenizer without tokenizer.ggml.merges cannot encode text.")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=splitting.whole_words))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"tokenizer.ggml.merges do not fit the vocabulary: {error}") from error
    if (normalizer := splitting.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, splitting.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], vocabulary: dict[str, int]) -> Tokenizer:
    """Sentencepiece BPE (Llama 1 and 2, Mistral): scores say what is merged first, unknown characters become bytes."""
    scores = metadata.get(_PREFIX + "scores")
    types = metadata.get(_PREFIX + "token_type") or [_NORMAL] * len(tokens)
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError("a sentencepiece tokenizer needs one tokenizer.ggml.scores entry a token.")
    normal = {token: -score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    unknown_id = metadata.get(_PREFIX + "unknown_token_id", 0)
    tokenizer = Tokenizer(
        BPE(vocabulary, _merges(normal, vocabulary), byte_fallback=True, fuse_unk=True, unk_token=tokens[unknown_id])
    )
    as_prefix = metadata.get(_PREFIX + "add_space_prefix", True)
    prepend = [normalizers.Prepend(_SPACE)] if as_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if as_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(normal: Mapping[str, float], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best first.

    Sentencepiece joins the neighbours whose joined token scores highest; a merge list in the order of the joined
    token's score does the same.

    Args:
        normal: token -> cost (its score, negated), without control, byte and user-defined tokens.
        vocabulary: token -> id.
    """
    pairs = [
        (cost, vocabulary[token], token[:cut], token[cut:])
        for token, cost in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    pairs.sort()
    return [(left, right) for _, _, left, right in pairs]


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str], add_bos: bool) -> None:
    """Put beginning and end of sequence around text, as the file wants it."""
    bos, eos = metadata.get(_PREFIX + "bos_token_id"), metadata.get(_PREFIX + "eos_token_id")
    first = [tokens[bos]] if bos is not None and metadata.get(_PREFIX + "add_bos_token", add_bos) else []
    last = [tokens[eos]] if eos is not None and metadata.get(_PREFIX + "add_eos_token", False) else []
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B:1", *last],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*first, *last}],
        )


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    ids = {
        name: metadata.get(f"{_PREFIX}{key}_token_id")
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    return {name: tokens[index] for name, index in ids.items() if index is not None and 0 <= index < len(tokens)}
