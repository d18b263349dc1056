"""Say of every result what made it: commit, date, device, versions, data."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = (
    "numpy", "pandas", "scipy", "scikit-image", "scikit-learn", "pillow", "tifffile",
    "openslide-python", "openslide-bin", "torch", "timm", "faiss-cpu",
)  # fmt: skip


def record(result, path, *, profile, parameters, data, seconds, device=None):
    """Write a result with its provenance as JSON; all of the file or nothing.

    Parameters
    ----------
    result : dict
        The result's own entries; NumPy values are converted, NaN becomes null.
    path : str or pathlib.Path
        Where to write, for example ``results/tissue/02_mosaic_extraction.json``.
    profile : str
        ``"demo"``, ``"tissue"`` or ``"paper"``.
    parameters : dict
        The notebook's parameters as they were in effect.
    data : dict
        Data set name to its hash (`file_hash` of its index, for example).
    seconds : float
        Wall time of the run.
    device : str, optional
        What it ran on; the processor's description if not given.

    Returns
    -------
    dict
        What was written.
    """
    commit, dirty = git_state()
    provenance = {
        "commit": commit,
        "uncommitted_changes": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "profile": profile,
        "parameters": parameters,
        "device": device or f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "seconds": round(float(seconds), 1),
        "python": platform.python_version(),
        "packages": installed_versions(),
        "data": data,
    }
    if "provenance" in result:
        raise ValueError("'provenance' is written by record(); name that entry anew")
    whole = plain({**result, "provenance": provenance})
    with new_file(path) as part:
        text = json.dumps(whole, indent=1, ensure_ascii=False)
        part.write_text(text + "\n", "utf-8")
    return whole


def credit(whole):
    """Say in one sentence what made a result that `record` wrote; Markdown."""
    made = whole["provenance"]
    changed = ", with uncommitted changes" if made["uncommitted_changes"] else ""
    return (
        f"Profile `{made['profile']}`, commit `{made['commit']}`{changed}, "
        f"{made['date'][:10]}, {made['device']}, {made['seconds']:.0f} s."
    )


def committed(chapter):
    """Read ``results/tissue/<chapter>.json``; None where the project has none."""
    path = project_folder() / "results" / "tissue" / f"{chapter}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def project_folder():
    """Return the project's root from any folder inside it, else the present folder.

    JupyterLab runs a chapter in ``notebooks/``, papermill at the root.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "histo_utils" / "provenance.py").exists():
            return folder
    return here


def git_state(folder="."):
    """Return the commit of ``folder`` and whether its code differs from it.

    Changes under ``results/`` do not count: a run writes them. Without git, or
    outside a repository, the commit is ``"unknown"``.
    """
    try:
        commit = _git(folder, "rev-parse", "--short=10", "HEAD")
        changed = _git(folder, "status", "--porcelain").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
    return commit, any(not line[3:].startswith("results/") for line in changed)


def _git(folder, *arguments):
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.rstrip("\n")


def installed_versions(packages=PACKAGES):
    """Versions of the packages that are installed, by name."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def file_hash(path, algorithm="sha256"):
    """Hash of a file's bytes, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def plain(value):
    """Turn NumPy values and NaN, at any depth, into what JSON knows.

    Examples
    --------
    >>> import numpy as np
    >>> plain({"n": np.int64(3), "score": np.array([0.5, np.nan])})
    {'n': 3, 'score': [0.5, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, pandas Series
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


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
