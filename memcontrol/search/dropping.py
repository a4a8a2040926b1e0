"""Owns what a search drops where `search.keep` is `front`: weights and samples of fine-tunings that others
beat. Results and pictures stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from memcontrol.core.choice import Choice
from memcontrol.core.console import LOG
from memcontrol.core.files import write_json
from memcontrol.core.run_folder import RunFolder
from memcontrol.search.runs import TrialRuns
from memcontrol.study.keeping import select_beaten, select_surely_beaten
from memcontrol.study.record import Record
from memcontrol.study.store import Study


class Dropper:
    """Drops what no longer counts, each run once. A search that was killed in between does it when it goes
    on: what is beaten follows from the records alone."""

    def __init__(self, study: Study, runs: TrialRuns):
        self.study, self.runs = study, runs
        self.looked_at: set[RunFolder] = set()

    def drop_on_the_way(self) -> list[RunFolder]:
        """While trials run, only what is surely beaten. The runs that were changed."""
        return self.drop(select_surely_beaten)

    def drop_at_the_end(self) -> list[RunFolder]:
        """Once the front was measured again, also what was fine-tuned again for that."""
        self.looked_at.clear()
        return self.drop(select_beaten)

    def drop_checkpoints(self, ended: Choice) -> None:
        """Of a fine-tuning whose last variant has ended: each of these holds what it was measured on."""
        choice = ended.trained
        if ended.is_variant and all(
            self.runs.locate(variant).has_result for variant in self.runs.space.list_variants(choice)
        ):
            for path in self.runs.locate(choice).list_checkpoints():
                path.unlink(missing_ok=True)

    def drop(self, select) -> list[RunFolder]:
        if self.runs.config.search.keep == "all":
            return []
        records = self.study.records()
        beaten = [
            (record, run) for record in select(records, self.study.limits) for run in self.locate(record)
        ]
        beaten += self.list_lesser_rates(records)
        needed = self.find_needed(records)
        beaten = [(record, run) for record, run in beaten if run.path not in needed]
        new = [(record, run) for record, run in beaten if run not in self.looked_at]
        self.looked_at |= {run for _, run in new}
        return [run for record, run in new if drop_large_files(run, record)]

    def find_needed(self, records: Sequence[Record]) -> set[Path]:
        """Runs whose fine-tuning is still to be measured at other settings."""
        ended = {
            record.candidates[0] for record in records if record.is_variant and record.state != "RUNNING"
        }
        return {
            self.runs.locate(record.chosen).path
            for record in records
            if record.finished and not ended.issuperset(self.runs.space.list_variants(record.chosen))
        }

    def locate(self, record: Record) -> list[RunFolder]:
        return [self.runs.locate(choice) for choice in record.candidates]

    def list_lesser_rates(self, records: Sequence[Record]) -> Iterator[tuple[Record, RunFolder]]:
        """The runs of an anchor at other learning rates than the one that it stands at."""
        for record in records:
            if record.finished and record.anchor:
                own = self.runs.locate(record.chosen)
                yield from ((record, run) for run in self.locate(record) if run != own)


def drop_large_files(run: RunFolder, record: Record) -> bool:
    """Removes the weights and samples of a run and of its replicates, after a note of it. Whether there were
    any."""
    places = [run, *(RunFolder(path) for path in sorted(run.path.glob("replicate-*")))]
    n_bytes = 0
    for place in places:
        all_large = (place.adapter_file, place.samples_file, *place.list_checkpoints())
        large = [path for path in all_large if path.is_file()]
        if large:
            # first, so that whoever misses a file learns why
            write_json(place.dropped_file, {"trial": record.number, "files": [path.name for path in large]})
        for path in large:
            n_bytes += path.stat().st_size
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    if n_bytes:
        LOG.info(
            "trial %d, %s: beaten: its weights and samples are dropped, %.1f MiB (search.keep: front)",
            record.number,
            run.path.name,
            n_bytes / 2**20,
        )
    return n_bytes > 0
