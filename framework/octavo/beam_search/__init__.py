"""Beam search: which continuations of a prompt are kept, and each as a running request on shared blocks."""
