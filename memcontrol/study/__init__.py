"""Owns what is stored and what it says: records, the front, the pick, the hypervolume."""
