"""Whose folder it is, and what in it no longer belongs to a slide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil

from histo_utils import provenance

NOTE = "collection.json"
ATLAS_FACTS = ("atlas_of", "atlas_notes")  # of the note, kept from run to run


def claim(out, note):
    """Note in ``out`` whose collection it is; refuse another's, or a run at work."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / NOTE
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        if before["slides"] != note["slides"]:
            raise ValueError(
                f"{out} is the collection of {before['slides']}, not of "
                f"{note['slides']}; give another folder, or remove this one"
            )
        note |= {key: before[key] for key in ATLAS_FACTS if key in before}
        run = before.get("running")
        if run is not None and run != process() and process(run[0]) == run:
            raise ValueError(
                f"another run (process {run[0]}) is at work in {out}; wait for it"
            )
    elif any(out.iterdir()):
        raise ValueError(f"{out} holds other files; give an empty or a new folder")
    note["running"] = process()
    write(path, json.dumps(note, indent=1))


def process(number=None):
    """Return a process's number and start, which tell it from all others here."""
    try:
        process = psutil.Process(number)
        return [process.pid, process.create_time()]
    except psutil.NoSuchProcess:
        return None


def clear(folder, names, product):
    """Remove what belongs to no slide, and the lines of slides whose work is gone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        name = path.name
        if path.is_file():
            name = Path(name.removesuffix(".part")).stem
        if name not in names and not name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in names:
        if not (folder / product(name)).exists():
            (folder / f"{name}.json").unlink(missing_ok=True)


def clear_begun(folder):
    """Remove what killed runs had begun to save: ``.<name>.<process>.new``."""
    for path in folder.glob(".*.*.*"):
        if not psutil.pid_exists(int(path.suffixes[-2][1:])):
            shutil.rmtree(path)


def write(path, text):
    """Write a text file, whole or not at all."""
    with provenance.new_file(path) as part:
        part.write_text(text, "utf-8")
