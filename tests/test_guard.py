"""The guard before the dashboard: who may ask, and what may be written, whatever the app behind it would
do."""

import gzip

import pytest

from memcontrol.core.errors import MemControlError
from memcontrol.dashboard.guard import guard_app, name_cookie
from memcontrol.dashboard.prefix import check_prefix, put_below
from memcontrol.dashboard.read_only import hide_buttons


def ask(
    method="GET",
    path="/api/studies",
    host="127.0.0.1:8080",
    writable=False,
    token=None,
    query="",
    prefix="",
    given=(),
    **headers,
):
    """(status, headers) of the guard before an app that does anything for anyone."""
    reached = []

    def app(environ, start):
        reached.append(environ)
        start("200 OK", list(given))
        return [b""]

    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "HTTP_HOST": host,
        **headers,
    }
    answers = []
    guard_app(app, writable, token, prefix)(
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
        {"HTTP_COOKIE": f"{name_cookie(token)}=wrong"},
        {"HTTP_COOKIE": f"{name_cookie('another')}={token}"},
        {"HTTP_AUTHORIZATION": "Bearer wrong"},
        {"query": "token=" + "é"},
    ):
        assert ask(host="host.example", token=token, **given)[0] == 401
    status, headers = ask(host="host.example", token=token, query=f"token={token}")
    cookie = f"{name_cookie(token)}={token}"
    assert status == 200 and headers["Set-Cookie"] == f"{cookie}; HttpOnly; SameSite=Strict; Path=/"
    brought = {"HTTP_COOKIE": f"other=1; {cookie}"}, {"HTTP_AUTHORIZATION": f"Bearer {token}"}
    for given in brought:
        status, headers = ask(host="host.example", token=token, **given)
        assert status == 200 and "Set-Cookie" not in headers
    below = ask(host="host.example", token=token, query=f"token={token}", prefix="/x")[1]
    assert below["Set-Cookie"].endswith("Path=/x")
    assert ask("DELETE", host="host.example", token=token, query=f"token={token}")[0] == 405


def test_a_writable_one_takes_changes_from_its_own_pages_only():
    assert ask("PUT", writable=True)[0] == 200
    assert ask("PUT", writable=True, HTTP_ORIGIN="http://127.0.0.1:8080")[0] == 200
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null"):
        assert ask("PUT", writable=True, HTTP_ORIGIN=origin)[0] == 403


@pytest.mark.parametrize(
    "other", ["{a: 1}", 'a="b', "x[]=1", "\xe4=\xf6", "=", "a b c", "$Version=1", ";;", "a,b=1"]
)
def test_cookies_of_others_lock_nobody_out(other):
    token = "a-long-secret-token"
    own = f"{name_cookie(token)}={token}"
    for cookies in (f"{other}; {own}", f"{own}; {other}", f"{other};{own};{other}"):
        assert ask(token=token, HTTP_COOKIE=cookies)[0] == 200
    assert ask(token=token, HTTP_COOKIE=other)[0] == 401


@pytest.mark.parametrize("headers", [{"host": "["}, {"host": "[::1"}, {"HTTP_ORIGIN": "http://["}])
def test_what_is_no_address_is_a_bad_request(headers):
    for token in (None, "a-long-secret-token"):
        assert ask(token=token, **headers)[0] == 400


