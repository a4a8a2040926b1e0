"""All commands' string arguments at random: a result, or one line, never anything else.

`[FUZZED_ARGUMENTS=500] python -m pytest tests/nightly/fuzz_arguments.py`
"""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from fuzzed_arguments import run_case

FIRST = 1000  # tests/test_bad_input.py has others


@pytest.mark.parametrize("seed", range(FIRST, FIRST + int(os.environ.get("FUZZED_ARGUMENTS", "500"))))
def test_any_argument_gives_a_result_or_one_line(seed, tmp_path):
    wrong = run_case(seed, tmp_path)
    assert not wrong, wrong
