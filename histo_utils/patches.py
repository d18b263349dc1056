"""The patch table: one row a patch, checked on the way in.

Columns: ``image`` (an image file or a slide), ``x``, ``y`` (level-0 pixels), ``size``
(px at ``mpp``), ``mpp`` (µm per pixel; missing for image files of unknown scale),
``slide``, ``patient``; where known ``label``, ``preparation``, ``site``, ``split`` or
``fold``, and ``slide_mpp`` where the file itself does not hold its µm per pixel.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from histo_utils import provenance
from histo_utils.slides import open_slide

REQUIRED = ("image", "x", "y", "size", "mpp", "slide", "patient")
ASSIGNMENTS = ("split", "fold")
OPEN_FILES = 8  # kept open for each process; a slide costs OpenSlide's 32 MB cache


def check_patches(table):
    """Return the table if it is a patch table; say what is wrong otherwise.

    Raises
    ------
    ValueError
        On missing columns, an empty table, rows without slide or patient, sizes below
        one pixel, or a patient in two splits or folds.
    """
    missing = [name for name in REQUIRED if name not in table.columns]
    if missing:
        raise ValueError(
            f"the patch table has no column {', '.join(missing)}; it has "
            f"{', '.join(map(str, table.columns))}; expected {', '.join(REQUIRED)}"
        )
    if table.empty:
        raise ValueError("the patch table is empty; is the folder or the filter right?")
    for name in ("image", "slide", "patient"):
        bad = table.index[table[name].isna() | (table[name].astype(str) == "")]
        if len(bad):
            raise ValueError(
                f"{len(bad)} rows have no {name}, the first is row {bad[0]}; where "
                "patients are unknown use the slide's name, and say so"
            )
    if (table["size"] < 1).any():
        row = table.index[table["size"] < 1][0]
        raise ValueError(f"row {row}: size={table['size'][row]}; expected 1 px or more")
    for name in ASSIGNMENTS:
        shared = _in_several(table, "patient", name) if name in table else []
        if len(shared):
            raise ValueError(
                f"{len(shared)} patients are in more than one {name}, the first is "
                f"{shared[0]}; split by patient (patches.assign_splits)"
            )
    return table


def save_patches(table, path):
    """Check the table and write it as Parquet; all of the file or nothing."""
    with provenance.new_file(path) as part:
        check_patches(table).to_parquet(part, index=False)


def load_patches(path):
    """Read a patch table that `save_patches` wrote, and check it."""
    return check_patches(pd.read_parquet(path))


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
    # A Series' own .size is its length, so its entries are asked for by key.
    row = row._asdict() if hasattr(row, "_asdict") else row
    x, y, size, mpp = row["x"], row["y"], int(row["size"]), row["mpp"]
    given = row.get("slide_mpp")
    given = None if given is None or pd.isna(given) else float(given)
    if pd.isna(mpp):
        # Any scale does, as long as patch and file have the same one.
        return _opened(str(row["image"]), 1.0).read(x, y, size, 1.0)
    return _opened(str(row["image"]), given).read(x, y, size, float(mpp))


@functools.lru_cache(maxsize=OPEN_FILES)
def _opened(image, mpp):
    return open_slide(image, mpp)


def patch_hashes(table):
    """Hash of each patch's pixels: equal for equal images; Series of str."""
    rows = (read_patch(row) for row in table.itertuples(index=False))
    digests = [hashlib.sha1(pixels.tobytes()).hexdigest() for pixels in rows]
    return pd.Series(digests, index=table.index, name="pixels", dtype=str)


def assign_splits(table, validation=0.2, test=0.2, group="patient", seed=0):
    """Divide a table into train, validation and test, never within a group.

    Groups are drawn label by label (a group's most frequent one), so that each label
    with three groups or more is in every part.

    Returns
    -------
    pandas.Series
        ``"train"``, ``"validation"`` or ``"test"`` for each row.

    Raises
    ------
    ValueError
        If the shares leave nothing to train on.
    """
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(
            f"validation={validation} and test={test} were given; expected shares of "
            "0 or more that leave something to train on"
        )
    rng = np.random.default_rng(seed)
    part = {}
    for _, groups in _groups_by_label(table, group):
        groups = rng.permutation(groups)
        n_test, n_validation = (
            (max(1, round(len(groups) * share)) if share and len(groups) > 2 else 0)
            for share in (test, validation)
        )
        for i, name in enumerate(groups):
            held = "test" if i < n_test else "validation"
            part[name] = held if i < n_test + n_validation else "train"
    return table[group].map(part).rename("split")


def assign_folds(table, n_folds=5, group="patient", seed=0):
    """Give each row a fold from 0 to n_folds − 1, labels spread, groups kept whole.

    Raises
    ------
    ValueError
        If there are fewer groups than folds.
    """
    n_groups = table[group].nunique()
    if n_folds < 2 or n_folds > n_groups:
        raise ValueError(
            f"n_folds={n_folds} for {n_groups} groups ({group}); expected 2 to "
            f"{n_groups}"
        )
    rng = np.random.default_rng(seed)
    order = [
        name for _, g in _groups_by_label(table, group) for name in rng.permutation(g)
    ]
    fold = {name: i % n_folds for i, name in enumerate(order)}
    return table[group].map(fold).rename("fold")


