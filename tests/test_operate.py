"""An operator's hand on a study, on SQLite and PostgreSQL: while a search runs, is killed, begun again."""

import contextlib
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pytest
import yaml
from commands import FORKS, run, started
from simulated import Simulated, search
from test_foreign import Between
from test_orchestrate import N_SAMPLED, study_in

import memcontrol
from memcontrol.core.choice import Choice
from memcontrol.core.errors import MemControlError, SearchEnded
from memcontrol.core.jobs import PrepareJob
from memcontrol.core.space import Coordinate, make_range
from memcontrol.core.space_yaml import load_space
from memcontrol.execution.local import Local
from memcontrol.execution.ray_cluster import Place, Ray
from memcontrol.search import operating
from memcontrol.search.observer import Observer
from memcontrol.search.orchestrator import search_study
from memcontrol.study.foreign import settle_choice
from memcontrol.study.place import StudyPlace
from memcontrol.view.words import describe_choice

SPACE = load_space("digits")
GROUPS = list(SPACE.groups)[:2]
RATE = 0.00123456789
NAMES = iter(range(1000))


@pytest.fixture(params=["sqlite", "postgresql"])
def file(request, tmp_path):
    """A study file."""
    path = study_in(tmp_path)
    if request.param == "postgresql":
        values = yaml.safe_load(path.read_text())
        values |= {"name": f"s{next(NAMES)}", "storage": request.getfixturevalue("postgres").url}
        path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(operating, "LOOK_SECONDS", 0.0)


def search_slowly(file, seconds, hours=None):
    """In a process of its own: trials that take their time, on two places."""
    operating.LOOK_SECONDS = 0.05
    place = StudyPlace.load(file)
    with contextlib.suppress(SearchEnded):
        search_study(place, Simulated(2, seconds, clock=time), Observer(), hours)


@contextlib.contextmanager
def searching(file, seconds=0.15, n_ended=3):
    """A process that searches, once so many trials have ended; killed when the block is left."""
    process = FORKS.Process(target=search_slowly, args=(file, seconds))
    process.start()
    try:
        await_that(lambda: sum(record.finished for record in look(file)) >= n_ended)
        yield process
    finally:
        process.kill()
        process.join()


def look(file):
    with contextlib.suppress(MemControlError):
        return memcontrol.status(file)
    return []


def await_that(is_so, seconds=30):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def go_on(file, executor=None):
    """The same search, to its end."""
    said = []
    search(file, executor or Simulated(2), lambda event: said.append(getattr(event, "text", ""))).close()
    return "\n".join(said)


def assert_complete(file, n_more=0):
    """Every choice has one record, and as many were sampled as were asked for, and at most `n_more`."""
    records = memcontrol.status(file)
    keys = [choice.key for record in records for choice in record.candidates]
    assert len(set(keys)) == len(keys)
    assert {record.state for record in records} <= {"COMPLETE", "DROPPED"}
    assert N_SAMPLED <= sum(record.fills_place for record in records) <= N_SAMPLED + n_more
    return {record.number: record for record in records}


