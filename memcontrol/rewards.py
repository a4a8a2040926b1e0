"""Owns the rewards as plain functions of feature matrices under their public name; see memcontrol.scoring."""

from memcontrol.scoring.copying import (
    PRESETS,
    authpct,
    carlini_rate,
    copy_rate,
    extraction,
    memorization,
    mq,
    tile_distances,
)
from memcontrol.scoring.quality import clip_score, fd_pca, fid, kid, mifid, prdc

__all__ = [
    "PRESETS",
    "authpct",
    "carlini_rate",
    "clip_score",
    "copy_rate",
    "extraction",
    "fd_pca",
    "fid",
    "kid",
    "memorization",
    "mifid",
    "mq",
    "prdc",
    "tile_distances",
]
