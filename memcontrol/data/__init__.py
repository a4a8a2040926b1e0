"""Owns the images: folders, captions, splits, feature matrices."""
