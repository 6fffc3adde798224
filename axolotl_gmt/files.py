"""Files and folders that appear whole or not at all. Knows only paths."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder to, which becomes ``path`` when the block ends.

    What ``path`` was before is replaced then. If the block raises, or writes nothing, it stays.

    Args:
        path: The folder that it is in must exist.

    Raises:
        OSError: If it cannot be written.
    """
    # In a new folder, since any fixed name beside ``path`` could be a file of somebody's.
    part = Path(tempfile.mkdtemp(prefix=f".{path.name[:32]}.", suffix=".part", dir=path.parent))
    new, old = part / "new" / path.name, part / "old"
    try:
        new.parent.mkdir()
        yield new
        if new.is_dir() and path.exists():  # No folder takes the place of another in one step.
            path.replace(old)
        if new.exists():
            new.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
