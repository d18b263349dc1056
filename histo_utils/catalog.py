"""What data sets exist, how one is got and verified, how it becomes a patch table."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import requests
import yaml
from tqdm import tqdm

from histo_utils.patches import check_patches
from histo_utils.phantom import write_phantom_archive
from histo_utils.provenance import file_hash, project_folder
from histo_utils.readers.class_folders import read_class_folders
from histo_utils.readers.tcga import BARCODE
from histo_utils.slides import MissingScaleError, SlideError, open_slide, patch_grid

with warnings.catch_warnings():
    # pooch imports tqdm's widget version, which complains where ipywidgets is missing.
    warnings.simplefilter("ignore")
    import pooch

SLIDE_SUFFIXES = {
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm",
}  # fmt: skip
FACTS = Path(__file__).with_name("datasets.yaml")
CHUNK = 1 << 16  # bytes; at most this much is lost when a download is interrupted
TIMEOUT = 60  # seconds without an answer


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a data set: name, checksum (``algorithm:digest``), bytes and URL."""

    name: str
    checksum: str
    size: int | None = None
    url: str | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a reader must know of a data set before using it; see ``datasets.yaml``."""

    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    content: str
    unit: str
    access: str
    files: tuple[File, ...] = ()
    parts: dict = dataclasses.field(default_factory=dict)
    layout: str | None = None
    images: dict = dataclasses.field(default_factory=dict)


@functools.cache
def datasets(path=FACTS):
    """Read all data sets, by name; ValueError for misspelt keys and missing facts."""

    def checked(kind, **facts):
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        where = f"{path}, {facts.get('name')}"
        for key in facts.keys() - fields:
            raise ValueError(f"{where}: {_unknown('key', key, fields)}")
        for key, kind_of in fields.items():
            if kind_of == "str" and not facts.get(key):
                raise ValueError(f"{where}: no {key}; add it")
        return kind(**facts)

    found = {}
    for name, facts in yaml.safe_load(path.read_text("utf-8")).items():
        files = tuple(checked(File, **file) for file in facts.pop("files", ()))
        found[name] = checked(Dataset, **facts, name=name, files=files)
    return found


def dataset(name):
    """Look up a data set's facts; ValueError with the nearest names for another."""
    if name not in datasets():
        problem = _unknown("data set", name, datasets())
        raise ValueError(f"{problem}; give a folder of your own slides by its path")
    return datasets()[name]


def _unknown(kind, name, known):
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}known are {', '.join(known)}"


def data_folder():
    """Return the folder named by ``HISTO_DATA``, else ``data`` in the project."""
    return Path(os.environ.get("HISTO_DATA") or project_folder() / "data")


def cache_folder():
    """Return where to put what can be made again: ``HISTO_CACHE`` or _build/cache."""
    return Path(os.environ.get("HISTO_CACHE") or project_folder() / "_build" / "cache")


def converted_folder(name):
    """Return where `tools/paper.py` unpacks archives to; HISTO_DATA is not touched."""
    return cache_folder() / "data" / name


def is_synthetic(folder):
    """Whether phantoms lie there: known by the note their generator leaves."""
    return (Path(folder) / "phantom.json").exists()


def trained_folder(method, dataset, what="scan"):
    """Return where method (yang, ftx …) keeps its "scan", "organ" or "…_vectors"."""
    return cache_folder() / "trained" / f"{method}_{what}_{Path(dataset).name}"


