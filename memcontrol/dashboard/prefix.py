"""Owns the dashboard below a path of a reverse proxy: optuna-dashboard itself answers at the root only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from memcontrol.core.errors import MemControlError
from memcontrol.dashboard.guard import App

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
    rewritten: dict[bytes, bytes] = {}

    def answer(environ: dict[str, Any], start) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == prefix or path.startswith(f"{prefix}/"):
            environ = {**environ, "PATH_INFO": path.removeprefix(prefix) or "/"}
        begun: list[Any] = []
        body = app({**environ, "HTTP_ACCEPT_ENCODING": "identity"}, lambda *said: begun.extend(said))
        status, headers, *rest = begun
        moved = [
            (name, _move_location(value, prefix) if name == "Location" else value) for name, value in headers
        ]
        if not any(name == "Content-Type" and value.startswith(_REWRITTEN) for name, value in headers):
            start(status, moved, *rest)
            return body
        content = b"".join(body)
        if hasattr(body, "close"):
            body.close()
        if content not in rewritten:
            icon = f'<head><link rel="icon" href="{prefix}/favicon.ico">'  # else the browser asks at the root
            moved_content = _ADDRESS.sub(prefix.encode(), content)
            rewritten[content] = moved_content.replace(b"<head>", icon.encode(), 1)
        others = [pair for pair in moved if pair[0] != "Content-Length"]
        start(status, [*others, ("Content-Length", str(len(rewritten[content])))], *rest)
        return [rewritten[content]]

    return answer


def _move_location(address: str, prefix: str) -> str:
    """To a path alone: the proxy's name is the browser's to know."""
    path = re.sub(r"^[a-z]+://[^/]*", "", address)
    return path if path.startswith(f"{prefix}/") else prefix + path
