"""A study knows what it is about: whatever is edited between two searches of it, nothing is mixed."""

import contextlib
import copy
import json
import os
import sqlite3
from dataclasses import replace

import pytest
import yaml
from simulated import Simulated, search

from memcontrol.commands.fork import fork
from memcontrol.commands.status import status
from memcontrol.config.differing import FREE_KEYS, flatten_keys
from memcontrol.config.load import load_config
from memcontrol.config.study import Config
from memcontrol.core.errors import MemControlError
from memcontrol.core.jobs import TrialJob
from memcontrol.core.space_yaml import load_space
from memcontrol.study.place import StudyPlace
from memcontrol.study.store import Study

SPACE = {
    "groups": {
        "down": {"patterns": ["down.*to_q"], "methods": ["lora", "dora"], "rank": [2, 4], "alpha": 1.0},
        "up": "up.*to_q",
    },
    "always": [{"method": "norm", "patterns": "conv_norm_out"}],
    "methods": ["lora", "dora"],
    "mix": False,
    "learning_rate": {"lora": [1e-4, 1e-2], "dora": [1e-4, 1e-2], "full": [1e-5, 1e-3]},
    "rank": [2, 4],
    "alpha": 1.0,
}
STUDY: dict = {
    "name": "s",
    "data": "digits",
    "space": "mine.yaml",
    "inner": {"skip": {}, "redistribution": {}, "augmentation": {}, "ensemble": {"shards": 2}},
    "rewards": {"objectives": ["kid", "own.py:grey"], "confirm": 0, "extraction": {}},
    "search": {"trials": 3, "workers": 1, "sampler": "random", "early_stopping": {"rungs": [0.5]}},
}
OWN = "def grey(evidence):\n    return 1.0\n"
OTHER = {  # where a value cannot be changed by its kind alone
    "name": None,  # then it is another study
    "base": "other",
    "data.split": "one",
    "data.train": 0.3,
    "data.holdout": 0.3,
    "data.test": 0.3,
    "data.calibration": 0.1,
    "data.resolution": 64,
    "data.caption": "words",
    "data.group": "folder",
    "data.label": "caption",
    "data.max_pixels": 10**9,
    "data.path": None,  # the images may move
    "inner.budget_images": 5000,
    "inner.micro_batch_size": 8,
    "inner.ema": 0.9,
    "inner.min_snr": 5.0,
    "inner.norm_threshold": 3.0,
    "inner.stop_gap": 0.1,
    "inner.precision": "bfloat16",
    "inner.warmup": 0.1,
    "inner.caption_dropout": 0.2,
    "space": None,  # by its content, below
    "rewards.objectives": ["fid", "own.py:grey"],
    "rewards.limits": {"kid": 1.0},
    "rewards.extractor": "pixels",
    "rewards.clip": "openai/clip-vit-base-patch32",
    "rewards.guidance": 2.0,
    "search.stop_when_flat": 9,
    "search.warm_start": None,  # of a study that has begun nothing is read any more
    "search.time_limit_minutes": 5.0,
    "search.disk_gb": 9.0,
    "search.strengths": [0.5],
    "search.checkpoints": [0.5],
    "search.track": None,
    "search.train_fraction": 0.5,
    "search.anchors": ["none", "all"],
    "search.executor": "inline",
    "search.early_stopping.rungs": [0.25],
    "inner.rounds": 6,
    "inner.skip.bins": 10,
    "ray.gpus": 1.0,
    "slurm.memory_gb": 9,
    "ray.address": "auto",
    "slurm.partition": "x",
    "slurm.gres": "gpu:1",
    "slurm.account": "x",
    "storage": None,
}


def own_grey(choice):
    return {
        "kid": 1 + len(choice["groups"]),
        "grey": 2.0 - len(choice["groups"]),
        "fid": 3.0,
        "memorization": 0.1,
        "coverage": 0.5,
    }


def write_study(folder, study=STUDY, space=SPACE, own=OWN):
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text(yaml.safe_dump(space))
    (folder / "own.py").write_text(own)
    (folder / "s.yaml").write_text(yaml.safe_dump(study))
    return folder / "s.yaml"


def run(file):
    search(file, Simulated(rewards=own_grey)).close()