class TestContract:
    def test_a_choice_of_ones_own_is_tried_whoever_is_killed(self, file):
        with searching(file) as process:
            first = memcontrol.enqueue(file, groups=GROUPS, method="lora", rank=4, learning_rate=RATE)
            await_that(lambda: memcontrol.status(file)[first].finished)
            (again,) = [record for record in memcontrol.status(file) if record.number == first]
            with pytest.raises(MemControlError, match=rf"trial {first} has it already \(finished\)"):
                memcontrol.enqueue(file, again.choice)
            second = memcontrol.enqueue(file, {**again.choice.as_dict(), "learning_rate": 2 * RATE})
            process.kill()
        go_on(file)
        found = assert_complete(file, n_more=2)  # where all had been sampled by then
        assert found[first].choice.learning_rate == RATE and found[first].choice.groups == tuple(GROUPS)
        assert found[second].choice.learning_rate == 2 * RATE

    def test_it_is_enqueued_before_any_search_and_after_one(self, file):
        early = memcontrol.enqueue(file, groups=GROUPS[:1], learning_rate=RATE)
        asked = [(one.number, one.state, one.origin) for one in memcontrol.status(file)]
        assert asked == [(early, "WAITING", "enqueued")]
        go_on(file)
        assert assert_complete(file)[early].choice.learning_rate == RATE
        late = memcontrol.enqueue(file, groups=GROUPS, learning_rate=RATE)
        withdrawn = memcontrol.enqueue(file, groups=GROUPS, learning_rate=2 * RATE)
        memcontrol.drop(file, withdrawn, "a typing error")
        go_on(file)
        found = assert_complete(file, n_more=1)
        assert found[late].finished and found[withdrawn].state == "DROPPED" and not found[withdrawn].begun
        asked = {number for number, record in found.items() if record.origin == "enqueued"}
        assert asked == {early, late, withdrawn} and found[late].is_sampled

    def test_a_dropped_trial_counts_for_nothing_and_another_is_sampled(self, file):
        with searching(file) as process:
            best = memcontrol.front(file)[0].number
            memcontrol.drop(file, best, "its images were wrong")
            process.kill()
        go_on(file)
        found = assert_complete(file)
        assert found[best].state == "DROPPED" and found[best].dropped == "its images were wrong"
        assert found[best].searched and best not in [one.number for one in memcontrol.front(file)]
        with pytest.raises(MemControlError, match=f"trial {best} was dropped: its images were wrong"):
            memcontrol.pick(file, trial=best)
        assert memcontrol.pick(file).number != best
        place = StudyPlace.load(file)
        plain = optuna.load_study(study_name=place.config.name, storage=place.url)
        assert best not in [one.number for one in plain.best_trials]
        assert plain.trials[best].user_attrs["dropped"] == "its images were wrong"
        memcontrol.drop(file, best, undo=True)
        assert best in [one.number for one in memcontrol.front(file)]
        with pytest.raises(MemControlError, match="was not dropped"):
            memcontrol.drop(file, best, undo=True)

    def test_a_running_search_heeds_what_is_asked_for(self, file):
        dropped, enqueued = [], []

        def act(job):
            dropped.append(memcontrol.front(file)[0].number)
            memcontrol.drop(file, dropped[0], "no good")
            enqueued.append(memcontrol.enqueue(file, groups=GROUPS, learning_rate=RATE))

        said = go_on(file, Between(9, act))
        assert f"trial {dropped[0]} counts for nothing from now on (memcontrol drop): no good" in said
        found = assert_complete(file)  # the enqueued one counts as one of search.trials
        assert found[dropped[0]].state == "DROPPED" and found[enqueued[0]].choice.learning_rate == RATE

    @pytest.mark.parametrize("now", [False, True])
    def test_a_search_is_stopped_from_elsewhere_and_goes_on(self, file, now):
        with pytest.raises(MemControlError, match="has not been searched|holds no study|no search of study"):
            memcontrol.stop(file)
        with searching(file, seconds=1.0, n_ended=1) as process:
            memcontrol.stop(file, now=now)
            process.join(20)
            assert process.exitcode == 0
        runs = StudyPlace.load(file).folder.list_runs()
        assert all(run.has_result for run in runs) != now
        records = memcontrol.status(file)
        assert sum(record.fills_place for record in records) < N_SAMPLED
        n = sum(record.finished for record in records)
        with searching(file, n_ended=n + 1) as process:  # it was for the one before
            process.kill()
        go_on(file)
        assert_complete(file)

    def test_a_search_ends_in_time_and_begins_nothing_that_would_not_end(self, file, monkeypatch):
        clock = Simulated(2, 100.0)
        monkeypatch.setattr(operating, "time", clock.clock)
        with pytest.raises(SearchEnded, match="its time is over"):
            search_study(StudyPlace.load(file), clock, Observer(), hours=0.15)
        assert clock.clock.now - 1000 < 0.15 * 3600
        records = memcontrol.status(file)
        assert all(record.state == "COMPLETE" or record.anchor for record in records)
        go_on(file)
        assert_complete(file)

    def test_the_number_of_workers_is_handed_to_the_search_that_runs(self, file):
        asked = []

        def act(job):
            asked.append(executor.places)
            memcontrol.search(file, workers=4, quiet=True)
            with pytest.raises(MemControlError, match="another search is running"):  # with as many
                memcontrol.search(file, workers=4, executor="inline", quiet=True)
            with pytest.raises(MemControlError, match=r"inner\.batch_size .*--name"):  # another study's
                memcontrol.search(file, "inner.batch_size=3", workers=2, quiet=True)

        executor = Between(6, act)
        said = go_on(file, executor)
        assert executor.places == 4 and "the search goes on with 4 workers" in said
        assert_complete(file)
        executor = Between(1, lambda job: None)
        memcontrol.enqueue(file, groups=GROUPS, learning_rate=RATE)
        go_on(file, executor)
        assert executor.places == 1  # what was asked of an earlier search is past


