#!/usr/bin/env python3
"""Write the tables of what Triton kernels cost, compiled ahead of time; no GPU is needed.

    python scripts/kernel_table.py                      # of every plugin that has one
    python scripts/kernel_table.py attention_triton     # of this one

A plugin's plugins/NAME/tests/compiler/test_kernels.py says which variants there are (`compile_all`), and holds them to
the table.json beside it. Look at the difference before you commit it: a number that grew is a kernel that got slower.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from octavo.testing import CompiledKernel, write_table

ROOT = Path(__file__).resolve().parent.parent
TESTS = {path.parents[2].name: path for path in sorted(ROOT.glob("plugins/*/tests/compiler/test_kernels.py"))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of what Triton kernels cost.")
    parser.add_argument("plugins", nargs="*", choices=[*TESTS, []], help="folders under plugins/; all by default")
    for name in parser.parse_args().plugins or TESTS:
        start = time.monotonic()
        compiled = compile_all(TESTS[name])
        path = TESTS[name].with_name("table.json")
        write_table(path, compiled)
        print(f"{path.relative_to(ROOT)}: {len(set(compiled))} variants, {time.monotonic() - start:.0f} s")


def compile_all(path: Path) -> list[CompiledKernel]:
    """The variants of a plugin, as its test compiles them."""
    spec = importlib.util.spec_from_file_location(f"{path.parents[2].name}_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return list(module.compile_all())


if __name__ == "__main__":
    main()