def read_rows(folder):
    """All that the database holds of trials."""
    with contextlib.closing(sqlite3.connect(folder / "runs" / "s" / "study.db")) as database:
        tables = ("studies", "trials", "trial_values", "trial_params", "trial_user_attributes")
        return {table: database.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables}


def list_keys():
    """Every key that a study file may have, where the study has each of its optional parts."""
    config = load_config({**STUDY, "space": "digits"})
    return sorted(key for key in flatten_keys(config.model_dump(mode="json")))


def select_keys():
    """Every fourth of those that have another value; all of them by night."""
    keys = [key for key in list_keys() if OTHER.get(key, "") is not None]
    return keys if "NIGHTLY" in os.environ else keys[::4]


def change(key, value):
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if isinstance(value, int) or value >= 1 else value / 2 + 0.05
    field = Config
    for name in key.split("."):
        annotation = field.model_fields[name].annotation
        field = next(
            (
                kind
                for kind in (annotation, *getattr(annotation, "__args__", ()))
                if hasattr(kind, "model_fields")
            ),
            annotation,
        )
    options = [option for option in getattr(field, "__args__", ()) if isinstance(option, str)]
    return next(option for option in options if option != value)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A study that has ended, and what its database holds."""
    folder = tmp_path_factory.mktemp("searched")
    run(write_study(folder))
    return folder, read_rows(folder)


@pytest.mark.parametrize("key", select_keys())
def test_a_key_that_is_edited_between_two_searches_mixes_nothing(key, searched):
    folder, before = searched
    study = copy.deepcopy(STUDY)
    place, *names = study, *key.split(".")
    value = flatten_keys(load_config({**STUDY, "space": "digits"}).model_dump(mode="json"))[key]
    for name in names[:-1]:
        inner = place.get(name, {})
        place[name] = {"path": inner} if isinstance(inner, str) else dict(inner)
        place = place[name]
    place[names[-1]] = change(key, value)
    if key == "inner.low_memory_full":
        del study["inner"]["ensemble"], study["inner"]["redistribution"]  # which it does not go with
    file = write_study(folder, study)
    is_free = any(f"{key}.".startswith(f"{free}.") for free in FREE_KEYS)
    is_of_memory = key.removeprefix("inner.") in load_config(file).inner.memory_keys
    if is_free or is_of_memory:
        if key not in ("search.trials", "search.strengths", "search.checkpoints"):  # which begin trials
            run(file)
            assert read_rows(folder) == before
    else:
        with pytest.raises(MemControlError) as refused:
            run(file)
        assert key in str(refused.value) and "--name" in str(refused.value)
        assert read_rows(folder) == before
    write_study(folder)


def edits():
    """The space with one thing in it changed, by name."""
    places = [
        ("groups", "down", "patterns", ["down.*to_k"]),
        ("groups", "down", "methods", ["lora"]),
        ("groups", "down", "rank", [2]),
        ("groups", "down", "alpha", 2.0),
        ("groups", "up", "up.*to_k"),
        ("groups", "new", "mid.*to_q"),
        ("groups", {"down": SPACE["groups"]["down"]}),
        ("groups", {"down": SPACE["groups"]["down"], "renamed": "up.*to_q"}),
        ("always", []),
        ("always", [{"method": "norm", "patterns": "conv_norm_in"}]),
        ("mix", True),
        ("learning_rate", "lora", [1e-4, 1e-3]),
        ("learning_rate", "full", [1e-5, 1e-2]),
        ("rank", [2, 4, 8]),
        ("alpha", 0.5),
    ]
    for *path, last, value in places:
        space = copy.deepcopy(SPACE)
        place = space
        for name in path:
            place = place[name]
        place[last] = value
        yield pytest.param(space, id=".".join(map(str, (*path, last))))
    fewer = copy.deepcopy(SPACE)
    fewer["methods"], fewer["groups"]["down"]["methods"] = ["lora"], ["lora"]
    del fewer["learning_rate"]["dora"]
    yield pytest.param(fewer, id="methods")


@pytest.mark.parametrize("space", list(edits()))
def test_a_space_that_is_edited_between_two_searches_mixes_nothing(space, searched):
    folder, before = searched
    file = write_study(folder, space=space)
    with pytest.raises(MemControlError, match=r"space\..* there, .* here.*memcontrol fork"):
        run(file)
    assert read_rows(folder) == before
    shown = status(file)  # as it was searched, whatever the file holds now
    assert [record.state for record in shown] == ["COMPLETE"] * 6
    with contextlib.closing(StudyPlace.load(file).open()) as study:
        assert study.space.groups == load_space(str(write_study(folder).parent / "mine.yaml")).groups


def test_what_is_said_of_a_space_and_comments_in_it_may_change(searched):
    folder, before = searched
    file = write_study(folder, space={**SPACE, "description": "other words"})
    run(file)
    assert read_rows(folder) == before
    write_study(folder)


def test_an_own_reward_is_kept_to_once_a_trial_was_scored_by_it(searched, tmp_path):
    folder, before = searched
    file = write_study(folder, own=OWN + "\n# mended\n")
    with pytest.raises(MemControlError, match=r"own_rewards\.grey\.source \(.* there, .* here\)"):
        run(file)
    assert read_rows(folder) == before
    write_study(folder)

    file = write_study(tmp_path)
    with contextlib.suppress(KeyboardInterrupt):
        search(file, Interrupted())
    write_study(tmp_path, own=OWN + "\n# mended before any trial has ended\n")
    run(file)
    assert len(status(file)) == 6


class Interrupted(Simulated):
    """Ctrl-C as the n-th run begins."""

    def __init__(self, n=1):
        super().__init__(rewards=own_grey)
        self.n = n

    def submit(self, job):
        if isinstance(job, TrialJob) and self.n_ended == self.n - 1:
            raise KeyboardInterrupt
        super().submit(job)


SHARED = {"storage": "sqlite:///../one.db"}


def with_images(folder, digests):
    """A study's folder after its search, whose split.json a simulated preparation does not write."""
    place = folder / "runs" / "s"
    place.mkdir(parents=True, exist_ok=True)
    rows = [{"name": f"{digest}.png", "caption": "", "digest": digest} for digest in digests]
    split = {"source": str(folder / "images"), "resolution": 32, "parts": {"train": rows}}
    (place / "split.json").write_text(json.dumps(split))


