"""memcontrol doctor: each line of it against a thing that is truly broken, and against what is well."""

import importlib.metadata
import json
import os
import re
import shutil
import socket
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import yaml
from commands import NEW_PROCESS, run
from conftest import SMALL
from postgres import PASSWORD

import memcontrol
from memcontrol.checks import downloads, fit, machine, packages, services
from memcontrol.checks.card import Card
from memcontrol.checks.finding import FAIL, OK, WARN, Finding, run_check
from memcontrol.cli.init import _print_finding
from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.model.cost import Cost
from memcontrol.study.place import StudyPlace

ARCHITECTURES = Path(__file__).parent / "architectures"


def place_study(folder, **keys):
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({"name": "study", **SMALL, **keys}))
    return StudyPlace.load(file)


def configure(**keys):
    return load_config({"name": "study", **SMALL, **keys})


def test_a_study_that_is_well_is_told_so_and_nothing_is_left(tmp_path, monkeypatch):
    file = place_study(tmp_path).file
    before = sorted(tmp_path.rglob("*"))
    done = run("doctor", file, "--json")
    found = {line["name"]: line for line in json.loads(done.stdout)}
    assert done.returncode == 0 and not [line for line in found.values() if line["state"] == FAIL]
    names = "python packages torch device study memory folder data base fit extractor hub database ray slurm"
    assert [*found] == names.split()
    assert "schema" not in found["database"]["text"] and "GiB" in found["fit"]["text"]
    assert sorted(tmp_path.rglob("*")) == before


