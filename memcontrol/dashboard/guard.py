"""Owns the guard before optuna-dashboard, which itself lets anyone do anything: who may ask, what a browser
may do with the answers, and that nothing is written unless allowed."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_READING = ("GET", "HEAD", "OPTIONS")
_Environ = dict[str, Any]
_Headers = list[tuple[str, str]]
_Start = Callable[..., Any]
App = Callable[[_Environ, _Start], Iterable[bytes]]

# No page of another origin frames an answer, shows a picture of it or reads it, nor learns its address.
_CSP = "Content-Security-Policy"
_NO_FRAMES = "frame-ancestors 'none'"
_SAFE = {
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def guard_app(app: App, writable: bool, token: str | None, prefix: str = "") -> App:
    """The app behind a guard. With a token only those are answered who bring it: in the URL as ?token=, then
    in a cookie of `prefix`, or as a bearer. Without one loopback's names alone are answered to, so that no
    page that a browser has open can reach it under a name of its own (DNS rebinding). What would write is
    refused unless `writable`, and then only from the dashboard's own pages."""

    def answer(environ: _Environ, start: _Start) -> Iterable[bytes]:
        start = _harden(start)
        refused = _find_refusal(environ, writable, token)
        if refused:
            return _refuse_request(start, *refused)
        is_new = token and _read_url_token(environ)
        return app(environ, _add_cookie(start, token, prefix) if token and is_new else start)

    return answer


def _find_refusal(
    environ: _Environ, writable: bool, token: str | None
) -> tuple[str, str, *tuple[tuple[str, str], ...]] | None:
    """Status, why, and further headers."""
    try:
        host = urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname
        is_own_page = _is_own_page(environ)
    except ValueError:
        return "400 Bad Request", "Host or Origin is none"
    if token and not any(
        hmac.compare_digest(given.encode(), token.encode()) for given in _list_tokens(environ, token)
    ):
        return "401 Unauthorized", "open the address that `memcontrol dashboard` printed, with its token"
    if not token and host not in LOOPBACK:
        return (
            "403 Forbidden",
            "without a token this dashboard answers on loopback only; leave --no-token out",
        )
    if _is_foreign_page(environ):
        return "403 Forbidden", "pages of another origin are not answered"
    if environ["REQUEST_METHOD"] not in _READING:
        if not writable:
            return (
                "405 Method Not Allowed",
                "this dashboard is read-only; memcontrol dashboard --writable allows changes",
                ("Allow", ", ".join(_READING)),
            )
        if not is_own_page:
            return "403 Forbidden", "changes are taken from the dashboard's own pages only"
    return None


def _refuse_request(start: _Start, status: str, said: str, *headers: tuple[str, str]) -> Iterable[bytes]:
    body = json.dumps({"reason": said}).encode()
    start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers])
    return [body]


def _list_tokens(environ: _Environ, token: str) -> list[str]:
    """Wherever one may be. Cookies are split by hand: of other people's that it cannot parse Python's
    http.cookies makes none of all."""
    bearer = environ.get("HTTP_AUTHORIZATION", "")
    cookies = (part.strip().partition("=") for part in environ.get("HTTP_COOKIE", "").split(";"))
    found = [value.strip('"') for name, _, value in cookies if name == name_cookie(token)]
    found += [bearer.removeprefix("Bearer ")] if bearer.startswith("Bearer ") else []
    return [*found, *filter(None, [_read_url_token(environ)])]


def name_cookie(token: str) -> str:
    """Of its own for each dashboard: browsers keep the cookies of a machine's ports together."""
    return f"memcontrol_{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def _read_url_token(environ: _Environ) -> str | None:
    return next(iter(parse_qs(environ.get("QUERY_STRING", "")).get("token", [])), None)


def _add_cookie(start: _Start, token: str, prefix: str) -> _Start:
    """So that the address need not be carried along."""
    cookie = f"{name_cookie(token)}={token}; HttpOnly; SameSite=Strict; Path={prefix or '/'}"
    return lambda status, headers, *rest: start(status, [*headers, ("Set-Cookie", cookie)], *rest)


def _harden(start: _Start) -> _Start:
    """What the app lets other origins do is taken back."""

    def start_hardened(status: str, headers: _Headers, *rest: Any) -> Any:
        kept = [
            (name, value)
            for name, value in headers
            if not name.lower().startswith("access-control-") and name not in (*_SAFE, _CSP)
        ]
        policy = [value for name, value in headers if name == _CSP]
        return start(status, [*kept, (_CSP, ";".join([*policy, _NO_FRAMES])), *_SAFE.items()], *rest)

    return start_hardened


def _is_foreign_page(environ: _Environ) -> bool:
    """Whether a browser says that a page of another origin asks, another port's included; to follow its link
    is a person's own will."""
    is_other = environ.get("HTTP_SEC_FETCH_SITE") in ("cross-site", "same-site")
    return is_other and environ.get("HTTP_SEC_FETCH_DEST") != "document"


def _is_own_page(environ: _Environ) -> bool:
    """Whether a browser says that the page which asks is the dashboard's; a program that is no browser sends
    no Origin."""
    origin = environ.get("HTTP_ORIGIN")
    return origin is None or urlsplit(origin).netloc == environ.get("HTTP_HOST")
