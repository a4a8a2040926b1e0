"""Owns what lies in a study's folder: its list for a person, and what of it is removed."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from memcontrol.core.files import make_private, make_private_folder, read_json, write_json, write_text
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.study.place import StudyPlace

# as the README in the folder names it, a pattern on its name, and what it is
_CONTENTS = (
    ("README.txt", r"README\.txt", "this list"),
    (
        "study.db",
        r"study\.db(-wal|-shm|-journal)?",
        "the study: every choice, its rewards, and notes that name the images' folder",
    ),
    (
        "split.json",
        r"split\.json",
        "which image is in which part: its name, captions, group, and a hash of its pixels",
    ),
    (
        "network.json, extractor.json, base.json",
        r"(network|extractor|base)\.json",
        "the denoiser's blocks, the feature network and the base",
    ),
    ("front.png", r"front\.png", "the front as a picture"),
    (
        "search.log, log.txt, worker-0.txt",
        r"search\.log|log(-\d+)?\.txt|worker-\d+\.txt",
        "what happened, and what was printed, with paths and names of files",
    ),
    (
        "search.lock, search.holder.json",
        r"search\.lock|search\.holder\.json|\.study\.db\..*\.lock",
        "one search at a time, and whose it is",
    ),
    ("others.json", r"others\.json", "names that were in the folder before, which are not the study's"),
    ("secret", r"secret", "what the names of the pictures in artifacts/ are drawn from"),
    (
        "cache/",
        r"cache",
        "32 x 32 pixels of every image, its captions and metadata (images.db); latents, from which an image "
        "can be decoded almost whole; encoded captions; features; of a dataset its unpacked images",
    ),
    (
        "artifacts/",
        r"artifacts",
        "pictures that the dashboard shows: generated images, and the training images nearest to them",
    ),
    (
        "track/",
        r"track",
        "what experiment trackers were told (search.track): choices, rewards, pictures, training images too",
    ),
    ("slurm/", r"slurm", "records, scripts and logs of Slurm's jobs"),
    ("calibration-0/ and on", r"calibration-\d+", "short trials of a dry run"),
    (
        "a folder of eight digits and letters",
        r"[0-9a-f]{8}",
        "a choice: weights, generated images, training images beside those like them (pairs.png, maps.npz), "
        "captions, rewards, and what was printed",
    ),
    ("retrain/", r"retrain", "choices that were fine-tuned on all training images, with the same files"),
)
_OUR_NAMES = "|".join(pattern for _, pattern, _ in _CONTENTS)
_OURS = re.compile(
    rf"({_OUR_NAMES})|\.?({_OUR_NAMES})(\.lock|\.\d+\.part)"
)  # half a file of a process that died, too
_HEAD = """\
The folder of study '{name}', made by `memcontrol search`. Only its owner may read it: it holds pictures,
captions and latents of training images, until they are removed:

    memcontrol clean STUDY.yaml                 all of it
    memcontrol clean STUDY.yaml --keep front    all but the study, its results, and the models on its front

What may be given away is made by `memcontrol export` and `memcontrol report --without-images`.

"""
# of a run that stays as a result, but not as a model
_RESULTS = re.compile(
    r"(spec|result|confirmed|training|dropped|judged|failures|rung-[\d.]+)\.json|contributions\.npz|"
    r"rung-[\d.]+\.npz|attempts\.jsonl"
)
_KEPT = (
    "README.txt",
    "others.json",
    "split.json",
    "network.json",
    "extractor.json",
    "base.json",
    "secret",
    "retrain",
)


def make_study_folder(place: StudyPlace) -> None:
    """The study's folder, with a list of what lies in it. What an older version made for everyone to read
    becomes its owner's, once: who opens the folder to others afterwards has it so."""
    folder = place.folder
    make_private_folder(folder.path)
    if folder.others_file.is_file():
        return
    # where a person made the folder, names as these may be that person's
    is_old = folder.database.exists() or folder.split_file.exists() or folder.log_file.exists()
    others = [path.name for path in list_contents(folder)] if place.is_beside_file and not is_old else []
    write_json(folder.others_file, others)
    for path in list_contents(folder) if place.is_beside_file else [folder.path]:
        make_private(path)
    if not folder.readme_file.exists():
        write_text(folder.readme_file, write_readme(place.config.name))


def write_readme(name: str) -> str:
    """What lies in the folder of a study."""
    lines = [
        textwrap.fill(f"{title}: {text}", 100, subsequent_indent="  ", break_on_hyphens=False)
        for title, _, text in _CONTENTS
    ]
    return _HEAD.format(name=name) + "\n".join(lines) + "\n"


def list_contents(folder: StudyFolder) -> list[Path]:
    """What a search puts into its folder, of what is there."""
    if not folder.path.is_dir():
        return []
    others = read_json(folder.others_file) if folder.others_file.is_file() else []
    return sorted(
        path for path in folder.path.iterdir() if _OURS.fullmatch(path.name) and path.name not in others
    )


def list_others(folder: StudyFolder) -> list[Path]:
    """What no search made."""
    return sorted(set(folder.path.iterdir()) - set(list_contents(folder)))


def list_beside_front(
    folder: StudyFolder, front: Collection[Path], artifacts: Collection[str]
) -> Iterator[Path]:
    """Of what a search puts into its folder, all but the study and its results, the run folders of `front`
    and the `artifacts` of these names."""
    for path in list_contents(folder):
        if path == folder.artifacts:
            yield from (file for file in sorted(path.iterdir()) if file.name not in artifacts)
        elif path in front:
            yield from _list_rounds(path)
        elif RunFolder(path).spec_file.is_file():
            yield from _list_beside_results(path)
        elif not path.name.startswith(folder.database.name) and path.name not in _KEPT:
            yield path


def _list_rounds(run: Path) -> list[Path]:
    return [
        path for path in (RunFolder(run).rounds, *RunFolder(run).list_copies_of_rounds()) if path.exists()
    ]


def _list_beside_results(run: Path) -> Iterator[Path]:
    for path in sorted(run.iterdir()):
        if RunFolder(path).spec_file.is_file():  # a replicate
            yield from _list_beside_results(path)
        elif not _RESULTS.fullmatch(path.name):
            yield path


def sum_sizes(paths: Iterable[Path]) -> int:
    """Of files, and of all in folders; links count for nothing."""
    files = (file for path in paths for file in ([path] if not path.is_dir() else path.rglob("*")))
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def remove_paths(paths: Iterable[Path]) -> None:
    """Files, and folders with all in them; of links the link."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
