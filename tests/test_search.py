"""The way of a search from end to end, in real processes: results, resuming after kill -9, retraining,
export."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import run, started

from memcontrol.core.run_folder import locate_study_folder

FAST = {"search": {"trials": 2, "workers": 2}}


memcontrol = partial(run, check=True)


def list_trials(study):
    return json.loads(memcontrol("status", study, "--json").stdout)["trials"]


def assert_sound(trials, n_sampled):
    """n_sampled finished sampled trials beside the three anchors, no choice twice, nothing left running."""
    assert {trial["state"] for trial in trials} == {"COMPLETE"}
    assert sorted(trial["anchor"] or "" for trial in trials) == [""] * n_sampled + ["all", "full", "none"]
    choices = [json.dumps(trial["choice"], sort_keys=True) for trial in trials]
    assert len(set(choices)) == len(choices)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A finished small study: its file."""
    import yaml
    from conftest import SMALL

    path = tmp_path_factory.mktemp("searched") / "small.yaml"
    path.write_text(yaml.safe_dump({"name": "small", **SMALL, "search": {**SMALL["search"], "trials": 2}}))
    memcontrol("search", path)
    return path


def test_a_search_ends_with_anchors_and_sampled_trials(searched):
    trials = list_trials(searched)
    assert_sound(trials, 2)
    for trial in trials:
        stored = json.loads(Path(trial["run"], "result.json").read_text())
        assert "images_of_shards" not in json.loads(Path(trial["run"], "training.json").read_text())
        assert stored["rewards"] == trial["searched"] == trial["rewards"] and trial["values"] == {
            name: stored["rewards"][name] for name in ("fid", "memorization")
        }
    assert (locate_study_folder(searched, "small") / "front.png").stat().st_size > 10_000


def test_a_study_begun_with_other_keys_is_refused_by_their_names(searched):
    for override, words in (
        ("search.seed=5", "search.seed (0 there, 5 here)"),
        ("data.holdout=33", "data.holdout (40 there, 33 here)"),
    ):
        refused = memcontrol("search", searched, "--workers", 1, override, check=False)
        assert refused.returncode == 1 and words in refused.stderr


def test_searching_again_repeats_nothing_and_more_trials_continue(searched):
    before = list_trials(searched)
    assert "trial" in memcontrol("search", searched).stderr
    assert list_trials(searched) == before
    memcontrol("search", searched, "--trials", 3, "--executor", "inline")
    after = list_trials(searched)
    assert after[: len(before)] == before
    assert_sound(after, 3)


def test_front_and_pick_agree_with_brute_force(searched):
    trials = [trial for trial in list_trials(searched) if trial["values"]]
    points = {trial["trial"]: tuple(trial["values"].values()) for trial in trials}
    best = {
        i
        for i, p in points.items()
        if not any(all(a <= b for a, b in zip(q, p)) and q != p for q in points.values())
    }
    front = json.loads(memcontrol("front", searched, "--json").stdout)
    assert {points[trial["trial"]] for trial in front} == {points[i] for i in best}
    assert all({"trial", "values", "choice", "run", "anchor"} <= set(trial) for trial in front)
    picked = json.loads(memcontrol("pick", searched, "--json").stdout)
    assert picked["anchor"] != "none" and picked["trial"] in points
    chosen = json.loads(memcontrol("pick", searched, "--trial", front[-1]["trial"], "--json").stdout)
    assert chosen == front[-1]
    limit = sorted(point[0] for i, point in points.items())[1]
    limited = json.loads(memcontrol("pick", searched, "--limit", f"fid<={limit}", "--json").stdout)
    assert limited["values"]["fid"] <= limit
    refused = memcontrol("pick", searched, "--limit", "fid<=0", check=False)
    assert refused.returncode == 1 and "no finished trial keeps fid<=0" in refused.stderr


def test_json_is_one_document_on_stdout_and_nothing_else(searched):
    for command in ("status", "front", "pick"):
        done = memcontrol(command, searched, "--json")
        assert json.loads(done.stdout) and done.stderr == ""
        assert memcontrol(command, searched).stdout


