"""Owns the dashboard below a path of a reverse proxy: optuna-dashboard itself answers at the root only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from memcontrol.core.errors import MemControlError
from memcontrol.dashboard.guard import App
from memcontrol.dashboard.rewriting import rewrite_answers

_PREFIX = r"(/[A-Za-z0-9._~-]+)+"
# where its page and its script name their own addresses (tests/test_seeing.py holds them to the version)
_ADDRESS = re.compile(
    rb"(?<=[`}(])(?=/(?:api|artifacts|csv)/)|(?<=[\"'])(?=/(?:dashboard|static/bundle\.js)[\"'])"
)
_REWRITTEN = ("text/html", "text/javascript", "application/javascript")


def check_prefix(prefix: str) -> str:
    """Without a slash at its end; empty where there is none. Raises MemControlError."""
    prefix = prefix.rstrip("/")
    if prefix and not re.fullmatch(_PREFIX, prefix):
        raise MemControlError(
            f"--prefix is {prefix!r}; give the path of a reverse proxy, such as /memcontrol: letters, "
            "digits, '.', '_', '~' and '-' between slashes"
        )
    return prefix


def put_below(app: App, prefix: str) -> App:
    """The app with all its links, requests and redirects below `prefix`, whether or not the proxy takes that
    off the addresses that it passes on."""
    if not prefix:
        return app
    written: dict[bytes, bytes] = {}
    icon = f'<head><link rel="icon" href="{prefix}/favicon.ico">'.encode()  # else it is asked for at the root

    def rewrite(content: bytes) -> bytes:
        if content not in written:
            written[content] = _ADDRESS.sub(prefix.encode(), content).replace(b"<head>", icon, 1)
        return written[content]

    moved = rewrite_answers(app, _REWRITTEN, rewrite)

    def answer(environ: dict[str, Any], start) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == prefix or path.startswith(f"{prefix}/"):
            environ = {**environ, "PATH_INFO": path.removeprefix(prefix) or "/"}

        def start_moved(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            told = [
                (name, _move_location(value, prefix) if name == "Location" else value)
                for name, value in headers
            ]
            return start(status, told, *rest)

        return moved({**environ, "HTTP_ACCEPT_ENCODING": "identity"}, start_moved)

    return answer


def _move_location(address: str, prefix: str) -> str:
    """To a path alone: the proxy's name is the browser's to know."""
    path = re.sub(r"^[a-z]+://[^/]*", "", address)
    return path if path.startswith(f"{prefix}/") else prefix + path
