"""Owns the bound on a study's folder: how large it is, and whether a further trial still finds room."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from memcontrol.core.run_folder import RunFolder, StudyFolder

_GB = 1e9
_NEARLY = 0.9  # of the bound: where a person is told


class FolderBound:
    """Sizes as the search sees them: a run that ended is measured once, what lies beside runs and what is in
    flight each time."""

    def __init__(self, folder: StudyFolder, bound_gb: float | None):
        self.folder, self.bound_gb = folder, bound_gb
        self.ended: dict[Path, int] = {}
        self.largest: dict[str, int] = {}  # bytes of a run, by its choice's method

    def forget(self, run: RunFolder) -> None:
        """The run has changed, and is measured again."""
        self.ended.pop(run.path, None)

    def explain_no_room(self, method: str | None, in_flight: Collection[Path] = (), n: int = 1) -> str:
        """Why n further runs of a method (None: any that is sampled), beside those in flight, find no room;
        empty where they do."""
        if self.bound_gb is None:
            return ""
        sizes = self.measure(in_flight)
        one = self.expect(method)
        now = sum(sizes.values())
        then = now + n * one + sum(max(0, one - size) for path, size in sizes.items() if path in in_flight)
        if then <= self.bound_gb * _GB:
            return ""
        return (
            f"the study's folder, {self.folder.path}, holds {now / _GB:.3g} GB, and {n} more run(s) of about "
            f"{one / _GB:.3g} GB exceed search.disk_gb, {self.bound_gb:g}; make room there "
            "(search.keep=front drops what is beaten) or raise it, and the same command goes on"
        )

    def describe_nearly_full(self, in_flight: Collection[Path] = ()) -> str:
        """Empty below nine tenths of the bound."""
        if self.bound_gb is None:
            return ""
        now = sum(self.measure(in_flight).values()) / _GB
        if now < _NEARLY * self.bound_gb:
            return ""
        return (
            f"the study's folder, {self.folder.path}, holds {now:.3g} GB of the {self.bound_gb:g} that "
            "search.disk_gb allows; no trial begins that would exceed it"
        )

    def expect(self, method: str | None) -> int:
        """The largest of the method, else of all, or for a sampled one of all but full fine-tuning."""
        others = {name: size for name, size in self.largest.items() if method or name != "full"}
        return self.largest.get(method or "", max((others or self.largest).values(), default=0))

    def measure(self, in_flight: Collection[Path]) -> dict[Path, int]:
        """Bytes of each entry of the folder."""
        if not self.folder.path.is_dir():
            return {}
        entries = [Path(entry.path) for entry in os.scandir(self.folder.path)]
        return {path: self.measure_entry(path, path in in_flight) for path in entries}

    def measure_entry(self, path: Path, is_in_flight: bool) -> int:
        if path in self.ended:
            return self.ended[path]
        n_bytes, run = measure_bytes(path), RunFolder(path)
        if not is_in_flight and run.has_result:
            self.ended[path] = n_bytes
            method = run.read_result()["choice"]["method"]
            self.largest[method] = max(n_bytes, self.largest.get(method, 0))
        return n_bytes


def measure_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder; what is removed meanwhile counts for nothing."""
    try:
        if path.is_dir():
            return sum(measure_bytes(Path(entry.path)) for entry in os.scandir(path))
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
