"""Triton is published for Linux only; elsewhere nothing can be compiled."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["test_kernels.py"]
