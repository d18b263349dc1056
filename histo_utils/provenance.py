"""What made a result (commit, date, device, versions, data), and atomic writes."""

from __future__ import annotations

import ast
import contextlib
import functools
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
    """Write a result with its provenance as JSON, atomically.

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
    if "provenance" in result:
        raise ValueError("'provenance' is written by record(); rename that entry")
    fake = [name for name, of in data.items() if str(of).startswith("synthetic")]
    if profile == "paper" and fake:
        raise ValueError(
            f"{fake[0]} holds phantoms: the profile paper takes the paper's data only; "
            "name them in `dataset`, or run the profile demo"
        )
    commit, dirty = git_state()
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    provenance = {
        "commit": commit,
        "uncommitted_changes": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "profile": profile,
        "parameters": parameters,
        "device": device or f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "seconds": round(float(seconds), 1),
        "python": platform.python_version(),
        "packages": versions,
        "data": data,
    }
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


def committed(chapter, profile="tissue"):
    """Read ``results/<profile>/<chapter>.json``; None where the project has none."""
    path = project_folder() / "results" / profile / f"{chapter}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def project_folder():
    """Return the project's root from any folder inside it, else the current folder."""
    here = Path.cwd()  # JupyterLab runs a chapter in notebooks/, papermill at the root
    for folder in (here, *here.parents):
        if (folder / "histo_utils" / "provenance.py").exists():
            return folder
    return here


def git_state(folder="."):
    """Return commit and whether files outside ``results/`` changed; else "unknown"."""

    def git(*words):
        command = ["git", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    try:
        [commit] = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
    return commit, any(not line[3:].startswith("results/") for line in changed)


@functools.cache
def code_hash(*modules, package=Path(__file__).parent):
    """Hash modules ("mosaic", "encoders.saved") and all of the package they import.

    Found by ast, nothing is run; docstrings, comments and layout do not count.
    """

    def source(name):
        place = package.joinpath(*name.split(".")[1:])
        return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")

    wanted, found = [f"{package.name}.{name}" for name in modules], {}
    if missing := [name for name in wanted if not source(name).exists()]:
        raise ValueError(f"no module {missing[0]}; expected {source(missing[0])}")
    while wanted:
        name = wanted.pop()
        inside = name.split(".")[0] == package.name and source(name).exists()
        if name in found or not inside:  # not of the package, or a name in a module
            continue
        tree = ast.parse(source(name).read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                wanted += [
                    node.module,
                    *(f"{node.module}.{a.name}" for a in node.names),
                ]
            elif isinstance(body := getattr(node, "body", None), list):
                body[:] = [x for x in body if not isinstance(x, ast.Expr)
                           or not isinstance(x.value, ast.Constant)]  # fmt: skip
        found[name] = ast.dump(tree)
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def file_hash(path, algorithm="sha256"):
    """Hash of a file's bytes, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def plain(value):
    """Turn NumPy values, tuples and NaN (to None), at any depth, into JSON's types."""
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
    """Yield ``<path>.part`` to write to; at the end it replaces ``path`` atomically."""
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
    """Yield a new folder that replaces ``folder``, which may hold ``names`` alone."""
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
    for leftover in (fresh, stale):  # of a process that was killed
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
