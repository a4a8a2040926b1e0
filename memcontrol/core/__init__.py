"""Owns the common vocabulary: errors, config, choices and spaces, estimates, the files of a run; needs
neither torch nor a database."""