@pytest.mark.parametrize("path", ["images", "other"])
def test_a_study_of_others_images_is_never_searched_or_shown(path, tmp_path):
    """Two people, one database, one name."""
    for name, digests, source in (("alice", "ab", "images"), ("bob", "cd", path)):
        (tmp_path / name / source).mkdir(parents=True)
        (tmp_path / name / source / "1.png").write_bytes(digests.encode())  # of one name and size
    files = [
        write_study(tmp_path / name, {**STUDY, **SHARED, "data": source})
        for name, source in (("alice", "images"), ("bob", path))
    ]
    with_images(tmp_path / "alice", "ab")
    run(files[0])
    assert len(status(files[0])) == 6
    with pytest.raises(MemControlError, match="about other images .*--name"):
        status(files[1])  # before he has searched: nothing of his is known but the file
    with_images(tmp_path / "bob", "cd")
    for look in (run, status):
        with pytest.raises(MemControlError, match="data.train .*2 images"):
            look(files[1])
    (tmp_path / "bob" / "runs").rename(tmp_path / "bob" / "gone")
    (tmp_path / "carol").mkdir()  # another machine that has neither images nor runs may look
    assert len(status(write_study(tmp_path / "carol", {**STUDY, **SHARED, "data": "images"}))) == 6


def test_a_fork_takes_over_what_stays_valid(searched, tmp_path):
    """An edited group leaves the trials without it; what is new is searched on."""
    file = write_study(tmp_path)
    run(file)
    old = {record.number: record for record in status(file)}
    space = copy.deepcopy(SPACE)
    space["groups"]["up"] = "up.*to_k"
    write_study(tmp_path, space=space)
    made = fork(file, "forked")
    stay = {n for n, record in old.items() if all("up" not in choice.groups for choice in record.candidates)}
    assert set(made.taken) == stay and set(made.left) == set(old) - stay and {0, 2} <= stay
    assert all("'up'" in reason for reason in made.left.values())
    run(made.file)
    new = {record.number: record for record in status(made.file)}
    for number, there in made.taken.items():
        assert (new[there].values, new[there].choice) == (old[number].values, old[number].choice)
    assert len(new) == 6 and all(record.state == "COMPLETE" for record in new.values())
    assert len(status(made.file)) == 6 and [record.values for record in old.values()] == [
        record.values for record in status_of_before(tmp_path)
    ]


