"""How a data set is got and verified, and how it becomes a patch table."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import pandas as pd
import requests
from tqdm import tqdm

from histo_utils.datasets import DATASETS, dataset
from histo_utils.patches import check_patches
from histo_utils.phantom import write_phantom_archive
from histo_utils.provenance import file_hash, project_folder
from histo_utils.readers.class_folders import (
    class_folders,
    read_class_folders,
    read_parts,
)
from histo_utils.readers.pannuke import read_pannuke
from histo_utils.readers.tcga import BARCODE
from histo_utils.slides import (
    MissingScaleError,
    SlideError,
    open_slide,
    patch_grid,
)

with warnings.catch_warnings():
    # pooch imports tqdm's widget version, which complains where ipywidgets is missing.
    warnings.simplefilter("ignore")
    import pooch

SLIDE_SUFFIXES = {
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm",
}  # fmt: skip
# Data sets whose folders hold their split or folds: how to get there after `fetch`.
LAID_OUT = {
    "kimia_path24": "cut its file with "
    "histo_utils.readers.path24.convert_path24(file, folder)",
    "kimia_path24c": "unpack its training archives into the folder train and its test "
    "archive into test, each with folders s0 to s23",
    "nct_crc_he_100k": "unpack NCT-CRC-HE-100K.zip and CRC-VAL-HE-7K.zip there",
    "nct_crc_he_100k_nonorm": "unpack NCT-CRC-HE-100K-NONORM.zip and CRC-VAL-HE-7K.zip "
    "there",
    "crc_val_he_7k": "unpack CRC-VAL-HE-7K.zip there",
    "pannuke": "turn its arrays into images with "
    "histo_utils.readers.pannuke.convert_pannuke(folder)",
}
CHUNK = 1 << 16  # bytes; at most so many are lost when a download breaks off
TIMEOUT = 60  # seconds without an answer


def data_folder():
    """Return the folder named by ``HISTO_DATA``, else ``data`` in the project."""
    return Path(os.environ.get("HISTO_DATA") or project_folder() / "data")


def cache_folder():
    """Return where to put what can be made again: ``HISTO_CACHE`` or _build/cache."""
    return Path(os.environ.get("HISTO_CACHE") or project_folder() / "_build" / "cache")


def trained_folder(method, dataset, what="scan"):
    """Return where a chapter keeps what it trained, and where chapter 9 looks for it.

    Parameters
    ----------
    method : str
        The paper's name in the book: kieffer, kimianet, ftx, yang, neck.
    dataset : str
        Name of a data set, or path of a folder.
    what : str
        "scan" or "organ": an encoder that was trained on that task (`encoders.save`);
        "scan_vectors" or "organ_vectors": vectors of every seed and split
        (`trials.keep_vectors`).
    """
    return cache_folder() / "trained" / f"{method}_{what}_{Path(dataset).name}"


def data_hash(folder):
    """Hash of what a data set holds: its ``slides.csv``, else names and sizes."""
    folder = Path(folder)
    for index in ("slides.csv", "images.csv"):
        if (folder / index).exists():
            return "sha256:" + file_hash(folder / index)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = "\n".join(
        f"{p.relative_to(folder).as_posix()} {p.stat().st_size}" for p in files
    )
    return "names and sizes:" + hashlib.sha256(listing.encode()).hexdigest()


def fetch(name, folder=None, progress=True):
    """Make a data set available and verified; return its folder.

    Phantoms are generated into `cache_folder`. Files with a URL are downloaded into
    ``folder``, an interrupted download goes on where it stopped, and each is compared
    with its checksum. What cannot be downloaded is looked for and compared, too.

    Parameters
    ----------
    name : str
        A name in `DATASETS`.
    folder : str or pathlib.Path, optional
        ``data_folder() / name`` if not given.
    progress : bool
        Show a progress bar.

    Raises
    ------
    FileNotFoundError
        If the data must be got by hand; the message says from where.
    ValueError
        If a checksum differs: the download is removed, both values are shown.
    """
    entry = dataset(name)
    if name == "phantom":
        folder = Path(folder or cache_folder() / "phantom-24-0")
        write_phantom_archive(folder)
        return folder
    folder = Path(folder or data_folder() / name)
    for file in entry.files:
        target = folder / file.name
        if file.url is None and not target.exists():
            raise FileNotFoundError(_by_hand(entry, folder, file.name))
        if file.url is None:
            _compare(target, file.checksum)
            continue
        pooch.retrieve(
            file.url, file.checksum, file.name, folder,
            downloader=_Resuming(progress),
            processor=pooch.Unzip(extract_dir=".") if target.suffix == ".zip" else None,
        )  # fmt: skip
    if not entry.files and not folder.is_dir():
        raise FileNotFoundError(_by_hand(entry, folder))
    if name == "monuseg":
        verify(folder)
    return folder


def locate(name, folder=None):
    """Return the folder of a data set by name (see `fetch`), or of one's own by path.

    Raises
    ------
    ValueError
        If it is neither; the message holds the nearest names.
    """
    if str(name) in DATASETS:
        return fetch(str(name), folder)
    if not Path(name).is_dir():
        dataset(str(name))  # raises, with the nearest names
    return Path(name)


def _by_hand(entry, folder, file=""):
    return (
        f"{entry.title}: {file or 'the data'} is not in {folder}; {entry.access} "
        f"({entry.homepage}; licence: {entry.licence}), then put it there, or name "
        "its parent folder in the environment variable HISTO_DATA"
    )


def _compare(path, checksum):
    algorithm, expected = checksum.split(":")
    found = pooch.file_hash(str(path), alg=algorithm)
    if found != expected:
        raise ValueError(
            f"{path}: {algorithm} is {found}, expected {expected}; the file is damaged "
            "or another version: remove it and get it again"
        )


def verify(folder):
    """Compare a folder's files with the ``sha256`` column of its ``slides.csv``.

    Raises
    ------
    ValueError
        For the first file that differs; the message shows both values.
    """
    folder = Path(folder)
    for row in pd.read_csv(folder / "slides.csv", dtype=str).itertuples():
        _compare(folder / row.file, f"sha256:{row.sha256}")


class _Resuming:
    """Downloader for pooch that goes on with a part already here."""

    def __init__(self, progress):
        self.progress = progress

    def __call__(self, url, output_file, pooch_or_none, check_only=False):
        # pooch names a new temporary file each time; the part keeps the file's own
        # name, so that the next run finds it.
        name = Path(requests.utils.urlparse(url).path).name
        part = Path(output_file).with_name(name + ".part")
        have = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == 416:  # the part is whole already
                part.replace(output_file)
                return
            answer.raise_for_status()
            have = have if answer.status_code == 206 else 0
            total = have + int(answer.headers.get("content-length", 0)) or None
            with (
                part.open("ab" if have else "wb") as file,
                tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name,
                     ascii=True, disable=not self.progress) as bar,
            ):  # fmt: skip
                for chunk in answer.iter_content(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
        part.replace(output_file)


def slide_table(folder, mpp=None):
    """List the slides of a folder, with what is known of each.

    Parameters
    ----------
    folder : str or pathlib.Path
        Holds slides, and optionally ``slides.csv`` with a column ``file`` (relative to
        the folder) and any of ``slide patient label preparation site mpp``.
    mpp : float, optional
        µm per level-0 pixel for slides whose file holds none and that the CSV leaves
        out; files that hold a value keep theirs.

    Returns
    -------
    pandas.DataFrame
        One row a slide: ``image``, ``slide``, ``patient``, ``slide_mpp`` (NaN: as the
        file says) and the CSV's other columns. Without a CSV the patient is read from a
        TCGA barcode (with ``site``), else it is the slide itself.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no slide in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of slides")
    if (folder / "slides.csv").exists():
        # A source-site code is called NA; empty cells alone are missing.
        table = pd.read_csv(folder / "slides.csv", keep_default_na=False, na_values="")
        table.insert(0, "image", [str(folder / name) for name in table.pop("file")])
        table["slide"] = table.get(
            "slide", [Path(name).stem for name in table["image"]]
        )
        table["slide_mpp"] = table.pop("mpp") if "mpp" in table else float("nan")
    else:
        files = sorted(
            p for p in folder.iterdir() if p.suffix.lower() in SLIDE_SUFFIXES
        )
        if not files:
            raise FileNotFoundError(
                f"{folder}: no slides in it; expected files ending in "
                f"{' '.join(sorted(SLIDE_SUFFIXES))}, or a slides.csv"
            )
        barcodes = [BARCODE.match(p.stem) for p in files]
        table = pd.DataFrame(
            {
                "image": [str(p) for p in files],
                "slide": [p.stem for p in files],
                "slide_mpp": float("nan"),
                "patient": [
                    b[0] if b else p.stem for b, p in zip(barcodes, files, strict=True)
                ],
            }
        )
        if any(barcodes):
            table["site"] = [b[1] if b else None for b in barcodes]
    if "patient" not in table:
        table["patient"] = table["slide"]
    if mpp is not None:
        table["slide_mpp"] = [
            mpp
            if pd.isna(row.slide_mpp) and _holds_no_mpp(row.image)
            else row.slide_mpp
            for row in table.itertuples()
        ]
    return table


