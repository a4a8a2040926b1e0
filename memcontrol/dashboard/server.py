"""Owns `memcontrol dashboard`: optuna-dashboard over a study's database, read-only three times over: by the
guard, by the connection, and by the store of artifacts."""

from __future__ import annotations

import re
import secrets
import socket
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import RDBStorage

from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import StudyFolder
from memcontrol.dashboard.guard import LOOPBACK, App, guard_app
from memcontrol.dashboard.prefix import check_prefix, put_below
from memcontrol.dashboard.read_only import hide_buttons
from memcontrol.study.artifacts import ReadOnlyStore
from memcontrol.study.database import (
    connect_file,
    is_postgresql,
    make_connection_arguments,
    make_engine_arguments,
    make_engine_url,
)
from memcontrol.study.optuna_private import close_storage

_TOKEN = r"[A-Za-z0-9_-]{16,}"
_ANY = ("0.0.0.0", "::", "")  # noqa: S104  # all interfaces of the machine, which is reached by its name


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request: a page asks for many things at once."""

    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a browser that has gone on to another page
            super().handle_error(request, client_address)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


def _make_read_only_arguments(url: str) -> dict[str, Any]:
    """For sqlalchemy.create_engine: connections on which the database itself refuses every change."""
    if is_postgresql(url):
        return make_engine_arguments(url) | {
            "connect_args": make_connection_arguments(
                "statement_timeout=60000", "default_transaction_read_only=on"
            )
        }

    def connect() -> sqlite3.Connection:
        connection = connect_file(url)
        connection.execute("PRAGMA query_only = ON")
        return connection

    return {"creator": connect}


def make_application(url: str, folder: Path, writable: bool, token: str | None, prefix: str = "") -> App:
    from optuna_dashboard import wsgi

    arguments = make_engine_arguments(url) if writable else _make_read_only_arguments(url)
    storage = RDBStorage(
        make_engine_url(url), engine_kwargs=arguments, skip_compatibility_check=True, skip_table_creation=True
    )
    store = FileSystemArtifactStore(StudyFolder(folder).artifacts) if writable else ReadOnlyStore(folder)
    app = wsgi(storage, artifact_store=store)
    shown = app if writable else hide_buttons(app)
    return put_below(guard_app(shown, writable, token, prefix), prefix)


def find_study_id(url: str, name: str) -> int:
    """Optuna's number of the study, which the dashboard's addresses have."""
    storage = RDBStorage(
        make_engine_url(url),
        engine_kwargs=_make_read_only_arguments(url),
        skip_compatibility_check=True,
        skip_table_creation=True,
    )
    try:
        return storage.get_study_id_from_name(name)
    finally:
        close_storage(storage)


@dataclass(frozen=True)
class Serving:
    """How a dashboard is served. `token`: what visitors must bring, None for one that is drawn; `no_token`:
    nothing, on loopback."""

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    writable: bool = False
    no_token: bool = False
    prefix: str = ""


def start_server(url: str, folder: Path, name: str, serving: Serving) -> tuple[WSGIServer, str]:
    """A server that listens, and the address to open. Raises MemControlError."""
    host, token, prefix = serving.host, _choose_token(serving), check_prefix(serving.prefix)
    app = make_application(url, folder, serving.writable, token, prefix)
    server = _bind_server(app, host, serving.port)
    reached = socket.gethostname() if host in _ANY else f"[{host}]" if ":" in host else host
    address = f"http://{reached}:{server.server_port}{prefix}/dashboard/studies/{find_study_id(url, name)}"
    return server, address + (f"?token={token}" if token else "")


def _choose_token(serving: Serving) -> str | None:
    """One that is given or drawn; none where that is wanted. Raises MemControlError for one that can be
    guessed, or that an address or a cookie cannot hold, and for none where other machines could ask."""
    token = serving.token
    if serving.no_token:
        if token or serving.host not in LOOPBACK:
            why = "and a token are given" if token else f"is for loopback, and --host is {serving.host}"
            raise MemControlError(f"--no-token {why}; leave it out")
        return None
    if token and not re.fullmatch(_TOKEN, token):
        raise MemControlError(
            "the token (--token or MEMCONTROL_TOKEN) needs 16 or more letters, digits, '-' or '_'; "
            "leave it out, and one is drawn"
        )
    return token or secrets.token_urlsafe(16)


def _bind_server(app: App, host: str, port: int) -> WSGIServer:
    """A server that listens; `serve_forever` runs it. Port 0 takes any free one. Raises MemControlError."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        return make_server(host, port, app, server_class=_Server, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        raise MemControlError(
            f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}; "
            "give another --port (0: any free one) or --host"
        ) from None
