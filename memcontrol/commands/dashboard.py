"""Owns `memcontrol.dashboard`: a study in optuna-dashboard."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from memcontrol.study.place import StudyPlace
from memcontrol.view.dashboard import start_server


def dashboard(
    study: str | Path,
    *,
    storage: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    writable: bool = False,
) -> str:
    """Serves the study in optuna-dashboard from a thread, until the process ends. Returns the address. Raises
    MemControlError."""
    server, address = open_dashboard(study, storage, host, port, token, writable)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return address


def open_dashboard(
    study: str | Path, storage: str | None, host: str, port: int, token: str | None, writable: bool
) -> tuple[WSGIServer, str]:
    """The server, not yet serving, and its address."""
    place = StudyPlace.load(study, [f"storage={storage}"] if storage else [])
    with contextlib.closing(place.open()) as found:
        url, name = found.url, found.config.name
    return start_server(url, place.folder.path, name, host, port, token, writable)
