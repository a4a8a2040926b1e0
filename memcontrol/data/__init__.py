"""Owns the images: with what is known of them: the index of a folder, twins, the split, feature matrices."""
