"""Owns the connection to the study's database: settings that outlive a restart, waiting while it is away,
errors a person can mend, and the lock that keeps a study to one orchestrator. Passwords never leave it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import re
import socket
import sqlite3
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from filelock import FileLock, Timeout

from memcontrol.core import interrupt
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import make_private_folder, open_private
from memcontrol.core.run_folder import StudyFolder

SQLITE = "sqlite:///"  # and a path, as it is, and perhaps options such as ?timeout=60
_OPTIONS = re.compile(r"\?(\w+=[^&/?]*(?:&\w+=[^&/?]*)*)$")

PATIENCE_SECONDS = 600
RETRY_SECONDS = 2.0
_N_EVICTIONS = 10
_NUMBERS = itertools.count(1)  # of locks in this process
_HOLDER_QUERY = """
SELECT a.pid, a.application_name, coalesce(host(a.client_addr), 'local') AS address, a.backend_start
FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
    AND (l.classid::bigint << 32) + l.objid::bigint = :key
"""
# what libpq adds, and our cure answers
_ASKED = " Is the server running on that host and accepting TCP/IP connections?"
Result = TypeVar("Result")
Tell = Callable[[str], None]


def is_postgresql(url: str) -> bool:
    return url.startswith("postgresql")


def make_engine_url(url: str) -> str:
    """For sqlalchemy.create_engine. Of a file whose path has what a URL reads as something else (?, %20), any
    file's: `make_engine_arguments` then says how the right one is opened."""
    return f"{SQLITE}study.db" if _is_odd_path(url) else url


def make_engine_arguments(url: str) -> dict[str, Any]:
    """For sqlalchemy.create_engine: few connections, each tried before it is used, none that hangs for
    long."""
    if _is_odd_path(url):
        return {"creator": functools.partial(connect_file, url)}
    if not is_postgresql(url):
        return {}
    return {
        "pool_size": 2,
        "max_overflow": 2,
        "pool_pre_ping": True,
        "pool_recycle": 600,
        "connect_args": make_connection_arguments("statement_timeout=60000"),
    }


def is_sqlite(url: str) -> bool:
    return url.startswith(SQLITE)


def split_sqlite_url(url: str) -> tuple[Path, str]:
    """The file, whose path is as it is in our URLs (nothing in it is quoted), and the options as they stand:
    "timeout=60"."""
    rest = url.removeprefix(SQLITE)
    found = _OPTIONS.search(rest)
    return (Path(rest[: found.start()]), found[1]) if found else (Path(rest), "")


def _is_odd_path(url: str) -> bool:
    return is_sqlite(url) and not set("?%").isdisjoint(str(split_sqlite_url(url)[0]))


def make_database_file(url: str) -> None:
    """An empty SQLite file, where there is none, that only its owner may read: SQLite gives the files that it
    puts beside it the same rights. Raises OSError."""
    path, _ = split_sqlite_url(url)
    make_private_folder(path.parent)
    if not path.exists():
        open_private(path, "ab").close()


def connect_file(url: str) -> sqlite3.Connection:
    """To a SQLite file."""
    path, options = split_sqlite_url(url)
    timeout = dict(urllib.parse.parse_qsl(options)).get("timeout", "30")
    return sqlite3.connect(path, check_same_thread=False, timeout=float(timeout))


def make_connection_arguments(*settings: str, name: str = "") -> dict[str, Any]:
    """Of libpq: both sides notice within half a minute that the other is gone."""
    alive = ("tcp_keepalives_idle=20", "tcp_keepalives_interval=5", "tcp_keepalives_count=3")
    return {
        "connect_timeout": 5,
        "keepalives": 1,
        "keepalives_idle": 20,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "application_name": name or name_process(),
        "options": " ".join(f"-c {setting}" for setting in (*alive, *settings)),
    }


def name_process() -> str:
    return f"memcontrol on {socket.gethostname()[:30]}, process {os.getpid()}"


def validate_url(url: str) -> str:
    """The URL, if it is one. Raises MemControlError."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(url)
    except (ValueError, ArgumentError):
        raise MemControlError(
            f"storage {hide_all(url)} is no database URL; write it as "
            "postgresql+psycopg2://USER@HOST:PORT/DATABASE or sqlite:///FILE, with the password in "
            "PGPASSWORD or, in the URL, its special characters percent-encoded (@ as %40, : as %3A)"
        ) from None
    return url


# of a query, or of libpq's own form
_VALUE = re.compile(r"""([\w%.-]+)(\s*=\s*)('(?:[^'\\]|\\.)*'|"[^"]*"|(?:\\.|[^&\s\\])*)""")
_SECRET = re.compile("pass|pwd|secret|token", re.IGNORECASE)


