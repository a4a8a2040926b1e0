"""Fixtures that several tests share: the embedded base, opened once, and small studies."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import signal
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sqlalchemy import event
from sqlalchemy.engine import Engine

from memcontrol.core import console

torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, commands that tests begin would ignore it

CHOICE = {"groups": ("up_attention",), "method": "lora", "learning_rate": 3e-3, "rank": 2}
N_IMAGES = 20

SMALL = {
    "data": {"path": "digits", "train": 32, "holdout": 40, "test": 48},
    "space": "digits",
    "inner": {"budget_images": 32, "batch_size": 16, "rounds": 2},
    "rewards": {"n_samples": 64, "force": True, "sampling_steps": 1, "confirm": 0},
    "search": {"trials": 1, "workers": 1, "executor": "inline"},
}


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Whoever is killed leaves what it wrote, synced or not; only a power cut would not, and no test makes
    one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        event.listen(Engine, "connect", leave_sync_to_the_system)
        yield
        event.remove(Engine, "connect", leave_sync_to_the_system)


@pytest.fixture(autouse=True)
def each_test_is_told_as_usual(monkeypatch):
    """Commands that a test runs in its own process set how much is said there."""
    monkeypatch.setattr(console, "level", console.NORMAL)


def leave_sync_to_the_system(connection, record):
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="session")
def base():
    from memcontrol.model.base import load_base

    return load_base("tiny")


@pytest.fixture(scope="module")
def postgres():
    """A PostgreSQL server of its own."""
    from postgres import Postgres

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)  # it runs as a user of its own
        server = Postgres(Path(folder) / "pg")
        yield server
        server.stop("immediate")


@pytest.fixture
def study_file(tmp_path):
    """Writes a study file; keyword arguments replace whole keys of SMALL."""

    def write(name="small", **keys):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **SMALL, **keys}))
        return path

    return write


@pytest.fixture(scope="session")
def shown(tmp_path_factory):
    """A finished study to look at, with skipped images and a confirmed front: its file. Searched once for all
    test processes."""
    from commands import run
    from filelock import FileLock

    folder = (
        tmp_path_factory.getbasetemp().parent / "shown"
        if "PYTEST_XDIST_WORKER" in os.environ
        else tmp_path_factory.mktemp("shown")
    )
    folder.mkdir(exist_ok=True)
    path = folder / "seen.yaml"
    with FileLock(folder / "lock"):
        if not path.exists():
            inner = {"budget_images": 64, "batch_size": 16, "rounds": 2, "skip": {"ratio": 1.1, "bins": 1}}
            study = {
                **SMALL,
                "name": "seen",
                "inner": inner,
                "rewards": {**SMALL["rewards"], "n_samples": 64, "force": True, "confirm": 1},
                "search": {"trials": 4, "workers": 1, "executor": "inline"},
            }
            part = folder / "part.yaml"
            part.write_text(yaml.safe_dump(study))
            run("search", part, check=True)
            part.rename(path)
    return path


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, any that is found; a page of it sees nothing but this machine."""
    import shutil

    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
    )
    if found is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    options = (
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(options))
        yield browser
        browser.close()


@pytest.fixture
def photographs(tmp_path):
    """A folder of n smooth colour images, no two alike, numbered from `first` on."""

    def make(n, folder="photos", size=(40, 30), mode="RGB", first=0):
        root = tmp_path / folder
        root.mkdir(parents=True, exist_ok=True)
        for i in range(n):
            cells = np.random.default_rng(first + i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).convert(mode).save(
                root / f"{i:03}.png"
            )
        return root

    return make


@pytest.fixture(scope="session")
def material(base, tmp_path_factory):
    """Twenty digits, encoded."""
    from memcontrol.config.load import load_config
    from memcontrol.data.split import load_parts
    from memcontrol.model.encoded import load_encoded
    from memcontrol.training.shard import Material

    config, cache = (
        load_config({"name": "a", "data": {"path": "digits", "train": N_IMAGES, "holdout": 20, "test": 20}}),
        tmp_path_factory.mktemp("cache"),
    )
    parts = load_parts(config.data, 32, 0).parts
    encoded = {part: load_encoded(base, images, cache) for part, images in parts.items()}
    images = parts["train"]
    return Material(
        encoded["train"], images.captions, lambda rows: images.take(rows).pixels(), lambda: encoded["holdout"]
    )


