"""Owns numbers that know their error, under their public name; see memcontrol.core.estimate."""

from memcontrol.core.estimate import Estimate, beta_binomial_p, paired_difference, spearman

__all__ = ["Estimate", "beta_binomial_p", "paired_difference", "spearman"]
