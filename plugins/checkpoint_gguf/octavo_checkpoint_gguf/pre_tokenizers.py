"""How a byte-level vocabulary cuts text into words before merging, by the name that tokenizer.ggml.pre gives it.

Only names whose splitting is known for certain are here: a wrong split gives wrong tokens without any error.

Sources: the tokenizer.json files of the models the names stand for, and the table in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_DIGIT = r"\p{N}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Splitting:
    """One way to cut text.

    Attributes:
        patterns: applied in turn; each match is a piece, and so is the text between two.
        whole_words: a piece that is a token is taken as it is, without merging (tiktoken's behaviour).
        add_bos: whether text starts with the beginning-of-sequence token when the file does not say.
        compose: whether text is first brought to Unicode's composed form (NFC).
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    compose: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.compose else None


_llama3 = Splitting(patterns=(_LLAMA3,), whole_words=True, add_bos=True)
_digits = Splitting(patterns=(_DIGIT, _GPT2))

SPLITTINGS = {
    "default": Splitting(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Splitting(patterns=(_GPT2,)),
    "llama-bpe": _llama3,
    "llama-v3": _llama3,
    "llama3": _llama3,
    "qwen2": Splitting(patterns=(_QWEN2,), compose=True),
    "refact": _digits,
    "smaug-bpe": Splitting(patterns=(_LLAMA3,)),
    "smollm": _digits,
    "starcoder": _digits,
    "tekken": Splitting(patterns=(_TEKKEN,), whole_words=True, add_bos=True),
}