def _holds_no_mpp(image):
    try:
        open_slide(image).close()
    except MissingScaleError:
        return True
    except SlideError:
        return False  # damaged: reported where it is worked on
    return False


def patch_table(name, size=None, mpp=None, folder=None):
    """Build the patch table of a data set, or of a folder of slides or image folders.

    Parameters
    ----------
    name : str or pathlib.Path
        A name in `DATASETS` that has a table here (``phantom``, ``monuseg``,
        ``lc25000_lung``, ``slides``, those of `LAID_OUT`), or a folder: of slides (see
        `slide_table`), with one folder of images a class, or with such folders in one
        folder for training and one for testing (see `class_folders.read_parts`).
    size, mpp : optional
        Patch side in pixels and µm per pixel; 250 px at 0.25 for MoNuSeg, 256 px at
        0.5 for slides, the whole image for image folders.
    folder : str or pathlib.Path, optional
        Where a named data set lies, if not where `fetch` puts it.

    Returns
    -------
    pandas.DataFrame
        A checked patch table with ``slide_mpp``; with ``split`` or ``fold`` where the
        data set is published so. Kimia Path24 alone has each patient in both splits, by
        its design: work with one split at a time.

    Raises
    ------
    FileNotFoundError
        If a data set of `LAID_OUT` is not there as folders of images.
    """
    if str(name) in LAID_OUT:
        return _laid_out(str(name), Path(folder or data_folder() / str(name)))
    place = locate(name, folder)
    if name == "lc25000_lung":
        return check_patches(_lc25000(place))
    if name == "monuseg":
        return check_patches(_regions(place, size or 250, mpp or 0.25))
    if not (place / "slides.csv").exists():
        table = _image_folders(place)
        if table is not None:
            return table
    return check_patches(_tissue_patches(slide_table(place), size or 256, mpp or 0.5))


