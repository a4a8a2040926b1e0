"""What people and files give that is none of what was asked for, by kind: one line, nothing left behind."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from commands import NEW_PROCESS, run
from conftest import CHOICE
from fuzzed_arguments import run_case
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from memcontrol.core import console
from memcontrol.core.choice import Choice
from memcontrol.core.console import escape_controls, make_console
from memcontrol.core.errors import MemControlError
from memcontrol.core.files import read_json, write_text
from memcontrol.core.space_yaml import dump_space, load_space
from memcontrol.core.yaml_reader import parse_yaml, read_yaml
from memcontrol.model.adapter import format_header, inject_adapter
from memcontrol.model.saved_adapter import load_adapter
from memcontrol.study.database import explain_open_error, hide_password
from memcontrol.view.audit_page import check_audit_folder
from memcontrol.view.report_data import format_csv
from memcontrol.view.tables import RewardsTable

ODD_NAMES = ("work [v2]", "x[", "[bold]y", ":smile:", "a[red]b[link=z]", "back\\[slash]")


@pytest.mark.parametrize("seed", range(60))
def test_any_argument_gives_a_result_or_one_line(seed, tmp_path):
    wrong = run_case(seed, tmp_path)
    assert not wrong, wrong


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_printed_as_it_is(name, study_file, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    study = study_file().rename(folder / "s.yaml")
    done = run("status", study)
    assert done.returncode == 1 and f"memcontrol search {study} " in done.stderr
    said = Console(file=io.StringIO(), width=200, markup=False, emoji=False)
    said.print(RewardsTable([(name, name, {})], name, note=name))
    assert said.file.getvalue().count(name) == 4


def test_a_closing_tag_that_was_never_opened_is_a_name(capsys, monkeypatch):
    monkeypatch.setattr(console, "level", console.NORMAL)
    made = make_console()
    made.print("x[/y]")
    made.print(RewardsTable([("a", "x[/y]", {})], "x[/y]"))
    assert capsys.readouterr().err.count("x[/y]") == 3


def test_line_breaks_and_controls_in_names_are_escaped():
    assert escape_controls("a\nb\x1b[31m\udcff é") == "a\\nb\\x1b[31m\\udcff é"
    done = run("search", "a\nmemcontrol: all is well")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "a\\nmemcontrol" in done.stderr


def write_bomb(depth):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        write_bomb(9),
        write_bomb(40),
        "[" * 5000,
        "{a: " * 3000,
        "a: &b [*b]",
        "a: &b {c: {d: *b}}",
        "9" * 9999,
    ],
    ids=["bomb", "large bomb", "deep lists", "deep keys", "itself", "itself, deeper", "digits"],
)
def test_a_yaml_that_would_not_end_is_one_line_in_every_reader(text, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
    with pytest.raises(MemControlError, match="not valid YAML"):
        read_yaml(path, ["name"])
    with pytest.raises(MemControlError, match="not valid YAML"):
        load_space(str(path))
    with pytest.raises(MemControlError, match="not valid YAML"):
        from memcontrol.config.load import load_config

        load_config({"name": "s", "data": "digits"}, [f"space={text}"])


def test_aliases_as_people_write_them_stay():
    text = "a: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\nd: [*a, *a]"
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, '{"a": 1', "nul"])
def test_a_broken_json_is_one_line(text, tmp_path):
    write_text(tmp_path / "x.json", text)
    with pytest.raises(MemControlError, match="x.json holds no JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "words",
    [
        *(["--version"], ["--help"], ["rewards"], ["rewards", "--json"], ["spaces", "list"]),
        *(["completion", "bash"], ["search", "--help"], ["spaces", "show", "digits"]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_cannot_be_printed_is_one_line(words, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "w") as full:
        done = subprocess.run([*NEW_PROCESS, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == (
        "memcontrol: what is printed cannot be written: No space left on device\n"
    )


@pytest.mark.parametrize("command", ["status", "front", "pick", "report"])
def test_looking_commands_say_so_too(command, shown):
    for more in [["--json"]] if command == "report" else [[], ["--json"]]:
        done = run(command, shown, *more, before=print_to_a_full_disk)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


def print_to_a_full_disk():
    import os

    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


class Holder:
    """As a pipeline, to load an adapter into."""

    def __init__(self, denoiser):
        self.unet = denoiser
        self.components = {"unet": denoiser}


@pytest.fixture
def own_file(base, tmp_path):
    """A file of MemControl's own, of several methods' layers; and what the denoiser was."""
    space = load_space("digits")
    choice = Choice(**CHOICE)
    adapter = inject_adapter(base.denoiser, space, choice, 0)
    described = {
        "version": "0",
        "config": {"space": "digits", "name": "s"},
        "choice": choice.as_dict(),
        "space": dump_space(space),
    }
    state = {name: tensor.contiguous() for name, tensor in adapter.state().items()}
    adapter.remove()
    return tmp_path / "own.safetensors", described, state


def describe_denoiser(denoiser):
    return (
        [(name, id(module), type(module)) for name, module in denoiser.named_modules()],
        [
            (name, id(p), p.requires_grad, p.detach().double().sum().item())
            for name, p in denoiser.named_parameters()
        ],
        sorted(vars(denoiser)),
    )


BREAKS = {
    "no choice": lambda d, s: d.pop("choice"),
    "no space": lambda d, s: d.pop("space"),
    "no config": lambda d, s: d.pop("config"),
    "a huge rank": lambda d, s: d["choice"].update(rank=10**9),
    "a rank of text": lambda d, s: d["choice"].update(rank="many"),
    "another rank": lambda d, s: d["choice"].update(rank=3),
    "an unknown group": lambda d, s: d["choice"].update(groups=["nose"]),
    "no groups": lambda d, s: d["choice"].update(groups=None),
    "a group that matches nothing": lambda d, s: d["space"]["groups"].update(
        {"up_attention": {"patterns": ["("]}}
    ),
    "a missing tensor": lambda d, s: s.pop(next(iter(s))),
    "another shape": lambda d, s: s.update({next(iter(s)): torch.zeros(3)}),
    "an odd offset": lambda d, s: s.update({f"{next(iter(s)).partition('.lora')[0]}.offset": torch.zeros(3)}),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_an_adapter_that_does_not_fit_leaves_the_pipeline_as_it_was(kind, base, own_file):
    path, described, state = own_file
    BREAKS[kind](described, state)
    save_file(state, path, {"memcontrol": format_header(described)})
    before = describe_denoiser(base.denoiser)
    with pytest.raises(MemControlError) as said:
        load_adapter(Holder(base.denoiser), path)
    assert "\n" not in str(said.value)
    assert describe_denoiser(base.denoiser) == before


@pytest.mark.parametrize("header", ["{", "[1]", "null", "[" * 50_000, '"x"', "{}"])
def test_a_broken_header_is_one_line(header, base, own_file):
    path, _, state = own_file
    save_file(state, path, {"memcontrol": header})
    with pytest.raises(MemControlError):
        load_adapter(Holder(base.denoiser), path)


@pytest.mark.parametrize("n", [0, 4, 9, 200])
def test_a_cut_file_is_one_line(n, base, own_file):
    path, described, state = own_file
    save_file(state, path, {"memcontrol": format_header(described)})
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(MemControlError):
        load_adapter(Holder(base.denoiser), path)


def test_what_fits_is_loaded_and_goes_again(base, own_file):
    path, described, state = own_file
    save_file(state, path, {"memcontrol": format_header(described)})
    with safe_open(path, "np") as file:
        assert all(np.isfinite(file.get_tensor(name)).all() for name in file.keys())
    modules = [id(module) for module in base.denoiser.modules()]
    load_adapter(Holder(base.denoiser), path).remove()
    assert [id(module) for module in base.denoiser.modules()] == modules


SECRET = "hun:ter@2/x"
URLS = [
    f"postgresql+psycopg2://me:{SECRET}@host/db",
    f"postgresql://:{SECRET}@host:5432/db",
    f"postgresql://me@host/db?password={SECRET}",
    f"postgresql://me@host/db?p%61ssword={SECRET}&x=1",
    f"postgresql://me@host/db?sslpassword={SECRET}",
    f"postgresql://host/db?passfile=/a&PASSWORD={SECRET}",
    "postgresql://me:hun%3Ater%402%2Fx@host/db",
    f"host=db user=me password='{SECRET}' dbname=x",
    f"host=db password = {SECRET}",
    f"postgres://me:{SECRET}@host/db?password={SECRET}",
    f"mysql:/me:{SECRET}@host",
]


@pytest.mark.parametrize("url", URLS, ids=range(len(URLS)))
def test_passwords_are_masked_in_every_shape(url):
    pieces = (SECRET, "hun:ter", "hun%3Ater", "ter@2", "2/x")
    assert not any(piece in hide_password(url) for piece in pieces)
    error = ValueError(f'connection failed: FATAL: no such thing as "{SECRET}" for {url}')
    assert not any(piece in str(explain_open_error(url, error)) for piece in pieces)


@pytest.mark.parametrize("url", [URLS[0], URLS[3], URLS[7]], ids=["user", "query", "libpq"])
def test_a_command_prints_no_password(url, study_file):
    done = run("status", study_file(storage=url.replace("host", "127.0.0.1:1")))
    assert done.returncode == 1 and "hun:ter" not in done.stdout + done.stderr
    assert "storage" in done.stderr and done.stderr.count("\n") == 1


def test_what_is_no_password_stays():
    for url in ("sqlite:////a/b.db", "postgresql://me@host:5432/db?sslmode=require", "/a/b@c"):
        assert hide_password(url) == url


def test_an_audit_writes_into_a_folder_of_its_own(tmp_path):
    check_audit_folder(tmp_path / "new")
    (tmp_path / "audit.json").write_text("{}")
    check_audit_folder(tmp_path)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(MemControlError, match="holds thesis.tex"):
        check_audit_folder(tmp_path)
    with pytest.raises(MemControlError, match="is no folder"):
        check_audit_folder(tmp_path / "thesis.tex")
    done = run("audit", "--images", tmp_path, "--train", tmp_path, "--holdout", tmp_path, "--out", tmp_path)
    assert done.returncode == 1 and "which no audit wrote" in done.stderr


@pytest.mark.parametrize("name", ["=1+1", "+a", "-b", "@c", "\td", "\re", "=cmd|' /C calc'!A0"])
def test_a_csv_cell_of_a_name_is_no_formula_and_a_number_stays_one(name):
    trial = {
        **{"trial": 0, "origin": name, "state": "COMPLETE", "seconds": 1.0, "front": True, "tie": False},
        **{"pick": False, "confirmed": False, "rewards": {"kid": -0.5, name: -1e-9}},
        "choice": {"groups": [name], "method": name, "rank": None, "learning_rate": 1e-3},
    }
    rows = list(
        csv.reader(io.StringIO(format_csv({"trials": [trial], "space": {"groups": [name], "settings": {}}})))
    )
    cells = [cell for row in rows for cell in row]
    numbers = [cell for cell in cells if cell.startswith("-")]
    assert numbers == ["-0.5", "-1e-09"]
    assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in cells)
    held = name.replace("\r", " ")
    assert cells.count(f"'{held}") == 4  # two headings, the anchor, the method


def test_windows_is_refused_in_one_line():
    for code, status in (
        ("from memcontrol.cli import main; sys.exit(main())", 1),
        ("import memcontrol\ntry: memcontrol.search\nexcept memcontrol.MemControlError as e: print(e)", 0),
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.platform = 'win32'\n{code}"],
            capture_output=True,
            text=True,
        )
        said = done.stdout + done.stderr
        assert done.returncode == status and said.count("\n") == 1 and "WSL 2" in said


def test_the_dashboards_request_of_no_host_is_answered(shown):
    import http.client

    from memcontrol.commands.dashboard import dashboard

    place = dashboard(shown).removeprefix("http://").partition("/")[0]
    for host in ("[", "[::1", "a b", ""):
        connection = http.client.HTTPConnection(place)
        connection.putrequest("GET", "/api/studies", skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status in (400, 401) and "reason" in json.loads(answer.read())
