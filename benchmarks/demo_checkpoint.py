"""The demo model as a Hugging Face folder, so that every engine reads the same dequantised weights.

    python benchmarks/demo_checkpoint.py --dtype bfloat16      # prints the folder; takes a minute, once

transformers itself reads the GGUF file and writes the folder, into Octavo's cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from octavo.demo_model import cache_folder, demo_model_path

DTYPES = ("bfloat16", "float32")


def demo_checkpoint(dtype: str) -> Path:
    """The folder with the demo model's weights in `dtype`, made when it is not there yet."""
    folder = cache_folder() / f"demo-model-{dtype}"
    if not folder.is_dir():
        gguf = demo_model_path()
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="convert-") as temporary:
            part = Path(temporary) / folder.name
            _convert(gguf, part, dtype)
            os.replace(part, folder)  # nobody ever sees half a folder
    return folder


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.to(getattr(torch, dtype))
    # A model read from GGUF holds plain floats, but calls itself quantised and then refuses to be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = getattr(torch, dtype)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo model as a Hugging Face folder into Octavo's cache.")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    print(demo_checkpoint(parser.parse_args().dtype))


if __name__ == "__main__":
    main()
