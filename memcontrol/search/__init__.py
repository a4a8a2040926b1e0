"""Owns what is tried next, and the loop that keeps trials in flight."""
