"""What a search drops of beaten trials, and the bound on its folder; trials are only simulated."""

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from commands import run
from simulated import Simulated, search
from test_orchestrate import Dead, dying

from memcontrol.core.choice import Choice
from memcontrol.core.errors import FolderFull, MemControlError
from memcontrol.core.files import write_json
from memcontrol.core.jobs import ConfirmJob, Done, TrialJob, Warned
from memcontrol.core.run_folder import RunFolder, locate_study_folder
from memcontrol.study.keeping import select_beaten, select_surely_beaten
from memcontrol.study.pareto import Limit
from memcontrol.study.pick import choose_trial, select_front, select_ties
from memcontrol.study.record import Record

GOALS = {"fid": "minimize", "memorization": "minimize"}
N_BYTES = 1000


class Saving(Simulated):
    """Trials that leave weights, samples and a picture. Measured again, FID is worse by `luck`."""

    def __init__(self, luck=0.0, n_bytes=N_BYTES, **keys):
        super().__init__(**keys)
        self.luck, self.n_bytes, self.trained = luck, n_bytes, []

    def ended(self, begun, end, job):
        run = RunFolder(job.folder)
        if isinstance(job, ConfirmJob):
            assert run.adapter_file.is_file(), "a model that is sampled again is there"
            rewards = run.read_result()["rewards"]
            write_json(run.confirmed_file, {"rewards": {**rewards, "fid": rewards["fid"] + self.luck}})
            return Done(job)
        event = super().ended(begun, end, job)
        if isinstance(job, TrialJob):
            self.trained.append(job.folder)
            for path in (run.adapter_file, run.samples_file):
                path.write_bytes(bytes(self.n_bytes // 2))
            run.samples_picture.write_bytes(b"png")
        return event


def study_in(folder, confirm=0, **keys):
    path = folder / "s.yaml"
    values = {"trials": 12, "workers": 1, "sampler": "random", **keys}
    rewards = {"confirm": confirm}
    path.write_text(
        yaml.safe_dump(
            {"name": "s", "data": "digits", "space": "digits", "rewards": rewards, "search": values}
        )
    )
    return path


def record(number, fid, memorization, error=0.0, state="COMPLETE", **keys):
    rewards = {"fid": fid, "memorization": memorization, "fid_error": error, "memorization_error": 0.0}
    choice = Choice(("mid_attention",), "lora", 1e-3 + number, 2)
    return Record(number, state, (choice,), choice=choice, objectives=GOALS, searched=rewards, **keys)


def list_numbers(records):
    return [record.number for record in records]


def test_surely_beaten_is_worse_than_one_other_in_everything_beyond_error():
    best = record(0, 10, 0.1, error=1.0)
    beyond = 2 * 2**0.5  # two standard errors of the difference
    trials = [
        best,
        record(1, 10 + 1.01 * beyond, 0.2, error=1.0),
        record(2, 10 + 0.99 * beyond, 0.2, error=1.0),
        record(3, 30, 0.1),  # as good in one
        record(4, 30, 0.2, anchor="full"),
        record(5, 30, 0.2, confirmed={"fid": 30, "memorization": 0.2}),
        record(6, 0, 0, state="PRUNED"),
        record(7, 0, 0, state="RUNNING"),
    ]
    assert list_numbers(select_surely_beaten(trials)) == [6, 1]
    # where the better one may break a limit that the other keeps, that one is no better
    wide, near, narrow = (Limit("fid", "<=", bound) for bound in (40.0, 11.9, 5.0))
    assert list_numbers(select_surely_beaten(trials, [wide])) == [6, 1]
    assert list_numbers(select_surely_beaten(trials, [narrow])) == [6, 1]  # which none keeps
    assert list_numbers(select_surely_beaten([best, record(1, 11.8, 0.2)], [near])) == []
    assert list_numbers(select_surely_beaten([])) == []


def test_at_the_end_front_ties_anchors_and_whatever_a_pick_takes_stay():
    trials = [
        record(0, 10, 0.2, error=1.0),
        record(1, 11, 0.2, error=1.0),  # off the front within error
        record(2, 30, 0.3),
        record(3, 31, 0.4, anchor="all"),
        record(4, 20, 0.15, confirmed={"fid": 32.0, "memorization": 0.4}),  # of those measured again the best
        record(5, 40, 0.19),  # the best that keeps the limit
        record(6, 0, 0, state="FAIL"),
    ]
    limit = [Limit("memorization", "<=", 0.19)]
    assert list_numbers(select_beaten(trials, limit)) == [2, 6]
    assert choose_trial(trials, wanted=limit).number == 4


def list_kept(records):
    return {record.number for record in records if RunFolder(record.run).adapter_file.is_file()}


def expect_kept(records):
    wanted = [*select_front(records), *select_ties(records), *(one for one in records if one.anchor)]
    return {record.number for record in wanted}


@pytest.mark.parametrize("keep", ["all", "front"])
def test_weights_and_samples_of_beaten_trials_go_and_results_and_pictures_stay(tmp_path, keep):
    file = study_in(tmp_path, keep=keep)
    study = search(file, Saving())
    records, folder = study.records(), locate_study_folder(file, "s")
    everything = {record.number for record in records}
    assert list_kept(records) == (expect_kept(records) if keep == "front" else everything)
    assert keep == "all" or expect_kept(records) < everything
    for choice in (choice for record in records for choice in record.candidates):
        run = RunFolder(folder / choice.key)
        assert run.is_complete and run.samples_picture.is_file()
        assert run.samples_file.is_file() == run.adapter_file.is_file() != run.dropped_file.is_file()
    lesser = [c.key for one in records if one.anchor for c in one.candidates if c != one.choice]
    assert len(lesser) == 4
    assert all(RunFolder(folder / key).adapter_file.is_file() == (keep == "all") for key in lesser)
    study.close()


def test_a_study_of_before_loses_what_is_beaten_when_it_is_told_to(tmp_path):
    study_in(tmp_path)
    search(tmp_path / "s.yaml", Saving()).close()
    again = Saving()
    study = search(study_in(tmp_path, keep="front"), again)
    assert list_kept(study.records()) == expect_kept(study.records()) and not again.trained
    study.close()


@pytest.mark.parametrize("at, when", [(1, "before"), (1, "after"), (2, "before"), (9, "after")])
def test_a_search_that_is_killed_while_it_drops_drops_the_rest_later(tmp_path, monkeypatch, at, when):
    file, unlink = study_in(tmp_path, keep="front"), Path.unlink
    dropping = dying(unlink, at, when)
    large = ("adapter.safetensors", "samples.safetensors")
    with monkeypatch.context() as patch, pytest.raises(Dead):
        patch.setattr(
            Path, "unlink", lambda path, **keys: (dropping if path.name in large else unlink)(path, **keys)
        )
        search(file, Saving())
    for path in locate_study_folder(file, "s").glob("*/spec.json"):
        run = RunFolder(path.parent)
        if run.has_result and run.is_complete:
            assert run.adapter_file.is_file() or run.dropped_file.is_file()
    study = search(file, Saving())
    assert list_kept(study.records()) == expect_kept(study.records())
    study.close()


def test_what_moves_up_after_all_is_fine_tuned_again_and_measured(tmp_path):
    """The first to be measured again come out far worse, so that all others move up."""
    executor = Saving(luck=100.0)
    study = search(study_in(tmp_path, keep="front", confirm=1), executor)
    records = study.records()
    assert all(record.confirmed for record in select_front(records))
    assert {record.number for record in select_front(records)} <= list_kept(records)
    assert len(executor.trained) > len({*executor.trained})
    assert not list_kept(records) & {record.number for record in select_beaten(records)}
    study.close()


def test_commands_that_need_what_was_dropped_say_so(tmp_path):
    file = study_in(tmp_path, keep="front")
    study = search(file, Saving())
    lost = next(record for record in study.records() if record.number not in list_kept(study.records()))
    study.close()
    said = f"since other trials beat trial {lost.number} (search.keep: front)"
    for command in (
        ("export", lost.run, tmp_path / "out"),
        ("audit", "--model", lost.run, "--out", tmp_path / "page"),
    ):
        refused = run(*command)
        assert refused.returncode == 1 and said in refused.stderr and len(refused.stderr.splitlines()) == 1
        assert f"memcontrol retrain STUDY.yaml --trial {lost.number}" in refused.stderr
    assert run("pick", file, "--trial", lost.number, check=True).stdout


def test_a_search_stops_before_it_exceeds_the_bound_and_goes_on_with_more_room(tmp_path):
    """Trials of 100 kB: 1 MB holds the seven runs of the anchors and a few more."""
    warned = []
    hear = lambda event: warned.append(event.text) if isinstance(event, Warned) else None  # noqa: E731
    file = study_in(tmp_path, disk_gb=0.001)
    with pytest.raises(FolderFull, match=r"exceed search.disk_gb, 0.001; make room there"):
        search(file, Saving(n_bytes=100_000, places=2, seconds=1.0), hear)
    folder = locate_study_folder(file, "s")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 0.8e6 < size < 1.1e6
    assert len([line for line in warned if "search.disk_gb allows" in line]) <= 1
    with pytest.raises(FolderFull):  # at once, and nothing is trained
        still = Saving(n_bytes=100_000)
        search(file, still)
    assert not still.trained
    more = study_in(tmp_path, disk_gb=0.01)
    study = search(more, Saving(n_bytes=100_000), hear)
    assert [record.state for record in study.records()] == ["COMPLETE"] * 15
    study.close()


def test_nine_tenths_of_the_bound_are_said_once(tmp_path):
    warned = []
    file = study_in(tmp_path, disk_gb=0.001)
    hear = lambda event: warned.append(event.text) if isinstance(event, Warned) else None  # noqa: E731
    with contextlib.suppress(FolderFull):
        search(file, Saving(n_bytes=45_000), hear)
    assert len([line for line in warned if "of the 0.001 that search.disk_gb allows" in line]) == 1


def test_the_command_ends_with_one_line_where_the_folder_is_full(tmp_path):
    from conftest import SMALL

    path = tmp_path / "full.yaml"
    search_keys = {**SMALL["search"], "trials": 1, "anchors": [], "disk_gb": 1e-6}
    path.write_text(yaml.safe_dump({"name": "full", **SMALL, "search": search_keys}))
    refused = run("search", path)
    assert refused.returncode == 1 and "search.disk_gb" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
    run("search", path, "search.disk_gb=1", check=True)
    assert json.loads(run("status", path, "--json", check=True).stdout)["trials"][0]["state"] == "COMPLETE"


def test_a_bound_is_a_positive_number():
    from memcontrol.config.load import load_config

    with pytest.raises(MemControlError, match="search.disk_gb"):
        load_config({"name": "s", "data": "digits", "search": {"disk_gb": 0}})
