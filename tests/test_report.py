"""The report's data against the study's own files, and a page that asks for nothing."""

import csv
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import yaml
from commands import run

from memcontrol.core.run_folder import StudyFolder, locate_study_folder
from memcontrol.study.pareto import find_front
from memcontrol.view.report import render_page


@pytest.fixture(scope="module")
def facts(shown):
    done = run("report", shown, "--json", "--with-paths")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_data_is_that_of_status_and_pick(shown, facts):
    trials = json.loads(run("status", shown, "--json").stdout)["trials"]
    for mine, theirs in zip(facts["trials"], trials, strict=True):
        assert {key: mine[key] for key in theirs if key != "runs"} == {
            key: theirs[key] for key in theirs if key != "runs"
        }
    picked = json.loads(run("pick", shown, "--json").stdout)
    assert [trial["trial"] for trial in facts["trials"] if trial["pick"]] == [picked["trial"]]
    best = find_front([list(trial["values"].values()) for trial in trials])
    assert [trial["trial"] for trial in facts["trials"] if trial["front"]] == sorted(best)


def test_hashes_and_sizes_are_those_of_the_split(shown, facts):
    split = json.loads((locate_study_folder(shown, "seen") / "split.json").read_text())
    assert {name: part["images"] for name, part in facts["data"]["parts"].items()} == {
        name: len(rows) for name, rows in split["parts"].items()
    }
    assert len({part["digest"] for part in facts["data"]["parts"].values()}) == 3


def test_the_heat_map_counts_parameters_of_trained_modules(facts, base):
    """Against the modules that the patterns of the chosen groups match, counted by hand."""
    from memcontrol.core.space_yaml import list_shipped_spaces

    groups = yaml.safe_load(list_shipped_spaces()["digits"].read_text())["groups"]
    names = dict(base.denoiser.named_parameters())
    for trial in facts["trials"]:
        chosen = trial["choice"]["groups"]
        patterns = [
            groups[name]["patterns"] if isinstance(groups[name], dict) else groups[name]
            for name in chosen
            if name != "*"
        ]
        for block, share in zip(facts["blocks"], trial["blocks"], strict=True):
            inside = {
                name: parameter.numel() for name, parameter in names.items() if name.startswith(f"{block}.")
            }
            on = {
                name: n
                for name, n in inside.items()
                if "*" in chosen
                or any(re.fullmatch(pattern, name.rpartition(".")[0]) for pattern in patterns)
            }
            assert share == pytest.approx(sum(on.values()) / sum(inside.values())), (trial["trial"], block)
    assert facts["blocks"].index("mid_block") < facts["blocks"].index("up_blocks.0")


def test_fates_add_up_and_cost_is_that_of_all_runs(shown, facts):
    folder = locate_study_folder(shown, "seen")
    for one in facts["training"]:
        assert (
            one["seen"]
            == one["trained"] + one["skipped"] + one["dropped"] + one["queued"] + one["surplus"]
            > 0
        )
    assert sum(one["skipped"] for one in facts["training"]) > 0
    seconds = [json.loads(path.read_text())["seconds"] for path in folder.glob("*/result.json")]
    assert facts["cost"]["runs"] == len(seconds) == 11
    assert facts["cost"]["hours"] == pytest.approx(sum(seconds) / 3600)
    assert {"python", "torch", "diffusers", "peft", "optuna", "memcontrol", "device"} <= set(
        facts["made_with"]
    )


def test_csv_has_a_row_for_each_trial(shown, facts):
    rows = list(csv.DictReader(io.StringIO(run("report", shown, "--csv").stdout)))
    for row, trial in zip(rows, facts["trials"], strict=True):
        assert (int(row["trial"]), row["anchor"]) == (trial["trial"], trial["origin"])
        assert (
            float(row["fid"]) == trial["rewards"]["fid"]
            and float(row["copy_rate_high"]) == trial["rewards"]["copy_rate_high"]
        )
        groups = [name for name in facts["space"]["groups"] if row[name] == "1"]
        assert groups == (
            facts["space"]["groups"]
            if trial["anchor"] == "full"
            else [name for name in facts["space"]["groups"] if name in trial["choice"]["groups"]]
        )


