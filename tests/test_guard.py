"""The guard before the dashboard: who may ask, and what may be written, whatever the app behind it would
do."""

import pytest

from memcontrol.view.dashboard_guard import guard_app


def ask(
    method="GET", path="/api/studies", host="127.0.0.1:8080", writable=False, token=None, query="", **headers
):
    """(status, headers) of the guard before an app that does anything for anyone."""
    reached = []

    def app(environ, start):
        reached.append(environ)
        start("200 OK", [])
        return [b""]

    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "HTTP_HOST": host,
        **headers,
    }
    answers = []
    guard_app(app, writable, token)(
        environ, lambda status, headers, *rest: answers.append((int(status[:3]), dict(headers)))
    )
    status, found = answers[0]
    assert bool(reached) == (status == 200)
    return status, found


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "get", "PROPFIND", ""])
def test_only_reading_passes(method):
    assert ask(method)[0] == 405


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
def test_reading_passes(method):
    assert ask(method)[0] == 200


def test_loopback_answers_to_its_own_names_only():
    for host in ("localhost:8080", "127.0.0.1", "[::1]:8080"):
        assert ask(host=host)[0] == 200
    for host in ("evil.example:8080", "127.0.0.1.evil.example", "", "localhost@evil.example"):
        assert ask(host=host)[0] == 403


def test_a_token_is_asked_for_and_then_kept_in_a_cookie():
    token = "a-long-secret"
    for given in (
        {},
        {"query": "token=wrong"},
        {"HTTP_COOKIE": "memcontrol_token=wrong"},
        {"HTTP_AUTHORIZATION": "Bearer wrong"},
        {"query": "token=" + "é"},
    ):
        assert ask(host="host.example", token=token, **given)[0] == 401
    status, headers = ask(host="host.example", token=token, query=f"token={token}")
    assert status == 200 and headers["Set-Cookie"].startswith(
        f"memcontrol_token={token}; HttpOnly; SameSite=Strict"
    )
    assert ask(host="host.example", token=token, HTTP_COOKIE=f"other=1; memcontrol_token={token}") == (
        200,
        {},
    )
    assert ask(host="host.example", token=token, HTTP_AUTHORIZATION=f"Bearer {token}") == (200, {})
    assert ask("DELETE", host="host.example", token=token, query=f"token={token}")[0] == 405


def test_a_writable_one_takes_changes_from_its_own_pages_only():
    assert ask("PUT", writable=True)[0] == 200
    assert ask("PUT", writable=True, HTTP_ORIGIN="http://127.0.0.1:8080")[0] == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null"):
        assert ask("PUT", writable=True, HTTP_ORIGIN=origin)[0] == 403