def _laid_out(name, place):
    # Files are compared with their checksums when got, not each time: 29 GB take long.
    table = _image_folders(place)
    wanted = ["test"] if name == "crc_val_he_7k" else ["train", "test"]
    missing = [split for split in wanted if not _has(table, split)]
    apart = name.startswith("nct_crc")  # its test set is a data set of its own
    sources = ["crc_val_he_7k" if apart and s == "test" else name for s in missing]
    for source in dict.fromkeys(sources):
        fetch(source, place)
    table = _image_folders(place) if missing else table
    if not all(_has(table, split) for split in wanted):
        raise FileNotFoundError(
            f"{place}: {dataset(name).title} is not there as folders of images; "
            f"{LAID_OUT[name]}"
        )
    return table


def _has(table, split):
    if table is None:
        return False
    return "fold" in table or split in set(table.get("split", []))


def _image_folders(place):
    """Table of a folder of image folders, checked; None if it is no such folder."""
    if not place.is_dir():
        return None
    table = read_parts(place)
    table = read_pannuke(place) if table is None else table
    if table is None and class_folders(place):
        table = read_class_folders(place)
    if table is None:
        return None
    if "split" in table and table["patient"].equals(table["label"]):
        # Kimia Path24: its slides are in both splits by design, and told so.
        for _, part in table.groupby("split"):
            check_patches(part)
        return table
    return check_patches(table)


def _regions(folder, size, mpp):
    """Cut expert-picked regions into all their whole patches."""
    table = slide_table(folder).rename(columns={"source_site": "site"})
    table["label"] = table["organ"]
    parts = []
    for row in table.to_dict("records"):
        with open_slide(row["image"], row["slide_mpp"]) as slide:
            grid = patch_grid(slide, size, mpp, min_tissue=0, mask=[[True]])
        parts.append(grid.drop(columns="tissue").assign(**row))
    return pd.concat(parts, ignore_index=True)


def _tissue_patches(slides, size, mpp):
    parts = []
    for row in slides.to_dict("records"):
        given = None if pd.isna(row["slide_mpp"]) else row["slide_mpp"]
        with open_slide(row["image"], given) as slide:
            row["slide_mpp"] = slide.mpp
            parts.append(patch_grid(slide, size, mpp).assign(**row))
    return pd.concat(parts, ignore_index=True)


def _lc25000(folder):
    images = pd.read_csv(folder / "images.csv")
    # No ids were published: the tile an image was augmented from stands in for both.
    return pd.DataFrame(
        {
            "image": [str(folder / name) for name in images["file"]],
            "x": 0, "y": 0, "size": 224, "mpp": float("nan"),
            "slide_mpp": float("nan"), "label": images["class"],
            "slide": images["source_tile"], "patient": images["source_tile"],
        }
    )  # fmt: skip
