"""Owns the base pipeline, and what a choice trains in it."""