def make(**values):
    return Choice.from_dict({"groups": GROUPS, "method": "lora", "rank": 4, "learning_rate": RATE, **values})


def test_a_choice_is_settled_as_the_space_writes_it():
    assert settle_choice(make(groups=GROUPS[::-1]), SPACE) == make()
    per_group = {GROUPS[0]: {"method": "lora", "learning_rate": RATE, "rank": 4}}
    assert settle_choice(make(per_group=per_group), SPACE) == make()
    drawn = SPACE.make_choice_at({**SPACE.find_point(make()), "rate": 0.3})
    assert settle_choice(drawn, SPACE) == drawn


@pytest.mark.parametrize(
    "values, words",
    [
        ({"groups": ["nothing"]}, "unknown group 'nothing'; space 'digits' has "),
        ({"groups": []}, "it has no group; space 'digits' has "),
        ({"groups": ["*"], "method": "full", "rank": None}, "is an anchor's"),
        ({"method": "svdiff", "rank": None}, "method 'svdiff' cannot train group '.*'; allowed: "),
        ({"rank": 3}, "rank 3 of group '.*' with lora; allowed: "),
        ({"learning_rate": 5.0}, "learning_rate is 5.0; of lora allowed: .* to "),
        (
            {"per_group": {GROUPS[0]: {"method": "lora", "learning_rate": 2 * RATE, "rank": 4}}},
            "groups differ in method or learning rate",
        ),
    ],
)
def test_a_choice_that_the_space_has_not_is_refused_in_one_line(values, words):
    with pytest.raises(MemControlError, match=words) as refused:
        settle_choice(make(**values), SPACE)
    assert "\n" not in str(refused.value)


