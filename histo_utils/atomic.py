"""Files and folders that appear whole or not at all.

They are written under a temporary name and renamed when they are complete: whoever is
killed on the way leaves what was there before, never a half.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def new_file(path):
    """Give a temporary name to write to; at the end it takes the place of ``path``.

    The name is ``<path>.part``, for one process at a time.

    Parameters
    ----------
    path : str or pathlib.Path
        Its folder is made if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder, names, what):
    """Give an empty folder to write into; at the end it takes the place of ``folder``.

    Parameters
    ----------
    folder : str or pathlib.Path
        The folder above it is made if missing.
    names : set of str
        Files that belong to such a folder: with these alone it may be replaced.
    what : str
        What such a folder is, for the error: "saved embeddings".

    Raises
    ------
    FileExistsError
        The folder exists and holds something else.
    """
    folder = Path(folder)
    others = {folder.name} if folder.exists() else set()
    if folder.is_dir():
        others = {path.name for path in folder.iterdir()} - set(names)
    if others:
        raise FileExistsError(
            f"{folder} holds {sorted(others)[0]!r}, which does not belong to {what}; "
            "give a folder of its own, which may be replaced"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, stale = (
        folder.with_name(f".{folder.name}.{os.getpid()}.{kind}")
        for kind in ("new", "old")
    )
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
    finally:
        if stale.exists() and not folder.exists():
            stale.rename(folder)
        for leftover in (fresh, stale):
            shutil.rmtree(leftover, ignore_errors=True)
