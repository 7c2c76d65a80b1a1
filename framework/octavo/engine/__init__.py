"""Scheduler, block pool and the engine that drives them."""
