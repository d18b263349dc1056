"""Which slides a collection has, and what is known of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd

from histo_utils.catalog import SLIDE_SUFFIXES, slide_table

LABEL_COLUMNS = ("patient", "label", "preparation", "site", "mpp")


def listed(folder, mpp, labels):
    """Slide table with what the CSV says, and notes on what is guessed or left out."""
    table = slide_table(folder, mpp)
    notes = []
    for name in ("slide", "patient"):
        table[name] = table[name].fillna(table["slide"]).astype(str)
    if labels is not None:
        table, unused = _with_labels(table, Path(labels))
        if unused:
            notes.append(f"{unused} rows of {labels} name no slide of the folder")
    names = table["slide"]
    bad = [name for name in names if Path(name).name != name or name.startswith(".")]
    if bad:
        raise ValueError(
            f"a slide is called {bad[0]!r}; expected a name that can be a file's, "
            "without / and not beginning with a dot: change the column slide"
        )
    folders = {Path(image).parent for image in table["image"]} | {folder}
    listed = {os.path.abspath(image) for image in table["image"]}
    there = [p for place in folders if place.is_dir() for p in place.iterdir()]
    left = [p.name for p in there
            if p.suffix.lower() in SLIDE_SUFFIXES and str(p) not in listed]  # fmt: skip
    if left:
        notes.append(
            f"{len(left)} slides are not in slides.csv and were left out, the first is "
            f"{min(left)}: add a row each"
        )
    guessed = int((table["patient"] == table["slide"]).sum())
    if guessed:
        notes.append(
            f"no patient is known for {guessed} of {len(table)} slides: each counts as "
            "a patient of its own, so two slides of one patient can find each other; a "
            "column patient in slides.csv or --labels says better"
        )
    return table, notes


def _with_labels(table, path):
    """Lay a CSV's columns over a slide table; also count its rows without a slide."""
    # A source-site code is called NA; empty cells alone are missing.
    given = pd.read_csv(path, dtype=str, keep_default_na=False, na_values="")
    key = next((name for name in ("slide", "file") if name in given), None)
    if key is None:
        raise ValueError(
            f"{path} has the columns {', '.join(given)}; expected slide or file, and "
            f"any of {', '.join(LABEL_COLUMNS)}"
        )
    own = table["slide"]
    if key == "file":
        given["file"] = [Path(str(name)).name for name in given["file"]]
        own = pd.Series([Path(image).name for image in table["image"]])
    twice = given[key].duplicated()
    if twice.any():
        raise ValueError(
            f"{path}: {given.loc[twice, key].iloc[0]!r} has two rows; expected one row "
            "a slide"
        )
    known = given[key].isin(set(own))
    if not known.any():
        raise ValueError(
            f"{path}: no {key} in it is in the folder; it has {given[key].iloc[0]!r}, "
            f"the folder {own.iloc[0]!r}"
            if len(given)
            else f"{path} has no rows"
        )
    rows = given.set_index(key).reindex(own.to_numpy())
    for name in rows:
        values = rows[name].to_numpy()
        if name == "mpp":
            name, values = "slide_mpp", pd.to_numeric(values)
        before = table[name].to_numpy(object) if name in table else None
        table[name] = np.where(pd.isna(values), before, values)
    table["slide_mpp"] = table["slide_mpp"].astype(float)
    return table, int((~known).sum())
