"""PanNuke's arrays (Gamper et al. 2019, 2020), turned into class folders of PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from histo_utils.readers.class_folders import (
    class_folders,
    read_class_folders,
    save_png,
)

FOLDS = (1, 2, 3)

MPP = 0.25  # µm per pixel (40×)


def convert_pannuke(folder, progress=True):
    """Write each fold's images to ``fold<k>/<tissue>/fold<k>_<number>.png``.

    Reads ``Fold <k>/images/fold<k>/images.npy`` ((n, 256, 256, 3), 0–255, any number
    type) image by image, and ``types.npy`` (n,) for the tissue, whose underscores
    become dashes. Folds that are not there are left out. Run again, images that are
    there are not repeated.

    Parameters
    ----------
    folder : str or pathlib.Path
        Holds the unpacked folds; the PNG files go there, too.
    progress : bool
        Show a progress bar.

    Raises
    ------
    FileNotFoundError
        If there is no fold.
    ValueError
        If arrays do not fit each other, or values lie outside 0–255.
    """
    folder = Path(folder)
    places = {k: folder / f"Fold {k}" / "images" / f"fold{k}" for k in FOLDS}
    places = {k: place for k, place in places.items() if place.is_dir()}
    if not places:
        raise FileNotFoundError(
            f"{folder}: no 'Fold 1/images/fold1' in it; expected PanNuke's unpacked "
            "folds (catalog.fetch('pannuke') gets them)"
        )
    for k, place in places.items():
        # Never allow_pickle: an object array from outside could run code.
        pixels = np.load(place / "images.npy", mmap_mode="r", allow_pickle=False)
        types = np.load(place / "types.npy", allow_pickle=False)
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) != len(types):
            raise ValueError(
                f"{place}: images {pixels.shape} and {len(types)} types; expected "
                "(n, 256, 256, 3) and n"
            )
        steps = tqdm(types, desc=f"fold {k}", disable=not progress, ascii=True)
        for i, tissue in enumerate(steps):
            name = str(tissue).replace("_", "-")
            path = folder / f"fold{k}" / name / f"fold{k}_{i:04d}.png"
            if not path.exists():
                save_png(_bytes(pixels[i], place, i), path)


def read_pannuke(folder):
    """List the converted patches.

    Returns
    -------
    pandas.DataFrame or None
        The columns of `class_folders.read_class_folders`, with ``fold`` (1 to 3),
        ``mpp`` and ``slide_mpp`` 0.25; patient ids are not published, so ``patient`` is the patch.
        None if nothing is converted.
    """
    found = [k for k in FOLDS if (Path(folder) / f"fold{k}").is_dir()]
    found = [k for k in found if class_folders(Path(folder) / f"fold{k}")]
    parts = [
        read_class_folders(Path(folder) / f"fold{k}").assign(fold=k) for k in found
    ]
    if not parts:
        return None
    return pd.concat(parts, ignore_index=True).assign(mpp=MPP, slide_mpp=MPP)


def _bytes(pixels, place, i):
    pixels = np.asarray(pixels)
    if not (pixels.min() >= 0 and pixels.max() <= 255):  # also false for NaN
        raise ValueError(
            f"{place}: image {i} has values from {pixels.min()} to {pixels.max()}; "
            "expected 0 to 255"
        )
    return np.rint(pixels).astype(np.uint8)