@pytest.fixture
def memorized(base, material, tmp_path):
    """Within the block the base is a model that has learnt its twenty digits by heart."""
    from memcontrol.config.inner import InnerConfig
    from memcontrol.core.choice import Choice
    from memcontrol.core.space_yaml import load_space
    from memcontrol.model.adapter import inject_adapter
    from memcontrol.training.rounds import train_rounds

    @contextlib.contextmanager
    def hold():
        adapter = inject_adapter(base.denoiser, load_space("digits"), Choice(("*",), "full", 2e-3), 0)
        inner = InnerConfig(budget_images=3200, batch_size=20)
        try:
            train_rounds(
                base,
                adapter,
                material,
                inner,
                seed=0,
                folder=tmp_path / "memorized",
                progress=lambda *_, **said: None,
            )
            yield
        finally:
            adapter.remove()

    return hold


@pytest.fixture
def trained(base, material, tmp_path):
    """Trains, and returns the log and what was learned."""
    from memcontrol.config.inner import InnerConfig
    from memcontrol.core.choice import Choice
    from memcontrol.core.space_yaml import load_space
    from memcontrol.model.adapter import inject_adapter
    from memcontrol.model.precision import choose_precision
    from memcontrol.training.rounds import train_rounds

    def run(choice=None, seed=3, folder="rounds", space="digits", progress=lambda *_, **said: None, **inner):
        settings = InnerConfig(**{"budget_images": 24, "batch_size": 8, **inner})
        base.precision = choose_precision("auto", settings.precision, base.device)
        adapter = inject_adapter(
            base.denoiser,
            load_space(space) if isinstance(space, str) else space,
            choice or Choice(**CHOICE),
            seed,
            shared_a=settings.ensemble.shares_a,
        )
        try:
            log = train_rounds(
                base,
                adapter,
                material,
                settings,
                seed=seed,
                folder=tmp_path / folder,
                identity=str(inner),
                progress=progress,
            )
            return log, adapter.state()
        finally:
            adapter.remove()
            base.precision = choose_precision("auto", "float32", base.device)

    return run


SLOW_FIXTURES = {
    "base",
    "executor",
    "local",
    "material",
    "postgresql",
    "ray_cluster",
    "shown",
    "study_file",
    "trained",
}
SLOW_FILES = {  # that start processes or services, or fine-tune, by themselves
    "test_adapters.py",
    "test_audit.py",
    "test_bad_input.py",
    "test_benchmarks.py",
    "test_calibrate.py",
    "test_chaos.py",
    "test_compose.py",
    "test_database.py",
    "test_demo.py",
    "test_doctor.py",
    "test_encoding.py",
    "test_ensemble.py",
    "test_export.py",
    "test_export_numbers.py",
    "test_families.py",
    "test_foreign.py",
    "test_growth.py",
    "test_guard.py",
    "test_identity.py",
    "test_locks.py",
    "test_model_card.py",
    "test_moved.py",
    "test_old_study.py",
    "test_operate.py",
    "test_orchestrate.py",
    "test_out_of_memory.py",
    "test_precision.py",
    "test_privacy.py",
    "test_private_training.py",
    "test_propose.py",
    "test_publish.py",
    "test_readme.py",
    "test_replicates.py",
    "test_report_layout.py",
    "test_retries.py",
    "test_sampling.py",
    "test_search.py",
    "test_seeing.py",
    "test_slurm.py",
    "test_spaces_shipped.py",
    "test_stopping.py",
    "test_variants.py",
}


