"""One file a kernel: its formula, the launcher and the reference in float64. Importing one imports Triton."""
