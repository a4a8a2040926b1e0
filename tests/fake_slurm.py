"""A Slurm that only pretends: sbatch, squeue and scancel over files in a folder. Jobs wait for ever, unless
they are let begin. What `broken` in the folder says is how the next sbatch fails."""

import json
import os
import subprocess
import sys
from pathlib import Path


def install(folder: Path, monkeypatch) -> Path:
    """Its commands come first on the path. Returns the folder of its jobs, one JSON file for each."""
    bin_folder, state = folder / "bin", folder / "slurm-state"
    for place in (bin_folder, state):
        place.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {state} {name} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    return state


def list_jobs(state: Path) -> dict[str, dict]:
    """By name, in the order of their submission."""
    found = [json.loads(path.read_text()) for path in sorted(state.glob("*.json"), key=lambda p: int(p.stem))]
    return {job["name"]: job for job in found}


def change_job(state: Path, name: str, **values) -> None:
    job = list_jobs(state)[name]
    (state / f"{job['id']}.json").write_text(json.dumps(job | values))


def let_begin(state: Path, name: str) -> None:
    """Runs the job to its end, here and now."""
    done = subprocess.run(["bash", list_jobs(state)[name]["script"]], stdin=subprocess.DEVNULL)
    change_job(state, name, word="FAILED" if done.returncode else "COMPLETED")


def submit(state: Path, words: list[str]) -> int:
    name, script = words[-2].removeprefix("--job-name="), words[-1]
    (record,) = [word for word in Path(script).read_text().split() if word.endswith(f"{name}.json")]
    assert Path(record).is_file(), "the job is not on record"
    broken = state / "broken"
    words = broken.read_text() if broken.exists() else ""
    if not words or "timed out" in words:  # it got through, and nobody heard of it
        number = len(list(state.glob("*.json"))) + 1
        job = {"id": number, "name": name, "script": script, "word": "PENDING", "used": "0:00"}
        (state / f"{number}.json").write_text(json.dumps(job))
    if words:
        broken.unlink()
        sys.stderr.write(f"sbatch: error: {words}\n")
        return 1
    print(number)
    return 0


def show(state: Path, words: list[str]) -> int:
    (wanted,) = [word.removeprefix("--name=").split(",") for word in words if word.startswith("--name=")]
    for job in list_jobs(state).values():
        if job["name"] in wanted:
            print("|".join(str(job[key]) for key in ("name", "id", "word", "used")))
    return 0


def cancel(state: Path, words: list[str]) -> int:
    change_job(state, words[0].removeprefix("--name="), word="CANCELLED")
    return 0


if __name__ == "__main__":
    command = {"sbatch": submit, "squeue": show, "scancel": cancel}[sys.argv[2]]
    sys.exit(command(Path(sys.argv[1]), sys.argv[3:]))
