"""Kimia Path24's one HDF5 file (29 GB), cut into training and test patches as PNG.

Babaie et al., CVPR Workshops 2017, published scans with the places of the test patches
painted white, and left the cutting of training patches to the reader. Kieffer et al.,
IPTA 2017, cut a grid without overlap, set the bright ground to white and dropped what
was homogeneous at the 99 % level; the grey level of "bright" and the measure of
homogeneity are ours. Published counts are 27,055 (Kieffer) and more: compare yours.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from histo_utils import provenance
from histo_utils.readers.class_folders import save_png

BRIGHT = 230  # grey level from which a pixel is ground (ours)
HOMOGENEOUS = 0.99  # share of a patch that has one grey level (level: Kieffer 2017)
NOTE, PARTS = "path24.json", ("train", "test")


def convert_path24(file, folder, bright=BRIGHT, progress=True) -> pd.DataFrame:
    """Cut Kimia Path24 into ``train/s<k>/*.png`` and ``test/s<k>/*.png``.

    The grid has no overlap and ⌊size / side⌋ rows and columns, so the last complete
    strip is kept (the loop in the data set's own notes stops before it). A training
    patch is left out, in this order, if it

    1. shares a pixel with a *test place*: a solid square of exactly 255, as large as a
       test patch, anywhere in the raw scan. Glass recorded as 255 looks the same;
    2. is *homogeneous*: more than 99 % of its pixels have one grey level, after pixels
       of ``bright`` or more were set to 255.

    Test patches are whitened in the same way and all kept. Two strips of a scan are in
    memory at a time. Run again, finished scans are not repeated.

    Parameters
    ----------
    file : str or pathlib.Path
        ``Kimia_Path24.h5``: ``/scan<k>/data`` (uint8, 2-D), ``/test_data/patches``
        (uint8, (n, side, side)), ``/test_data/targets`` (n,).
    folder : str or pathlib.Path
        Where to write; made if missing. `catalog.patch_table` reads it.
    bright : int
        Grey level 1–255 from which a pixel counts as ground.
    progress : bool
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        One row per scan: ``slide``, ``cells`` of its grid, of these ``test_place``,
        ``homogeneous`` and ``train`` (kept), and ``test`` (test patches).

    Raises
    ------
    ImportError
        If h5py is missing.
    FileNotFoundError, ValueError
        If there is no such file, it has another layout, or the folder holds patches
        made otherwise.
    """
    file, folder = Path(file), Path(folder)
    if not 1 <= bright <= 255:
        raise ValueError(
            f"bright={bright} was given; expected a grey level of 1 to 255"
        )
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "Kimia Path24 is an HDF5 file, and h5py is not installed: pip install "
            '"histo_utils[networks]"'
        ) from error
    if not file.exists():
        raise FileNotFoundError(
            f"{file}: no such file; catalog.dataset('kimia_path24') says how to get it"
        )
    with h5py.File(file, "r") as data:
        scans, side = _check(data, file)
        _claim(folder, {"file_bytes": file.stat().st_size, "bright": int(bright)})
        lines = []
        for number in tqdm(scans, unit="scan", disable=not progress, ascii=True):
            scan = data[f"scan{number}/data"]
            lines.append(_cut_scan(scan, folder, f"s{number}", side, bright))
        targets = np.ravel(data["test_data/targets"][:]).astype(int)
        steps = tqdm(targets, unit="test patch", disable=not progress, ascii=True)
        for i, target in enumerate(steps):
            path = folder / "test" / f"s{target}" / f"s{target}_test{i:04d}.png"
            if not path.exists():
                save_png(_whitened(data["test_data/patches"][i], bright), path)
    table = pd.DataFrame(lines)
    return table.assign(test=[int((targets == number).sum()) for number in scans])


def _check(data, file):
    """Numbers of the scans, and the side of a patch in pixels."""
    scans = sorted(int(n[4:]) for n in data if re.fullmatch(r"scan\d+", n))
    wanted = ["test_data/patches", "test_data/targets"]
    wanted += [f"scan{number}/data" for number in scans or [0]]
    if missing := [name for name in wanted if name not in data]:
        raise ValueError(
            f"{file}: no {', '.join(missing)} in it (it holds {', '.join(data)}); "
            "expected /scan<k>/data, /test_data/patches and /test_data/targets, as in "
            "Kimia_Path24.h5"
        )
    patches, targets, *pixels = (data[name] for name in wanted)
    for scan in pixels:
        if scan.ndim != 2 or scan.dtype != np.uint8:
            raise ValueError(
                f"{file}: {scan.name} is {scan.dtype} {scan.shape}; expected grey: "
                "uint8 with two dimensions"
            )
    shape, side = patches.shape, patches.shape[-1]
    if shape != (targets.size, side, side) or patches.dtype != np.uint8:
        raise ValueError(
            f"{file}: /test_data/patches is {patches.dtype} {shape} with "
            f"{targets.size} targets; expected uint8 (n, side, side) with n targets"
        )
    if odd := sorted({int(t) for t in np.ravel(targets[:])} - set(scans)):
        raise ValueError(
            f"{file}: test targets {odd} have no scan; expected numbers among {scans}"
        )
    return scans, side


def _claim(folder, made):
    """Note how the folder's patches are made, or check how they were."""
    note = folder / NOTE
    found = json.loads(note.read_text("utf-8")) if note.exists() else made
    if found != made:
        raise ValueError(
            f"{folder} holds patches made with {found}, but {made} was given; give "
            "another folder, or remove this one"
        )
    if not note.exists() and any((folder / part).exists() for part in PARTS):
        raise ValueError(
            f"{folder} holds train or test without {NOTE}: other data; give another "
            "folder"
        )
    with provenance.new_file(note) as part:
        part.write_text(json.dumps(made), "utf-8")


def _cut_scan(scan, folder, label, side, bright):
    """Write one scan's training patches unless that was finished; its counts."""
    done = folder / "train" / f"{label}.json"  # written last
    if done.exists():
        return json.loads(done.read_text("utf-8"))
    counts = {"slide": label, "cells": 0, "test_place": 0, "homogeneous": 0, "train": 0}
    for top, strip, touched in _strips(scan, side):
        for column, taken in enumerate(touched):
            left = column * side
            patch = _whitened(strip[:, left : left + side], bright)
            same = np.bincount(patch.ravel()).max() > HOMOGENEOUS * patch.size
            fate = "test_place" if taken else "homogeneous" if same else "train"
            counts["cells"] += 1
            counts[fate] += 1
            if fate == "train":
                name = f"{label}_y{top:06d}_x{left:06d}.png"
                save_png(patch, folder / "train" / label / name)
    with provenance.new_file(done) as part:
        part.write_text(json.dumps(counts), "utf-8")
    return counts


def _whitened(patch, bright):
    return np.where(patch >= bright, np.uint8(255), patch)


def _strips(scan, side):
    """Yield top row, pixels, and which grid cells share a pixel with a test place.

    A strip waits until the next is read: a white square that ends there may begin here.
    """
    height, width = scan.shape
    n_cells = width // side
    run = np.zeros(width, np.int32)  # white pixels in a row, upwards from here
    waiting = None
    for top in range(0, height, side):
        strip = scan[top : top + side]
        here, above = np.zeros((2, n_cells), bool)
        for y, white in enumerate(strip == 255):
            run = (run + 1) * white
            if not (run >= side).any():
                continue
            total = np.cumsum(np.append(0, run >= side))
            left = np.flatnonzero(total[side:] - total[:-side] == side)  # whole squares
            cells = np.append(left, left + side - 1) // side
            cells = cells[cells < n_cells]  # the incomplete column has no patch
            here[cells] = True
            above[cells] |= y < side - 1
        if waiting:
            yield waiting[0], waiting[1], waiting[2] | above
        waiting = top, strip, here
    if waiting and len(waiting[1]) == side:
        yield waiting
