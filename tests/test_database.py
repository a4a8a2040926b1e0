"""The database: one contract for studies on SQLite and PostgreSQL, by both drivers; outages, locks,
passwords, and errors that say what to do."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from postgres import BIN, PASSWORD

from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.core.space_yaml import load_space
from memcontrol.study import database
from memcontrol.study.database import explain_open_error, find_lock_holder, hide_password, hold_study_lock
from memcontrol.study.opening import open_study

SPACE = load_space("digits")
NAMES = iter(range(1000))


@pytest.fixture(params=["sqlite", "psycopg2", "psycopg"])
def storage(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/s.db"
    server = request.getfixturevalue("postgres")
    return server.write_url("owner", PASSWORD, driver=request.param)


OPEN = []


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().close()


def opened(tmp_path, storage, name, create=True, **rest):
    config = load_config({"name": name, "data": "digits", "space": "digits", "storage": storage})
    OPEN.append(open_study(config, tmp_path, tmp_path / "s.yaml", create=create, **rest))
    return OPEN[-1]


def new_name():
    return f"study-{next(NAMES)}"


def choice(i, method="lora"):
    return SPACE.choice(SPACE.select_groups(method)[: 1 + i % 5], method, 0.1 + i / 100)


def result(one, fid, **rest):
    rewards = {"fid": fid, "memorization": 0.1}
    return {
        "state": "COMPLETE",
        "choice": one.as_dict(),
        "rewards": rewards,
        "seconds": 1.0,
        "measured_with": {"figures": 1},
        **rest,
    }


class TestContract:
    def test_what_is_written_is_read_again_by_another_process(self, storage, tmp_path):
        name = new_name()
        study = opened(tmp_path, storage, name)
        numbers = [study.begin([choice(i)], SPACE) for i in range(4)]
        assert numbers == [0, 1, 2, 3]
        study.finish(0, [result(choice(0), 9.0)])
        study.finish(1, [{"state": "FAIL", "choice": choice(1).as_dict(), "reason": "why"}])
        study.confirm(0, {"fid": 9.5, "memorization": 0.2})
        again = opened(tmp_path, storage, name, create=False)
        assert again.records() == study.records()
        assert [record.state for record in again.records()] == ["COMPLETE", "FAIL", "RUNNING", "RUNNING"]
        assert again.records()[0].values == {"fid": 9.5, "memorization": 0.2} and again.records()[
            2
        ].candidates == (choice(2),)

    def test_telling_a_result_again_changes_nothing(self, storage, tmp_path):
        study = opened(tmp_path, storage, new_name())
        study.begin([choice(0)], SPACE)
        study.finish(0, [result(choice(0), 9.0)])
        before = study.inner.get_trials()
        study.finish(0, [result(choice(0), 1.0)])
        opened(tmp_path, storage, study.config.name).finish(0, [result(choice(0), 1.0)])
        assert study.inner.get_trials() == before

    def test_no_password_is_kept(self, storage, tmp_path):
        study = opened(tmp_path, storage, new_name())
        assert (
            PASSWORD
            not in str(study.inner.user_attrs)
            + str(study.storage.get_study_system_attrs(study.inner._study_id))
            + study.config.model_dump_json()
        )


def test_outages_are_waited_for_and_every_write_happens_once(postgres, tmp_path, monkeypatch):
    """The server is stopped between, before and after writes, by both ways of stopping it."""
    monkeypatch.setattr(database, "RETRY_SECONDS", 0.2)
    said, name = [], new_name()
    with hold_study_lock(postgres.url, name) as lock:
        study = opened(tmp_path, postgres.url, name, say=said.append, lock=lock)
        for i, mode in enumerate(("fast", "immediate", "fast")):
            outage = threading.Thread(target=postgres.outage, args=(2, mode))
            outage.start()
            for k in range(3):
                one = choice(10 * i + k)
                study.finish(study.begin([one], SPACE), [result(one, 10.0 * i + k)])
            outage.join()
    assert sum("is away" in line for line in said) == sum("is back" in line for line in said) >= 2
    assert PASSWORD not in " ".join(said)
    records = opened(tmp_path, postgres.url, name, create=False).records()
    assert [record.number for record in records] == list(range(9)) and {
        record.state for record in records
    } == {"COMPLETE"}
    assert [record.values["fid"] for record in records] == [10.0 * i + k for i in range(3) for k in range(3)]


def test_a_write_that_was_done_though_its_answer_was_lost_is_not_done_twice(postgres, tmp_path, monkeypatch):
    import sqlalchemy.exc

    monkeypatch.setattr(database, "RETRY_SECONDS", 0.1)
    study = opened(tmp_path, postgres.url, new_name())
    storage, lost = study.storage, []

    def once(name):
        real = getattr(storage, name)

        def call(*args, **keys):
            found = real(*args, **keys)
            if name not in lost:
                lost.append(name)
                raise sqlalchemy.exc.OperationalError(
                    "x", {}, Exception("server closed the connection unexpectedly")
                )
            return found

        monkeypatch.setattr(storage, name, call)

    names = [
        "create_new_trial",
        "get_trial_number_from_id",
        "set_trial_system_attr",
        "set_trial_state_values",
    ]
    for name in names:
        once(name)
    study.finish(study.begin([choice(0)], SPACE), [result(choice(0), 9.0)])
    assert lost == names
    assert [
        (record.state, record.values["fid"])
        for record in opened(tmp_path, postgres.url, study.config.name).records()
    ] == [("COMPLETE", 9.0)]


def test_patience_ends_with_one_line(postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(database, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(database, "PATIENCE_SECONDS", 1)
    study = opened(tmp_path, postgres.url, new_name())
    postgres.stop()
    try:
        with pytest.raises(MemControlError, match="has been away for .* the same command goes on") as caught:
            study.begin([choice(0)], SPACE)
    finally:
        postgres.start()
    assert PASSWORD not in str(caught.value)


def test_a_second_orchestrator_is_told_who_holds_the_study(postgres):
    with (
        hold_study_lock(postgres.url, "held"),
        pytest.raises(
            MemControlError,
            match=r"being searched by another process \(memcontrol on .*, process \d+, .*address",
        ),
    ):
        with hold_study_lock(postgres.url, "held"):
            pass
    with hold_study_lock(postgres.url, "held"), hold_study_lock(postgres.url, "another"):
        pass


def test_the_lock_goes_with_its_process_and_is_taken_again_after_an_outage(postgres):
    code = (
        "from memcontrol.study.database import hold_study_lock\nwith "
        f"hold_study_lock({postgres.url!r}, 'killed'):\n    print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(MemControlError), hold_study_lock(postgres.url, "killed"):
            pass
        holder.kill()
    with hold_study_lock(postgres.url, "killed") as lock:
        postgres.outage(0)
        with pytest.raises(Exception, match="(?i)connection|terminat"):
            lock.check()
        lock.take()
        lock.check()


def test_a_lock_is_taken_back_from_ones_own_lost_connection(postgres):
    """As after a cut in the network, which the server notices later than the client."""
    with hold_study_lock(postgres.url, "cut") as lock:
        lost, lock.connection = lock.connection, None
        lock.take()
        lock.check()
        with pytest.raises(Exception, match="(?i)connection|terminat"):
            from sqlalchemy import text

            lost.execute(text("SELECT 1"))
        lost.invalidate()
        lost.close()


@pytest.mark.parametrize(
    "user, password, name, words",
    [
        ("owner", "wrong", "postgres", "password authentication failed.*check the user and the password"),
        ("nobody", PASSWORD, "postgres", "(password authentication failed|role .* does not exist).*"),
        ("owner", PASSWORD, "none-such", "database .none-such. does not exist; create the database"),
    ],
)
def test_mistakes_in_a_url_say_what_to_do_and_show_no_password(
    postgres, tmp_path, user, password, name, words
):
    with pytest.raises(MemControlError, match=words) as caught:
        opened(tmp_path, postgres.write_url(user, password, name), new_name())
    assert password not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize(
    "place", ["127.0.0.1:5432:memcontrol", "127.0.0.1:5432O/memcontrol", "tail@x:y@127.0.0.1:5432/memcontrol"]
)
def test_what_is_no_url_is_refused_without_its_password(tmp_path, place):
    with pytest.raises(MemControlError, match="is no database URL; write it as .* percent-encoded") as caught:
        opened(
            tmp_path,
            f"postgresql+psycopg2://memcontrol:s3cret{place}"
            if place.startswith("tail")
            else f"postgresql://memcontrol:s3cret@{place}",
            "s",
        )
    assert "s3cret" not in str(caught.value) and "tail" not in str(caught.value)


@pytest.mark.parametrize(
    "said, cure",
    [
        ("Can't load plugin: sqlalchemy.dialects:postgresql.psycopg9", r"write postgresql\+psycopg2://"),
        ("cannot execute CREATE TYPE in a read-only transaction", "this role may only read"),
        (
            "Failed to import DB access module for the specified storage URL.",
            "install memcontrol\\[postgresql\\]",
        ),
    ],
)
def test_each_mistake_has_its_own_cure(said, cure):
    with pytest.raises(MemControlError, match=cure):
        raise explain_open_error("postgresql+psycopg2://memcontrol@host/memcontrol", ValueError(said))


def test_who_searches_is_known_from_any_machine(postgres):
    assert find_lock_holder(postgres.url, "held") is None
    with hold_study_lock(postgres.url, "held"):
        assert find_lock_holder(postgres.url, "held").startswith("memcontrol on ")
    assert find_lock_holder(postgres.url, "held") is None


def test_a_role_without_rights_and_an_old_schema_say_what_to_do(postgres, tmp_path):
    opened(tmp_path, postgres.url, new_name())
    postgres.sql("CREATE ROLE guest LOGIN PASSWORD 'guest'", "CREATE DATABASE old")
    with pytest.raises(MemControlError, match="permission denied.*storage/roles.sql"):
        opened(tmp_path, postgres.write_url("guest", "guest"), new_name())
    old = postgres.write_url("owner", PASSWORD, "old")
    opened(tmp_path, old, new_name())
    import psycopg2

    with psycopg2.connect(old.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    connection.close()
    with pytest.raises(MemControlError, match="optuna storage upgrade"):
        opened(tmp_path, old, new_name())


@pytest.mark.parametrize(
    "url, expected",
    [
        ("postgresql://a:b@c/d", "postgresql://a:***@c/d"),
        ("postgresql+psycopg2://a:b@x@c:5/d", "postgresql+psycopg2://a:***@c:5/d"),
        ("postgresql://c/d?user=a&password=b", "postgresql://c/d?user=a&password=***"),
        ("sqlite:///x.db", "sqlite:///x.db"),
    ],
)
def test_urls_are_shown_without_their_password(url, expected):
    assert hide_password(url) == expected


STORAGE = Path(__file__).parent.parent / "storage"


def tool(postgres, program, *args, user="owner", password=PASSWORD, database="postgres", check=True):
    """One of PostgreSQL's own programs, or a script of storage/, connected through the environment."""
    environment = {
        "PATH": f"{BIN}:/usr/bin:/bin",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGUSER": user,
        "PGPASSWORD": password,
        "PGDATABASE": database,
    }
    return subprocess.run(
        [program, *map(str, args)], env=environment, capture_output=True, text=True, check=check
    )


