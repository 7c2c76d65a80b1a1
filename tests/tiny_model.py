"""A tiny random Llama as a Hugging Face folder: weights and config.json written by transformers, and a tokenizer.

Its vocabulary is a handful of special tokens and the printable ASCII characters, one token each, so a test can tell
from a text which tokens it is, and the reverse.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

BOS, EOS, SYSTEM, USER, ASSISTANT = range(5)
SPECIAL_TOKENS = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
CHARACTERS = [chr(code) for code in range(ord(" "), ord("~") + 1)]
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)
MAX_POSITIONS = 128

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Weights ten times larger than a trained model's: logits far apart, so that greedy tokens vary and rarely tie.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def write_tiny_llama(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write the folder and return it; `changes` are of LlamaConfig, over SIZES. One seed, one set of weights."""
    return write_tiny_model(folder, LlamaConfig(**(SIZES | changes)), seed=seed)


def write_tiny_model(folder: Path, config: PreTrainedConfig, *, seed: int = 0) -> Path:
    """Write the folder of a random model of any architecture and return it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1, where faults do not show
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def token_ids_of(text: str) -> list[int]:
    """The tokens of a text of printable characters, without the special token that begins a prompt."""
    return [len(SPECIAL_TOKENS) + CHARACTERS.index(character) for character in text]


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, byte-level as most models have it, and tokenizer_config.json with a chat template."""
    pieces = [*SPECIAL_TOKENS, "Ġ", *CHARACTERS[1:]]  # Ġ is the byte-level alphabet's space
    tokenizer = Tokenizer(BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
