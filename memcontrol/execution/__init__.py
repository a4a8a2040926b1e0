"""Owns where trials run: in this process, in workers, on Ray or Slurm; tries, and the worker."""