@pytest.fixture(scope="module")
def roles(postgres):
    tool(
        postgres,
        "psql",
        "-v",
        "owner_password=own'er",
        "-v",
        "reader_password=reader",
        "-f",
        STORAGE / "roles.sql",
    )
    return postgres


def test_the_reader_may_read_what_the_owner_writes_and_nothing_else(roles, tmp_path):
    study = opened(tmp_path, roles.write_url("memcontrol", "own%27er", "memcontrol"), "roles")
    study.begin([choice(0)], SPACE)
    read = lambda query, **rest: tool(
        roles,
        "psql",
        "-At",
        "-c",
        query,
        user="memcontrol_reader",
        password="reader",
        database="memcontrol",
        **rest,
    )
    assert read("SELECT count(*) FROM trials").stdout == "1\n"
    for query in (
        "DELETE FROM trials",
        "CREATE TABLE x (y int)",
        "UPDATE studies SET study_name = 'x'",
        "SET default_transaction_read_only = off; DELETE FROM trials",
    ):
        refused = read(query, check=False)
        assert refused.returncode and (
            "permission denied" in refused.stderr or "read-only transaction" in refused.stderr
        )
    assert read("SELECT count(*) FROM trials").stdout == "1\n"


def test_a_backup_comes_back_whole_and_never_over_studies(roles, tmp_path):
    owner = {"user": "memcontrol", "password": "own'er", "database": "memcontrol"}
    study = opened(tmp_path, roles.write_url("memcontrol", "own%27er", "memcontrol"), "kept")
    study.finish(study.begin([choice(0)], SPACE), [result(choice(0), 9.0)])
    tool(roles, STORAGE / "backup.sh", tmp_path / "a.dump", **owner)
    assert (tmp_path / "a.dump").stat().st_mode & 0o077 == 0 and not (tmp_path / "a.dump.part").exists()
    refused = tool(roles, STORAGE / "restore.sh", tmp_path / "a.dump", check=False, **owner)
    assert refused.returncode == 1 and "already holds studies; restore into an empty one" in refused.stderr
    tool(roles, "createdb", "-O", "memcontrol", "second")
    restored = tool(roles, STORAGE / "restore.sh", tmp_path / "a.dump", **{**owner, "database": "second"})
    assert "studies" in restored.stdout
    again = opened(tmp_path, roles.write_url("memcontrol", "own%27er", "second"), "kept", create=False)
    assert again.records() == study.records()
    failed = tool(
        roles, STORAGE / "backup.sh", tmp_path / "b.dump", check=False, **{**owner, "password": "wrong"}
    )
    assert failed.returncode and not list(tmp_path.glob("b.dump*"))


