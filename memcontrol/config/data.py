"""Owns `data`: which images, how they are dealt out and read, and its short form."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from memcontrol.config.strict import Count, Share, Strict

BY_CAPTION = "caption"  # data.label where captions are the classes
Pages = Literal["refuse", "first", "all"]
Fit = Literal["crop", "pad", "squash"]


class DataConfig(Strict):
    """Images with captions: `digits` (embedded) or a folder; a part is a share of the images (0.5) or a count
    (128)."""

    path: str
    """`digits` (embedded), a folder of images, seen from the study file, or a dataset: a folder of parquet
    shards or WebDataset tars, one such file, or `hf://OWNER/NAME` on Hugging Face's hub"""
    split: Annotated[str, Field(min_length=1)] | None = None
    """of a dataset, the split whose images are dealt out; none: its splits are the parts, or it has one"""
    train: Share | Count = 0.5
    """share or number of images to fine-tune on; ignored where the images come in parts: folders `train/`,
    `holdout/` and `test/`, a column `split`, a dataset's splits"""
    holdout: Share | Count = 0.25
    """share or number of images that a search compares with, never trained on"""
    test: Share | Count = 0.25
    """share or number of images that only `retrain` is scored on"""
    calibration: Share | Count | None = None
    """share or number of further real images, of which 99 % lie above the line of copies; or a folder
    `calibration/` beside the others. None: held-out images, each left out of its own reference"""
    resolution: Annotated[int, Field(ge=8)] | None = None
    """side of the square images in pixels; none: the base's own"""
    fit: Fit = "crop"
    """how an image that is not square becomes so: its centre square, the whole on black, or squashed"""
    caption: Annotated[str, Field(min_length=1)] | None = None
    """the column of the metadata that holds captions; none: `text`, `txt`, `caption`, `prompt` or
    `description`"""
    group: Annotated[str, Field(min_length=1)] | None = None
    """who is in an image, such as a patient: a column of the metadata (`patient_id`), a pattern on its path
    whose first group is the name (`"(p\\d+)_"`), `folder`, or `PatientID` of DICOM files. A group is in one
    part and one shard, and one unit of every error; none: each image for itself"""
    label: Annotated[str, Field(min_length=1)] | None = None
    """which class an image shows, for `utility`: `caption` where captions are the classes, `folder`, a column
    of the metadata, or a pattern on its path whose first group is the name; none: `utility` is not
    measured"""
    twins: Literal["refuse", "drop", "keep"] = "refuse"
    """images that are nearly the same (re-encoded, resized, turned, cropped) in two of the folders `train/`,
    `holdout/` and `test/`: refuse them, drop the one that is not trained on, or keep both. A pool that is
    split keeps them in one part"""
    pages: Pages = "refuse"
    """files of several pages or frames (TIFF, animations, DICOM): refuse them, take the first page, or make
    each an image"""
    max_pixels: Annotated[int, Field(ge=1)] | None = None
    """width times height beyond which an image is refused; none: 178,956,970"""
    skip_unreadable: bool = False
    """skip images that cannot be decoded, or are too large, instead of stopping"""


def expand_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value
