"""Owns the epsilon of a model that was trained without a bound on what it tells."""

NO_BOUND = 1000.0  # any that a fine-tuning may ask for is less
