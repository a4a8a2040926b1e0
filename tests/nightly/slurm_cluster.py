"""A Slurm of two nodes on this machine, from Debian's packages (slurm-wlm, munge), as root: for the nightly
test of the Slurm executor."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from postgres import free_port

CONF = """
ClusterName=nightly
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=300
JobRequeue=1
ReturnToService=2
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=short Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """`environment` is what Slurm's commands need."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        try:
            self.begin_all()
        except BaseException:
            self.close()
            raise

    def begin_all(self) -> None:
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (folder / "slurm.conf").write_text(
            CONF.format(folder=folder, controller=free_port(), first=free_port(), second=free_port())
        )
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        paths = dict(zip(names, ("munge.key", "munge.socket", "munge.pid", "munge.log", "munge.seed")))
        self.begin(
            "munged",
            [
                "munged",
                "--foreground",
                "--force",
                *(f"--{name}={folder / path}" for name, path in paths.items()),
            ],
        )
        self.begin("slurmctld", ["slurmctld", "-D"])
        for node in ("n1", "n2"):
            self.begin(node, ["slurmd", "-D", "-N", node])
        deadline = time.monotonic() + 60
        while self.ask("sinfo", "-h", "-o", "%T").split() != ["idle"] and time.monotonic() < deadline:
            time.sleep(1)
        assert self.ask("sinfo", "-h", "-o", "%D %T").split() == ["2", "idle"], (
            self.ask("sinfo", "-N", "-l") + self.logs()
        )

    def begin(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "w") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        time.sleep(1)

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def kill(self, node: str) -> None:
        """The node is gone: its slurmd and all that it runs."""
        import psutil

        daemon = self.daemons.pop(node)
        steps = [p for p in psutil.process_iter(["name", "cmdline"]) if "slurmstepd" in p.info["name"]]
        for step in steps:
            if any(
                f"spool-{node}" in path
                for path in [*map(str, [f.path for f in step.open_files()]), *step.info["cmdline"]]
            ) or node in " ".join(step.info["cmdline"]):
                for child in step.children(recursive=True):
                    child.kill()
                step.kill()
        daemon.kill()

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.folder.glob("*.[lo][ou][gt]"))
        )

    def close(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True)
        for daemon in reversed(self.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
        time.sleep(1)
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()