def test_no_answer_is_for_another_origin():
    """Of the app's own headers those stay that let nobody in; refusals are no different."""
    given = [
        ("Access-Control-Allow-Origin", "*"),
        ("access-control-allow-headers", "*"),
        ("Content-Security-Policy", "default-src 'self'"),
        ("Content-Type", "image/png"),
    ]
    status, headers = ask(given=given)
    assert status == 200 and headers["Content-Type"] == "image/png"
    assert not any(name.lower().startswith("access-control") for name in headers)
    assert headers["Content-Security-Policy"] == "default-src 'self';frame-ancestors 'none'"
    refused = ask(host="evil.example")[1], ask("DELETE")[1], ask(token="a-long-secret-token")[1]
    for answer in (headers, *refused):
        assert "frame-ancestors 'none'" in answer["Content-Security-Policy"]
        assert answer["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_origins_are_told_nothing_and_links_are_followed(site):
    for destination in ("image", "script", "iframe", "empty", ""):
        assert ask(HTTP_SEC_FETCH_SITE=site, HTTP_SEC_FETCH_DEST=destination)[0] == 403
    assert ask(HTTP_SEC_FETCH_SITE=site, HTTP_SEC_FETCH_DEST="document")[0] == 200
    assert ask(HTTP_SEC_FETCH_SITE="same-origin", HTTP_SEC_FETCH_DEST="image")[0] == 200


def get(app, path):
    """(headers, body) of what an app answers."""
    said = []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path}
    body = app(environ, lambda status, headers: said.append(dict(headers)))
    return said[0], b"".join(body)


def test_below_a_prefix_every_address_is():
    asked = []

    def app(environ, start):
        asked.append(environ["PATH_INFO"])
        kind = "text/html" if environ["PATH_INFO"] == "/page" else "application/json"
        start("302 Found", [("Content-Type", kind), ("Location", "http://host:80/dashboard")])
        return [b'<script src="/static/bundle.js">`/artifacts/${e}` `${this.url}/api/x` "/dashboard" /api/']

    below = put_below(app, "/x/y")
    for path, passed in {"/x/y/page": "/page", "/page": "/page", "/x/y": "/", "/x/yz": "/x/yz"}.items():
        get(below, path)
        assert asked.pop() == passed
    headers, body = get(below, "/x/y/page")
    assert headers["Location"] == "/x/y/dashboard" and int(headers["Content-Length"]) == len(body)
    assert body == (
        b'<script src="/x/y/static/bundle.js">`/x/y/artifacts/${e}` `${this.url}/x/y/api/x` '
        b'"/x/y/dashboard" /api/'
    )
    assert b"/x/y" not in get(below, "/x/y/data")[1]  # what people wrote stays as it is
    assert put_below(app, "") is app


def test_a_prefix_is_a_path():
    assert check_prefix("/a/b.c-d_e~1/") == "/a/b.c-d_e~1" and check_prefix("") == check_prefix("/") == ""
    for wrong in ("x", "//x", "/a//b", '/"', "/a?b", "/a b", "/\n", "http://x", "/ä"):
        with pytest.raises(MemControlError, match="--prefix"):
            check_prefix(wrong)


@pytest.mark.parametrize(
    ("kind", "encoding", "changes"),
    [
        ("text/html; charset=utf-8", None, True),
        ("text/html", "gzip", False),
        ("application/json", None, False),
    ],
)
def test_pages_of_a_read_only_dashboard_hide_what_writes(kind, encoding, changes):
    """Pages alone: what is no page, or compressed, is passed on as it is."""
    page = b"<html><head><title>t</title></head><body></head></body></html>"
    sent = gzip.compress(page) if encoding else page
    told = [("Content-Type", kind), ("Content-Length", str(len(sent))), ("X-Own", "1")]
    told += [("Content-Encoding", encoding)] if encoding else []

    def app(environ, start):
        start("200 OK", told)
        return [sent[:9], sent[9:]]

    answers = []
    body = b"".join(hide_buttons(app)({}, lambda status, headers: answers.append(dict(headers))))
    assert int(answers[0]["Content-Length"]) == len(body) and answers[0]["X-Own"] == "1"
    if not changes:
        assert body == sent
        return
    style = body.partition(b"<style>")[2].partition(b"</style>")[0]
    assert b"EditIcon" in style and b"UploadFileIcon" in style and b"display: none" in style
    assert body.replace(b"<style>" + style + b"</style>", b"") == page