def test_each_finding_is_a_line_and_a_cure_is_never_broken(tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    away = {"search": {"executor": "ray"}, "ray": {"address": "127.0.0.1:1"}}
    file = place_study(tmp_path, rewards={**SMALL["rewards"], "extractor": "dinov2"}, **away).file
    piped = run("doctor", file)
    lines = piped.stdout.splitlines()
    assert piped.returncode == 1 and piped.stdout.isascii() and "\x1b" not in piped.stdout
    assert "a search would fail: extractor, ray" in piped.stderr
    marked = [line for line in lines if line.split()[0] in (OK, WARN, FAIL)]
    cures = [line for line in lines if line.startswith("      cure:")]
    assert len(marked) + len(cures) == len(lines)
    assert any("hf download facebook/dinov2-base" in cure for cure in cures)


def test_lines_fit_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cure = "memcontrol search study.yaml " + "inner.micro_batch_size=1 " * 4 + "last"
    _print_finding(Finding("fit", FAIL, "much is said of it, " * 12, cure))
    *text, last = capsys.readouterr().out.splitlines()
    assert len(text) > 3 and max(map(len, text)) <= 80 and last.endswith(cure)


def test_the_machine_alone_is_looked_at_without_a_study():
    found = memcontrol.doctor()
    assert {one.name for one in found} >= {"python", "packages", "torch", "device", "memory", "folder", "fit"}
    assert "study" not in {one.name for one in found} and all(isinstance(one, Finding) for one in found)


def test_a_study_that_cannot_be_read_is_a_finding(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: bad\ndata: digits\nspase: digits\n")
    last = memcontrol.doctor(tmp_path / "bad.yaml")[-1]
    assert (last.name, last.state) == ("study", FAIL) and "spase" in last.text


def test_every_key_that_is_wrong_is_a_finding_with_its_cure_in_lines(tmp_path, capsys, monkeypatch):
    file = tmp_path / "bad.yaml"
    file.write_text("name: a b\ndata: {path: digits, batch_size: 4}\ninner: {rounds: 0}\n")
    found = [one for one in memcontrol.doctor(file) if one.name == "study"]
    assert [one.state for one in found] == [FAIL] * 3
    assert [re.search("key '([^']+)'", one.text)[1] for one in found] == [
        "name",
        "data.batch_size",
        "inner.rounds",
    ]
    assert found[1].cure.startswith("did you mean inner.batch_size? allowed: path, split")
    assert found[2].cure == "it should be greater than or equal to 1"
    monkeypatch.setenv("COLUMNS", "80")
    _print_finding(found[1])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 80


def hide_packages(monkeypatch, *names):
    """As if these had never been installed, to whoever asks for their metadata."""
    ask = importlib.metadata.MetadataPathFinder.find_distributions

    def find(context=None, *args):
        context = context or importlib.metadata.DistributionFinder.Context()
        return [one for one in ask(context) if one.metadata["Name"] not in names]

    monkeypatch.setattr(importlib.metadata.MetadataPathFinder, "find_distributions", find)


def write_package(folder, name, version, needs=()):
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    place.joinpath("METADATA").write_text(
        "\n".join([*lines, *(f"Requires-Dist: {one}" for one in needs), ""])
    )


def test_a_package_that_is_missing_is_named_with_its_range(monkeypatch):
    hide_packages(monkeypatch, "peft")
    found = packages.check_packages()
    assert found.state == FAIL and "peft is missing" in found.text
    assert found.cure.startswith("pip install 'peft") and ">=0.21" in found.cure


def test_a_package_that_is_too_old_is_named(monkeypatch, tmp_path):
    write_package(tmp_path, "diffusers", "0.30.0")
    monkeypatch.syspath_prepend(tmp_path)
    found = packages.check_packages()
    assert found.state == FAIL and "diffusers 0.30.0 (needed: " in found.text
    assert "diffusers<0.43" in found.cure


def test_what_another_package_says_of_versions_is_a_warning(monkeypatch, tmp_path):
    write_package(tmp_path, "rich", "99", ["numpy<1"])
    monkeypatch.syspath_prepend(tmp_path)
    found = packages.check_packages()
    assert found.state == WARN and "says rich" in found.text


def test_a_memcontrol_that_is_not_installed_is_a_warning(monkeypatch):
    hide_packages(monkeypatch, "memcontrol")
    assert packages.check_packages().state == WARN


def test_a_torchvision_of_another_torch_is_found_without_importing_it(monkeypatch, tmp_path):
    write_package(tmp_path, "torchvision", "0.20.0", ["torch==2.5.0"])
    monkeypatch.syspath_prepend(tmp_path)
    found = packages.check_torch()
    assert found.state == FAIL and "built for torch ==2.5.0" in found.text
    assert found.cure.startswith("pip uninstall torchvision")


def test_a_build_for_the_cpu_beside_a_card_is_told(monkeypatch):
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = packages.check_torch()
    assert found.state == WARN and "2 GPUs" in found.text and "pip install" in found.cure
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver" in packages.check_torch().text


def test_more_threads_than_cores_are_told(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    found = machine.check_device()
    assert torch.cuda.is_available() or (found.state == WARN and "export OMP_NUM_THREADS=" in found.cure)


def test_too_small_a_memory(monkeypatch):
    monkeypatch.setattr(machine, "count_free_gib", lambda: 2.5)
    config = configure(search={"workers": 6})
    found = machine.check_memory(config, Path("a study.yaml"))
    assert (found.state, found.cure) == (WARN, "memcontrol search 'a study.yaml' --workers 2")
    monkeypatch.setattr(machine, "count_free_gib", lambda: 0.3)
    assert machine.check_memory(None, None).state == FAIL


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file")
    found = machine.check_folder(tmp_path / "runs" / "study", None)
    assert found.state == FAIL and "is a file" in found.text and str(tmp_path / "runs") in found.cure
    closed = tmp_path / "closed"
    closed.mkdir(0o500)
    found = machine.check_folder(closed / "runs", None)
    # root may write everywhere but where there is no such thing as writing
    assert found.state == (OK if os.geteuid() == 0 else FAIL)
    assert machine.check_folder(Path("/proc/runs"), None).state == FAIL
    assert not list(closed.iterdir())


def test_a_disk_that_is_nearly_full(tmp_path, monkeypatch):
    for left, bound, state in ((10**8, None, FAIL), (10**9, None, WARN), (10**10, 50.0, WARN)):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda place, left=left: shutil._ntuple_diskusage(0, 0, left)
        )
        assert machine.check_folder(tmp_path, bound).state == state


SD15 = str(ARCHITECTURES / "sd15")


def cost(n_parameters, weights_gib, activations_gib):
    """Of a step of 16 images, by hand: gradients in float32, and two moments."""
    gradients = 4 * n_parameters / 2**20
    parts = {
        "weights": 1024 * weights_gib,
        "moments": 2 * gradients,
        "activations and gradients": 1024 * activations_gib + gradients,
    }
    return Cost(n_parameters, 1.0, sum(parts.values()), parts)


@pytest.fixture
def counted(monkeypatch):
    """A base of 2 GiB and 16 GiB of activations, 1 for each image; with 1 GiB of libraries LoRA takes 19 GiB,
    full fine-tuning, with three times 2 GiB beside the weights, 25."""
    costs = {"all": cost(0, 2, 16), "full": cost(2**29, 2, 16)}
    monkeypatch.setattr(fit, "_count_step", lambda config, folder, room, kind: costs[kind])
    monkeypatch.setattr(fit, "describe_card", lambda: None)
    return lambda gib: monkeypatch.setattr(fit, "count_free_gib", lambda: gib)


@pytest.mark.parametrize(
    "gib, state, cure",
    [
        (25.1, OK, ""),
        (24.9, FAIL, "inner.micro_batch_size=8"),  # 17
        (13.1, FAIL, "inner.micro_batch_size=4"),
        (10.1, FAIL, "inner.micro_batch_size=1"),
        (9.5, FAIL, "inner.micro_batch_size=1 inner.gradient_checkpointing=true"),  # 9.2 and 3.2
        (9.1, FAIL, "inner.gradient_checkpointing=true 'search.anchors=[none,all]'"),
        (3.1, FAIL, "a larger card"),
    ],
)
def test_a_memory_that_the_base_does_not_fit(counted, gib, state, cure):
    counted(gib)
    found = fit.check_fit(configure(), Path("study.yaml"))
    assert found.state == state and found.cure.endswith(cure), found


def test_of_workers_that_do_not_fit_fewer_are_proposed(counted):
    counted(80.0)
    found = fit.check_fit(configure(search={"workers": 8}), Path("study.yaml"))
    assert (found.state, found.cure) == (FAIL, "memcontrol search study.yaml search.workers=3")


def test_what_a_search_halves_by_itself_is_a_warning(counted, monkeypatch):
    for gib, state in ((24.0, WARN), (14.0, FAIL)):
        monkeypatch.setattr(fit, "describe_card", lambda gib=gib: Card("card", gib))
        assert fit.check_fit(configure(), Path("study.yaml")).state == state


def test_a_card_for_which_full_fine_tuning_is_too_large(monkeypatch):
    monkeypatch.setattr(fit, "describe_card", lambda: Card("card", 8.0))
    found = fit.check_usual_fit()
    assert found.state == WARN and "low_memory_full" in found.cure
    monkeypatch.setattr(fit, "describe_card", lambda: Card("card", 80.0))
    assert fit.check_usual_fit().state == OK


def test_what_is_not_on_this_machine(tmp_path):
    found = downloads.check_base(configure(base="nobody/nothing"))
    assert found.state == FAIL and found.cure == "hf download nobody/nothing"
    found = downloads.check_base(configure(base=SD15))
    assert found.state == FAIL and "no .safetensors" in found.text
    rewards = {**SMALL["rewards"], "extractor": f"sscd:{tmp_path / 'none.pt'}"}
    assert downloads.check_extractor(configure(rewards=rewards)).state == FAIL
    with pytest.raises(MemControlError, match="unknown"):
        downloads.check_extractor(configure(rewards={**SMALL["rewards"], "extractor": "beauty"}))
    found = downloads.check_clip("openai/clip-vit-base-patch32")
    assert found.state == FAIL and "hf download openai/clip-vit-base-patch32" in found.cure


def test_a_feature_network_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(downloads, "find_photo_package", lambda: None)
    found = downloads.check_extractor(
        configure(rewards={**SMALL["rewards"], "extractor": "efficientnet-lite0"})
    )
    assert found.state == FAIL and "memcontrol[photos]" in found.cure


def test_characters_for_photographs_and_images_that_are_not_there(tmp_path):
    config = configure(data={"path": str(tmp_path), "train": 8, "holdout": 8, "test": 8})
    assert downloads.check_extractor(config).state == WARN
    assert downloads.check_data(config).state == OK
    shutil.rmtree(tmp_path)
    with pytest.raises(MemControlError, match="no such folder"):
        downloads.check_data(config)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert downloads.check_hub().state == OK
    found = downloads.check_hub()
    assert found.state == WARN and "HF_HUB_OFFLINE=1" in found.cure
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert downloads.check_hub().state == OK


def test_a_sqlite_file_that_is_locked_broken_or_of_another_optuna(tmp_path):
    place = place_study(tmp_path, storage="sqlite:///own.db")
    file = tmp_path / "own.db"
    assert services.check_database(place).state == OK and not file.exists()
    with sqlite3.connect(file, isolation_level=None) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('v0.9.0.a')")
        found = services.check_database(place)
        assert found.state == FAIL and "optuna storage upgrade" in found.cure
        connection.execute("BEGIN EXCLUSIVE")
        assert "is locked" in services.check_database(place).text
    connection.close()
    file.write_bytes(b"no database at all, but some text" * 99)
    assert services.check_database(place).state == FAIL


def test_a_study_that_is_being_searched_is_told(tmp_path):
    from memcontrol.search.locks import hold_folder_lock

    place = place_study(tmp_path)
    with hold_folder_lock(place.folder.path):
        found = services.check_database(place)
    assert found.state == WARN and "runs already" in found.text and "memcontrol status" in found.cure


def test_a_postgresql_where_nobody_listens_shows_no_password(tmp_path):
    url = "postgresql+psycopg2://owner:hidden-one@127.0.0.1:1/studies"
    found = services.check_database(place_study(tmp_path, storage=url))
    assert found.state == FAIL and "Connection refused" in found.text
    assert found.cure == "start PostgreSQL there, or correct host and port"
    assert "hidden-one" not in f"{found}"


def test_a_postgresql_that_answers_is_asked_for_rights_and_tables(tmp_path, postgres):
    import optuna
    import sqlalchemy

    def check(url=postgres.url):
        return services.check_database(place_study(tmp_path, storage=url))

    assert check().state == OK and "no tables yet" in check().text and PASSWORD not in check().text
    optuna.storages.RDBStorage(postgres.url).engine.dispose()
    assert check().state == OK and "schema v" in check().text
    engine = sqlalchemy.create_engine(postgres.url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE ROLE looker LOGIN PASSWORD 'looks-only'"))
    reader = re.sub("://[^@]*@", "://looker:looks-only@", postgres.url)
    found = check(reader)
    assert found.state == FAIL and "may only read" in found.text and "roles.sql" in found.cure
    assert "looks-only" not in f"{found}"
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = 'v0.9.0.a'"))
    engine.dispose()
    assert check().state == FAIL and "optuna storage upgrade" in check().cure


def test_a_server_that_never_answers_is_not_waited_for(tmp_path, monkeypatch):
    """It takes the connection, and says nothing."""
    monkeypatch.setattr(services, "make_connection_arguments", lambda *_: {"connect_timeout": 600})
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"postgresql+psycopg2://owner:hidden-one@127.0.0.1:{server.getsockname()[1]}/studies"
        place, began = place_study(tmp_path, storage=url), time.monotonic()
        found = run_check("database", lambda: services.check_database(place), 1.0)
    assert time.monotonic() - began < 5 and found.state == FAIL
    assert "no answer within 1 seconds" in found.text and "pg_isready" in found.cure


def test_ray_that_is_not_there(monkeypatch):
    config = configure(search={"executor": "ray"}, ray={"address": "ray://127.0.0.1:1"})
    found = services.check_ray(config)
    assert found.state == FAIL and "nobody listens" in found.text and "ray start --head" in found.cure
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"ray://127.0.0.1:{server.getsockname()[1]}"
        config = configure(search={"executor": "ray"}, ray={"address": address})
        assert services.check_ray(config).state == OK
    monkeypatch.setattr(services, "find_spec", lambda name: None)
    found = services.check_ray(config)
    assert found.state == FAIL and "memcontrol[ray]" in found.cure


def test_slurm_that_is_not_there_or_does_not_answer(tmp_path, monkeypatch):
    config = configure(search={"executor": "slurm"})
    monkeypatch.setenv("PATH", str(tmp_path))
    found = run_check("slurm", lambda: services.check_slurm(config), 10.0)
    assert found.state == FAIL and "login node" in found.cure
    for name in ("sbatch", "squeue", "scancel"):
        (tmp_path / name).write_text("#!/bin/sh\nexec /bin/sleep 60\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(services, "_ANSWER_SECONDS", 0.3)
    assert "has not answered" in services.check_slurm(config).text
    (tmp_path / "squeue").write_text("#!/bin/sh\necho down >&2\nexit 1\n")
    assert "does not answer: down" in services.check_slurm(config).text
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 0\n")
    assert services.check_slurm(config).state == OK


def test_a_check_that_breaks_is_a_finding_without_traceback_or_password():
    def raise_error():
        raise RuntimeError("postgresql://me:hidden-one@host/db\nis broken")

    found = run_check("base", raise_error, 10.0)
    assert found.state == FAIL and "\n" not in found.text and "hidden-one" not in found.text
    assert run_check("fit", threading.Event().wait, 0.1).state == WARN  # it only takes long


def test_a_library_that_cannot_be_imported_is_a_finding_too(tmp_path):
    """numpy is broken here: nothing but the interpreter's own modules works."""
    import subprocess

    (tmp_path / "numpy.py").write_text("raise ImportError('numpy is broken')\n")
    root = Path(memcontrol.__file__).parent.parent
    paths = os.pathsep.join([str(tmp_path), str(root)])
    done = subprocess.run(
        [*NEW_PROCESS, "doctor"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert "numpy is broken" in done.stdout
