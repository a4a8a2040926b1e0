"""What the suite leaves out of tests at real sizes, since it takes a minute each on a CPU.

`python -m pytest tests/nightly/real_sizes.py`
"""

import pytest
import test_spaces_shipped
from test_spaces_shipped import architecture  # noqa: F401


def test_the_complete_space_hides_nothing(architecture):  # noqa: F811
    test_spaces_shipped.test_our_spaces_hide_nothing(architecture, "sd15-sites-complete")


@pytest.mark.parametrize("groups, method", [(("down_attention", "up_resnet"), "lora"), (("mid",), "full")])
def test_the_bytes_of_a_step_in_bfloat16(base, material, groups, method):
    test_spaces_shipped.test_the_bytes_of_a_step_are_those_that_the_allocator_gives(
        base, material, groups, method, "bfloat16"
    )
