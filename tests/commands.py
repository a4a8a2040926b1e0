"""memcontrol's commands as a user runs them, each in a process of its own: forked from one that has imported
what they import, which takes a new process seconds."""

import atexit
import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NEW_PROCESS = [sys.executable, "-m", "memcontrol.cli"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
        "diffusers.training_utils",
        "matplotlib.pyplot",
        "memcontrol.cli.commands",
        "memcontrol.search.orchestrator",
        "memcontrol.execution.worker",
        "optuna_dashboard",
        "peft",
        "rich.table",
        "scipy.stats",
        "sklearn.datasets",
        "transformers.models.clip.modeling_clip",
    ]
)


@contextlib.contextmanager
def started(*args, cwd=None, before=None):
    """The process of a command, and the files that take its stdout and its stderr; `before` is called in it
    first. It is killed if it is still there when the block is left."""
    words = [*map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        process = FORKS.Process(
            target=command, args=(words, said, cwd or os.getcwd(), dict(os.environ), before)
        )
        process.start()
        try:
            yield process, said
        finally:
            process.kill()
            process.join()


def run(*args, cwd=None, check=False, before=None):
    """The finished process of a command. Where `check` is set, it must have succeeded."""
    with started(*args, cwd=cwd, before=before) as (process, said):
        process.join()
        done = subprocess.CompletedProcess(
            [*NEW_PROCESS, *map(str, args)], process.exitcode, *(path.read_text() for path in said)
        )
    assert not check or done.returncode == 0, done
    return done


def command(words, said, cwd, environment, before):
    """In the forked process: the command, with streams, folder and environment of its own."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(0, closefd=False),
        open(1, "w", closefd=False),
        open(2, "w", closefd=False, buffering=1),
    )
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["memcontrol", *words]
    if before:
        before()
    from memcontrol.cli import main

    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
