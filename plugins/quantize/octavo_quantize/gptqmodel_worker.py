"""Quantise a plain Hugging Face folder with gptqmodel. Run by the Python of an environment of its own:

    python gptqmodel_worker.py JOB.json

The job is one object: `folder` (the plain model), `output` (where to save), `method` ("gptq" or "awq"), `settings` (of
gptqmodel's QuantizeConfig) and `samples` (token ids). Standard output has one line for each layer that is done,
"layer 3 of 30", and "done" at the end; what gptqmodel itself prints goes to standard error.

This file imports nothing of Octavo, which is not installed where it runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints to standard output, compilers that it starts included
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name, value in variables(os.cpu_count() or 1).items():
        os.environ.setdefault(name, value)

    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    config = json.loads(Path(job["folder"], "config.json").read_text(encoding="utf-8"))
    num_layers = config.get("text_config", config)["num_hidden_layers"]
    settings = QuantizeConfig(**job["settings"], method=job["method"], offload_to_disk=False)
    model = GPTQModel.load(job["folder"], settings)

    def layer_complete(layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:  # it is called twice for a layer
            print(f"layer {layer_idx + 1} of {num_layers}", file=protocol, flush=True)

    model.layer_callback = layer_complete
    model.quantize([{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in job["samples"]])
    model.save(job["output"])
    print("done", file=protocol, flush=True)


def variables(num_cores: int) -> dict[str, str]:
    """What gptqmodel reads from the environment when it is imported, where the user has not set it."""
    needed = {"TORCHDYNAMO_DISABLE": "1"}  # compiling costs minutes that one run never earns back
    if num_cores < 3:
        needed["GPTQMODEL_CPU_WORKERS"] = "2"  # half of the cores by default, and one does not fill its pool of two
    return needed


if __name__ == "__main__":
    main()
