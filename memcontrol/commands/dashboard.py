"""Owns `memcontrol.dashboard`: a study in optuna-dashboard."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from memcontrol.dashboard.server import Serving, start_server
from memcontrol.study.place import StudyPlace


def dashboard(
    study: str | Path,
    *,
    storage: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    no_token: bool = False,
    writable: bool = False,
    prefix: str = "",
) -> str:
    """Serves the study in optuna-dashboard from a thread, until the process ends, to whoever brings the
    `token`, a given one or one that is drawn; with `no_token` to all on this machine. `prefix` is the path of
    a reverse proxy. Returns the address, with the token. Raises MemControlError."""
    server, address = open_dashboard(study, storage, Serving(host, port, token, writable, no_token, prefix))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return address


def open_dashboard(
    study: str | Path, storage: str | None, serving: Serving, name: str | None = None
) -> tuple[WSGIServer, str]:
    """The server, not yet serving, and its address."""
    place = StudyPlace.load(study, [f"storage={storage}"] if storage else [], name)
    with contextlib.closing(place.open()) as found:
        url, searched = found.url, found.config.name
    return start_server(url, place.folder.path, searched, serving)
