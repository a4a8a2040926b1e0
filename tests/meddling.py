"""The other half of the chaos suite: a search on a real PostgreSQL while people and other programs meddle
with it. They tell, ask for, enqueue and delete its trials, search it too, edit its space, and use its name
for other images. Then the invariants; `make chaos` runs it after the first half."""

import contextlib
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import yaml
from chaos import SEARCH, Chaos, write_study
from PIL import Image
from postgres import Postgres

from memcontrol.config.load import load_config
from memcontrol.core.files import PACKAGE
from memcontrol.core.run_folder import StudyFolder, locate_study_folder
from memcontrol.search.locks import read_holder
from memcontrol.study.opening import open_study
from memcontrol.study.optuna_private import ENQUEUED, get_trial_id
from memcontrol.study.trials import OWN

HANDS = Counter(
    {
        "tell trial": 3,
        "delete trial": 2,
        "ask trial": 2,
        "enqueue trial": 2,
        "search twice": 2,
        "edit space": 2,
        "use its name": 2,
        "kill orchestrator": 2,
        "terminate orchestrator": 1,
    }
)
TABLES = ("trial_values", "trial_params", "trial_user_attributes", "trial_system_attributes", "trials")


class Meddled(Chaos):
    """One search that is meddled with; `found` says what was not as it should be."""

    def __init__(self, *args):
        super().__init__(*args)
        self.found, self.asked = [], []

    def open_plain(self):
        """As a user's own script opens it."""
        return optuna.load_study(study_name=self.study.stem, storage=self.server.url)

    def find_running(self):
        """A trial of ours that runs; None where all work is done."""
        found = []

        def look():
            if self.search.poll() == 0:
                return True
            running = self.open_plain().get_trials(states=(optuna.trial.TrialState.RUNNING,))
            found.extend(trial for trial in running if f"{OWN}candidates" in trial.system_attrs)
            return bool(found)

        self.until(look)
        if not found:
            self.n_late += 1
        return found[-1] if found else None

    def tell_trial(self):
        if trial := self.find_running():
            with contextlib.suppress(ValueError, RuntimeError):  # it has ended just now
                self.open_plain().tell(trial.number, [0.0, 0.0])

    def delete_trial(self):
        """Never one that was enqueued: nobody else would know of its choice."""
        if (trial := self.find_running()) and ENQUEUED not in trial.system_attrs:
            for table in TABLES:
                self.server.sql(f"DELETE FROM {table} WHERE trial_id = {get_trial_id(trial)}")

    def ask_trial(self):
        self.open_plain().ask()

    def enqueue_trial(self):
        self.asked.append(1e-3 * (1 + len(self.asked)))
        mask = {"up_attention": True, "method": "lora", "learning_rate": self.asked[-1]}
        self.open_plain().enqueue_trial(mask)

    def claim_refused(self, words, *args):
        """A search that must not begin says so in one line, with these words."""
        done = subprocess.run([*SEARCH, *map(str, args)], capture_output=True, text=True, timeout=300)
        said = done.stderr.strip().splitlines()[-1:] or [""]
        if done.returncode != 1 or not said[0].startswith("memcontrol: ") or words not in said[0]:
            self.found.append(
                f"{args}, exit code {done.returncode}, instead of '{words}': {done.stderr[-500:]}"
            )

    def search_twice(self):
        """From the same folder, and from another, which no lock of a folder keeps."""
        self.until(self.is_at_work)
        if self.search.poll() is None:
            other = self.study.parent / "other"
            other.mkdir(exist_ok=True)
            shutil.copy2(self.study, other)
            for file in (self.study, other / self.study.name):
                self.claim_refused("search", file)

    def is_at_work(self):
        """Whether the search has its locks, or has ended."""
        holder = read_holder(StudyFolder(self.folder)).get("holder", "")
        return self.search.poll() == 0 or holder.endswith(f"process {self.search.pid}")

    def edit_space(self):
        """Between two searches."""
        self.kill_orchestrator()
        edited = self.study.parent / "edited.yaml"
        shipped = (PACKAGE.parent / "search_spaces" / "digits.yaml").read_text()
        edited.write_text(shipped.replace("rank: [2, 4, 8]", "rank: [2, 4, 8, 16]"))
        self.claim_refused("space.rank", self.study, f"space={edited}")

    def use_its_name(self):
        """For other images, from another folder."""
        self.kill_orchestrator()
        place = self.study.parent / "others"
        (place / "images").mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (160, 32, 32), dtype=np.uint8)):
            Image.fromarray(pixels).save(place / "images" / f"{i}.png")
        values = yaml.safe_load(self.study.read_text())
        values["data"]["path"] = str(place / "images")
        (place / self.study.name).write_text(yaml.safe_dump(values))
        self.claim_refused("--name", place / self.study.name)


def list_violations(chaos: Meddled, trials: int) -> list[str]:
    """What does not hold: every choice has one finished record, whose values are its result's, and what
    others asked for was run."""
    config = load_config(chaos.study)
    folder = locate_study_folder(chaos.study, config.name)
    study = open_study(config, folder, chaos.study, create=False)
    records, shown = study.records(), {trial.number: trial for trial in study.inner.get_trials()}
    found, numbers = list(chaos.found), [trial.number for trial in study.inner.get_trials()]

    def claim(holds, words):
        if not holds:
            found.append(words)

    done = [record for record in records if record.finished]
    claim(len(set(numbers)) == len(numbers), f"a number was given twice: {sorted(numbers)}")
    claim(len(done) >= trials, f"{len(done)} finished trials, not {trials}")
    choices = [choice for record in done for choice in record.candidates]
    claim(len(set(choices)) == len(choices), "a choice has two finished records")
    for record in records:
        is_told = "another program told it" in record.reason
        claim(record.finished or is_told, f"trial {record.number}: {record.state}, {record.reason}")
    for record in done:
        result = StudyFolder(folder).run(record.choice).read_result()
        claim(record.searched == result["rewards"], f"trial {record.number}: rewards are not its result's")
        values = shown[record.number].values
        claim(values == list(record.values.values()), f"trial {record.number}: plain Optuna shows {values}")
    for rate in chaos.asked:
        ran = [r for r in done if r.choice.groups == ("up_attention",) and r.choice.learning_rate == rate]
        claim(len(ran) == 1, f"the mask that was enqueued with {rate:g} was run {len(ran)} times")
    waiting = [
        trial for trial in shown.values() if ENQUEUED in trial.system_attrs and not trial.state.is_finished()
    ]
    claim(not waiting, f"{len(waiting)} enqueued masks still wait")
    study.close()
    return found


def meddle(folder: Path, trials: int, hands: Counter, seed: int, say) -> list[str]:
    server = Postgres(folder / "pg-meddled")
    try:
        study = write_study(folder, "meddled", server.url, trials)
        chaos = Meddled(study, server, trials, hands, seed, say)
        chaos.run()
        found = list_violations(chaos, trials)
        if chaos.n_late:
            found.append(f"{chaos.n_late} hands came when all work was done; give it more trials")
        return found
    finally:
        server.stop("immediate")
