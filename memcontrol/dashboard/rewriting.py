"""Owns the rewriting of what the dashboard answers: its pages and scripts, before a browser has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from memcontrol.dashboard.guard import App


def rewrite_answers(app: App, kinds: tuple[str, ...], rewrite: Callable[[bytes], bytes]) -> App:
    """The app, each answer of whose Content-Type is one of the kinds is rewritten. What is compressed is
    passed on as it is."""

    def answer(environ: dict[str, Any], start) -> Iterable[bytes]:
        begun: list[Any] = []
        body = app(environ, lambda *said: begun.extend(said))
        status, headers, *rest = begun
        told = {name: value for name, value in headers}
        if not told.get("Content-Type", "").startswith(kinds) or "Content-Encoding" in told:
            start(status, headers, *rest)
            return body
        content = rewrite(b"".join(body))
        if hasattr(body, "close"):
            body.close()
        others = [pair for pair in headers if pair[0] != "Content-Length"]
        start(status, [*others, ("Content-Length", str(len(content)))], *rest)
        return [content]

    return answer