SAMPLE_PLAINLY = """
import sys
sys.modules["memcontrol"] = None  # importing it now fails
import numpy as np, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
pipeline, lora, samples, captions, steps, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
if lora:
    pipe.load_lora_weights(lora)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
from safetensors.numpy import load_file
stored = load_file(samples)
captions = open(captions).read().split("\\n")
n = 16
generators = [torch.Generator().manual_seed(int(seed)) for seed in stored["seeds"][:n]]
settings = {"num_inference_steps": int(steps), "guidance_scale": 1.0, "output_type": "np"}
images = pipe([captions[row] for row in stored["rows"][:n]], generator=generators, **settings).images
np.save(out, np.abs(images.transpose(0, 3, 1, 2) - stored["images"][:n] / 255).max())
"""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_exports_give_the_runs_images_in_plain_diffusers(searched, method, tmp_path):
    from memcontrol.model.source import TINY

    trial = next(trial for trial in list_trials(searched) if trial["choice"]["method"] == method)
    split = json.loads((locate_study_folder(searched, "small") / "split.json").read_text())
    (tmp_path / "captions").write_text("\n".join(row["caption"] for row in split["parts"]["train"]))
    runs = [("pipeline", str(tmp_path / "fused"), "")]
    if method == "lora":
        runs.append(("adapter", str(TINY), str(tmp_path / "lora")))
    for format, pipeline, lora in runs:
        memcontrol("export", trial["run"], lora or pipeline, "--format", format)
        arguments = [
            pipeline,
            lora,
            f"{trial['run']}/samples.safetensors",
            str(tmp_path / "captions"),
            "1",
            str(tmp_path / "off.npy"),
        ]
        subprocess.run(
            [sys.executable, "-c", SAMPLE_PLAINLY, *arguments],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": ""},
        )
        assert np.load(tmp_path / "off.npy") < 2 / 255
    again = memcontrol("export", trial["run"], runs[0][1], check=False)
    assert again.returncode == 1 and "not an empty folder" in again.stderr


def test_retraining_scores_on_test_data_beside_full_fine_tuning(searched, tmp_path):
    trial = next(trial for trial in list_trials(searched) if trial["choice"]["method"] == "lora")
    (tmp_path / "choice.json").write_text(json.dumps(trial))
    done = memcontrol("retrain", searched, "--choice", tmp_path / "choice.json", "--out", tmp_path / "out")
    assert done.stderr.rstrip().splitlines()[-1].startswith("copy rate: ")
    full = next(trial for trial in list_trials(searched) if trial["anchor"] == "full")
    baseline = locate_study_folder(searched, "small") / "retrain" / Path(full["run"]).name
    for folder in (tmp_path / "out", baseline):
        result = json.loads((folder / "result.json").read_text())
        assert result["state"] == "COMPLETE" and result["reference"] == "test" and result["images_seen"] == 32
    assert json.loads((tmp_path / "out" / "result.json").read_text())["choice"] == trial["choice"]
    assert (tmp_path / "out" / "pairs.png").stat().st_size > 10_000
    said = memcontrol("export", tmp_path / "out", tmp_path / "lora")
    assert sorted(os.listdir(tmp_path / "lora")) == [
        "README.md",
        "comfyui",
        *(["example.png"] if (tmp_path / "lora" / "example.png").exists() else []),  # where one may be shown
        "pytorch_lora_weights.safetensors",
    ]
    assert (
        said.stdout == f"{tmp_path / 'lora'}\n"
        and f'assets/tiny").load_lora_weights("{tmp_path / "lora"}")' in said.stderr
    )
    trained_at = (baseline / "result.json").stat().st_mtime_ns
    # the baseline itself: nothing is trained twice
    done = memcontrol("retrain", searched, "--trial", full["trial"])
    assert (
        "the pick is full fine-tuning itself" in done.stderr
        and (baseline / "result.json").stat().st_mtime_ns == trained_at
    )


def test_a_choice_is_transferred_to_a_study_that_was_never_searched(
    searched, study_file, photographs, tmp_path
):
    """As in the paper: a mask found on one dataset, applied to another; what cannot be mapped is named."""
    trial = next(trial for trial in list_trials(searched) if trial["choice"]["method"] == "lora")
    (tmp_path / "choice.json").write_text(json.dumps(trial))
    data = {"path": str(photographs(96)), "train": 32, "holdout": 32, "test": 32}
    other = study_file(
        "other",
        data=data,
        rewards={"n_samples": 16, "sampling_steps": 1, "objectives": ["kid", "memorization"]},
    )
    done = memcontrol("retrain", other, "--choice", tmp_path / "choice.json", "--out", tmp_path / "out")
    assert "full fine-tuning is at the middle of its learning rates" in done.stderr
    assert json.loads((tmp_path / "out" / "result.json").read_text())["choice"] == trial["choice"]
    trial["choice"]["groups"] = ["down_1_0"]
    (tmp_path / "choice.json").write_text(json.dumps(trial))
    refused = memcontrol(
        "retrain", other, "--choice", tmp_path / "choice.json", "--out", tmp_path / "out2", check=False
    )
    assert (
        refused.returncode == 1
        and "unknown group 'down_1_0'; space 'digits' has down_attention" in refused.stderr
    )


