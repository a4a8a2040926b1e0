"""docker-compose.yml and the Dockerfile: read, held against the specification, and their commands run without
containers."""

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from compose_services import COMPOSE, ROOT, TOKEN, Services
from postgres import Postgres
from test_database import tool

SERVICES = COMPOSE["services"]


def values(node):
    if isinstance(node, dict):
        for inner in node.values():
            yield from values(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from values(inner)
    else:
        yield str(node)


def test_it_keeps_to_the_compose_specification(tmp_path):
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    assert subprocess.run([*check, ROOT / "docker-compose.yml"], capture_output=True).returncode == 0
    (tmp_path / "wrong.yml").write_text(
        (ROOT / "docker-compose.yml").read_text().replace("start_period", "start_periode")
    )
    assert subprocess.run([*check, tmp_path / "wrong.yml"], capture_output=True).returncode == 1


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_that_it_does_not_need(name):
    """CIS Docker Benchmark 1.6: 5.4 (capabilities), 5.5 (privileged), 5.13 (read-only root), 5.26
    (privileges); and that it is told to end, and has time to."""
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"] and service["init"] is True
    assert not {"privileged", "network_mode", "pid", "ipc", "cgroup_parent"} & set(service)
    assert any(place.startswith("/tmp:") for place in service["tmpfs"])
    assert service["stop_signal"] in ("SIGTERM", "SIGINT")
    assert re.fullmatch(r"[12]m", service["stop_grace_period"])  # Docker's own is 10 seconds
    for volume in service["volumes"]:
        assert "docker.sock" not in volume
        assert volume.endswith(":ro") or volume.startswith(("${WORK", *COMPOSE["volumes"]))


def test_the_database_is_reached_by_services_alone_and_the_dashboard_writes_nothing():
    assert [name for name in SERVICES if "ports" in SERVICES[name]] == ["dashboard"]
    assert SERVICES["dashboard"]["volumes"] == ["${WORK:-.}:/work:ro"]
    assert SERVICES["postgres"]["user"] == "postgres"
    assert not any(word.startswith("--writable") for word in SERVICES["dashboard"]["command"])


def test_the_services_are_those_of_a_search():
    assert set(SERVICES) == {"postgres", "ray-head", "worker", "orchestrator", "dashboard"}


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_and_services_wait_for_health(name):
    service = SERVICES[name]
    assert re.search(r":\d+\.\d+", service["image"]), service["image"]
    for other, condition in service.get("depends_on", {}).items():
        assert condition == {"condition": "service_healthy"} and "healthcheck" in SERVICES[other]
    for port in service.get("ports", []):
        assert port.startswith("${BIND:-127.0.0.1}:")
    for volume in service.get("volumes", []):
        source = volume.partition(":/")[0]
        assert source.startswith(("./", "${WORK")) or source in COMPOSE["volumes"]
        assert not source.startswith("./") or (ROOT / source).exists(), source


def test_passwords_come_from_the_environment_or_nothing_starts():
    secrets = [value for value in values(SERVICES) if "PASSWORD" in value or "TOKEN" in value]
    assert len(secrets) == 9 and all(
        re.fullmatch(r"\$\{\w+_(PASSWORD|TOKEN):\?[^}]+\}", value) for value in secrets
    )
    assert not re.findall(r"://[^@\s]*:[^@\s]*@", " ".join(values(SERVICES)))


def test_the_image_is_pinned_and_runs_as_a_user_of_its_own():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert any(re.fullmatch(r"FROM python:3\.11\.\d+-slim-\w+", line) for line in lines)
    assert [line for line in lines if line.startswith("USER ")] == ["USER memcontrol"]
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert all("-c constraints.txt" in line for line in lines if "pip install" in line)


def test_the_first_start_makes_the_roles_with_the_passwords_that_compose_gives():
    script = (ROOT / "storage" / "init.sh").read_text()
    given = SERVICES["postgres"]["environment"]
    assert set(re.findall(r"\$(\w+_PASSWORD)", script)) == set(given) - {"POSTGRES_PASSWORD"}
    mounted = {volume.split(":")[1] for volume in SERVICES["postgres"]["volumes"]}
    assert {
        "/storage/roles.sql",
        "/docker-entrypoint-initdb.d/init.sh",
    } <= mounted and "/storage/roles.sql" in script


@pytest.fixture
def own_folder():
    """One that PostgreSQL's own user can reach, with a short path: Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def looked_at(services):
    """The studies that the dashboard lists, by the role that only reads; nobody else is told."""
    address = f"http://127.0.0.1:{services.dashboard_port}/api/studies"
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{address}?token={TOKEN}") as response:
                return response.read()
        except urllib.error.URLError:
            assert time.monotonic() < deadline and services.running["dashboard"].poll() is None
            time.sleep(0.5)


def test_its_commands_search_a_study_without_containers(own_folder):
    """PostgreSQL with the roles of storage/, a Ray head without cores, a worker that joins it, and the
    orchestrator."""
    folder = own_folder
    server = Postgres(folder / "pg")
    tool(
        server,
        "psql",
        "-v",
        "owner_password=of the owner",
        "-v",
        "reader_password=of the reader",
        "-f",
        ROOT / "storage" / "roles.sql",
    )
    study = folder / "study.yaml"
    study.write_text(
        yaml.safe_dump(
            {
                "name": "composed",
                "storage": f"postgresql+psycopg2://memcontrol@127.0.0.1:{server.port}/memcontrol",
                "data": {"path": "digits", "train": 32, "holdout": 64, "test": 64},
                "space": "digits",
                "ray": {"address": "auto"},
                "inner": {"budget_images": 64, "batch_size": 16, "rounds": 2},
                "rewards": {
                    "objectives": ["kid", "memorization"],
                    "n_samples": 32,
                    "sampling_steps": 2,
                    "confirm": 0,
                },
                "search": {"trials": 1, "executor": "ray", "workers": 2},
            }
        )
    )
    services = Services(
        folder,
        {
            "OWNER_PASSWORD": "of the owner",
            "READER_PASSWORD": "of the reader",
            "DASHBOARD_TOKEN": TOKEN,
            "STUDY": "study.yaml",
            "PGPORT": str(server.port),
        },
    )
    try:
        services.up()
        assert services.running["orchestrator"].wait(timeout=300) == 0, (folder / "services.log").read_text()[
            -3000:
        ]
        services.start("dashboard")
        assert b'"composed"' in looked_at(services)
        found = tool(
            server,
            "psql",
            "-At",
            "-c",
            "SELECT state, count(*) FROM trials GROUP BY state",
            database="memcontrol",
        ).stdout
    finally:
        services.close()
        server.stop("immediate")
    assert found == "COMPLETE|4\n" and {
        json.loads(path.read_text())["state"] for path in folder.glob("runs/composed/*/result.json")
    } == {"COMPLETE"}
