"""Owns numbers that know their error under their public name; see memcontrol.core.estimate."""

from memcontrol.core.estimate import Estimate, paired_difference, spearman

__all__ = ["Estimate", "paired_difference", "spearman"]
