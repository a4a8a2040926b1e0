"""docker-compose.yml and the Dockerfile, read: no engine runs here, so what can be told without one is."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
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


def test_the_services_are_those_of_a_search():
    assert set(SERVICES) == {"postgres", "ray-head", "worker", "orchestrator"}


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
    secrets = [value for value in values(SERVICES) if "PASSWORD" in value]
    assert len(secrets) == 4 and all(re.fullmatch(r"\$\{\w+_PASSWORD:\?[^}]+\}", value) for value in secrets)
    assert "://" not in " ".join(values(SERVICES))


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
    assert {"/storage/roles.sql", "/docker-entrypoint-initdb.d/init.sh"} <= mounted and "/storage/roles.sql" in script
