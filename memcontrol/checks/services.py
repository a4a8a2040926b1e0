"""Owns whether the services that a study names answer: its database, Ray, Slurm. Nothing is left in them, and
none is waited for longer than some seconds."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import sqlite3
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memcontrol.checks.finding import FAIL, OK, WARN, Finding
from memcontrol.config.study import Config
from memcontrol.study.database import (
    explain_open_error,
    hide_password,
    is_postgresql,
    is_sqlite,
    make_connection_arguments,
    split_sqlite_url,
)
from memcontrol.study.place import StudyPlace

_ANSWER_SECONDS = 4.0
_OWN_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # where `ray start` writes its head's address
_UPGRADE = "make a backup, then: optuna storage upgrade --storage URL (storage/README.md)"
_TABLE = "alembic_version"  # where Optuna keeps its schema's version


def check_database(place: StudyPlace) -> Finding:
    """Raises MemControlError where its URL is none."""
    url = place.url
    found = _check_sqlite(url) if is_sqlite(url) else _check_server(url)
    return _tell_search(place, found) if found.state == OK else found


def _check_sqlite(url: str) -> Finding:
    path, _ = split_sqlite_url(url)
    if not path.exists():
        parent = next(folder for folder in path.parents if folder.exists())
        if not os.access(parent, os.W_OK):
            return Finding(
                "database", FAIL, f"{parent} cannot be written", f"chmod u+rwx {shlex.quote(str(parent))}"
            )
        return Finding("database", OK, f"SQLite, {path}, which the search makes")
    if not os.access(path, os.W_OK):
        return Finding("database", FAIL, f"{path} cannot be written", f"chmod u+rw {shlex.quote(str(path))}")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=1, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            return _judge_schema(f"SQLite, {path}", _read_schema(connection))
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        text = f"{path} is locked by another process: it writes this moment, or hangs"
        return Finding("database", WARN, text, f"fuser {shlex.quote(str(path))} (shows who)")
    except sqlite3.DatabaseError as error:
        cure = f"mv {shlex.quote(str(path))} {shlex.quote(f'{path}.broken')}, and bring back a backup"
        return Finding("database", FAIL, f"{path}: {error}", cure)


def _read_schema(connection: sqlite3.Connection) -> str | None:
    """None where Optuna has made no tables yet."""
    known = connection.execute("SELECT name FROM sqlite_master WHERE name = ?", (_TABLE,)).fetchone()
    row = known and connection.execute(f"SELECT version_num FROM {_TABLE}").fetchone()
    return row[0] if row else None


def _judge_schema(said: str, schema: str | None) -> Finding:
    from memcontrol.study.optuna_private import find_schema_head

    head = find_schema_head()
    if schema in (None, head):
        return Finding("database", OK, f"{said}, {f'schema {schema}' if schema else 'no tables yet'}")
    text = f"{said}: its tables are of schema {schema}, and the Optuna here has {head}"
    return Finding("database", FAIL, text, _UPGRADE)


def _check_server(url: str) -> Finding:
    """A server other than PostgreSQL is only connected with."""
    import sqlalchemy
    from sqlalchemy.pool import NullPool

    arguments: dict[str, Any] = {}
    if is_postgresql(url):
        arguments = {
            "connect_args": make_connection_arguments(f"statement_timeout={int(1000 * _ANSWER_SECONDS)}")
        }
    try:
        with sqlalchemy.create_engine(url, poolclass=NullPool, **arguments).connect() as connection:
            if is_postgresql(url):
                return _check_rights(connection, url)
            return Finding("database", OK, f"{hide_password(url)} answers")
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        text, _, cure = str(explain_open_error(url, error)).rpartition("; ")
        return Finding("database", FAIL, text, cure)


def _check_rights(connection: Any, url: str) -> Finding:
    """Whether this role may do what a search does."""
    from sqlalchemy import text

    def ask(query: str) -> Any:
        return connection.execute(text(query)).scalar()

    said = f"PostgreSQL {str(ask('SHOW server_version')).split()[0]}, {hide_password(url)}"
    cure = "the role must own the tables or have been granted them: storage/roles.sql does"
    if ask("SHOW transaction_read_only") == "on":
        return Finding("database", FAIL, f"{said}: this role, or server, may only read", cure)
    if ask(f"SELECT to_regclass('{_TABLE}')") is None:
        if not ask("SELECT has_schema_privilege(current_schema(), 'CREATE')"):
            return Finding("database", FAIL, f"{said}: this role may make no tables", cure)
        return _judge_schema(said, None)
    if not ask("SELECT has_table_privilege('trials', 'INSERT')"):
        return Finding("database", FAIL, f"{said}: this role may only read the tables", cure)
    return _judge_schema(said, ask(f"SELECT version_num FROM {_TABLE}"))


def _tell_search(place: StudyPlace, found: Finding) -> Finding:
    """And whether a search of the study runs already, beside which another is refused."""
    from memcontrol.search.locks import is_searching, read_holder

    if not is_searching(place.folder.path, place.url, place.config.name):
        return found
    holder = read_holder(place.folder).get("holder", "on another machine")
    text = f"{found.text}; a search of '{place.config.name}' runs already ({holder})"
    return Finding("database", WARN, text, f"memcontrol status {shlex.quote(str(place.file))}")


def check_ray(config: Config | None) -> Finding:
    """Whether it is installed and, where a study has a cluster, somebody listens at its address."""
    is_here = find_spec("ray") is not None
    if config is None or config.search.executor != "ray":
        here = "is installed" if is_here else "is not installed"
        return Finding("ray", OK, f"{here}; only search.executor: ray needs it")
    if not is_here:
        return Finding("ray", FAIL, "is not installed", "pip install 'memcontrol[ray]'")
    address = config.ray.address
    if address is None:
        return Finding("ray", OK, "is installed; a cluster is started on this machine")
    if address == "auto":
        own = _OWN_CLUSTER.read_text().strip() if _OWN_CLUSTER.is_file() else ""
        address = os.environ.get("RAY_ADDRESS") or own
        if not address:
            return Finding("ray", WARN, "no cluster is found on this machine", "ray start --head")
    return _listen_for_ray(address)


def _listen_for_ray(address: str) -> Finding:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return Finding(
            "ray", WARN, f"ray.address {address} is not looked at: it is no HOST:PORT", "ray status"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        cure = "ray start --head on its machine, or correct ray.address"
        return Finding("ray", FAIL, f"nobody listens at {address}: {reason}", cure)
    return Finding("ray", OK, f"somebody listens at {address}")


def check_slurm(config: Config | None) -> Finding:
    """Whether Slurm's commands are here and its controller answers."""
    from memcontrol.execution.slurm_commands import require_slurm

    if config is None or config.search.executor != "slurm":
        here = "is here" if shutil.which("sbatch") else "is not here"
        return Finding("slurm", OK, f"sbatch {here}; only search.executor: slurm needs it")
    require_slurm()
    try:
        words = ["squeue", "--noheader", "--name=memcontrol-doctor", "--format=%A"]
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=_ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding(
            "slurm", FAIL, f"squeue has not answered in {_ANSWER_SECONDS:g} seconds", "scontrol ping"
        )
    if done.returncode:
        reason = next(iter(done.stderr.splitlines()), f"it ends with {done.returncode}")[:200]
        return Finding("slurm", FAIL, f"squeue does not answer: {reason}", "scontrol ping")
    return Finding("slurm", OK, f"{shutil.which('sbatch')}, and its controller answers")