def test_what_front_prints_is_enqueued_elsewhere(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(study_in(tmp_path / name))
    go_on(files[0])
    chosen = max(memcontrol.status(files[0]), key=lambda record: record.number)
    told = tmp_path / "choice.json"
    told.write_text(json.dumps([chosen.as_dict()]))
    said = run("enqueue", files[1], "--choice", told).stdout
    words = describe_choice(chosen.choice, len(SPACE.groups))
    assert f"trial 0 is enqueued: {words}; memcontrol search" in said
    go_on(files[1])
    assert memcontrol.status(files[1])[0].choice == chosen.choice
    again = run("enqueue", files[1], "--choice", told)
    assert again.returncode == 1 and "trial 0 has it already (finished)" in again.stderr
    told.write_text("[]")
    refused = run("enqueue", files[1], "--choice", told)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1


def test_commands_reach_a_real_search_and_its_workers(study_file):
    """With worker processes, which are begun and ended while it runs."""
    path = study_file(
        inner={"budget_images": 320, "batch_size": 16, "rounds": 4},
        search={"trials": 3, "workers": 1, "executor": "local"},
    )
    with started("search", path) as (process, said):
        await_that(lambda: any(record.finished for record in look(path)), 300)
        handed = run("search", path, "--workers", 2)
        assert handed.returncode == 0 and "goes on with 2 workers; nothing else is changed" in handed.stderr
        number = memcontrol.enqueue(path, groups=GROUPS, learning_rate=RATE)
        await_that(lambda: "goes on with 2 workers" in said[1].read_text(), 60)
        assert "the search is told to end" in run("stop", path, "--now", check=True).stdout
        process.join(60)
        assert (
            process.exitcode == 0 and "nothing is lost, and the same command goes on" in said[1].read_text()
        )
    assert any(record.state == "RUNNING" for record in memcontrol.status(path))
    in_time = run("search", path, "--hours", "0.003", check=True)
    assert "the search ended: its time is over (--hours 0.003)" in in_time.stderr
    run("search", path, check=True)
    records = memcontrol.status(path)
    assert {record.state for record in records} == {"COMPLETE"} and len(records) == 6
    assert records[number].choice.learning_rate == RATE


def test_settings_of_a_choice_are_held_against_what_is_searched_over():
    over = {
        "inner.budget_images": make_range(1000, 9000, True, 4),
        "inner.skip": Coordinate((None, "on"), usual=None),
    }
    space = replace(SPACE, over=over)
    key = "inner.budget_images"
    assert dict(settle_choice(make(settings={key: 1234}), space).settings)[key] == 1234
    assert dict(settle_choice(make(), space).settings) == {key: 1000, "inner.skip": None}
    for usual, taken in ((1500, 1500), (500, 1000)):  # the config's own; the range does not hold the second
        own = replace(space, over={**over, key: replace(over[key], usual=usual)})
        assert dict(settle_choice(make(), own).settings)[key] == taken
    plain = make(settings={key: 9000, "inner.skip": "on"})
    assert settle_choice(plain.with_settings({"strength": 0.5}), space) == plain
    for settings, words in (
        ({key: 10}, r"inner.budget_images is 10; allowed: 1000 to 9000"),
        ({"inner.skip": "off"}, "setting inner.skip is 'off'; allowed: None, on"),
        ({"inner.weight_decay": 0.1}, "unknown setting 'inner.weight_decay'; space"),
    ):
        with pytest.raises(MemControlError, match=words):
            settle_choice(make(settings=settings), space)


def test_what_was_measured_on_a_dropped_fine_tuning_is_dropped_with_it(tmp_path):
    file = study_in(tmp_path, strengths=[1, 0.5], trials=2)
    go_on(file)
    records = memcontrol.status(file)
    trained = next(record for record in records if record.is_sampled)
    (variant,) = [one for one in records if one.is_variant and one.chosen.trained == trained.chosen]
    said = run("drop", file, "--trial", trained.number, "--why", "no good", check=True).stdout
    assert f"with it what was measured on its fine-tuning, trials {variant.number}" in said
    assert memcontrol.status(file)[variant.number].dropped == "no good"
    go_on(file)  # another is sampled, and measured at both
    found = memcontrol.status(file)
    assert sum(record.fills_place for record in found) == 2 and len(found) == len(records) + 2
    memcontrol.drop(file, trained.number, undo=True)
    assert memcontrol.status(file)[variant.number].finished
    memcontrol.drop(file, variant.number, "only this one")
    assert memcontrol.status(file)[trained.number].finished
    memcontrol.drop(file, trained.number, "too")
    memcontrol.drop(file, trained.number, undo=True)
    assert memcontrol.status(file)[variant.number].dropped == "only this one"


def test_workers_are_begun_and_ended_and_who_has_a_job_keeps_it(tmp_path):
    job = PrepareJob(tmp_path, {})
    local = Local(1, folder=tmp_path)
    try:
        assert local.resize(3) and local.count_free() == 3
        assert [worker.index for worker in local.workers] == [0, 1, 2]
        busy, ended = local.workers[1], local.workers[2].process
        busy.job = job  # as if it had been given to it
        local.resize(1)
        assert local.workers == [busy] and local.count_free() == 0 and ended.poll() is not None
        local.resize(2)
        assert [worker.index for worker in local.workers] == [1, 0] and local.count_free() == 1
        local.resize(1)
        busy.job = None
        assert local.count_free() == 1 and local.workers == [busy]
    finally:
        local.close()


def test_actors_beyond_the_number_of_places_end_once_they_have_no_job(tmp_path):
    ended = []
    ray = Ray.__new__(Ray)
    ray.ray = SimpleNamespace(kill=ended.append)
    ray.n_places, ray.places = 2, [Place(actor="a", job=PrepareJob(tmp_path, {})), Place(actor="b")]
    assert ray.resize(4) and ray.count_free() == 3
    ray.resize(1)
    assert ended == ["b"] and ray.count_free() == 0
