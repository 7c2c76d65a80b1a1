"""A plugin whose LoRA backend takes memory and does nothing else, for tests of what chooses and counts."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

_PLUGIN = """
    from octavo import LoraSpec, hookimpl
    OCTAVO_API = "1.0"

    @hookimpl
    def octavo_components():
        return [LoraSpec(name="counted", target="dummy_counted.parts:Counted")]
"""
_PARTS = """
    from octavo.interfaces import LoraBackend

    class Counted(LoraBackend):
        def __init__(self, limits):
            super().__init__(limits)
            self.features = 0

        def linear(self, parts, *, is_head=False):
            self.features += 0 if is_head else sum(part.in_features + part.out_features for part in parts)

        def embedding(self, part):
            return None

        @property
        def num_bytes(self):
            limits = self.limits
            return limits.max_loras * limits.max_lora_rank * self.features * limits.dtype.itemsize

        def allocate(self):
            return None

        def load(self, path, base):
            raise NotImplementedError

        def place(self, position, adapter):
            raise NotImplementedError

        def plan(self, positions, *, captured=False):
            self.active = False

        def apply(self, slot, x, output):
            return output

        def apply_embedding(self, slot, token_ids, output):
            return output
"""


def install_lora_plugin(site_packages: Any) -> None:
    """Backend "counted": a position takes both matrices of every part of every linear but the head."""
    folder: Path = site_packages.install("counted", _PLUGIN).parent
    (folder / "parts.py").write_text(dedent(_PARTS))
