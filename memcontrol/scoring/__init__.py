"""Owns what is measured on a model's images: quality, copying, a user's own rewards."""
