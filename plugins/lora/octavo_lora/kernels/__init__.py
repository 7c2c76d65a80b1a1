"""One file a kernel: its formula, the launcher and what it stands for in float64. Importing one imports Triton."""
