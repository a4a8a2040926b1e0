"""What a person sees in a browser: the dashboard and the report, in headless Chromium."""

import contextlib
import hashlib
import http.client
import http.server
import json
import re
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from commands import NEW_PROCESS, run

from memcontrol.core.run_folder import locate_study_folder


@contextlib.contextmanager
def served(study, *options):
    """The dashboard's address, while it runs."""
    process = subprocess.Popen(
        [*NEW_PROCESS, "dashboard", str(study), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def dashboard(shown):
    with served(shown) as address:
        yield address


@pytest.fixture
def page(chromium):
    """A page that remembers what it asked for, and its errors."""
    context = chromium.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    context.close()


def at(address, path):
    """The address of something below what is served at an address, with its token."""
    place, _, token = address.partition("?token=")
    return f"{place}{path}{'&' if '?' in path else '?'}token={token}"


def asked(address, path, method="GET", body=None, token=None):
    """(status, body) of a request to the server of an address, with its token."""
    root, _, own = address.partition("/dashboard")
    token = own.partition("?token=")[2] if token is None else token
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(f"{root}{path}", method=method, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def contents(study):
    folder = locate_study_folder(study, "seen")
    paths = [folder / "study.db", *sorted((folder / "artifacts").iterdir())]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_dashboard_lists_the_study_and_shows_its_front_under_the_metrics_names(dashboard, page):
    page.goto(dashboard)
    page.goto(dashboard.partition("/studies")[0])  # the cookie now says who asks
    page.get_by_text(re.compile(r"^\d+\. seen$")).first.click()
    page.get_by_text("Pareto Front", exact=True).wait_for()
    page.get_by_text("seen: front").wait_for()
    text = page.inner_text("body")
    assert "Objective X:" in text and "fid" in text and "memorization" in text
    assert "seen: hypervolume" in text
    assert page.locator(".js-plotly-plot").count() >= 4
    assert page.errors == []
    assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in page.asked)


def test_a_trial_shows_its_note_and_its_images(dashboard, page):
    page.goto(at(dashboard, "/trials?numbers=3"))
    page.get_by_text("pairs.png").wait_for()
    text = page.inner_text("body")
    assert "as searched" in text and "copied (95 %)" in text and "Trained groups:" in text
    images = page.locator("img[src*='/artifacts/']")
    images.nth(1).wait_for()
    assert images.count() == 2
    assert all(
        page.evaluate(
            "image => image.decode().then(() => image.naturalWidth)", images.nth(i).element_handle()
        )
        > 500
        for i in range(2)
    )
    # no line of raw JSON stretches the page
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.errors == []


@pytest.mark.parametrize("path", ["", "/trials?numbers=3", "/note"])
def test_a_read_only_dashboard_shows_no_button_that_writes(dashboard, page, path):
    """Pencil, upload, create, rename and delete; the icons are still there, which tells that the names
    hold."""
    page.goto(at(dashboard, path))
    hidden = {"": "UploadFileIcon", "/trials?numbers=3": "EditIcon", "/note": "EditIcon"}[path]
    page.locator(f"[data-testid={hidden}]").first.wait_for(state="attached")
    assert not page.locator(f"[data-testid={hidden}]").first.is_visible()
    assert page.get_by_text("Upload a New File").filter(visible=True).count() == 0
    page.goto(dashboard.partition("/studies")[0])
    page.locator("[data-testid=RefreshIcon]").first.wait_for()
    for icon in ("DeleteIcon", "AddBoxIcon", "DriveFileRenameOutlineIcon"):
        page.locator(f"[data-testid={icon}]").first.wait_for(state="attached")
        assert not page.locator(f"[data-testid={icon}]").first.is_visible(), icon


def test_the_study_has_a_note(dashboard, page):
    page.goto(at(dashboard, "/note"))
    page.get_by_text("Front and anchors").wait_for()
    assert re.search(r"32 train, 40 holdout, 48 test", page.inner_text("body"))


def test_what_would_write_is_refused_and_changes_nothing(dashboard, shown):
    before = contents(shown)
    assert len(before) > 8
    study = json.loads(asked(dashboard, "/api/studies/1")[1])
    trial = study["trials"][0]
    artifact = trial["artifacts"][0]["artifact_id"]
    attempts = [
        ("DELETE", "/api/studies/1"),
        ("POST", "/api/studies"),
        ("POST", "/api/studies/1/rename"),
        ("PUT", "/api/studies/1/note"),
        ("POST", f"/api/trials/{trial['trial_id']}/tell"),
        ("PUT", f"/api/studies/1/{trial['trial_id']}/note"),
        ("PATCH", "/api/studies/1"),
        ("DELETE", f"/api/artifacts/1/{trial['trial_id']}/{artifact}"),
        ("POST", f"/api/artifacts/1/{trial['trial_id']}"),
        ("POST", "/incompatible-rdb-schema"),
    ]
    for method, path in attempts:
        body = json.dumps(
            {
                "study_name": "x",
                "directions": ["minimize"],
                "state": "Fail",
                "body": "x",
                "version": 99,
                "file": "data:text/plain;base64,AA==",
            }
        ).encode()
        status, answer = asked(dashboard, path, method, body)
        assert status == 405 and b"read-only" in answer, (method, path)
    assert contents(shown) == before
    assert json.loads(asked(dashboard, "/api/studies/1")[1]) == study


def test_other_interfaces_ask_for_a_token(shown):
    with served(shown, "--host", "0.0.0.0") as address:
        token = address.partition("?token=")[2]
        assert len(token) > 15
        local = address.replace("0.0.0.0", "127.0.0.1")
        for path in ("/api/studies", "/api/studies?token=wrong"):
            assert asked(local, path, token="")[0] == 401
        assert asked(local, f"/api/studies?token={token}", token="")[0] == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "DELETE"])
