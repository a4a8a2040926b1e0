"""Owns what other trainers are told: a choice's layers by their own filters and names, its settings by their
own keys.

Each rule is read from the trainer's own code, which the function that follows it names. What a trainer cannot
hold is refused: an approximation of a mask is another mask.
"""
