"""The command line: every command has help and stands in docs/cli.md, --json is pure, mistakes end in one
line."""

import json
import re
from pathlib import Path

import pytest
import yaml
from commands import run

from memcontrol.cli.parser import make_parser
from memcontrol.core.errors import MemControlError
from memcontrol.trial.loaded import LoadedModels
from memcontrol.trial.prepare import prepare_study

DOCS = Path(__file__).parent.parent / "docs"


def refused(*args):
    done = run(*args)
    assert done.returncode in (1, 2) and done.stdout == "", done
    assert "Traceback" not in done.stderr
    return done.stderr


def commands():
    return next(action for action in make_parser()._actions if action.dest == "command").choices


def test_every_command_has_help_and_stands_in_its_page():
    text = (DOCS / "cli.md").read_text()
    for name, command in commands().items():
        assert command.description
        assert f"memcontrol {name}" in text, name
        for action in command._actions:
            assert action.help, (name, action.dest)


def test_the_page_on_study_files_names_every_key():
    from memcontrol.config.strict import Strict

    text = (DOCS / "study-file.md").read_text()
    for model in Strict.__subclasses__():
        for key in model.model_fields:
            assert re.search(rf"\b{key}\b", text), key


def test_dry_run_prints_the_resolved_config_and_makes_nothing(study_file):
    study = study_file()
    done = run("search", study, "inner.batch_size=8", "--trials", 5, "--workers", 1, "--dry-run")
    values = yaml.safe_load(done.stdout)
    assert (values["inner"]["batch_size"], values["search"]["trials"], values["base"]) == (8, 5, "tiny")
    assert (
        re.search(r"# predicted time: \d.* with 1 worker\(s\), 12 runs", done.stdout)
        and "# predicted memory of a worker: " in done.stdout
        and "# predicted disk: " in done.stdout
    )
    assert sorted(path.name for path in study.parent.iterdir()) == [study.name]


def test_a_dry_run_of_a_folder_leaves_what_it_read_and_encoded(study_file, photographs):
    photographs(48)
    keys = {"path": str(photographs(0)), "train": 16, "holdout": 16, "test": 16}
    study = study_file(data=keys)
    done = run("search", study, "--trials", 2, "--workers", 2, "--dry-run")
    assert "# predicted disk: " in done.stdout, done.stderr
    (folder,) = study.parent.glob("runs/*")
    assert [path.name for path in folder.iterdir()] == ["cache"]
    left = {path.name: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    kinds = {name.split("-")[0].split(".")[0] for name in left}
    assert kinds == {"images", "latents", "features"}
    run("search", study, "--trials", 2, "--workers", 2, "--dry-run", check=True)
    for path in (folder / "cache").glob("*.safetensors"):
        assert left[path.name] == path.stat().st_mtime_ns  # not made again


def test_a_dry_run_refuses_what_a_search_refuses(study_file):
    study = study_file()
    assert "rewards.n_samples is 64: fid over 64 features needs at least 256" in refused(
        "search", study, "rewards.force=false"
    )
    assert not list(study.parent.glob("runs/*/study.db"))
    done = run("search", study, "rewards.force=false", "--dry-run")
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1].startswith("memcontrol: rewards.n_samples is 64: fid")
        and "predicted" not in done.stdout
    )


