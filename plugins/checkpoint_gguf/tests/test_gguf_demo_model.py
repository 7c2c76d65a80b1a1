"""The demo model, against numbers from other programs: transformers' weights and llama.cpp's tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.tokenizer import Tokenizer
from octavo_checkpoint_gguf.checkpoint import GGUFCheckpoint, half_rotary
from octavo_checkpoint_gguf.gguf_file import GGUFFile

# Of the same file, loaded by transformers 5.23: the first numbers, and the sum of numbers times (index modulo 97).
FROM_TRANSFORMERS = {
    "model.embed_tokens.weight": ([-0.10654449462890625, 0.032978057861328125], -740630.3343496323),
    "model.layers.0.self_attn.q_proj.weight": ([-0.0963134765625, 0.1573486328125], -3906.5491638183594),
    "model.layers.7.self_attn.k_proj.weight": ([-0.002532958984375, 0.321746826171875], -498.5962448120117),
    "model.layers.29.mlp.down_proj.weight": ([-0.2733154296875, 0.186279296875], 3770.8242797851562),
    "model.norm.weight": ([1.7578125, 1.8203125], 49451.53125),
}
# Of the same file, by llama.cpp's /tokenize (October 2026).
FROM_LLAMA_CPP = {
    "Hello world": [19556, 905],
    "  two  spaces ": [216, 827, 216, 5600, 216],
    "1234567890 12,345.67": [33, 34, 35, 36, 37, 38, 39, 40, 41, 32, 216, 33, 34, 28, 35, 36, 37, 30, 38, 39],
    "don't I'LL we'Re": [12420, 982, 339, 23, 16421, 392, 23, 3733],
    "tab\tand\nnewline\r\n\r\n  indented": [15999, 197, 397, 198, 28160, 18682, 216, 641, 6574],
    "반갑습니다.": [182, 125, 242, 181, 125, 235, 183, 228, 130, 41259, 226, 41259, 114, 30],
    "👩\u200d👧 🇰🇷": [10813, 235, 119, 321, 231, 10813, 235, 117, 15107, 225, 125, 10813, 225, 132],
    "ÀÉ mixedCase ½ Ⅷ ² ٣": [142, 218, 39614, 6468, 10802, 216, 16738, 216, 173, 223, 117, 216, 19133, 216, 164, 113],
    "def f(x):\n    return x**2  # ok\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 10907, 198],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}


@pytest.fixture(scope="module")
def checkpoint(demo_model: str) -> GGUFCheckpoint:
    return GGUFCheckpoint(demo_model)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: GGUFCheckpoint) -> Tokenizer:
    return Tokenizer(checkpoint.tokenizer())


# ------------------------------------------------------------------------------------------- weights


def test_weights_equal_those_of_transformers(checkpoint: GGUFCheckpoint) -> None:
    seen = set()
    for name, tensor in checkpoint.tensors():
        if name in FROM_TRANSFORMERS:
            first, weighted_sum = FROM_TRANSFORMERS[name]
            flat = tensor.flatten().double()
            assert flat[: len(first)].tolist() == first
            assert (flat * (torch.arange(len(flat)) % 97)).sum().item() == pytest.approx(weighted_sum, rel=1e-9)
            seen.add(name)
    assert seen == set(FROM_TRANSFORMERS)


def test_quantised_blocks_are_the_numbers_that_their_formats_say(checkpoint: GGUFCheckpoint, demo_model: str) -> None:
    """Q8_0: 32 times scale * q. Q4_1: 32 times scale * q + minimum, low halves of the bytes first."""
    file = GGUFFile(demo_model)
    for name, block_bytes in (("token_embd.weight", 34), ("blk.3.ffn_up.weight", 20), ("blk.3.attn_q.weight", 20)):
        info = file.tensors[name]
        blocks = np.fromfile(Path(demo_model), np.uint8, info.num_bytes, offset=info.start).reshape(-1, block_bytes)
        expected = q8_0(blocks) if info.type is GGMLQuantizationType.Q8_0 else q4_1(blocks)
        np.testing.assert_array_equal(file.read(name), expected.reshape(info.shape))


def q8_0(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return blocks[:, :2].view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)


def q4_1(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    scale, minimum = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    return scale * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) + minimum


def test_rotary_order_is_undone_row_by_row() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert half_rotary(rows, num_heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_configuration_is_smollm2_s(checkpoint: GGUFCheckpoint) -> None:
    config = checkpoint.config()
    assert (config["num_hidden_layers"], config["hidden_size"], config["head_dim"]) == (30, 576, 64)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert (config["rope_theta"], config["dtype"], config["tie_word_embeddings"]) == (100000.0, "bfloat16", True)
    assert checkpoint.generation_config()["eos_token_id"] == [2]


# ------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("text", FROM_LLAMA_CPP)
def test_tokens_equal_those_of_llama_cpp(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == FROM_LLAMA_CPP[text]


# Its vocabulary lacks some control characters, and bytes that begin characters past U+3FFFF: no language has these.
@given(st.text(alphabet=st.characters(max_codepoint=0x1FFFF, exclude_categories=("Cc", "Cs"))))
@settings(deadline=None)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_bytes_of_each_token_are_its_text(tokenizer: Tokenizer) -> None:
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        assert tokenizer.token_bytes(token_id).decode("utf-8", "replace") == text


def test_conversation_is_encoded_with_its_special_tokens_once(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages) == text
    assert tokenizer.encode_chat(messages) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode_chat(messages).count(1) == 3
