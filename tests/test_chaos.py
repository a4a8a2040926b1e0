"""A short chaos run: each fault once. `make chaos` runs the full one."""

from collections import Counter

import chaos


def test_a_search_survives_each_fault_once(tmp_path_factory, monkeypatch):
    import tempfile
    from pathlib import Path

    monkeypatch.setattr(chaos, "OUTAGE_SECONDS", 4)
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        said = []
        found = chaos.disturbed_and_not(
            Path(name),
            6,
            Counter(
                dict.fromkeys(
                    ("kill worker", "kill orchestrator", "terminate orchestrator", "stop database"), 1
                )
            ),
            1,
            said.append,
        )
        assert not found, (found, said, (Path(name) / "search.log").read_text()[-2000:])
