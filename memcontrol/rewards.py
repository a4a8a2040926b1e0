"""Owns the rewards as plain functions of feature matrices, under a public name; see memcontrol.scoring."""

from memcontrol.core.estimate import Estimate
from memcontrol.scoring.copying import copy_rate, memorization
from memcontrol.scoring.membership import epsilon_low, membership_auc, membership_tpr
from memcontrol.scoring.published import PRESETS, authpct, carlini_rate, extraction, mq, tile_distances
from memcontrol.scoring.quality import Gaussian, clip_score, cosine_distance, fd_pca, fid, kid, mifid, prdc
from memcontrol.scoring.quality import fit_gaussian as gaussian

__all__ = [
    "PRESETS",
    "Estimate",
    "Gaussian",
    "authpct",
    "carlini_rate",
    "clip_score",
    "copy_rate",
    "cosine_distance",
    "epsilon_low",
    "extraction",
    "fd_pca",
    "fid",
    "gaussian",
    "kid",
    "membership_auc",
    "membership_tpr",
    "memorization",
    "mifid",
    "mq",
    "prdc",
    "tile_distances",
]
