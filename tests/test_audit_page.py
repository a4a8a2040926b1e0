"""Pairs on the audit's page."""

import numpy as np

from memcontrol.view.audit_page import frame_region


def test_the_part_that_is_compared_is_framed():
    image = np.zeros((3, 64, 64), np.uint8)
    assert frame_region(image, [0.0, 0.0, 1.0, 1.0]) is image
    changed = (frame_region(image, [0.25, 0.5, 0.75, 1.0]) != image).any(0)
    expected = np.zeros((64, 64), bool)
    expected[32:, 16:48] = True
    expected[33:63, 17:47] = False
    assert (changed == expected).all()
