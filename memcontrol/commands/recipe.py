"""Owns `memcontrol.recipe`: a trial's mask and settings as another trainer's own config."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from memcontrol.core.errors import MemControlError
from memcontrol.core.files import name_full_disk, replace_file
from memcontrol.recipes.planning import plan_recipe
from memcontrol.recipes.trainers import write_recipe
from memcontrol.study.pick import choose_record
from memcontrol.study.place import StudyPlace


def recipe(
    study: str | Path,
    trainer: str,
    rule: str | None = None,
    *,
    trial: int | None = None,
    limits: Sequence[str] = (),
    out: str | Path | None = None,
) -> dict[str, str]:
    """The pick, or trial number `trial`, as the config of another trainer: kohya (sd-scripts), ai-toolkit,
    onetrainer, simpletuner, diffusers (its example scripts) or peft. Its filters select the mask's modules
    and no other; steps are those of `retrain`, on all training images.

    Returns file name to text, the main file first, and writes the files to the folder `out` where one is
    named. Raises MemControlError: what that trainer cannot express, why, and which trainers can.
    """
    place = StudyPlace.load(study)
    with contextlib.closing(place.open()) as found:
        choice = choose_record(found, trial, rule, limits).chosen
        plan = plan_recipe(found.config, found.space, choice, place.folder)
    files = write_recipe(plan, trainer)
    if out is not None:
        write_files(files, Path(out))
    return files


def write_files(files: dict[str, str], out: Path) -> None:
    """Raises MemControlError where the folder holds such a file already."""
    for name in files:
        if (out / name).exists():
            raise MemControlError(f"{out / name} exists; give another folder with --out")
    with name_full_disk(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with replace_file(out / name, published=True) as part:
                part.write_text(text, encoding="utf-8")
