"""The patch table: one row per patch, checked on the way in.

Columns: ``image`` (an image file or a slide), ``x``, ``y`` (level-0 pixels), ``size``
(px at ``mpp``), ``mpp`` (µm per pixel; missing for image files of unknown scale),
``slide``, ``patient`` (missing where the source does not say); where known
``label``, ``preparation``, ``site``, ``split`` or ``fold``, and ``slide_mpp`` where the
file itself does not hold its µm per pixel.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from scipy.stats.contingency import association

from histo_utils.slides import open_slide

REQUIRED = ("image", "x", "y", "size", "mpp", "slide", "patient")
ASSIGNMENTS = ("split", "fold")
OPEN_FILES = 8  # kept open per process; a slide costs OpenSlide's 32 MB cache


def check_patches(table):
    """Return the table if it is a patch table; say what is wrong otherwise.

    Parameters
    ----------
    table : pandas.DataFrame
        A missing ``patient`` is the same as no other; what needs patients (folds,
        exclusion) refuses such rows.

    Raises
    ------
    ValueError
        On missing columns, an empty table, rows without image or slide, an empty name
        in place of a missing patient, sizes below one pixel, or a patient in two splits
        or folds.
    """
    if missing := [name for name in REQUIRED if name not in table]:
        raise ValueError(
            f"the patch table has no column {', '.join(missing)}; it has "
            f"{', '.join(map(str, table.columns))}; expected {', '.join(REQUIRED)}"
        )
    if table.empty:
        raise ValueError("the patch table is empty; is the folder or the filter right?")
    for name in ("image", "slide", "patient"):
        may_miss = name == "patient"
        bad = (table[name].astype(str) == "") | (table[name].isna() & (not may_miss))
        if bad.any():
            raise ValueError(
                f"{bad.sum()} rows have no {name}, the first is row {bad.idxmax()}; "
                f"fill it in{', or leave it missing (None)' if may_miss else ''}"
            )
    if (table["size"] < 1).any():
        row = (table["size"] < 1).idxmax()
        raise ValueError(f"row {row}: size={table['size'][row]}; expected 1 px or more")
    for name in ASSIGNMENTS:
        shared = _in_several(table, "patient", name) if name in table else []
        if shared:
            raise ValueError(
                f"{len(shared)} patients are in more than one {name}, the first is "
                f"{shared[0]}; split by patient (patches.assign_folds)"
            )
    return table


def read_patch(row):
    """Read the pixels of one row of a patch table.

    Parameters
    ----------
    row : pandas.Series, dict or named tuple
        With ``image``, ``x``, ``y``, ``size``, ``mpp`` and, if the file does not hold
        its own scale, ``slide_mpp``.

    Returns
    -------
    numpy.ndarray
        uint8, (size, size, 3), RGB. Where ``mpp`` is missing, the file's own pixels.
    """
    # A Series' own .size is its length, so its entries are read by key.
    row = row._asdict() if hasattr(row, "_asdict") else row
    x, y, size, mpp = row["x"], row["y"], int(row["size"]), row["mpp"]
    given = row.get("slide_mpp")
    given = None if given is None or pd.isna(given) else float(given)
    if pd.isna(mpp):
        mpp = given = 1.0  # any scale does, as long as patch and file have the same one
    return _opened(str(row["image"]), given).read(x, y, size, float(mpp))


@functools.lru_cache(maxsize=OPEN_FILES)
def _opened(image, mpp):
    return open_slide(image, mpp)


def assign_folds(table, n_folds=5, group="patient", seed=0):
    """Give each row a fold, groups kept whole and labels spread over the folds.

    Parameters
    ----------
    table : pandas.DataFrame
        With the column ``group``, and ``label`` if folds are to be stratified.
    n_folds, seed : int
    group : str
        What is never divided; ``"slide"`` where patients are unknown.

    Returns
    -------
    pandas.Series
        int, 0 to n_folds - 1, for each row.

    Raises
    ------
    ValueError
        If there are fewer groups than folds, or rows without group.
    """
    if table[group].isna().any():
        raise ValueError(
            f"row {table[group].isna().idxmax()} has no {group}; fill it in, drop the "
            'row, or keep another unit whole (group="slide")'
        )
    n_groups = table[group].nunique()
    if n_folds < 2 or n_folds > n_groups:
        raise ValueError(
            f"n_folds={n_folds} for {n_groups} groups ({group}); expected 2 to "
            f"{n_groups}"
        )
    rng = np.random.default_rng(seed)
    label = table["label"] if "label" in table else pd.Series("", index=table.index)
    usual = label.groupby(table[group]).agg(lambda values: values.mode().iloc[0])
    names = [rng.permutation(part.index) for _, part in usual.groupby(usual)]
    fold = {name: i % n_folds for i, name in enumerate(np.concatenate(names))}
    return table[group].map(fold).rename("fold")


def leakage_report(table, assignment="split", pixels=True):
    """List what would make a score on this table too good.

    Parameters
    ----------
    table : pandas.DataFrame
        A patch table; a patient in two splits is found, not refused.
    assignment : {"split", "fold"}
        A column of it.
    pixels : bool
        Read every patch and look for identical images.

    Returns
    -------
    pandas.DataFrame
        One row per check: ``check``, ``found``, ``of``, ``detail``. Where preparations
        or sites differ, ``found`` is the number of labels that occur under one of them
        only, and the detail gives Cramér's V over patients.
    """
    if assignment not in table:
        raise ValueError(
            f"the table has no column {assignment!r}; it has {', '.join(table.columns)}"
        )
    rows = []
    for unit in ("patient", "slide"):
        shared, missing = _in_several(table, unit, assignment), table[unit].isna().sum()
        detail = f"{missing} patches have no {unit}" if missing else _examples(shared)
        check = f"{unit}s in more than one {assignment}"
        rows.append((check, len(shared), table[unit].nunique(), detail))
    if pixels:
        images = (read_patch(row).tobytes() for row in table.itertuples(index=False))
        hashed = table.assign(pixels=[hashlib.sha1(x).hexdigest() for x in images])
        shared = _in_several(hashed, "pixels", assignment)
        files = hashed.drop_duplicates("pixels").set_index("pixels")["image"]
        check = f"identical images in more than one {assignment}"
        names = [Path(name).name for name in files.loc[shared]]
        rows.append((check, len(shared), len(files), _examples(names)))
    part, pairs = table[assignment].to_numpy(), touching_pairs(table)
    crossing = int((part[pairs[:, 0]] != part[pairs[:, 1]]).sum())
    check = f"touching patches in different {assignment}s"
    detail = "pairs that overlap, or touch at an edge or a corner"
    rows.append((check, crossing, len(pairs), detail))
    for cause in ("preparation", "site"):
        if {"label", cause} <= set(table):
            rows += _tie(table, cause)
    return pd.DataFrame(rows, columns=["check", "found", "of", "detail"])


def touching_pairs(table):
    """Pairs of patches of one slide that overlap, or touch at an edge or a corner.

    Returns int (n, 2), positions (not index labels) of the rows, the smaller first.
    Patches that are image files of their own (Kimia Path24) have no known place on
    their slide: they touch nothing.
    """
    scale = table["mpp"] / table["slide_mpp"] if "slide_mpp" in table else 1.0
    side = (table["size"] * scale).to_numpy(float)
    places = table[["x", "y"]].to_numpy(float)
    found = [np.empty((0, 2), int)]
    where = [c for c in ("slide", "image") if c in table]
    for rows in table.groupby(where, sort=False).indices.values():
        reach = np.median(side[rows]) * 1.001
        near = cKDTree(places[rows]).query_pairs(reach, p=np.inf, output_type="ndarray")
        found.append(np.sort(rows[near], axis=1).reshape(-1, 2))
    pairs = np.concatenate(found)
    return pairs[np.lexsort(pairs.T[::-1])]


def _tie(table, cause):
    patients = table.dropna(subset="patient")
    patients = patients.drop_duplicates(["patient", "label", cause])
    causes = patients.groupby("label")[cause].nunique()
    labels = patients.groupby(cause)["label"].nunique()
    if len(labels) < 2 or len(causes) < 2:
        return []
    v = association(pd.crosstab(patients["label"], patients[cause]), "cramer")
    single = list(causes.index[causes == 1])
    text = f"Cramér's V {v:.2f} over {patients['patient'].nunique()} patients"
    text += f"; {(labels == 1).sum()} of {len(labels)} {cause}s have one label only"
    if single:
        text += f"; only one {cause}: {_examples(single, 4)}"
    return [(f"labels with a single {cause}", len(single), len(causes), text)]


def _in_several(table, unit, assignment):
    counts = table.groupby(unit)[assignment].nunique()
    return counts.index[counts > 1].to_list()


def _examples(names, most=2):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