def hide_password(url: str) -> str:
    """The URL, or whatever was given in its place, without its password."""

    def mask(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}***" if _SECRET.search(unquote(match[1])) else match[0]

    return re.sub(r"(?s)(:/+[^:/@]*):.*@", r"\1:***@", _VALUE.sub(mask, url))


def hide_all(url: str) -> str:
    """Of what is no URL, where a password may stand anywhere: its first word."""
    first = re.match(r"\w+(\+\w+)?(?=:|$)", url)
    return f"'{first[0]}...'" if first else "'...'"


def _list_passwords(url: str) -> list[str]:
    """As the URL has them, and as a driver may print them, the longest first."""
    values = [match[3] for match in _VALUE.finditer(url) if _SECRET.search(unquote(match[1]))]
    if between := re.search(r"(?s):/+[^:/@]*:(.*)@", url):
        values.append(between[1])
    known = {form for value in values for form in (value, unquote(value), value.strip("'")) if form}
    return sorted(known, key=len, reverse=True)


_CURES = {
    "password authentication failed": "check the user and the password",
    "no password supplied": "give the password in the URL, or in PGPASSWORD or ~/.pgpass",
    r"role .* does not exist": "create the role: storage/roles.sql does",
    r"database .* does not exist": "create the database: see storage/README.md",
    "permission denied": "the role must own the tables or have been granted them: storage/roles.sql does",
    "Connection refused": "start PostgreSQL there, or correct host and port",
    "Can't load plugin|NoSuchModule": "write postgresql+psycopg2://USER@HOST/DATABASE, "
    "postgresql+psycopg:// for psycopg 3, or sqlite:///FILE",
    "read-only transaction": "this role may only read; a search needs the one that owns the tables",
    "could not translate host name": "check the host's name",
    "Name or service not known": "check the host's name",
    "no longer compatible|schema": "upgrade the tables after a backup: optuna storage upgrade --storage "
    "URL, see storage/README.md",
    "No module named 'psycopg2'": "install memcontrol[postgresql]",
    "No module named 'psycopg'": "install psycopg[binary], or write postgresql+psycopg2://",
}


def explain_open_error(url: str, error: Exception) -> MemControlError:
    """What went wrong in one line, and its cure."""
    cause = _find_database_error(error) or error
    reason = " ".join(str(getattr(cause, "orig", None) or cause).split())[:300].removesuffix(_ASKED)
    if "Failed to import DB access module" in reason:
        reason = (
            f"the driver of {hide_password(url).partition(':')[0]} is not installed: No module "
            f"named '{'psycopg' if '+psycopg:' in url else 'psycopg2'}'"
        )
    reason = reason.replace(url, hide_password(url))
    for password in _list_passwords(url):
        reason = reason.replace(password, "***")
    cure = next(
        (cure for pattern, cure in _CURES.items() if re.search(pattern, reason)),
        "give for example sqlite:///study.db",
    )
    return MemControlError(f"storage {hide_password(url)} cannot be opened: {reason}; {cure}")


def _find_database_error(error: BaseException | None) -> BaseException | None:
    """SQLAlchemy's error behind another one, such as Optuna's."""
    from sqlalchemy.exc import SQLAlchemyError

    while error is not None and not isinstance(error, SQLAlchemyError):
        error = error.__cause__ or error.__context__
    return error


def is_away(error: BaseException, url: str) -> bool:
    """Whether it is the connection that failed, so that waiting may help; not a wrong statement, right or
    password."""
    import sqlalchemy.exc

    cause = _find_database_error(error)
    if not isinstance(
        cause, (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError, sqlalchemy.exc.TimeoutError)
    ):
        return bool(getattr(cause, "connection_invalidated", False))
    text = str(cause)
    if not is_postgresql(url):
        return "locked" in text
    return not any(
        re.search(pattern, text)
        for pattern in ("password", "role .* does not exist", "database .* does not exist", "translate host")
    )


