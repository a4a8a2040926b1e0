"""What the README and its like say: every command runs, every link and file that they name exists."""

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from commands import NEW_PROCESS, run

import memcontrol

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("*/README.md")),
    ROOT / "benchmarks/evidence/README.md",
]
ELSEWHERE = {  # other tests run these, each with what it needs
    "make demo": "test_demo",
    "make test": "this",
    "make check": ".ci/run",
    "make chaos": "test_chaos",
    "memcontrol audit --model my-pipeline": "test_audit, sampling takes minutes",
}
BUDGET = {
    "inner": {"budget_images": 32, "batch_size": 16, "rounds": 2},
    "rewards": {"n_samples": 16, "force": True, "sampling_steps": 1, "confirm": 0},
}


def blocks(language=""):
    text = (ROOT / "README.md").read_text()
    return [
        block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M) if kind == language
    ]


def commands():
    """Each command line of the README's plain blocks, in order, without its comment."""
    lines = [line.partition(" #")[0].strip() for block in blocks() for line in block.splitlines()]
    return [line for line in lines if re.match(r"(\$ )?(memcontrol|make|pip|python) ", line)]


@pytest.fixture
def folder(tmp_path, photographs):
    """What a reader of the README has: images, some generated ones, and patience for none but the smallest
    budget."""
    photographs(40, "images/xrays")
    for i, part in enumerate(("images/train", "images/holdout", "generated")):
        root = photographs(12 * (i + 1), part)
        for path in sorted(root.iterdir())[: 12 * i]:
            path.unlink()
    return tmp_path


def test_every_command_of_the_readme_runs_in_its_order(folder):
    seen, key = [], None
    for command in commands():
        if any(command.startswith(known) for known in ELSEWHERE) or "other.yaml" in command:
            continue
        if "KEY" in command:
            key = key or next(
                path.parent.name for path in (folder / "runs/xrays/retrain").glob("*/pairs.png")
            )
            command = command.replace("KEY", key)
        if command.startswith("memcontrol dashboard"):
            serve(command + " --port 0", folder)
        else:
            done = run(*shlex.split(command)[1:], cwd=folder)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        seen.append(command.split()[1])
        if seen[-1] == "init":
            with_small_budget(folder / "xrays.yaml")
    assert {
        "init",
        "search",
        "status",
        "dashboard",
        "front",
        "report",
        "pick",
        "retrain",
        "export",
        "audit",
    } <= set(seen)
    assert (folder / "xrays.html").stat().st_size > 10_000
    for exported in ("my-lora", "my-pipeline", "my-adapter"):
        if (folder / exported).is_dir():
            assert "## How much it copies" in (folder / exported / "README.md").read_text()


def with_small_budget(study):
    values = yaml.safe_load(study.read_text())
    study.write_text(
        yaml.safe_dump({**values, **BUDGET, "search": {"trials": 1, "workers": 1, "executor": "inline"}})
    )


def restore_interrupts():
    """Tests in the background inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def serve(command, folder):
    """It prints its address, answers, and ends on Ctrl-C."""
    import urllib.request

    arguments = [*NEW_PROCESS, *shlex.split(command)[1:]]
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts,
    )
    address = process.stdout.readline().strip()
    with urllib.request.urlopen(address) as response:
        assert response.status == 200
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in errors


def test_the_studies_and_the_python_of_the_readme_are_valid(tmp_path):
    from memcontrol.core.config import load_config

    for text in blocks("yaml"):
        values = yaml.safe_load(text)
        assert load_config({"name": "a", "data": "digits", **values})
    for text in blocks("python"):
        compile(text, "README.md", "exec")


def test_the_readmes_python_runs(shown, monkeypatch, capsys):
    """The block of `import memcontrol`, on a study that has been searched."""

    (block,) = [text for text in blocks("python") if "memcontrol.front(" in text]
    monkeypatch.setattr(memcontrol, "search", lambda study, *overrides, trials: [])
    monkeypatch.chdir(shown.parent)
    shutil.copy(shown, "xrays.yaml")
    exec(block.replace("copy_rate<=0.02", "copy_rate<=1"), {})
    assert "fid" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        path, anchor = target
        if path.startswith(("http:", "https:")):
            continue
        there = (page.parent / path) if path else page
        assert there.exists(), f"{page.name}: {path}"
        if anchor:
            assert anchor in {
                slug(heading) for heading in re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            }, f"{page.name}: #{anchor}"


def slug(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_file_tree_names_every_file_and_no_other():
    tree = blocks()[-1]
    names = {
        name
        for line in tree.splitlines()
        if line.startswith("  ")
        for name in re.findall(r"[a-z_0-9]+\.py", line.split("   ")[0] + " ")
    }
    assert names == {path.name for path in (ROOT / "memcontrol").glob("*.py") if path.name != "__init__.py"}
    for line in tree.splitlines():
        if re.match(r"\w+/", line):
            assert (ROOT / line.split("/")[0]).is_dir(), line


def test_a_wheel_knows_its_license_and_its_version():
    assert f"version: {memcontrol.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert os.path.exists(ROOT / "memcontrol/py.typed")
