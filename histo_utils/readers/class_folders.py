"""Images as the papers' data sets ship them: a folder per class, a folder per split."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from histo_utils import provenance

NCT_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
PATH24_CLASSES = tuple(f"s{i}" for i in range(24))
MPP = 0.5  # µm per pixel of Kimia Path24 and of both NCT-CRC sets (20×)
PANNUKE_MPP = 0.25  # 40×
# A column of the patch table, and its value for each folder of class folders.
PARTS = (
    ("split", {"train": "train", "test": "test"}),  # Path24, Path24C: see datasets.yaml
    ("split", {"Training": "train", "RGBPatches-test": "test"}),  # KIMIAPath24_RGB
    ("split", {"NCT-CRC-HE-100K": "train", "CRC-VAL-HE-7K": "test"}),
    ("split", {"NCT-CRC-HE-100K-NONORM": "train", "CRC-VAL-HE-7K": "test"}),
    ("fold", {"fold1": 1, "fold2": 2, "fold3": 3}),  # as `convert_pannuke` writes
)
SYNSET = re.compile(r"n\d{8}")  # a class folder of ImageNet-1k
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def read_class_folders(folder):
    """List square images in class folders, or in a pair or triple of `PARTS` of these.

    Columns of the patch table with ``label`` (the folder's name), ``slide`` (the file's
    stem) and ``split`` or ``fold``; patients are not published. Kimia Path24 (classes
    ``s0`` to ``s23``) has one slide per class: ``slide`` and ``patient`` are the label,
    **and every patient is in both splits**; folders ``0`` to ``23`` are its classes too
    (under the two parts of KIMIAPath24_RGB, else if all 24 are there). Its training
    files with the same bytes are listed once, since the archives of Path24C may
    overlap. None if there are no such folders; ValueError if an image is not square (of
    ImageNet's, in folders ``n…``, the central square is taken), or an NCT-CRC set lacks
    a class.
    """
    folder = Path(folder)

    def present(part):
        return {n: value for n, value in part[1].items() if _class_folders(folder / n)}

    column, names = max(PARTS, key=lambda part: len(present(part)))
    parts = [
        _read(folder / name).assign(**{column: value})
        for name, value in present((column, names)).items()
    ]
    if not parts:
        return _read(folder) if _class_folders(folder) else None
    table = pd.concat(parts, ignore_index=True)
    scale = {"mpp": PANNUKE_MPP, "slide_mpp": PANNUKE_MPP}
    return table.assign(**scale) if column == "fold" else table


def _class_folders(folder):
    """Folders that hold images: s2 before s10, 2 before 10, else by name."""

    def order(place):
        number = re.fullmatch(r"s?(\d+)", place.name)
        return int(number[1]) if number else -1, place.name

    places = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in places if p.is_dir() and any(_images(p))), key=order)


def _images(folder):
    return (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _read(folder):
    rows = []
    for place in _class_folders(folder):
        for path in sorted(_images(place)):
            with Image.open(path) as image:  # its head alone is read
                width, height = image.size
            side = min(width, height)
            if width != height and not SYNSET.fullmatch(place.name):
                raise ValueError(
                    f"{path}: {(width, height)} px; expected square images in class "
                    "folders"
                )
            corner = (width - side) // 2, (height - side) // 2
            rows.append((str(path), *corner, side, place.name, path.stem))
    columns = ["image", "x", "y", "size", "label", "slide"]
    table = pd.DataFrame(rows, columns=columns)
    table["patient"] = None
    own = table["label"].map({str(i): name for i, name in enumerate(PATH24_CLASSES)})
    released = folder.name in ("Training", "RGBPatches-test")
    if own.notna().all() and (released or own.nunique() == len(PATH24_CLASSES)):
        table["label"] = own
    classes = set(table["label"])
    if "CRC" in folder.name and classes != set(NCT_CLASSES):
        raise ValueError(
            f"{folder}: the class folders are {', '.join(sorted(classes))}; expected "
            f"{', '.join(NCT_CLASSES)}; unpack the archive again"
        )
    known = classes == set(NCT_CLASSES) or classes <= set(PATH24_CLASSES)
    mpp = MPP if known else float("nan")
    if classes <= set(PATH24_CLASSES):
        table["slide"] = table["patient"] = table["label"]
        if folder.name in ("train", "Training"):
            table = _without_duplicates(table)
    return table.assign(mpp=mpp, slide_mpp=mpp)


def _without_duplicates(part):
    # Equal files have equal lengths: few need to be read.
    length = part["image"].map(os.path.getsize)
    alike = part.assign(length=length).duplicated(["label", "length"], keep=False)
    digest = part["image"].where(~alike, None)
    digest[alike] = part["image"][alike].map(provenance.file_hash)
    return part[~digest.duplicated()]


def save_png(pixels, path):
    """Write a uint8 image (h, w[, 3]) as PNG, atomically, unless it is there."""
    if not Path(path).exists():
        with provenance.new_file(path) as part:
            Image.fromarray(pixels).save(part, format="PNG")


def convert_pannuke(folder, out=None, progress=True):
    """Write PanNuke's arrays to ``fold<k>/<tissue>/fold<k>_<number>.png``, resumable.

    Into the folder ``out``, or ``folder`` itself.

    ``folder`` holds ``Fold <k>/images/fold<k>/images.npy`` ((n, 256, 256, 3), 0–255,
    any number type) and ``types.npy`` (n,) of some folds (Gamper et al. 2019, 2020);
    FileNotFoundError if of none, ValueError if arrays do not fit each other.
    """
    folder = Path(folder)
    places = {k: folder / f"Fold {k}" / "images" / f"fold{k}" for k in (1, 2, 3)}
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
            name = f"fold{k}/{name}/fold{k}_{i:04d}.png"
            path = Path(out or folder) / name
            if path.exists():
                continue
            image = np.asarray(pixels[i])
            if not (image.min() >= 0 and image.max() <= 255):  # also false for NaN
                raise ValueError(
                    f"{place}: image {i} has values from {image.min()} to "
                    f"{image.max()}; expected 0 to 255"
                )
            save_png(np.rint(image).astype(np.uint8), path)