def retry_while_away(
    call: Callable[[], Result], url: str, say: Tell, again: Callable[[], None] = lambda: None
) -> Result:
    """The call's result; while the database is away, waits and tries again, at most PATIENCE_SECONDS, and
    says so.

    The call must be one that may be repeated, since a lost connection does not tell whether the database had
    done it. `again` runs before each repetition. Raises MemControlError when patience ends.
    """
    away_since = None
    while True:
        try:
            if away_since is not None:
                again()
            found = call()
            if away_since is not None:
                say(f"the database is back after {time.monotonic() - away_since:.0f} s; the search goes on")
            return found
        except Exception as error:
            if not is_away(error, url):
                raise
            if away_since is None:
                away_since = time.monotonic()
                say(
                    f"the database {hide_password(url)} is away; trials run on, and the search "
                    f"waits for it up to {PATIENCE_SECONDS // 60} minutes"
                )
            if time.monotonic() - away_since > PATIENCE_SECONDS:
                raise MemControlError(
                    f"the database {hide_password(url)} has been away for {PATIENCE_SECONDS // 60} "
                    "minutes; finished results are kept in their folders, and the "
                    "same command goes on when it is back"
                ) from None
            for _ in range(int(RETRY_SECONDS / 0.1)):
                interrupt.check()
                time.sleep(0.1)


def _compute_lock_key(name: str) -> int:
    """Of the study's advisory lock."""
    return int.from_bytes(hashlib.sha256(f"memcontrol {name}".encode()).digest()[:8], signed=True)


def find_lock_holder(url: str, name: str) -> str | None:
    """Which process searches the study, as PostgreSQL knows it."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    with create_engine(
        url, poolclass=NullPool, connect_args=make_connection_arguments()
    ).connect() as connection:
        holder = connection.execute(text(_HOLDER_QUERY), {"key": _compute_lock_key(name)}).first()
    return holder.application_name if holder else None


class StudyLock:
    """PostgreSQL's advisory lock on a study's name: held by one connection, gone with it, however its process
    ends."""

    def __init__(self, url: str, name: str):
        from sqlalchemy import create_engine
        from sqlalchemy.pool import NullPool

        self.url, self.name = url, name
        self.label = f"{name_process()}, lock {next(_NUMBERS)}"
        self.engine = create_engine(
            url, poolclass=NullPool, connect_args=make_connection_arguments(name=self.label)
        )
        self.key = _compute_lock_key(name)
        self.connection: Any = None

    def take(self) -> None:
        """Raises MemControlError where another process holds it, and says which."""
        from sqlalchemy import text

        self.drop()
        self.connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        for _ in range(_N_EVICTIONS):
            if self.connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": self.key}).scalar():
                return
            holder = self.connection.execute(text(_HOLDER_QUERY), {"key": self.key}).first()
            if holder is None or holder.application_name != self.label:
                break
            # The server has not noticed yet that our own lost connection is gone.
            self.connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": holder.pid})
            time.sleep(0.2)
        said = (
            f"{holder.application_name}, address {holder.address}, since "
            f"{holder.backend_start:%Y-%m-%d %H:%M}"
            if holder
            else "it has just ended"
        )
        raise MemControlError(
            f"study '{self.name}' is being searched by another process ({said}); wait for it or stop it first"
        )

    def check(self) -> None:
        """Raises, as any lost connection does, where it is no longer held."""
        from sqlalchemy import text

        self.connection.execute(text("SELECT 1"))

    def drop(self) -> None:
        if self.connection is not None:
            with contextlib.suppress(Exception):
                self.connection.invalidate()
                self.connection.close()
            self.connection = None


def locate_lock(url: str, name: str) -> Path:
    """The file that is locked while the study of a SQLite database is searched."""
    path, _ = split_sqlite_url(url)
    return path.with_name(f".{path.name}.{name}.lock")


@contextlib.contextmanager
def hold_file_lock(path: Path, what: str) -> Iterator[None]:
    """Raises MemControlError where another process holds it."""
    make_private_folder(path.parent)
    try:
        with FileLock(path, timeout=0, mode=0o600):
            yield
    except Timeout:
        raise MemControlError(
            f"{what} is being searched by another process; wait for it or stop it first"
        ) from None


def is_file_locked(path: Path) -> bool:
    """Whether another process holds the lock; needs no right but to read it."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # gone with the file
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def hold_study_lock(url: str, name: str) -> Iterator[StudyLock | None]:
    """Holds the study's lock in the database, or beside a SQLite file, which several folders may have in
    common. Raises MemControlError where another process does."""
    if is_sqlite(url):
        path, _ = split_sqlite_url(url)
        if path == StudyFolder(path.parent).database and path.parent.name == name:
            yield None  # its own folder, which has a lock
            return
        with hold_file_lock(locate_lock(url, name), f"study '{name}' in {path}"):
            yield None
        return
    if not is_postgresql(url):
        yield None
        return
    import sqlalchemy.exc

    try:
        lock = StudyLock(url, name)
        lock.take()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise explain_open_error(url, error) from None
    try:
        yield lock
    finally:
        lock.drop()