NIGHTLY = {  # half a minute to two on a core each: `make nightly` runs them too
    "test_a_study_optimises_utility_and_retrain_has_a_network",
    "test_a_diverging_loss_prunes_the_trial_and_the_study_goes_on",
    "test_a_strength_that_is_added_is_measured_and_nothing_is_trained",
    "test_a_run_is_told_on_images_of_folders_as_its_lora_is",
    "test_every_part_of_the_gpus_script_is_rehearsed_on_a_cpu[step]",
    "test_our_spaces_hide_nothing[sd15-projections]",
    "test_strength_scales_it_and_none_is_the_base",
    "test_what_an_older_version_made_becomes_its_owners_once",
    "test_an_image_in_both_parts_is_dropped_or_kept_as_twins_are",
    "test_a_reward_may_be_better_the_more",
    "test_exports_give_the_runs_images_in_plain_diffusers[full]",
    "test_a_process_that_dies_costs_an_attempt_and_no_number",
    "test_training_lowers_the_loss",
    "test_the_model_card_tells_what_was_measured_and_its_code_runs[difffit-adapter]",
    "test_the_model_card_tells_what_was_measured_and_its_code_runs[bias-denoiser]",
    "test_a_page_of_another_origin_reads_nothing[127.0.0.1-token]",
    "test_a_page_of_another_origin_reads_nothing[127.0.0.1-no token]",
    "test_borders_that_images_share_accuse_nobody[0.0]",
    "test_a_steps_cost_falls_with_the_earliest_trained_block",
    "test_actors_end_with_their_orchestrator[9]",
    "test_a_stage_that_runs_out_of_memory_is_done_in_halves[score]",
    *(
        f"test_each_file_gives_the_weights_that_were_measured[{method}]"
        for method in ("loha", "oft", "ia3", "ln_tuning", "attention", "norm", "bias")
    ),
    "test_no_picture_where_the_model_draws_another_image_or_none_is_wanted",
    "test_a_signal_ends_a_search_in_the_middle_of_trials_and_says_how_to_go_on[1-lead_a_session-killpg-129-SIGHUP]",
    "test_a_dry_run_of_a_folder_leaves_what_it_read_and_encoded",
    "test_a_search_fine_tunes_its_front_again_once",
    "test_arms_of_the_inner_loop_are_trained_once_and_set_side_by_side",
    "test_init_writes_a_study_for_each_that_a_search_takes",
    "test_an_own_reward_that_fails_fails_its_trial_and_the_search_goes_on[raise-failed: ValueError: no luck]",
    "test_study_of_two_objectives_is_stopped_by_them_at_rungs",
    "test_study_of_three_objectives_runs_to_the_end",
    "test_search_that_is_killed_loses_and_repeats_nothing",
    "test_a_full_disk_is_named_and_what_was_done_is_kept[1500000]",
    "test_the_gap_opens_as_a_model_memorizes",
    "test_what_a_person_had_in_the_folder_stays",
    "test_a_proposed_study_is_searched_without_an_edit[copied]",
    "test_a_signal_ends_a_search_in_the_middle_of_trials_and_says_how_to_go_on[2-lead_a_session-killpg-130-Ctrl-C]",
    "test_peers_losses_are_ours_for_the_same_noise",
    "test_an_own_reward_that_fails_fails_its_trial_and_the_search_goes_on[nan-gave nan]",
    "test_rules_decide_the_same_in_every_process",
    "test_model_tuned_on_one_side_is_told_and_on_the_other_below_a_half",
    "test_a_stage_that_runs_out_of_memory_is_done_in_halves[decode]",
    "test_a_stage_that_runs_out_of_memory_is_done_in_halves[encode]",
    "test_a_stage_that_runs_out_of_memory_is_done_in_halves[probe]",
    "test_a_base_saved_in_half_is_searched[sdxl-bfloat16]",
    "test_a_base_saved_in_half_is_searched[sd3-bfloat16]",
    "test_shards_are_measured_at_any_size[10 copies]",
    "test_utilisation_counts_each_layout",
    "test_a_restart_changes_no_decision[submit]",
    "test_a_restart_changes_no_decision[begin]",
    "test_the_front_is_measured_again_before_it_is_reported",
    "test_a_full_disk_is_named_and_what_was_done_is_kept[150000]",
    "test_a_proposed_study_is_searched_without_an_edit[grey]",
    "test_a_proposed_study_is_searched_without_an_edit[plain]",
    "test_a_real_study_goes_all_the_way_without_its_anchors[anchors0]",
    "test_a_real_study_goes_all_the_way_without_its_anchors[anchors1]",
    "test_a_search_starts_from_an_adapter",
    "test_a_search_survives_each_fault_once",
    "test_a_trial_that_diverges_leaves_no_helper_behind_that_waits",
    "test_a_trial_runs_on_every_family[sd3-all at once]",
    "test_a_trial_runs_on_every_family[sdxl-all at once]",
    "test_its_commands_search_a_study_without_containers",
    "test_a_choice_of_ones_own_is_tried_whoever_is_killed[postgresql]",
    "test_a_dropped_trial_counts_for_nothing_and_another_is_sampled[postgresql]",
    "test_a_search_is_stopped_from_elsewhere_and_goes_on[postgresql-False]",
    "test_a_search_is_stopped_from_elsewhere_and_goes_on[postgresql-True]",
    "test_a_search_is_stopped_from_elsewhere_and_goes_on[sqlite-True]",
    "test_commands_reach_a_real_search_and_its_workers",
    "test_our_spaces_hide_nothing[sd15-sites-complete]",
    "test_the_bytes_of_a_step_are_those_that_the_allocator_gives[bfloat16-groups0-lora]",
    "test_the_bytes_of_a_step_are_those_that_the_allocator_gives[bfloat16-groups1-full]",
    "test_solvers_are_compared_over_a_studys_runs",
    "test_the_model_card_tells_what_was_measured_and_its_code_runs[svdiff-None]",
    "test_a_search_over_epsilon_says_what_bounds_each_model",
    "test_what_an_audit_shows_exceeds_the_bound_only_where_the_noise_is_gone",
    "test_the_cards_own_code_draws_its_picture_over_every_family",
    "test_each_file_gives_the_weights_that_were_measured[loha]",
    "test_each_file_gives_the_weights_that_were_measured[svdiff]",
    "test_each_file_gives_the_weights_that_were_measured[difffit]",
    "test_each_file_gives_the_weights_that_were_measured[ia3]",
    "test_each_file_gives_the_weights_that_were_measured[ln_tuning]",
    "test_each_file_gives_the_weights_that_were_measured[attention]",
    "test_each_file_gives_the_weights_that_were_measured[norm]",
    "test_each_file_gives_the_weights_that_were_measured[bias]",
    "test_each_file_gives_the_weights_that_were_measured[full]",
    "test_what_is_fused_is_what_was_measured[lora]",
    "test_what_is_fused_is_what_was_measured[loha]",
    "test_what_is_fused_is_what_was_measured[lokr]",
    "test_what_is_fused_is_what_was_measured[oft]",
    "test_what_is_fused_is_what_was_measured[ia3]",
    "test_what_is_fused_is_what_was_measured[ln_tuning]",
    "test_what_is_fused_is_what_was_measured[svdiff]",
    "test_what_is_fused_is_what_was_measured[difffit]",
    "test_what_is_fused_is_what_was_measured[attention]",
    "test_what_is_fused_is_what_was_measured[norm]",
    "test_what_is_fused_is_what_was_measured[dora]",
    "test_what_is_fused_is_what_was_measured[full]",
    "test_over_other_families[sdxl-dora]",
    "test_sd_scripts_reads_sdxl_by_the_original_names[lora]",
}


def pytest_collection_modifyitems(config, items):
    """`make quick` leaves out what is marked slow, `make test` what is left to `make nightly`."""
    if "NIGHTLY" not in os.environ:
        left = [item for item in items if item.name in NIGHTLY]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.name not in NIGHTLY]
    for item in items:
        if item.path.name in SLOW_FILES or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")
