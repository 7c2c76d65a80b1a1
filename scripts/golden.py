#!/usr/bin/env python3
"""Record what transformers answers to a workload: the reference that Octavo's greedy tokens are compared with.

    .venv/bin/python scripts/golden.py w2s w2

For each workload in benchmarks/workloads/ it writes tests/golden/demo-WORKLOAD.json. The demo model runs in float32,
each request alone, greedily, past end-of-sequence tokens, for exactly `max_tokens` tokens. Beside each token stands its
margin: how far its logit was above the second best (tests/margin_rule.py says what that is for).
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
import time
from pathlib import Path

import torch
import transformers

from octavo.demo_model import demo_model_path

ROOT = Path(__file__).resolve().parent.parent
WORKLOADS = ROOT / "benchmarks" / "workloads"
GOLDEN = ROOT / "tests" / "golden"


def main() -> None:
    parser = argparse.ArgumentParser(description="Record transformers' greedy tokens and their margins.")
    parser.add_argument("workloads", nargs="+", choices=sorted(path.stem for path in WORKLOADS.glob("*.json")))
    args = parser.parse_args()

    path = demo_model_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    for name in args.workloads:
        record(name, path, model)


def record(name: str, path: Path, model: transformers.PreTrainedModel) -> None:
    workload = json.loads((WORKLOADS / f"{name}.json").read_text())
    requests = []
    for request in workload["requests"]:
        start = time.monotonic()
        token_ids, margins = greedy(model, request["prompt"], request["max_tokens"])
        requests.append({"id": request["id"], "token_ids": token_ids, "margins": margins})
        print(f"{name} {request['id']}: {len(token_ids)} tokens, {time.monotonic() - start:.1f} s", file=sys.stderr)
    header = {
        "made_by": f"scripts/golden.py {name}",
        "date": datetime.date.today().isoformat(),
        "model": path.name,
        "model_sha256": sha256(path),
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (GOLDEN / f"demo-{name}.json").write_text(to_json(header, requests))


@torch.inference_mode()
def greedy(model: transformers.PreTrainedModel, prompt: list[int], max_tokens: int) -> tuple[list[int], list[float]]:
    """(token ids, margins) of one request, the keys and values of what was computed kept between the steps."""
    token_ids: list[int] = []
    margins: list[float] = []
    step = {"input_ids": torch.tensor([prompt]), "past_key_values": transformers.DynamicCache(config=model.config)}
    while len(token_ids) < max_tokens:
        output = model(**step, use_cache=True, logits_to_keep=1)
        best = output.logits[0, -1].topk(2)
        token_ids.append(int(best.indices[0]))
        margins.append(round(float(best.values[0] - best.values[1]), 6))
        step = {"input_ids": best.indices[:1].unsqueeze(0), "past_key_values": output.past_key_values}
    return token_ids, margins


def to_json(header: dict[str, str], requests: list[dict[str, object]]) -> str:
    """One line for the header's fields, one for each request."""
    lines = ",\n".join(json.dumps(request, separators=(",", ":")) for request in requests)
    return f'{json.dumps(header)[:-1]}, "requests": [\n{lines}\n]}}\n'


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
