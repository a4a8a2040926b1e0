"""Owns one trial in its folder: prepare, train, sample, score, draw."""
