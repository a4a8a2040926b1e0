"""Owns the guard before optuna-dashboard, which itself lets anyone do anything: who may ask, and that nothing
is written unless allowed."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_READING = ("GET", "HEAD", "OPTIONS")
_COOKIE = "memcontrol_token"
_Environ = dict[str, Any]
_Start = Callable[..., Any]
App = Callable[[_Environ, _Start], Iterable[bytes]]


def guard_app(app: App, writable: bool, token: str | None) -> App:
    """The app behind a guard. Without a token it answers to loopback's names only, so that no page that a
    browser has open can reach it under a name of its own (DNS rebinding); with one, only those who bring it:
    in the URL as ?token=, then in a cookie, or as a bearer. What would write is refused unless `writable`,
    and then only from the dashboard's own pages."""

    def answer(environ: _Environ, start: _Start) -> Iterable[bytes]:
        given = token and _read_token(environ)
        if token and not (given and hmac.compare_digest(given.encode(), token.encode())):
            return _refuse_request(
                start,
                "401 Unauthorized",
                "open the address that `memcontrol dashboard` printed, with its token",
            )
        if not token and _read_host(environ) not in LOOPBACK:
            return _refuse_request(
                start,
                "403 Forbidden",
                "this dashboard answers on loopback only; memcontrol dashboard --host ... asks for "
                "a token instead",
            )
        if environ["REQUEST_METHOD"] not in _READING:
            if not writable:
                return _refuse_request(
                    start,
                    "405 Method Not Allowed",
                    "this dashboard is read-only; memcontrol dashboard --writable allows changes",
                    ("Allow", ", ".join(_READING)),
                )
            if not _is_own_page(environ):
                return _refuse_request(
                    start, "403 Forbidden", "changes are taken from the dashboard's own pages only"
                )
        return app(environ, _add_cookie(start, token) if token and _read_url_token(environ) else start)

    return answer


def _refuse_request(start: _Start, status: str, said: str, *headers: tuple[str, str]) -> Iterable[bytes]:
    body = f'{{"reason": "{said}"}}'.encode()
    start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers])
    return [body]


def _read_token(environ: _Environ) -> str | None:
    bearer = environ.get("HTTP_AUTHORIZATION", "")
    if bearer.startswith("Bearer "):
        return bearer.removeprefix("Bearer ")
    try:
        cookie = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(_COOKIE)
    except CookieError:
        cookie = None
    return _read_url_token(environ) or (cookie.value if cookie else None)


def _read_url_token(environ: _Environ) -> str | None:
    return next(iter(parse_qs(environ.get("QUERY_STRING", "")).get("token", [])), None)


def _add_cookie(start: _Start, token: str) -> _Start:
    """So that the address need not be carried along."""
    cookie = ("Set-Cookie", f"{_COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/")
    return lambda status, headers, *rest: start(status, [*headers, cookie], *rest)


def _read_host(environ: _Environ) -> str | None:
    return urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname


def _is_own_page(environ: _Environ) -> bool:
    """Whether a browser says that the page which asks is the dashboard's; a program that is no browser sends
    no Origin."""
    origin = environ.get("HTTP_ORIGIN")
    return origin is None or urlsplit(origin).netloc == environ.get("HTTP_HOST")