def status_of_before(folder):
    return status(write_study(folder))


def test_a_fork_under_other_keys_takes_over_nothing_and_says_why(tmp_path):
    file = write_study(tmp_path)
    run(file)
    write_study(tmp_path, {**STUDY, "inner": {"batch_size": 8}})
    made = fork(file, "smaller")
    assert not made.taken and all("inner.batch_size" in reason for reason in made.left.values())
    run(made.file)
    with pytest.raises(MemControlError, match="exists; give another name"):
        fork(file, "smaller")


def test_another_name_is_another_study(tmp_path):
    file = write_study(tmp_path)
    run(file)
    write_study(tmp_path, {**STUDY, "inner": {"batch_size": 8}})
    place = StudyPlace.load(file, name="other")
    assert place.folder.path == tmp_path / "runs" / "other" and not place.is_searched()


@pytest.mark.parametrize("n_written", [0, 1, 2])
def test_a_study_is_made_whole_or_not_at_all(n_written, tmp_path, monkeypatch):
    """Whoever dies while it is made leaves nothing that is in the way."""
    from optuna.storages._rdb import models

    file, made = write_study(tmp_path), []
    begin = models.StudySystemAttributeModel.__init__

    def die(self, **values):
        if len(made) == n_written:
            raise KeyboardInterrupt
        made.append(values["key"])
        begin(self, **values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models.StudySystemAttributeModel, "__init__", die)
        run(file)
    with pytest.raises(MemControlError, match="has not been searched yet"):
        status(file)
    run(file)
    assert len(status(file)) == 6


def test_a_fork_for_other_objectives_has_their_directions(tmp_path):
    file = write_study(tmp_path)
    run(file)
    for other, n_taken in (("recall", 0), ("coverage", 6)):
        rewards = {**STUDY["rewards"], "objectives": ["kid", other]}
        write_study(tmp_path, {**STUDY, "rewards": rewards})
        made = fork(file, other)
        assert len(made.taken) == n_taken
        assert all("recall was not measured" in reason for reason in made.left.values())
    with contextlib.closing(StudyPlace.load(made.file).open()) as study:
        assert study.objectives == {"kid": "minimize", "coverage": "maximize"}


def test_a_fork_that_was_killed_is_taken_up_again(tmp_path, monkeypatch):
    file, finish = write_study(tmp_path), Study.finish
    run(file)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def die(self, number, results):
            if number == 3:
                raise KeyboardInterrupt
            return finish(self, number, results)

        patch.setattr(Study, "finish", die)
        fork(file, "forked")
    made = fork(file, "forked")
    assert len(made.taken) == 6
    run(made.file)
    found = [record.values for record in status(made.file) if record.finished]
    assert sorted(map(str, found)) == sorted(str(record.values) for record in status(file))


class Turned(Simulated):
    """Whose rewards say that more is better."""

    def ended(self, begun, end, job):
        event = super().ended(begun, end, job)
        is_prepared = getattr(event, "directions", None)
        return replace(event, directions=["minimize", "maximize"]) if is_prepared else event


def test_another_direction_is_refused(tmp_path):
    """Also while nothing is scored: the study's objectives have theirs."""
    file = write_study(tmp_path)
    with contextlib.suppress(KeyboardInterrupt):
        search(file, Interrupted())
    with pytest.raises(MemControlError, match=r"\(minimize, minimize there, minimize, maximize here"):
        search(file, Turned(rewards=own_grey))


def test_an_own_reward_counts_as_used_from_the_first_run_that_it_scored(tmp_path):
    """One of several that an anchor tries."""
    file = write_study(tmp_path)
    with contextlib.suppress(KeyboardInterrupt):
        search(file, Interrupted(3))
    write_study(tmp_path, own=OWN + "# edited\n")
    with pytest.raises(MemControlError, match=r"own_rewards\.grey\.source"):
        run(file)
