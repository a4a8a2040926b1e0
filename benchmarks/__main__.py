"""Runs one benchmark: `python -m benchmarks NAME [--device cuda]` prints a table and writes a dated JSON
beside this file."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import signal
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
# not FOLDER: a path of this machine is nobody's business
SETTINGS = ("IMAGES", "REPEATS", "SEEDS", "SMALL", "TRIALS", "VARIANTS", "WORKERS")
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


def name_card(device: str) -> str:
    """As a part of a file's name: "nvidia-h100-80gb-hbm3"."""
    import torch

    return (
        re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        if device == "cuda"
        else "cpu"
    )


def describe_run(name: str, device: str, rows: list[dict]) -> dict:
    """What the JSON holds."""
    settings = {key: os.environ[key] for key in SETTINGS if key in os.environ}
    return {
        "name": name,
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "settings": settings,
        "rows": rows,
    }


def write_json(path: Path, name: str, device: str, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(describe_run(name, device, rows), indent=1) + "\n")


def write_page(path: Path, device: str, minutes: float, rows: list[dict]) -> None:
    """The table of `gpu` in Markdown, with the machine."""
    said = ", ".join(f"{name} {value}" for name, value in machine(device).items() if value)
    title = f"# {machine(device)['gpu'] or 'Rehearsal on a CPU'}, {datetime.date.today().isoformat()}"
    how = f"`python -m benchmarks gpu --minutes {minutes:g}` ({said}). Once, not repeated."
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"{title}\n\n{how}\n\n{table(rows)}\n")


def run_gpu(device: str, minutes: float, out: Path) -> None:
    """All that waits for a card, kept after each part."""
    from benchmarks import gpu

    place = out / f"{datetime.date.today().isoformat()}-gpu-{name_card(device)}"
    page, record = place.with_name(place.name + ".md"), place.with_name(place.name + ".json")

    def keep(rows: list[dict]) -> None:
        if rows:
            write_json(record, "gpu", device, rows)
            write_page(page, device, minutes, rows)

    gpu.run(device, minutes, keep)
    print(f"written: {shorten_path(page)}, {shorten_path(record)}")


def shorten_path(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu, and of gpu cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="of gpu: how long it may take (8)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where its figures are written")
    args = parser.parse_args()
    device = args.device or ("cuda" if args.name == "gpu" else "cpu")
    if device == "cuda" and not gpu_found():
        parser.error(
            "torch finds no GPU here; --device cpu rehearses it at small size"
            if args.device is None
            else "--device is cuda, and torch finds no GPU here; leave it out to run on the CPU"
        )
    if args.name == "gpu":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # keeps what it has
        run_gpu(device, args.minutes, args.out)
        return
    rows = importlib.import_module(f"benchmarks.{args.name}").run(device)
    print(table(rows))
    path = args.out / f"{datetime.date.today().isoformat()}-{args.name}-{device}.json"
    write_json(path, args.name, device, rows)
    print(f"written: {shorten_path(path)}")


if __name__ == "__main__":
    main()