def test_no_endpoint_is_open_without_the_token(dashboard, method):
    """Each route that the library has, for this machine's own users too."""
    import optuna
    from optuna_dashboard._app import create_app

    routes = [route.rule for route in create_app(optuna.storages.InMemoryStorage()).routes]
    paths = {re.sub(r"<.*?>", "1", rule.replace("<:re:(/.*)?>", "")) for rule in routes}
    assert {"/api/studies", "/csv/1", "/static/1", "/dashboard"} <= paths
    for path in (*paths, "/dashboard/studies/1", "/artifacts/1/1/a", "/nothing"):
        for token in ("", "wrong"):
            assert asked(dashboard, path, method, token=token)[0] == 401, (method, path)


def test_none_is_asked_for_where_that_is_wanted_and_its_price_is_said(shown):
    process = subprocess.Popen(
        [*NEW_PROCESS, "dashboard", str(shown), "--port", "0", "--no-token"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = process.stdout.readline().strip()
        assert "token" not in address and asked(address, "/api/studies")[0] == 200
    finally:
        process.terminate()
    assert "every user and program of this machine may read the study" in process.communicate()[1]
    refused = run("dashboard", shown, "--no-token", "--host", "0.0.0.0")
    assert refused.returncode == 1 and refused.stderr.startswith("memcontrol: --no-token is for loopback")


@contextlib.contextmanager
def listening(answer):
    """The address of a server whose `answer` to a request's path and headers is (status, headers, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answer(self.path, self.headers)
            self.send_response(status)
            for pair in headers:
                self.send_header(*pair)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("strips", [True, False], ids=["strips", "keeps"])
def test_behind_a_proxy_all_is_below_its_path(shown, page, strips):
    """Pages, requests, pictures and cookies, whether or not the proxy takes the path off."""
    with served(shown, "--prefix", "/lab/memcontrol") as address:
        inner = address.partition("/lab")[0]

        def forward(path, headers):
            if not path.startswith("/lab/memcontrol"):
                return 404, [], b"another's"
            sent = {name: headers[name] for name in ("Cookie", "Accept", "Host") if headers[name]}
            path = path.removeprefix("/lab/memcontrol") if strips else path
            connection = http.client.HTTPConnection(inner.removeprefix("http://"))
            connection.request("GET", path, headers=sent)
            answer = connection.getresponse()
            kept = [pair for pair in answer.getheaders() if pair[0] not in ("Connection", "Date", "Server")]
            return answer.status, kept, answer.read()

        with listening(forward) as outer:
            page.goto(at(address.replace(inner, outer), "/trials?numbers=3"))
            page.get_by_text("pairs.png").wait_for()
            images = page.locator("img[src*='/artifacts/']")
            images.nth(1).wait_for()
            loaded = "image => image.decode().then(() => image.naturalWidth)"
            assert page.evaluate(loaded, images.nth(1).element_handle()) > 500
            page.goto(f"{outer}/lab/memcontrol/")  # a redirect
            page.get_by_text(re.compile(r"^\d+\. seen$")).first.click()
            page.get_by_text("Pareto Front", exact=True).wait_for()
            cookies = page.context.cookies()
            assert page.errors == [] and {cookie["path"] for cookie in cookies} == {"/lab/memcontrol"}
            below = (f"{outer}/lab/memcontrol/", "data:", "blob:")
            assert len(page.asked) > 5 and all(url.startswith(below) for url in page.asked)


# what a page can try: to ask, as itself and as the visitor; to show a picture; to frame; to run as a script
PROBE = """async ([root, picture]) => {
  const read = async (path, how) => {
    try { return await (await fetch(path, how)).text() || null } catch (error) { return null } };
  const put = (name, source) => new Promise(done => {
    const node = document.createElement(name); node.src = source;
    node.onload = () => {
      try { done(name == 'iframe' ? node.contentDocument.body.innerText || null : name) }
      catch { done(null) } };
    node.onerror = () => done(null); setTimeout(() => done(null), 2000);
    document.body.append(node) });
  return [
    await read(root + '/api/studies'), await read(root + '/api/studies', {credentials: 'include'}),
    await read(picture, {credentials: 'include'}),
    await read(root + '/csv/1', {mode: 'no-cors', credentials: 'include'}),
    await put('img', picture), await put('iframe', root + '/dashboard'),
    await put('script', root + '/static/bundle.js'),
  ] }"""


@pytest.mark.parametrize("options", [(), ("--no-token",)], ids=["token", "no token"])
@pytest.mark.parametrize("origin", ["127.0.0.1", "localhost"])
def test_a_page_of_another_origin_reads_nothing(shown, page, options, origin):
    """Another port of the same name, which a browser sends the same cookies to, or another name; while the
    dashboard is open beside it."""
    evil_page = 200, [("Content-Type", "text/html")], b"<body>x"
    with served(shown, *options) as address, listening(lambda *_: evil_page) as evil:
        root = address.partition("/dashboard")[0]
        trials = json.loads(asked(address, "/api/studies/1")[1])["trials"]
        trial = next(trial for trial in trials if trial["artifacts"])
        picture = f"{root}/artifacts/1/{trial['trial_id']}/{trial['artifacts'][0]['artifact_id']}"
        page.goto(address)
        page.get_by_text("seen: front").wait_for()
        other = page.context.new_page()
        other.goto(evil.replace("127.0.0.1", origin))
        assert other.evaluate(PROBE, [root, picture]) == [None] * 7
        own = page.evaluate(PROBE, [root, picture])  # who may, does
        assert "seen" in own[0] and own[2] and own[4] == "img"


def test_a_writable_dashboard_takes_a_note(shown, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(shown.parent, copy)
    with served(copy / shown.name, "--writable") as address:
        version = json.loads(asked(address, "/api/studies/1")[1])["note"]["version"]
        assert (
            asked(
                address,
                "/api/studies/1/note",
                "PUT",
                json.dumps({"body": "mine", "version": version + 1}).encode(),
            )[0]
            == 204
        )
        assert json.loads(asked(address, "/api/studies/1")[1])["note"]["body"] == "mine"


@pytest.fixture(scope="module")
def report(shown, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "seen.html"
    done = run("report", shown, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_opens_from_a_file_and_asks_for_nothing(report, page, width, scheme):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(report.as_uri())
    page.wait_for_load_state("load")
    assert page.errors == []
    assert [url for url in page.asked if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for heading in (
        "What data protection asks",
        "Quality and copying",
        "Front and anchors",
        "Which layers",
        "What drives what",
        "Images",
        "Cost and versions",
        "How to reproduce it",
    ):
        assert page.get_by_role("heading", name=heading, exact=True).count() == 1, heading
    paper, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    dark = sum(map(int, re.findall(r"\d+", paper)[:3])) < 200
    assert dark == (scheme == "dark") != (sum(map(int, re.findall(r"\d+", ink)[:3])) < 200)
    images = page.locator(".wide img")
    assert images.count() >= 1 and all(
        images.nth(i).evaluate("image => image.naturalWidth") > 500 for i in range(images.count())
    )


def test_a_point_of_the_front_tells_what_it_is_and_marks_its_rows(report, page):
    page.goto(report.as_uri())
    point = page.locator(".point.sampled").first
    number = point.get_attribute("data-trial")
    point.focus()
    assert page.inner_text(".told").startswith(f"trial {number}: ")
    assert page.locator(f'[data-trial="{number}"].on').count() >= 2


def test_the_report_prints_on_white(report, page):
    page.emulate_media(media="print", color_scheme="dark")
    page.goto(report.as_uri())
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".screen").first.is_hidden()
    assert Path(report).stat().st_size < 5_000_000
