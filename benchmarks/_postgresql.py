"""A PostgreSQL of a benchmark's own."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def postgresql() -> Iterator[tuple[Path, object]]:
    """A folder that goes with it, and the tests' server; tests/ can be imported from then on."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from postgres import Postgres

    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        server = Postgres(folder / "pg")
        try:
            yield folder, server
        finally:
            server.stop("immediate")
