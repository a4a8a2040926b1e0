"""Owns the judging of images and of a model that somebody brings: what `audit` looks at and how."""