def wait_until(process, happened):
    """Until the search has done something, which it does long before its end."""
    while not happened():
        assert process.exitcode is None, "it ended before"
        time.sleep(0.02)


def kill_search(study, count):
    """Begins the search, and kills all its processes by kill -9 as soon as there is more to count."""
    before = count()
    with started("search", study, before=os.setsid) as (process, _):
        wait_until(process, lambda: count() > before)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode == -signal.SIGKILL


def test_search_that_is_killed_loses_and_repeats_nothing(study_file):
    """Once the database is there, once a trial begins, once one ends."""
    study = study_file(**FAST)
    folder = locate_study_folder(study, "small")
    find_results = lambda: [*folder.glob("*/result.json")]  # noqa: E731
    kill_search(study, lambda: (folder / "study.db").is_file())
    kill_search(study, lambda: sum(len(path.read_text()) for path in folder.glob("*/attempts.jsonl")))
    kill_search(study, lambda: len(find_results()))
    ended = {path: path.stat().st_mtime_ns for path in find_results()}
    assert 0 < len(ended) < 9  # the anchors try seven choices, and two are sampled
    memcontrol("search", study)
    assert_sound(list_trials(study), 2)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in ended.items())


def lead_a_session():
    """As in a terminal; tests in the background inherit that Ctrl-C is ignored."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def begin_in_the_background():
    """As a script does with `&`: Ctrl-C is ignored, and the signal that ends it goes to it alone."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize(
    "number, begin, end, status, name",
    [
        (signal.SIGINT, lead_a_session, os.killpg, 130, "Ctrl-C"),
        (signal.SIGTERM, begin_in_the_background, os.kill, 143, "SIGTERM"),
        (signal.SIGHUP, lead_a_session, os.killpg, 129, "SIGHUP"),
    ],
)
def test_a_signal_ends_a_search_in_the_middle_of_trials_and_says_how_to_go_on(
    study_file, number, begin, end, status, name
):
    """Of trials that would take hours; what was trained is kept."""
    study = study_file(inner={"budget_images": 10_000_000, "batch_size": 16}, search={"workers": 2})
    folder = locate_study_folder(study, "small")
    with started("search", study, before=begin) as (process, (_, stderr)):
        wait_until(process, lambda: "train" in read_stages(folder).values())
        end(process.pid, number)
        process.join(timeout=120)
        assert process.exitcode == status
        (line,) = [line for line in stderr.read_text().splitlines() if line.startswith("memcontrol:")]
        assert line.endswith("the same command continues") and "Traceback" not in stderr.read_text()
    assert (folder / "search.log").read_text().rstrip().endswith(f"ended by {name}")
    interrupted = [run for run, stage in read_stages(folder).items() if stage == "train"]
    assert all([*(run / "rounds").glob("*")] for run in interrupted), "a worker left no checkpoint"
    assert not any((run / "failures.json").exists() for run in interrupted)
    assert interrupted and not any((run / "result.json").exists() for run in interrupted)
    said = memcontrol("status", study).stdout
    assert "running" not in said and "interrupted (" in said and "the next search goes on with it" in said


def read_stages(folder):
    """Run folder to what its attempt was last at."""
    return {path.parent: json.loads(path.read_text())["stage"] for path in folder.glob("*/progress.json")}


# too few for samples; for the rounds of full fine-tuning
@pytest.mark.parametrize("n_bytes", [150_000, 1_500_000])
def test_a_full_disk_is_named_and_what_was_done_is_kept(study_file, n_bytes):
    """A limit on the size of files stands for the disk: what is written beyond it meets the system's own
    error, in every process."""
    study = study_file(**FAST)
    small_files = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    done = memcontrol("search", study, check=False, before=small_files)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no space left to write" in done.stderr.splitlines()[-1] and done.stderr.rstrip().endswith(
        "then run the same command again"
    )
    memcontrol("search", study)
    assert_sound(list_trials(study), 2)


