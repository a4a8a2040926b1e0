"""Owns the study file: its keys, how they are read and compared, what a choice changes of them, and a trial's
specification, which holds them."""
