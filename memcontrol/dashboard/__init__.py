"""Owns optuna-dashboard as it is served: the guard before it, its address, and what a search writes for
it."""
