"""The demo's study: valid, named after its folder, so that everything lies in it. The demo itself runs by
`make demo`."""

import pytest

from memcontrol.commands.demo import write_demo_study
from memcontrol.config.load import load_config
from memcontrol.core.errors import MemControlError
from memcontrol.core.run_folder import locate_study_folder
from memcontrol.core.space_yaml import load_space


def test_the_study_lies_in_the_folder_it_works_in(tmp_path):
    path = write_demo_study(tmp_path / "runs" / "demo", 3, 2, 1)
    config = load_config(path)
    assert path == tmp_path / "runs" / "demo" / "study.yaml"
    assert locate_study_folder(path, config.name) == path.parent
    assert (config.name, config.search.seed, config.search.trials, config.search.workers) == ("demo", 3, 2, 1)
    assert load_space(config.space).methods == ("lora", "attention")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MemControlError, match="cannot be written"):
        write_demo_study(tmp_path / "file" / "demo", 0, None, None)
