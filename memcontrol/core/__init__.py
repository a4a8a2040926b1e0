"""Owns the common vocabulary: errors, choices and spaces, rewards, estimates, the files of a run; needs
neither torch nor a database."""
