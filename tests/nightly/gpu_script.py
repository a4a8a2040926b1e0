"""The GPU's script rehearsed on a CPU: its first part, through the command line.

`python -m pytest tests/nightly/gpu_script.py`
"""

import json

from benchmarks import gpu
from benchmarks.__main__ import run_gpu, table


def test_the_gpus_script_searches_through_the_command_line_and_keeps_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "list_parts", lambda size: ["search"])
    run_gpu("cpu", 5, tmp_path)
    (page,), (record,) = tmp_path.glob("*-gpu-cpu.md"), tmp_path.glob("*-gpu-cpu.json")
    rows = json.loads(record.read_text())["rows"]
    figures = {row["what"]: row["figure"] for row in rows}
    wanted = {"search", "pick", "retrain", "export", "export in plain diffusers"}
    assert wanted <= set(figures), rows
    assert "3 trials, 2 steps of 8" in next(row for row in rows if row["what"] == "search")["beside"]
    assert table(rows) in page.read_text() and "search: pick: " in capsys.readouterr().out
