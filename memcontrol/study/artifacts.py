"""Owns a study's artifacts: the pictures of its runs, as optuna-dashboard shows them beside a trial."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import shutil
import uuid
from pathlib import Path
from typing import BinaryIO

from optuna.artifacts import ArtifactMeta, FileSystemArtifactStore
from optuna.storages import BaseStorage

from memcontrol.core.files import replace_file, write_text
from memcontrol.core.run_folder import RunFolder, StudyFolder
from memcontrol.study.optuna_private import record_artifact


def attach_pictures(storage: BaseStorage, trial_id: int, run: RunFolder, folder: Path) -> None:
    """Copies the run's pictures to the study's artifacts and names them in the trial, which is still running.
    Done again, it changes nothing: optuna.artifacts.upload_artifact would draw a new name each time, and
    names the file before it is there."""
    for picture in (run.samples_picture, run.pairs_picture):
        if picture.is_file():
            artifact_id = name_artifact(folder, run, picture)
            with replace_file(StudyFolder(folder).artifacts / artifact_id) as part:
                shutil.copyfile(picture, part)
            record_artifact(storage, trial_id, ArtifactMeta(artifact_id, picture.name, "image/png", None))


def name_artifact(folder: Path, run: RunFolder, picture: Path) -> str:
    """The same each time, and for nobody to guess who does not know the study's secret: whoever has an id is
    shown the picture."""
    about = f"{run.path.name}/{picture.name}".encode()
    return str(uuid.UUID(bytes=hmac.digest(_take_secret(folder), about, hashlib.sha256)[:16], version=4))


def _take_secret(folder: Path) -> bytes:
    """The study's own, drawn when it is first asked for."""
    path = StudyFolder(folder).secret_file
    if not path.is_file():
        write_text(path, secrets.token_hex(32))
    return path.read_bytes()


class ReadOnlyStore:
    """What a dashboard that may only look is given: deleting a study would begin with its artifacts."""

    def __init__(self, folder: Path):
        self.store = FileSystemArtifactStore(StudyFolder(folder).artifacts)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        return self.store.open_reader(artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        raise PermissionError("this dashboard is read-only")

    def remove(self, artifact_id: str) -> None:
        raise PermissionError("this dashboard is read-only")
