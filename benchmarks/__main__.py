"""Runs one benchmark: `python -m benchmarks NAME [--device cuda]` prints a table and writes a dated JSON
beside this file."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
# not FOLDER: a path of this machine is nobody's business
SETTINGS = ("REPEATS", "SEEDS", "SMALL", "TRIALS", "VARIANTS", "WORKERS")
NAMES = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))


def gpu_found() -> bool:
    import torch

    return torch.cuda.is_available()


def machine(device: str) -> dict:
    """What the figures depend on beside the code."""
    import torch

    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    versions = {name: version(name) for name in ("torch", "diffusers", "peft", "optuna")}
    return {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        **versions,
    }


def table(rows: list[dict]) -> str:
    names = list(rows[0])
    cells = [
        names,
        *(
            [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names]
            for row in rows
        ),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    if args.device == "cuda" and not gpu_found():
        parser.error("--device is cuda, and torch finds no GPU here; leave it out to run on the CPU")
    rows = importlib.import_module(f"benchmarks.{args.name}").run(args.device)
    print(table(rows))
    day = datetime.date.today().isoformat()
    path = HERE / "results" / f"{day}-{args.name}-{args.device}.json"
    path.parent.mkdir(exist_ok=True)
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    path.write_text(
        json.dumps(
            {
                "name": args.name,
                "date": day,
                "machine": machine(args.device),
                "settings": settings,
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
