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

MIN_WORKERS = 2
"""Its pools reserve two; where os.cpu_count() is 2 it would take one, and refuse to start."""


def main() -> None:
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints to standard output, compilers that it starts included
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(MIN_WORKERS, (os.cpu_count() or 1) // 2)))
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling costs minutes that one run never earns back

    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    num_layers = json.loads(Path(job["folder"], "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    settings = QuantizeConfig(**job["settings"], method=job["method"], offload_to_disk=False)
    model = GPTQModel.load(job["folder"], settings)

    def layer_complete(layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:  # it is called twice for a layer
            print(f"layer {layer_idx + 1} of {num_layers}", file=protocol, flush=True)

    model.layer_callback = layer_complete
    model.quantize([{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in job["samples"]])
    model.save(job["output"])
    print("done", file=protocol, flush=True)


if __name__ == "__main__":
    main()
