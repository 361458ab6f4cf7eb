"""Sampling: tokens and log-probabilities from logits, with noise keyed by seed, position and token alone."""

from headrace.sampling.sampler import Sampled, Sampler

__all__ = ["Sampled", "Sampler"]
