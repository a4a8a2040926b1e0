"""Owns the inner loop of one fine-tuning: rounds, shards, skipping, augmentation."""