def test_a_diverging_loss_prunes_the_trial_and_the_study_goes_on(study_file, tmp_path):
    space = tmp_path / "wild.yaml"
    space.write_text(
        "groups: {mid: 'mid_block.attentions.0.proj_in'}\nmethods: [lora]\nrank: [2]\n"
        "learning_rate: {lora: [1.0e-4, 1.0e-3], full: [1.0e+24, 1.0e+30]}\n"
    )
    inner = {"budget_images": 160, "batch_size": 8, "warmup": 0.0, "max_grad_norm": 1.0e30}
    study = study_file(space=str(space), inner=inner)
    memcontrol("search", study)
    states = {trial["anchor"]: trial["state"] for trial in list_trials(study)}
    assert not list(locate_study_folder(study, "small").glob("*/rounds"))
    assert states == {"none": "COMPLETE", "all": "COMPLETE", "full": "PRUNED", None: "COMPLETE"}
    alone = memcontrol("retrain", study)
    assert "the anchor 'full' ended without a result, so nothing is compared with it" in alone.stderr
    assert len(list(locate_study_folder(study, "small").glob("retrain/*/result.json"))) == 1


def test_the_front_is_measured_again_before_it_is_reported(study_file):
    """Interrupted halfway, the next search goes on with it and repeats nothing; then every trial on the front
    was confirmed."""
    rewards = {"n_samples": 64, "sampling_steps": 1, "confirm": 2, "objectives": ["kid", "memorization"]}
    study = study_file(rewards=rewards, search={"trials": 0, "workers": 2})
    memcontrol("search", study)
    front = json.loads(memcontrol("front", study, "--json").stdout)
    assert front and all(trial["confirmed"] for trial in front)
    for trial in front:
        stored, run = json.loads(Path(trial["run"], "confirmed.json").read_text()), Path(trial["run"])
        assert stored["rewards"] == trial["rewards"] and (stored["n_draws"], stored["n_samples"]) == (2, 128)
        assert (
            trial["searched"] == json.loads((run / "result.json").read_text())["rewards"] != trial["rewards"]
        )
        assert trial["values"] == {name: trial["rewards"][name] for name in ("kid", "memorization")}
        assert trial["rewards"]["kid_error"] < trial["searched"]["kid_error"]
    run = Path(front[0]["run"])
    before = (run / "confirmed.json").read_text()
    (run / "confirmed.json").unlink()
    # as after a crash before the first of them was recorded
    with sqlite3.connect(locate_study_folder(study, "small") / "study.db") as database:
        database.execute("DELETE FROM study_system_attributes WHERE key LIKE 'memcontrol:confirmed:%'")
    others = {
        path: path.stat().st_mtime_ns for path in locate_study_folder(study, "small").glob("*/confirmed.json")
    }
    memcontrol("search", study)
    assert (run / "confirmed.json").read_text() == before
    assert all(path.stat().st_mtime_ns == when for path, when in others.items())
    assert json.loads(memcontrol("front", study, "--json").stdout) == front


def test_runs_are_compared_in_pairs_and_only_if_measured_alike(searched, tmp_path):
    a, b = (Path(trial["run"]) for trial in list_trials(searched)[:2])
    apart = json.loads(memcontrol("compare", a, b, "--json").stdout)
    first, second = (json.loads((run / "result.json").read_text())["rewards"] for run in (a, b))
    assert {"fid", "kid", "copy_rate", "memorization_pixels"} <= set(apart)
    for name, found in apart.items():
        assert (
            (found["first"], found["second"]) == (first[name], second[name])
            and found["difference"] == pytest.approx(first[name] - second[name])
            and found["low"] <= found["difference"] <= found["high"]
        )
    assert apart["fid"]["error"] > 0 and "paired over prompts" in memcontrol("compare", a, b).stdout
    other = tmp_path / "other.yaml"
    other.write_text(
        searched.read_text()
        .replace("n_samples: 64", "n_samples: 32")
        .replace("sampling_steps: 1", "sampling_steps: 2")
    )
    (tmp_path / "choice.json").write_text(json.dumps(list_trials(searched)[0]))
    memcontrol("retrain", other, "--choice", tmp_path / "choice.json", "--out", tmp_path / "apart")
    refused = memcontrol("compare", a, tmp_path / "apart", check=False)
    assert (
        refused.returncode == 1
        and "measured with different n_samples (64 and 32)" in refused.stderr
        and "sampling_steps (1 and 2)" in refused.stderr
    )