def test_a_dashboard_by_the_reader_shows_the_study_and_changes_nothing(roles, tmp_path):
    """With a role that only reads, and with the owner's: its connection is told to refuse changes."""
    from memcontrol.dashboard.server import find_study_id, make_application

    owner, reader = (
        roles.write_url("memcontrol", "own%27er", "memcontrol"),
        roles.write_url("memcontrol_reader", "reader", "memcontrol"),
    )
    study = opened(tmp_path, owner, "looked-at")
    study.finish(study.begin([choice(0)], SPACE), [result(choice(0), 9.0)])
    assert [record.state for record in opened(tmp_path, reader, "looked-at", create=False).records()] == [
        "COMPLETE"
    ]
    for url in (reader, owner):
        app = make_application(url, tmp_path, False, None)
        number = find_study_id(url, "looked-at")
        assert (
            asked(app, "GET", f"/api/studies/{number}")[0] == 200
            and b'"fid"' in asked(app, "GET", f"/api/studies/{number}")[1]
        )
        assert asked(app, "DELETE", f"/api/studies/{number}")[0] == 405
        unguarded = next(cell.cell_contents for cell in app.__closure__ if callable(cell.cell_contents))
        # what lies behind the guard refuses by itself
        assert asked(unguarded, "DELETE", f"/api/studies/{number}")[0] == 500
        assert (
            asked(unguarded, "PUT", f"/api/studies/{number}/note", b'{"version": 1, "body": "x"}')[0] == 500
        )
    assert [record.state for record in opened(tmp_path, owner, "looked-at", create=False).records()] == [
        "COMPLETE"
    ]


def asked(app, method, path, body=b"{}"):
    """(status, body) of a request, without a server."""
    import io

    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "HTTP_HOST": "127.0.0.1:8080",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8080",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": io.StringIO(),
        "wsgi.url_scheme": "http",
    }
    answers = []
    parts = app(environ, lambda status, headers, *rest: answers.append(int(status[:3])))
    return answers[0], b"".join(parts)
