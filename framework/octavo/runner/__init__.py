"""From a step to its tokens: batch, model, sampler."""
