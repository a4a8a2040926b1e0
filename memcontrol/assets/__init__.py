"""Owns the embedded base and feature network, and build.py that made them."""
