"""Image folders as the papers' data sets come: a folder a class, a folder a split."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pandas as pd
from PIL import Image

from histo_utils import provenance

NCT_CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")

PATH24_CLASSES = tuple(f"s{i}" for i in range(24))

# Folder names of the training and the test part. The first pair is what
# `path24.convert_path24` writes, and what we ask to unpack Path24C into.
PARTS = (
    ("train", "test"),
    ("Training", "RGBPatches-test"),  # KIMIAPath24_RGB, as Yang 2019 reads it
    ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"),
    ("NCT-CRC-HE-100K-NONORM", "CRC-VAL-HE-7K"),
)

MPP = 0.5  # µm per pixel of Kimia Path24 and of both NCT-CRC sets (20×)

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def images(folder):
    """Image files of a folder, sorted by name."""
    return sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES)


def class_folders(folder):
    """Folders of a folder that hold images: s2 before s10, else by name."""
    found = [p for p in Path(folder).iterdir() if p.is_dir() and images(p)]
    return sorted(found, key=lambda p: (_scan_number(p.name), p.name))


def read_class_folders(folder):
    """List the square images of one folder a class.

    Only the head of each file is read. Where all classes are among ``s0`` to ``s23``
    this is Kimia Path24 or Path24C, where a class is one slide.

    Parameters
    ----------
    folder : str or pathlib.Path

    Returns
    -------
    pandas.DataFrame
        ``image``, ``size`` (px), ``label`` (the folder's name), ``slide`` and
        ``patient`` (the file's stem: none is known; Path24: the label), ``x``, ``y``
        (0), ``mpp`` and ``slide_mpp`` (NaN: unknown; 0.5 for Path24 and for the nine
        classes of NCT-CRC).

    Raises
    ------
    ValueError
        If an image is not square.
    """
    rows = []
    for place in class_folders(folder):
        for path in images(place):
            with Image.open(path) as image:
                width, height = image.size
            if width != height:
                raise ValueError(
                    f"{path}: {(width, height)} px; expected square images in class "
                    "folders"
                )
            rows.append((str(path), width, place.name, path.stem))
    table = pd.DataFrame(rows, columns=["image", "size", "label", "slide"])
    classes = set(table["label"])
    if classes <= set(PATH24_CLASSES):
        table["slide"] = table["label"]
    known = classes <= set(PATH24_CLASSES) or classes == set(NCT_CLASSES)
    mpp = MPP if known else float("nan")
    return table.assign(patient=table["slide"], x=0, y=0, mpp=mpp, slide_mpp=mpp)


def read_parts(folder):
    """List the images of a data set that comes with its split as folders.

    Kimia Path24 and Path24C (classes ``s0`` to ``s23``): a class is one slide, so
    ``slide`` and ``patient`` are the label, **and every patient is in both splits**:
    that is the data set's design, and `patches.check_patches` refuses the table until
    one split is taken. Training files with the same bytes are listed once, because the
    archives of Path24C may overlap.

    NCT-CRC-HE-100K (train) and CRC-VAL-HE-7K (test): no patient ids are published, so
    ``slide`` and ``patient`` are the file's stem. The two sets share no patient.

    Parameters
    ----------
    folder : str or pathlib.Path
        Holds a pair of `PARTS`, or one of a pair.

    Returns
    -------
    pandas.DataFrame or None
        The columns of `read_class_folders` and ``split`` (``"train"``, ``"test"``);
        None if the folder holds no such pair.

    Raises
    ------
    ValueError
        If an image is not square, or an NCT-CRC set has not its nine classes.
    """
    folder = Path(folder)
    for names in PARTS:
        found = {
            split: folder / name
            for name, split in zip(names, ("train", "test"), strict=True)
            if (folder / name).is_dir() and class_folders(folder / name)
        }
        if found:
            break
    else:
        return None
    parts = []
    for split, place in found.items():
        part = read_class_folders(place)
        if "CRC" in place.name:
            _check_nine(place, set(part["label"]))
        if split == "train" and set(part["label"]) <= set(PATH24_CLASSES):
            part = _without_copies(part)
        parts.append(part.assign(split=split))
    return pd.concat(parts, ignore_index=True)


def save_png(pixels, path):
    """Write an image as PNG unless it is there; all of the file or nothing.

    Parameters
    ----------
    pixels : numpy.ndarray
        uint8 (h, w) or (h, w, 3).
    path : str or pathlib.Path
        Its folder is made if missing.
    """
    path = Path(path)
    if path.exists():
        return
    with provenance.new_file(path) as part:
        Image.fromarray(pixels).save(part, format="PNG")


def _scan_number(name):
    match = re.fullmatch(r"s(\d+)", name)
    return int(match[1]) if match else -1


def _check_nine(place, classes):
    if classes != set(NCT_CLASSES):
        raise ValueError(
            f"{place}: the class folders are {', '.join(sorted(classes))}; expected "
            f"{', '.join(NCT_CLASSES)}; unpack the archive again"
        )


def _without_copies(part):
    """Rows but for files with the same bytes as an earlier one of their class."""
    # Equal files have equal lengths: few need to be read.
    length = part["image"].map(os.path.getsize)
    alike = part.assign(length=length).duplicated(["label", "length"], keep=False)
    digest = part["image"].where(~alike, None)
    for i in part.index[alike]:
        digest[i] = hashlib.sha256(Path(part["image"][i]).read_bytes()).hexdigest()
    return part[~digest.duplicated()]
