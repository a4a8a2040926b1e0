"""Owns `memcontrol.models.TINY`, the embedded base's folder, under the name that exported model cards use."""

from memcontrol.model.source import TINY

__all__ = ["TINY"]
