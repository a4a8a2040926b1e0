"""What the README and its like say: every command runs, every link and file that they name exists."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
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


def name_page(page):
    return str(page.relative_to(ROOT))


ELSEWHERE = {  # other tests run these, each with what it needs
    "make demo": "test_demo",
    "make test": "this",
    "make quick": "a part of this",
    "make check": ".ci/run",
    "make docs": "test_docs",
    "make chaos": "test_chaos",
    "memcontrol audit --model my-pipeline": "test_audit and test_attack, sampling takes minutes",
    "memcontrol audit --model runwayml/": "test_attack, on a small base",
}
WHOLE_JOB = {  # what these pages show
    "README.md": {"init", "search", "front", "pick", "retrain", "export"},
    "tutorial.md": {"init", "search", "status", "dashboard", "front", "report", "pick", "retrain", "export"},
}
BUDGET = {
    "inner": {"budget_images": 32, "batch_size": 16, "rounds": 2},
    "rewards": {"n_samples": 16, "force": True, "sampling_steps": 1, "confirm": 0},
}


def blocks(page, language=""):
    return [
        block
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)
        if kind == language
    ]


def commands(page):
    """Each command line of the page's plain blocks, in order, without its comment."""
    lines = [line.partition(" #")[0].strip() for block in blocks(page) for line in block.splitlines()]
    return [line for line in lines if re.match(r"(\$ )?(memcontrol|make|pip|python) ", line)]


@pytest.fixture
def folder(tmp_path, photographs):
    """What a reader has: images, some generated ones, and patience for none but the smallest budget."""
    photographs(40, "images/xrays")
    for i, part in enumerate(("images/train", "images/holdout", "generated")):
        root = photographs(12 * (i + 1), part)
        for path in sorted(root.iterdir())[: 12 * i]:
            path.unlink()
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_page)
def test_every_command_of_a_page_runs_in_its_order(page, folder):
    seen, key = [], None
    for command in commands(page):
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
    assert WHOLE_JOB.get(page.name, set()) <= set(seen)
    for exported in ("my-lora", "my-pipeline", "my-adapter"):
        if (folder / exported).is_dir():
            assert "## How much it copies" in (folder / exported / "README.md").read_text()


def with_small_budget(study, executor="inline"):
    values = yaml.safe_load(study.read_text())
    study.write_text(
        yaml.safe_dump({**values, **BUDGET, "search": {"trials": 1, "workers": 1, "executor": executor}})
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


@pytest.mark.parametrize("page", PAGES, ids=name_page)
def test_the_studies_and_the_python_of_a_page_are_valid(page):
    from memcontrol.config.load import load_config

    for text in blocks(page, "yaml"):
        values = yaml.safe_load(text)
        if not {"services", "groups"} & set(values):
            assert load_config({"name": "a", "data": "digits", **values})
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")


def test_the_python_of_the_commands_runs(shown, monkeypatch, capsys):
    """The block of `import memcontrol`, on a study that has been searched."""
    (block,) = [text for text in blocks(ROOT / "docs/python-api.md", "python") if "memcontrol.front(" in text]
    monkeypatch.setattr(memcontrol, "search", lambda study, *overrides, trials: [])
    monkeypatch.chdir(shown.parent)
    shutil.copy(shown, "xrays.yaml")
    exec(block.replace("copy_rate<=0.02", "copy_rate<=1"), {})
    assert "fid" in capsys.readouterr().out


def test_generated_pages_are_current():
    done = subprocess.run(
        [sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_first_page_fits_a_screen_or_two():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=name_page)
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


def test_a_wheel_knows_its_license_and_its_version():
    assert f"version: {memcontrol.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert os.path.exists(ROOT / "memcontrol/py.typed")
