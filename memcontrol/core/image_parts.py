"""Owns the parts that a study's images are in, and the name of the images that are embedded."""

PARTS = ("train", "holdout", "test")
CALIBRATION = "calibration"  # a part that a study may have
DIGITS = "digits"  # data.path of the images that are embedded
