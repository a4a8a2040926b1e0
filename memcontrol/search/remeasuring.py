"""Owns what is done again once all trials have ended: the front is measured over fresh draws, and fine-tuned
from other seeds."""

from __future__ import annotations

from collections.abc import Callable, Collection

from memcontrol.core.console import LOG
from memcontrol.core.errors import FolderFull
from memcontrol.core.files import read_json
from memcontrol.core.jobs import ConfirmJob, GivenUp, TrialJob
from memcontrol.execution.job_queue import JobQueue
from memcontrol.search.folder_bound import FolderBound
from memcontrol.search.runs import TrialRuns
from memcontrol.study.pick import select_to_confirm
from memcontrol.study.record import Record
from memcontrol.study.replicates import select_to_replicate
from memcontrol.study.store import Study


def confirm_front(study: Study, runs: TrialRuns, jobs: JobQueue) -> None:
    """Measures the trials on the front over fresh draws, until every one that is on it was, or cannot be: a
    search picks lucky ones."""
    left_out: set[int] = set()

    def leave_out(number: int, reason: str) -> None:
        left_out.add(number)
        study.say(f"trial {number} cannot be measured again, and counts as it was searched: {reason}")

    while wanted := _select_wanted(study, runs, left_out):
        for record in wanted:
            if not runs.locate(record.chosen).has_result:
                leave_out(record.number, f"{record.run} is not here")
        here = [record for record in wanted if record.number not in left_out]
        _restore_dropped(here, runs, jobs, leave_out)
        here = [record for record in here if record.number not in left_out]
        for event in jobs.run(_list_confirmations(here, runs)):
            if isinstance(event, GivenUp) and isinstance(event.job, ConfirmJob):
                leave_out(event.job.number, event.reason)
        for record in here:
            if record.number not in left_out:
                confirmed = read_json(runs.locate(record.chosen).confirmed_file)
                study.confirm(record.number, confirmed["rewards"])


def _select_wanted(study: Study, runs: TrialRuns, left_out: Collection[int]) -> list[Record]:
    if not runs.config.rewards.confirm:
        return []
    wanted = select_to_confirm(study.records(), study.limits)
    return [record for record in wanted if record.number not in left_out]


def _restore_dropped(
    wanted: list[Record], runs: TrialRuns, jobs: JobQueue, leave_out: Callable[[int, str], None]
) -> None:
    """Fine-tunes again what was dropped as surely beaten and is on the front after all, since others came out
    worse when they were measured again."""
    lost = [
        record
        for record in wanted
        if runs.locate(record.chosen).is_dropped(runs.locate(record.chosen).adapter_file)
        and not runs.locate(record.chosen).confirmed_file.exists()
    ]
    for record in lost:
        LOG.warning(
            "trial %d is on the front after all, and fine-tuned again: its weights were dropped "
            "(search.keep: front)",
            record.number,
        )
    for event in jobs.run([runs.make_job(record.chosen, record.number, None) for record in lost]):
        if isinstance(event, GivenUp) and isinstance(event.job, TrialJob):
            assert event.job.number is not None, "it is a trial's"
            leave_out(event.job.number, event.reason)


def _list_confirmations(wanted: list[Record], runs: TrialRuns) -> list[ConfirmJob]:
    """Less those that are there from before an interruption."""
    places = {record.number: runs.locate(record.chosen) for record in wanted}
    return [
        ConfirmJob(places[record.number].path, record.chosen, record.number)
        for record in wanted
        if not places[record.number].confirmed_file.exists()
    ]


def replicate_front(study: Study, runs: TrialRuns, jobs: JobQueue, bound: FolderBound) -> None:
    """Fine-tunes the trials on the front, and full fine-tuning, again from other seeds, as often as
    search.replicates says: how much of a reward is the choice's own, and how much luck. Raises FolderFull."""
    n = runs.config.search.replicates
    wanted = [
        record
        for record in select_to_replicate(study.records(), n)
        if runs.locate(record.chosen).has_result  # its folder may be gone
    ]
    # what variants are measured on comes first, so that it is trained once
    trained = [(record.chosen.trained, record.number) for record in wanted if record.chosen.is_variant]
    for choices in (dict(trained), {record.chosen: record.number for record in wanted}):
        todo = [
            runs.make_replicate_job(choice, number, i)
            for choice, number in choices.items()
            for i in range(n)
            if not runs.has_replicate(choice, i)
        ]
        if todo and (reason := bound.explain_no_room(None, n=len(todo))):
            raise FolderFull(reason)
        for event in jobs.run(todo):
            if isinstance(event, GivenUp):
                number = getattr(event.job, "number", None)
                study.say(f"trial {number} could not be fine-tuned again from another seed: {event.reason}")
    for record in wanted:
        places = [runs.locate(record.chosen).replicate(i) for i in range(n)]
        results = [place.read_result() for place in places if place.has_result]
        study.replicate(
            record.number, [result["rewards"] for result in results if result["state"] == "COMPLETE"]
        )
