"""A search on Ray's three nodes and one on Slurm's two, a node killed in the middle of each, and one by the
services of docker-compose.yml, whose Ray head is killed; then the invariants of the chaos suite.

`python tests/nightly/cluster_searches.py [ray] [slurm] [compose]`; Slurm needs Debian's slurm-wlm and munge,
and root.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from chaos import SEARCH, violations, write_study
from compose_services import Services
from postgres import Postgres

from memcontrol.config.load import load_config
from memcontrol.core.run_folder import locate_study_folder

TRIALS = 8


def begun(study: Path, log, environment=None) -> subprocess.Popen:
    return subprocess.Popen([*SEARCH, study], stdout=log, stderr=log, env=environment)


def until_ended(study: Path, n: int, search: subprocess.Popen) -> None:
    folder, deadline = locate_study_folder(study, load_config(study).name), time.monotonic() + 600
    while len(list(folder.glob("*/result.json"))) < n:
        assert search.poll() is None and time.monotonic() < deadline, "the search ended, or makes no progress"
        time.sleep(0.2)


def on_ray(folder: Path, server: Postgres) -> list[str]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    study = write_study(folder, "on-ray", server.url, TRIALS, "ray", ray={"address": cluster.address})
    try:
        with open(folder / "search.log", "w") as log, begun(study, log) as search:
            until_ended(study, 3, search)
            print("three runs have ended: removing a node", flush=True)
            cluster.remove_node(nodes[0], allow_graceful=False)
            assert search.wait(timeout=600) == 0
    finally:
        cluster.shutdown()
    return violations(study, TRIALS, 2)


def on_slurm(folder: Path, server: Postgres) -> list[str]:
    from slurm_cluster import Slurm

    slurm = Slurm(folder / "slurm")
    study = write_study(
        folder, "on-slurm", server.url, TRIALS, "slurm", slurm={"partition": "short", "time_minutes": 20}
    )
    try:
        with open(folder / "search.log", "w") as log, begun(study, log, slurm.environment) as search:
            until_ended(study, 3, search)
            print("three runs have ended: killing slurmd on n1 and what it runs", flush=True)
            slurm.kill("n1")
            assert search.wait(timeout=900) == 0
        print(slurm.ask("sinfo", "-N", "-h", "-o", "%N %T"), flush=True)
    finally:
        slurm.close()
    return violations(study, TRIALS, 2)


def on_compose(folder: Path, server: Postgres) -> list[str]:
    """The services of docker-compose.yml; Ray's head is killed, and what ends of it is begun again by the
    restart policies."""
    study = write_study(folder, "composed", server.url, 3 * TRIALS, "ray", ray={"address": "auto"})
    services = Services(folder, {"STUDY": study.name, "OWNER_PASSWORD": ""})
    try:
        services.up()
        until_ended(study, 3, services.running["orchestrator"])
        print("three runs have ended: killing Ray's head", flush=True)
        services.kill("ray-head")
        deadline = time.monotonic() + 900
        while services.running["orchestrator"].poll() != 0:
            services.keep_running()
            assert time.monotonic() < deadline, "the search does not end"
            time.sleep(1)
        said = (folder / "services.log").read_text().splitlines()
        print(*[line for line in said if line.startswith("memcontrol:")], sep="\n", flush=True)
    finally:
        services.close()
    return violations(study, 3 * TRIALS, 4)


def main() -> int:
    wanted = sys.argv[1:] or ["ray", "slurm", "compose"]
    bad = 0
    for name in wanted:
        with tempfile.TemporaryDirectory(dir="/tmp") as place:
            folder, started = Path(place), time.monotonic()
            folder.chmod(0o755)
            server = Postgres(folder / "pg")
            try:
                found = {"ray": on_ray, "slurm": on_slurm, "compose": on_compose}[name](folder, server)
            except AssertionError as error:
                found = [str(error), (folder / "search.log").read_text()[-3000:]]
            finally:
                server.stop("immediate")
            print(
                f"{name}: {time.monotonic() - started:.0f} s: " + ("\n".join(found) or "all invariants hold"),
                flush=True,
            )
            bad += bool(found)
    return bad


if __name__ == "__main__":
    sys.exit(main())