def _groups_by_label(table, group):
    label = table["label"] if "label" in table else pd.Series("", index=table.index)
    usual = label.groupby(table[group]).agg(lambda values: values.mode().iloc[0])
    return [(name, part.index.to_numpy()) for name, part in usual.groupby(usual)]


def leakage_report(table, assignment="split", pixels=True):
    """List what would make a score on this table too good.

    Parameters
    ----------
    table : pandas.DataFrame
        A patch table with the column named by ``assignment``; it is not refused for a
        patient in two splits, since finding those is the purpose.
    assignment : str
        ``"split"`` or ``"fold"``.
    pixels : bool
        Read every patch and look for identical images.

    Returns
    -------
    pandas.DataFrame
        One row a check: ``check``, ``found``, ``of``, ``detail``. Where preparations or
        sites differ, ``found`` is the number of labels that occur under one of them
        only, and the detail gives Cramér's V over patients.
    """
    if assignment not in table:
        raise ValueError(
            f"the table has no column {assignment!r}; it has {', '.join(table.columns)}"
        )
    rows = []
    for unit in ("patient", "slide"):
        shared = _in_several(table, unit, assignment)
        check = f"{unit}s in more than one {assignment}"
        rows.append((check, len(shared), table[unit].nunique(), _examples(shared)))
    if pixels:
        hashed = table.assign(pixels=patch_hashes(table))
        shared = _in_several(hashed, "pixels", assignment)
        files = hashed.drop_duplicates("pixels").set_index("pixels")["image"]
        check = f"identical images in more than one {assignment}"
        names = [Path(name).name for name in files.loc[shared]]
        rows.append((check, len(shared), len(files), _examples(names)))
    pairs = touching_pairs(table)
    apart = table[assignment].to_numpy()
    crossing = int((apart[pairs[:, 0]] != apart[pairs[:, 1]]).sum())
    detail = "pairs that overlap, or touch at an edge or a corner"
    check = f"touching patches in different {assignment}s"
    rows.append((check, crossing, len(pairs), detail))
    for cause in ("preparation", "site"):
        if {"label", cause} <= set(table.columns) and len(set(table[cause])) > 1:
            rows.append(_tie(table, cause))
    return pd.DataFrame(rows, columns=["check", "found", "of", "detail"])


def touching_pairs(table):
    """Pairs of patches of one slide that overlap, or touch at an edge or a corner.

    Patches that are image files of their own (Kimia Path24) have no known place on
    their slide: they touch nothing.

    Returns
    -------
    numpy.ndarray
        int (n, 2): positions (not index labels) of the two rows, the smaller first.
    """
    scale = table["mpp"] / table["slide_mpp"] if "slide_mpp" in table else 1.0
    side = (table["size"] * scale).to_numpy(float)
    places = table[["x", "y"]].to_numpy(float)
    found = [np.empty((0, 2), int)]
    where = [c for c in ("slide", "image") if c in table]
    for rows in table.groupby(where, sort=False).indices.values():
        reach = np.median(side[rows]) * 1.001
        pairs = cKDTree(places[rows]).query_pairs(
            reach, p=np.inf, output_type="ndarray"
        )
        found.append(np.sort(rows[pairs], axis=1).reshape(-1, 2))
    pairs = np.concatenate(found)
    return pairs[np.lexsort(pairs.T[::-1])]


def cramers_v(a, b):
    """Cramér's V of two labels: 0 independent, 1 one tells the other.

    Examples
    --------
    >>> cramers_v(["a", "a", "b", "b"], [0, 0, 1, 1])
    1.0
    """
    counts = pd.crosstab(pd.Series(list(a)), pd.Series(list(b))).to_numpy(float)
    if min(counts.shape) < 2:
        return float("nan")
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return float(np.sqrt(chi2 / (counts.sum() * (min(counts.shape) - 1))))


def _tie(table, cause):
    patients = table.drop_duplicates(["patient", "label", cause])
    causes = patients.groupby("label")[cause].nunique()
    single = causes.index[causes == 1]
    v = cramers_v(patients["label"], patients[cause])
    text = f"Cramér's V {v:.2f} over {patients['patient'].nunique()} patients"
    labels = patients.groupby(cause)["label"].nunique()
    text += f"; {(labels == 1).sum()} of {len(labels)} {cause}s have one label only"
    if len(single):
        text += f"; only one {cause}: {_examples(list(single), 4)}"
    return f"labels with a single {cause}", len(single), len(causes), text


def _in_several(table, unit, assignment):
    counts = table.groupby(unit)[assignment].nunique()
    return counts.index[counts > 1].to_list()


def _examples(names, most=2):
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
