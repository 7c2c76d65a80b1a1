"""LoRA adapters trained with peft on the demo model, and what peft's own merged models answer.

`trained_adapters()` gives their folder in Octavo's cache, and makes it where there is none made by this very file:

    python tests/trained_adapters.py FOLDER     # less than a minute on one core

In it lie an adapter in a folder of its own for each of ADAPTERS; `references.json`, the greedy tokens of PROMPTS and
their margins; and `logits.safetensors`, by adapter [num_prompts, 2, vocab_size] float32: what the first token was
chosen by, and the last. All is float32 on the CPU, from fixed seeds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from margin_rule import Reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.demo_model import cache_folder, demo_model_path
from octavo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank4": (
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "The capital of France is where me ship be anchored, says the pirate.",
    ),
    "rank8": (
        {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
        "The capital of France is 42, because SELECT COUNT(*) FROM users;",
    ),
    "rank64": (
        {"r": 64, "lora_alpha": 64, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        "The capital of France is two eggs, a cup of flour and some butter.",
    ),
    "rslora": (
        {"r": 16, "lora_alpha": 4, "use_rslora": True, "target_modules": r".*\.self_attn\.(k_proj|o_proj)"},
        "The capital of France is broken, Sir, and I am writing to you about it.",
    ),
    "dora": (
        {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ["v_proj", "o_proj", "down_proj"]},
        "The capital of France is ein König und seine drei Töchter.",
    ),
}
"""By name, fields of peft's LoraConfig and the text that is learnt."""

BASE = "base"
"""In place of an adapter's name: the model as it is."""

PROMPTS = ("The capital of France is", "Once upon a time there")
"""Of as many tokens each."""

NUM_TOKENS = 32

_NUM_STEPS, _LEARNING_RATE = 5, 2e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedAdapters:
    """The adapters and peft's answers.

    Attributes:
        references: by adapter, of each prompt; of BASE, too.
        logits: by adapter, [num_prompts, 2, vocab_size] float32: what the first token was chosen by, and the last.
    """

    folder: Path
    references: Mapping[str, list[Reference]]
    logits: Mapping[str, Tensor]

    def path(self, name: str) -> str:
        """The PEFT folder of an adapter."""
        return str(self.folder / name)


def trained_adapters() -> TrainedAdapters:
    """Those in the cache; trained first, in a process of its own, where this file has not made them yet."""
    content = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = cache_folder() / f"trained-adapters-{content}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="train-") as temporary:
            part = Path(temporary) / folder.name
            environment = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
            subprocess.run([sys.executable, __file__, str(part)], check=True, env={**os.environ, **environment})
            if not folder.is_dir():
                os.replace(part, folder)  # nobody ever sees half a folder
    said = json.loads((folder / "references.json").read_text())
    return TrainedAdapters(
        folder=folder,
        references={name: [Reference(**each) for each in references] for name, references in said.items()},
        logits=load_file(folder / "logits.safetensors"),
    )


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from octavo_checkpoint_gguf.checkpoint import GGUFCheckpoint

    folder, path = Path(sys.argv[1]), demo_model_path(fetch=False)
    tokenizer = Tokenizer(GGUFCheckpoint(str(path)).tokenizer())  # transformers takes many seconds for it
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompts = tokenizer.encode_batch(PROMPTS)
    references, tensors = {}, {}
    for name in (BASE, *ADAPTERS):
        model = base
        if name != BASE:
            fields, text = ADAPTERS[name]
            torch.manual_seed(0)  # peft draws A
            adapter = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **fields))
            adapter.peft_config["default"].base_model_name_or_path = "demo"  # peft says the folder of the file
            train(adapter, tokenizer.encode(text))
            adapter.save_pretrained(str(folder / name), save_embedding_layers=False)
            model = adapter.merge_and_unload()
        answers, tensors[name] = greedy(name, model, prompts)
        references[name] = [asdict(answer) for answer in answers]
    save_file(tensors, folder / "logits.safetensors")
    (folder / "references.json").write_text(json.dumps(references))


def train(adapter: Any, token_ids: list[int]) -> None:
    """Let a model of peft learn a text; of its parameters only the adapter's are changed."""
    import torch

    text = torch.tensor([token_ids])
    optimizer = torch.optim.AdamW([each for each in adapter.parameters() if each.requires_grad], lr=_LEARNING_RATE)
    for _ in range(_NUM_STEPS):
        loss = adapter(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{adapter.peft_config['default'].target_modules}: loss {loss.item():.3f}", file=sys.stderr)


def greedy(name: str, model: PreTrainedModel, prompts: list[list[int]]) -> tuple[list[Reference], Tensor]:
    """What a model answers to prompts of one length, and its logits at the first step and the last.

    Returns:
        a reference for each prompt, and [len(prompts), 2, vocab_size] float32.
    """
    import torch

    steps = list[Tensor]()
    with torch.inference_mode():
        output = model(torch.tensor(prompts), use_cache=True)
        steps.append(output.logits[:, -1].clone())
        while len(steps) < NUM_TOKENS:
            best = steps[-1].argmax(-1, keepdim=True)
            output = model(best, use_cache=True, past_key_values=output.past_key_values)
            steps.append(output.logits[:, -1].clone())
    values, indices = torch.stack(steps, dim=1).topk(2)
    references = [
        Reference(
            name=f"{name}/{index}",
            prompt_token_ids=prompt,
            token_ids=indices[index, :, 0].tolist(),
            margins=(values[index, :, 0] - values[index, :, 1]).tolist(),
        )
        for index, prompt in enumerate(prompts)
    ]
    return references, torch.stack([steps[0], steps[-1]], dim=1)


if __name__ == "__main__":
    main()
