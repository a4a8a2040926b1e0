"""Owns which failed trials a search tries again: what broke them was the machine, or code that is mended
since, not their choice, which would have been pruned."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from memcontrol.core.choice import Choice
from memcontrol.study.record import Record

N_TRIALS = 3  # of one choice, each of several attempts, before it is left alone


def select_to_try_again(records: Sequence[Record], anchors: Collection[str]) -> list[Record]:
    """The last failure of each choice that has no other trial under way or ended well, fewer than N_TRIALS
    failures, and, as an anchor, is still wanted; anchors first. As long as nothing has ended well the machine
    is at fault, and nothing is given up."""
    most = N_TRIALS if any(record.finished for record in records) else len(records) + 1
    by_choices: dict[tuple[Choice, ...], list[Record]] = {}
    for record in records:
        by_choices.setdefault(record.candidates, []).append(record)
    last = [
        tried[-1]
        for tried in by_choices.values()
        if all(record.state == "FAIL" for record in tried) and len(tried) < most
    ]
    wanted = [record for record in last if record.anchor is None or record.anchor in anchors]
    return sorted(wanted, key=lambda record: record.anchor is None)


def list_given_up(records: Sequence[Record], anchors: Collection[str]) -> list[Record]:
    """The last trial of each wanted anchor that failed too often."""
    again = select_to_try_again(records, anchors)
    last = {record.anchor: record for record in records if record.anchor in anchors}
    return [record for record in last.values() if record.state == "FAIL" and record not in again]
