"""A stand-in for gptqmodel's environment: the worker runs as it is, on a gptqmodel that only copies the model."""

from __future__ import annotations

import sys
from pathlib import Path

GPTQMODEL = """
import json
import os
import shutil
import time
from pathlib import Path

HOW = os.environ.get("STAND_IN", "works")


class QuantizeConfig:
    def __init__(self, **settings):
        self.settings = settings


class GPTQModel:
    @classmethod
    def load(cls, folder, config):
        print("Loading   0 %\\rLoading 100 %")
        model = cls()
        model.folder, model.settings = Path(folder), config.settings
        return model

    def quantize(self, samples):
        self.samples = samples
        for layer in range(json.loads((self.folder / "config.json").read_text())["num_hidden_layers"]):
            if HOW == "fails" and layer == 1:
                raise RuntimeError("layer 1 is singular")
            self.layer_callback(layer_idx=layer, submodule_finalized=False)
            self.layer_callback(layer_idx=layer, submodule_finalized=True)
            if HOW == "lingers":
                time.sleep(60)

    def save(self, output):
        output = Path(output)
        output.mkdir()
        shutil.copyfile(self.folder / "model.safetensors", output / "model.safetensors")
        if HOW == "dies":
            os._exit(0)
        shutil.copyfile(self.folder / "config.json", output / "config.json")
        (output / "tokenizer.json").write_text("{}")
        variables = {name: os.environ.get(name) for name in ("TORCHDYNAMO_DISABLE", "GPTQMODEL_CPU_WORKERS")}
        told = {"settings": self.settings, "samples": self.samples, "variables": variables}
        (output / "told.json").write_text(json.dumps(told))
"""


def write_environment(folder: Path) -> Path:
    """A folder that looks like the environment, whose Python is this one."""
    package = folder / "lib" / "python3" / "site-packages" / "gptqmodel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(GPTQMODEL)
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder
