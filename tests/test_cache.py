"""Files of tensors: made once, whoever asks and how many at a time; whole or not there at all."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from memcontrol.data.cache import load_or_make


def test_file_is_made_once_by_those_who_ask_at_the_same_time(tmp_path):
    path, n_made, found = tmp_path / "cache" / "a.safetensors", [], []

    def make():
        n_made.append(1)
        time.sleep(0.2)
        return {"x": torch.arange(6.0).view(2, 3).T, "n": torch.tensor([3])}

    threads = [threading.Thread(target=lambda: found.append(load_or_make(path, make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(n_made) == 1 and len(found) == 4
    for tensors in found:
        assert tensors["x"].tolist() == [[0, 3], [1, 4], [2, 5]] and tensors["n"].tolist() == [3]
    assert {name: tensor.tolist() for name, tensor in load_file(path).items()} == {
        "x": [[0, 3], [1, 4], [2, 5]],
        "n": [3],
    }


def test_file_is_not_there_where_making_it_failed(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ZeroDivisionError):
        load_or_make(path, lambda: {"x": 1 / 0})
    assert not path.exists() and not list(tmp_path.glob(".*.part"))
    assert load_or_make(path, lambda: {"x": torch.ones(1)})["x"].tolist() == [1]


def test_core_and_config_need_neither_torch_nor_a_database():
    code = (
        "import sys, pkgutil, importlib, memcontrol.core as core, memcontrol.config as config\n"
        "for package in (core, config):\n"
        "    for module in pkgutil.iter_modules(package.__path__):\n"
        "        importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "sys.exit(bool({'torch', 'safetensors', 'optuna', 'sqlalchemy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
