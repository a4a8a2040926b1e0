"""Owns each command as a Python function: the public API."""