def test_the_page_names_no_host_and_escapes_what_people_wrote(shown, facts, tmp_path):
    from memcontrol.view.report import render_page

    text = render_page({**facts, "study": "<script>alert(1)</script>"}, True)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert not re.findall(r"(?:src|href|url\()\s*=?\s*[\"']?https?:", text) and set(
        re.findall(r"https?://[^\"<\s]+", text)
    ) <= {"http://www.w3.org/2000/svg"}
    assert "data:image/png" in text and "data:image/png" not in render_page(facts, False)
    assert str(tmp_path.anchor + "root") not in text


def test_a_network_that_may_not_know_the_images_is_named_below_the_tables(shown, facts, tmp_path):
    """The embedded digits are what tiny knows; of images from elsewhere nobody can tell."""
    assert facts["doubt"] == "" and "printed characters" not in render_page(facts, False)
    root = shutil.copytree(shown.parent, tmp_path / "copy")
    study = root / shown.name
    study.write_text(study.read_text().replace("path: digits", "path: /elsewhere"))  # they have moved
    said = run("report", root / shown.name, tmp_path / "page.html", "--json", check=True)
    doubt = json.loads(said.stdout)["doubt"]
    assert "tiny, which knows printed characters" in doubt
    assert f"{doubt[0].upper()}{doubt[1:]}." in unescape((tmp_path / "page.html").read_text())
    assert f"warning: {doubt}\n" in run("front", root / shown.name, check=True).stderr
    assert doubt not in run("front", shown, check=True).stderr


def test_the_front_as_svg_stands_alone(facts):
    import xml.etree.ElementTree as ElementTree

    from memcontrol.view.front_data import make_front_data
    from memcontrol.view.front_svg import draw_front_svg

    trials = [trial for trial in facts["trials"] if trial["state"] == "COMPLETE"]
    root = ElementTree.fromstring(draw_front_svg(make_front_data(trials, facts["objectives"])))
    points = [element for element in root.iter() if "data-trial" in element.attrib]
    assert sorted(int(point.attrib["data-trial"]) for point in points) == [trial["trial"] for trial in trials]
    places = {
        int(p.attrib["data-trial"]): [float(v) for v in re.findall(r"[\d.]+", p.attrib["transform"])]
        for p in points
    }
    by_fid = sorted(trials, key=lambda trial: trial["values"]["fid"])
    assert [places[trial["trial"]][0] for trial in by_fid] == sorted(
        places[trial["trial"]][0] for trial in by_fid
    )
    by_copying = sorted(trials, key=lambda trial: -trial["values"]["memorization"])
    assert [places[trial["trial"]][1] for trial in by_copying] == sorted(
        places[trial["trial"]][1] for trial in by_copying
    )


def test_what_is_missing_is_said(shown, tmp_path):
    done = run("report", shown)
    assert done.returncode == 1 and "OUT.html" in done.stderr
    before = Path(shown).read_bytes()
    for place in (shown, tmp_path, tmp_path / "x.csv"):  # a study file, a folder, what is no page
        done = run("report", shown, place)
        assert done.returncode == 1 and "OUT.html" in done.stderr and "Traceback" not in done.stderr
    assert Path(shown).read_bytes() == before and list(tmp_path.iterdir()) == []
    (tmp_path / "none.yaml").write_text(Path(shown).read_text().replace("name: seen", "name: none"))
    done = run("report", tmp_path / "none.yaml", tmp_path / "x.html")
    assert (
        done.returncode == 1
        and "has not been searched yet" in done.stderr
        and not (tmp_path / "x.html").exists()
    )


def test_people_are_counted_beside_images_and_every_part_has_its_use(shown, facts, tmp_path):
    folder = locate_study_folder(shown, "seen")
    split = json.loads((folder / "split.json").read_text())
    rows = split["parts"]["train"]
    for number, row in enumerate(rows):
        row["group"] = f"p{number // 4}"
    split["parts"]["calibration"] = split["parts"]["test"]
    (tmp_path / "split.json").write_text(json.dumps(split))
    page = render_page({**facts, "data": StudyFolder(tmp_path).summarize_data()}, with_images=False)
    cells = [re.search(rf"<td[^>]*>{part}</td>(.*?)</tr>", page).group(1) for part in split["parts"]]
    assert re.findall(r">(\d+)<", cells[0])[:2] == [str(len(rows)), str(-(-len(rows) // 4))]
    assert "real images lie" in cells[-1]