@pytest.mark.slow
def test_spaces(tmp_path):
    listed = run("spaces", "list").stdout
    assert "digits" in listed and "sd15-sites" in listed
    assert yaml.safe_load(run("spaces", "show", "sd15-blocks").stdout)["groups"]
    checked = [
        line
        for line in run("spaces", "check", "sd15-sites", "--base", "tiny").stdout.splitlines()
        if not line.startswith(" ")
    ]
    assert (
        len(checked) == 16 + 3
        and "8 modules" in checked[0]
        and "parameters in all" in checked[16]
        and " 0.119 GFLOP" in checked[17]
    )
    derived = tmp_path / "derived.yaml"
    derived.write_text(run("spaces", "show", "auto", "--base", "tiny").stdout)
    found = json.loads(run("spaces", "check", derived, "--base", "tiny", "--json").stdout)
    assert [group["name"] for group in found["groups"]] == [
        "down_0",
        "down_1",
        "down_2",
        "down_3",
        "mid_block",
        "up_0",
        "up_1",
        "up_2",
        "up_3",
    ]
    assert found["methods"]["lora"]["all_off"] == 0 < found["methods"]["lora"]["all_on"] < found["total"]
    (tmp_path / "bad.yaml").write_text("groups: {a: nothing}\nlearning_rate: {lora: [1, 2], full: [1, 2]}\n")
    assert "pattern 'nothing' of group 'a' matches no" in refused("spaces", "check", tmp_path / "bad.yaml")
    assert "shipped are" in refused("spaces", "show", "none-such")


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"space": "none-such"}, "space 'none-such': no such file and not shipped"),
        ({"base": "./none-such"}, "base './none-such': no such folder"),
        ({"data": "./none-such"}, "no such folder"),
        ({"rewards": {"n_samples": 100}}, "needs at least 256"),
        ({"rewards": {"objectives": ["beauty"]}}, "'beauty' is unknown"),
        ({"rewards": {"extractor": "beauty"}}, "'beauty' is unknown; allowed: tiny, pixels"),
        ({"data": {"path": "digits", "train": 4, "holdout": 64, "test": 64}}, "train has 4 images"),
        (
            {"data": {"path": "digits", "train": 64, "holdout": 64, "test": 64, "resolution": 20}},
            "multiple of",
        ),
    ],
)
def test_a_study_that_cannot_work_is_refused_in_preparation(base, study_file, keys, words):
    study, loaded = study_file(**keys), LoadedModels()
    loaded.kept["base", "tiny", None] = base
    with pytest.raises(MemControlError) as caught:
        prepare_study(yaml.safe_load(study.read_text()), study.parent / "runs", loaded, lambda line: None)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"colour": 1}, "unknown key 'colour'; allowed: name"),
        ({"space": "none-such"}, "space 'none-such': no such file and not shipped"),
        ({"data": "./none-such"}, "no such folder"),
    ],
)
def test_a_refused_study_is_one_line_and_makes_nothing(study_file, keys, words):
    study = study_file(**keys)
    message = refused("search", study)
    assert words in message
    assert len([line for line in message.splitlines() if line.startswith("memcontrol: ")]) == 1
    assert not list(study.parent.rglob("*.db"))


def test_data_that_changed_since_the_study_began_is_refused(base, study_file, photographs):
    photographs(40)
    study, loaded = (
        study_file(data={"path": str(photographs(0)), "train": 16, "holdout": 12, "test": 12}),
        LoadedModels(),
    )
    loaded.kept["base", "tiny", None] = base
    values = yaml.safe_load(study.read_text())
    for _ in range(2):
        assert prepare_study(values, study.parent / "runs", loaded, lambda line: None)["sizes"] == {
            "train": 16,
            "holdout": 12,
            "test": 12,
        }
    folder = photographs(0)
    (folder / "007.txt").write_text("a caption")
    with pytest.raises(
        MemControlError,
        match="the captions .the first that differs: '007.png'. are not those that study 'small'",
    ):
        prepare_study(values, study.parent / "runs", loaded, lambda line: None)
    (folder / "007.txt").unlink()
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes())
    with pytest.raises(MemControlError, match="the images .* are not those that study 'small' began with"):
        prepare_study(values, study.parent / "runs", loaded, lambda line: None)


def test_commands_before_the_search_say_what_to_run(study_file):
    study = study_file()
    for command in ("status", "front", "pick", "retrain"):
        assert "has not been searched yet; run: memcontrol search" in refused(command, study)
    assert "no run folder" in refused("export", study.parent, study.parent / "out")
    assert "no such file" in refused("front", study.parent / "missing.yaml")
    assert "is a folder; give the study file" in refused("status", study.parent)
    nowhere = refused("search", study, "--executor", "ray", "ray.address=127.0.0.1:1")
    assert "ray.address is 127.0.0.1:1" in nowhere and "start a cluster with" in nowhere
    refused("search", study, "--trials", "-1")
