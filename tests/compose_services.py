"""The processes of docker-compose.yml without containers: its own commands, all on this machine, with free
ports and a folder for the hosts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from postgres import free_port

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
TOKEN = "0123456789abcdef" * 4


class Services:
    """`environment` is what a user exports; WORK is the folder of the study."""

    def __init__(self, work: Path, environment: dict[str, str]):
        self.work, self.given, self.port, self.dashboard_port = (
            work,
            {**environment, "RAY_AUTH_TOKEN": TOKEN},
            free_port(),
            free_port(),
        )
        self.running: dict[str, subprocess.Popen] = {}
        self.log = open(work / "services.log", "a")

    def command(self, name: str) -> list[str]:
        service = COMPOSE["services"][name]
        words = [
            self.expanded(word) for word in [*service.get("entrypoint", ["memcontrol"]), *service["command"]]
        ]
        here = {
            "ray-head:6379": f"127.0.0.1:{self.port}",
            "=6379": f"={self.port}",
            "=8080": f"={self.dashboard_port}",
            "@postgres/": "@127.0.0.1/",
            "$$": "$",
        }
        for there, own in here.items():
            words = [word.replace(there, own) for word in words]
        return words

    def environment(self, name: str) -> dict[str, str]:
        """As compose gives it, and where commands, threads and Ray's own files are found here."""
        given = {
            key: self.expanded(str(value))
            for key, value in COMPOSE["services"][name].get("environment", {}).items()
        }
        own = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_TMPDIR": str(self.work / "ray"),
            "SERVICE": f"{self.work}/{name}",
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
        }
        head = {} if name != "ray-head" else {"RAY_ADDRESS": ""}
        return {**os.environ, "PGPORT": self.given.get("PGPORT", ""), **given, **own, **head}

    def expanded(self, value: str) -> str:
        if not value.startswith("${"):
            return value
        key, _, default = value[2:-1].partition(":")
        return self.given.get(key, default.removeprefix("-"))

    def start(self, name: str) -> None:
        self.running[name] = subprocess.Popen(
            self.command(name),
            cwd=self.work,
            env=self.environment(name),
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def up(self) -> None:
        """Everything in the order of what depends on what."""
        self.start("ray-head")
        self.until_healthy("ray-head")
        self.start("worker")
        self.until_joined(2)
        self.start("orchestrator")

    def until_healthy(self, name: str) -> None:
        check = COMPOSE["services"][name]["healthcheck"]["test"]
        command = [word.replace(":6379", f":{self.port}") for word in check[1:]]
        deadline = time.monotonic() + 260  # as long as its start_period, interval, timeout and retries allow
        while subprocess.run(
            command, env=self.environment(name), stdout=self.log, stderr=self.log
        ).returncode:
            assert time.monotonic() < deadline, (
                f"{name} does not become healthy: {Path(self.log.name).read_text()[-3000:]}"
            )
            self.keep_running()
            time.sleep(1)

    def until_joined(self, n_nodes: int) -> None:
        """Two nodes that join at the same moment on one machine get in each other's way."""
        deadline = time.monotonic() + 260
        command = ["ray", "status", f"--address=127.0.0.1:{self.port}"]
        while (
            subprocess.run(
                command, env=self.environment("worker"), capture_output=True, text=True
            ).stdout.count(" node_")
            < n_nodes
        ):
            assert time.monotonic() < deadline, "the worker does not join"
            time.sleep(1)

    def processes(self, name: str) -> list[psutil.Process]:
        """All of a service, those that left their parents included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SERVICE") == f"{self.work}/{name}":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self, name: str) -> None:
        """As a container ends: at once, with everything in it."""
        while found := self.processes(name):
            for process in found:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.Error:
                    continue
            psutil.wait_procs(found, timeout=5)
        self.running[name].wait()

    def keep_running(self) -> None:
        """Begins again what has ended, as its restart policy says."""
        for name, process in list(self.running.items()):
            well = 0 if COMPOSE["services"][name]["restart"].startswith("on-failure") else None
            if process.poll() not in (None, well):
                self.kill(name)
                self.start(name)

    def close(self) -> None:
        for name in self.running:
            self.kill(name)
        self.log.close()