def data_hash(folder):
    """Hash of what a data set holds: its ``slides.csv``, else names and sizes.

    It begins with "synthetic" for phantoms: pages say by it what their data are.
    """
    folder = Path(folder)
    if is_synthetic(folder):
        return "synthetic sha256:" + file_hash(folder / "slides.csv")
    for index in ("slides.csv", "images.csv"):
        if (folder / index).exists():
            return "sha256:" + file_hash(folder / index)
    listing = "\n".join(
        f"{path.relative_to(folder).as_posix()} {path.stat().st_size}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    return "names and sizes:" + hashlib.sha256(listing.encode()).hexdigest()


def fetch(name, folder=None, progress=True):
    """Make a data set available and verified; return its folder.

    Phantoms are generated into `cache_folder`. Files with a URL are downloaded into
    ``folder``, an interrupted download is resumed, and each is compared with its
    checksum. What cannot be downloaded is looked for and compared, too.

    Parameters
    ----------
    name : str
        A name in `datasets`.
    folder : str or pathlib.Path, optional
        ``data_folder() / name`` if not given.
    progress : bool
        Show a progress bar.

    Raises
    ------
    FileNotFoundError
        If the data cannot be downloaded; the message says how to get it.
    ValueError
        If a checksum differs: the download is removed, both values are shown. If there
        is no such data set: the message holds the nearest names.
    """
    entry = dataset(name)
    if name == "phantom":
        folder = Path(folder or cache_folder() / "phantom-24-0")
        _refuse_phantoms(folder, True)
        write_phantom_archive(folder)
        return folder
    folder = Path(folder or data_folder() / name)
    for file in entry.files:
        target = folder / file.name
        if file.url:
            unzip = pooch.Unzip(extract_dir=".") if target.suffix == ".zip" else None
            get = functools.partial(_download, progress=progress)
            pooch.retrieve(file.url, file.checksum, file.name, folder,
                           downloader=get, processor=unzip)  # fmt: skip
        elif target.exists():
            _compare(target, file.checksum)
    missing = [file.name for file in entry.files if not (folder / file.name).exists()]
    if missing or not folder.is_dir():
        raise FileNotFoundError(
            f"{entry.title}: {(missing or ['the data'])[0]} is not in {folder}; "
            f"{entry.access} ({entry.homepage}; licence: {entry.licence}), then put it "
            "there, or name its parent folder in the environment variable HISTO_DATA"
        )
    if name == "monuseg":
        verify(folder)
    return folder


def locate(name, folder=None):
    """Return where a named data set lies (got by `fetch` if need be), or a path.

    A relative path is looked up under ``HISTO_DATA``, then among what was converted
    (`converted_folder`), then in the current folder; ValueError or FileNotFoundError
    for what is in none of them.
    """
    name = str(name)
    if entry := datasets().get(name):
        there = _parts(entry)[1] if entry.parts else _unpacked(entry)
        return there[0] if there and not folder else fetch(name, folder)
    for root in (data_folder(), converted_folder(""), Path()):
        if name and (place := root / name).exists():
            _refuse_phantoms(place, is_synthetic(place))
            return place
    if len(Path(name).parts) < 2:
        dataset(name)
    raise FileNotFoundError(
        f"{name}: no such folder or file, here or in {data_folder()}; set HISTO_DATA"
    )


def _unpacked(entry):
    """Folders in which all archives of a data set were unpacked."""
    places = data_folder() / entry.name, converted_folder(entry.name)
    zipped = entry.files and all(file.name.endswith(".zip") for file in entry.files)
    return [p for p in places if zipped and any(q.is_dir() for q in p.glob("*"))]


def _refuse_phantoms(folder, synthetic):
    if synthetic and os.environ.get("HISTO_PROFILE") == "paper":
        raise ValueError(
            f"{folder} holds phantoms: the profile paper takes the paper's data only; "
            "name them in `dataset`, or run the profile demo"
        )


def _compare(path, checksum):
    algorithm, expected = checksum.split(":")
    found = file_hash(path, algorithm)
    if found != expected:
        raise ValueError(
            f"{path}: {algorithm} is {found}, expected {expected}; the file is damaged "
            "or another version: remove it and get it again"
        )


def verify(folder):
    """Compare files with the ``sha256`` of ``slides.csv``; ValueError for the first."""
    folder = Path(folder)
    for row in pd.read_csv(folder / "slides.csv", dtype=str).itertuples():
        _compare(folder / row.file, f"sha256:{row.sha256}")


def _download(url, output_file, _, *, progress):
    """Download for pooch, from where an earlier try broke off."""
    # pooch names a new temporary file each time; the next run has to find this one.
    name = Path(requests.utils.urlparse(url).path).name
    part = Path(output_file).with_name(name + ".part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code != 416:  # else the part is whole already
            answer.raise_for_status()
            have = have if answer.status_code == 206 else 0
            total = have + int(answer.headers.get("content-length", 0)) or None
            with (
                part.open("ab" if have else "wb") as file,
                tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name,
                     ascii=True, disable=not progress) as bar,
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
        Holds slides, or folders of slides (the GDC's), and optionally ``slides.csv``
        with a column ``file`` (relative to the folder) and any of ``slide patient label
        preparation site mpp``.
    mpp : float, optional
        µm per level-0 pixel where neither the CSV nor the file says it.

    Returns
    -------
    pandas.DataFrame
        One row per slide: ``image``, ``slide``, ``patient`` (where the CSV has none, of
        a TCGA barcode, with its ``site``; else missing), ``slide_mpp`` (NaN: as the
        file says) and the CSV's other columns.

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
    else:
        for depth in ("*", "*/*"):  # the GDC's tool: each slide in a folder of its own
            files = [
                p for p in folder.glob(depth) if p.suffix.lower() in SLIDE_SUFFIXES
            ]
            if files:
                break
        files = sorted(p.relative_to(folder).as_posix() for p in files)
        table = pd.DataFrame({"file": files})
        if table.empty:
            raise FileNotFoundError(
                f"{folder}: no slides in it; expected files ending in "
                f"{' '.join(sorted(SLIDE_SUFFIXES))}, or a slides.csv"
            )
    table.insert(0, "image", [str(folder / name) for name in table.pop("file")])
    table["slide"] = table.get("slide", [Path(name).stem for name in table["image"]])
    table["slide_mpp"] = table.pop("mpp") if "mpp" in table else float("nan")
    if "patient" not in table:
        barcodes = [BARCODE.match(str(name)) for name in table["slide"]]
        table["patient"] = [code and code[0] for code in barcodes]
        if any(barcodes) and "site" not in table:
            table["site"] = [code and code[1] for code in barcodes]
    if mpp is not None:
        unknown = table["slide_mpp"].isna()
        unknown[unknown] = table["image"][unknown].map(_holds_no_mpp)
        table["slide_mpp"] = table["slide_mpp"].mask(unknown, mpp)
    return table


def _holds_no_mpp(image):
    try:
        open_slide(image).close()
    except SlideError as error:  # damaged ones are reported where they are worked on
        return isinstance(error, MissingScaleError)
    return False


def patch_table(name, size=None, mpp=None, folder=None):
    """Build the patch table of a data set, or of a folder of slides or image folders.

    Parameters
    ----------
    name : str or pathlib.Path
        A name in `datasets`, or a folder: of slides (see `slide_table`), with one
        folder of images per class, or with such folders in one folder for training and
        one for testing (`class_folders.read_class_folders`).
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
        If the data set is not there as slides or images; the message says what to do.
    """
    entry = datasets().get(str(name))
    if entry and entry.parts:
        return _image_folders(entry, folder)
    place = locate(name, folder)
    if name == "lc25000_lung":
        images = pd.read_csv(place / "images.csv")
        # No ids were published: the tile an image was augmented from is its slide.
        table = pd.DataFrame({
            "image": [str(place / name) for name in images["file"]],
            "x": 0, "y": 0, "size": 224, "mpp": float("nan"), "slide_mpp": float("nan"),
            "label": images["class"], "slide": images["source_tile"], "patient": None,
        })  # fmt: skip
        return check_patches(table)
    if name == "monuseg":  # experts picked the regions: all their whole patches
        slides = slide_table(place).rename(columns={"source_site": "site"})
        slides["label"] = slides["organ"]
        whole = {"min_tissue": 0, "mask": [[True]]}
        table = _patches_of_slides(slides, size or 250, mpp or 0.25, **whole)
        return check_patches(table.drop(columns="tissue"))
    table = None if (place / "slides.csv").exists() else read_class_folders(place)
    if table is not None:
        return _checked(table)
    table = _patches_of_slides(slide_table(place), size or 256, mpp or 0.5)
    return check_patches(table)


def _parts(entry, folder=None):
    """Images of the published parts that are there, and the folders they lie in."""
    # A part may lie in its own data set's folder, where it was converted to, or, a test
    # set alone, with one of the training sets that it was published with.
    names = dict.fromkeys([entry.name, *entry.parts.values()])
    if {*entry.parts} == {"test"}:
        same = (one for one in datasets().values() if one.homepage == entry.homepage)
        names |= dict.fromkeys(one.name for one in same)
    roots = [root / n for n in names for root in (data_folder(), converted_folder(""))]
    tables, used = {}, {}
    for root in [Path(folder)] if folder else roots:
        complete = len(tables) == len(entry.parts) and "fold" not in tables
        table = None if complete else read_class_folders(root)
        for part in entry.parts if table is not None else ():
            own = "split" in table and table["split"].eq(part)
            rows = table if part in table else table[own] if np.any(own) else ()
            known = len(tables.get(part, ()))  # of folds, the folder with most of them
            if len(rows) > known and (part in table or not known):
                tables[part], used[part] = rows, root
    return tables, [*used.values()]


def _image_folders(entry, folder):
    """List a data set's images; parts that are not there are fetched first."""
    # Files are compared with their checksums when got, not each time: 29 GB take long.
    place = folder or data_folder() / entry.name
    for fetched in (False, True):
        tables, _ = _parts(entry, folder)
        missing = [entry.parts[part] for part in entry.parts if part not in tables]
        if not missing:
            parts = [tables[part] for part in entry.parts]
            return _checked(pd.concat(parts, ignore_index=True))
        for source in () if fetched else dict.fromkeys(missing):
            fetch(source, place)
    raise FileNotFoundError(
        f"{place}: {entry.title} is not there as folders of images; {entry.layout}"
    )


def _checked(table):
    # Kimia Path24: its slides are in both splits by design, and documented so.
    by_design = "split" in table and table["patient"].equals(table["label"])
    for _, part in table.groupby("split") if by_design else [("", table)]:
        check_patches(part)
    return table


def _patches_of_slides(slides, size, mpp, **how):
    parts = []
    for row in slides.to_dict("records"):
        given = None if pd.isna(row["slide_mpp"]) else row["slide_mpp"]
        with open_slide(row["image"], given) as slide:
            row["slide_mpp"] = slide.mpp
            parts.append(patch_grid(slide, size, mpp, **how).assign(**row))
    return pd.concat(parts, ignore_index=True)
