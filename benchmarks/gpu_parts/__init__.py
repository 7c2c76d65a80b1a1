"""The parts of benchmarks/gpu.py, in the order they run: each has `run(part)` and is a process of its own."""
