"""Owns what is done again once all trials have ended: the front is measured over fresh draws, and fine-tuned
from other seeds."""

from __future__ import annotations

from memcontrol.core.console import LOG
from memcontrol.core.errors import FolderFull, MemControlError
from memcontrol.core.files import read_json
from memcontrol.core.jobs import ConfirmJob, GivenUp
from memcontrol.execution.job_queue import JobQueue
from memcontrol.search.folder_bound import FolderBound
from memcontrol.search.runs import TrialRuns
from memcontrol.study.pick import select_to_confirm
from memcontrol.study.record import Record
from memcontrol.study.replicates import select_to_replicate
from memcontrol.study.store import Study


def confirm_front(study: Study, runs: TrialRuns, jobs: JobQueue) -> None:
    """Measures the trials on the front over fresh draws, until every one that is on it was: a search picks
    lucky ones."""
    while runs.config.rewards.confirm and (wanted := select_to_confirm(study.records(), study.limits)):
        _restore_dropped(wanted, runs, jobs)
        for event in jobs.run(_list_confirmations(wanted, runs)):
            if isinstance(event, GivenUp):
                raise MemControlError(f"{_name_trial(event)} could not be measured again: {event.reason}")
        for record in wanted:
            confirmed = read_json(runs.locate(record.chosen).confirmed_file)
            study.confirm(record.number, confirmed["rewards"])


def _restore_dropped(wanted: list[Record], runs: TrialRuns, jobs: JobQueue) -> None:
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
        if isinstance(event, GivenUp):
            raise MemControlError(f"{_name_trial(event)} could not be fine-tuned again: {event.reason}")


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
    wanted = select_to_replicate(study.records(), n)
    todo = [
        runs.make_replicate_job(record.chosen, record.number, i)
        for record in wanted
        for i in range(n)
        if not runs.has_replicate(record.chosen, i)
    ]
    if todo and (reason := bound.explain_no_room(None, n=len(todo))):
        raise FolderFull(reason)
    for event in jobs.run(todo):
        if isinstance(event, GivenUp):
            raise MemControlError(f"{_name_trial(event)} could not be fine-tuned again: {event.reason}")
    for record in wanted:
        results = [runs.locate(record.chosen).replicate(i).read_result() for i in range(n)]
        study.replicate(
            record.number, [result["rewards"] for result in results if result["state"] == "COMPLETE"]
        )


def _name_trial(event: GivenUp) -> str:
    return f"trial {getattr(event.job, 'number', None)}"
