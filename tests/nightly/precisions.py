"""What the suite does for two families, for all: half-saved bases held in float32, and quantised ones.

`python -m pytest tests/nightly/precisions.py`
"""

import pytest
import test_precision
from small_pipelines import SMALL

OTHERS = [name for name in SMALL if name not in test_precision.IN_FLOAT32]


@pytest.mark.parametrize("name", OTHERS)
def test_a_base_saved_in_half_is_searched_in_float32(name, tmp_path, photographs, monkeypatch):
    test_precision.test_a_base_saved_in_half_is_searched(name, "float32", tmp_path, photographs, monkeypatch)


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "ddpm"])
def test_a_quantised_base_is_searched(name, tmp_path, photographs):
    test_precision.test_a_quantised_base_of_every_family_is_searched(name, tmp_path, photographs)
