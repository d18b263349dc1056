"""TCGA's names, and weak labels: every patch gets the label of its slide."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

BARCODE = re.compile(r"TCGA-(\w{2})-\w{4}")
# The Genomic Data Commons' study names and their abbreviations.
STUDIES = Path(__file__).with_name("tcga_studies.csv")


def projects_of_sites(path):
    """Map source-site codes to projects, from GDC's table of tissue source sites.

    Tab-separated, with the columns ``TSS Code`` and ``Study Name``; control lines and
    studies outside the 33 projects are left out.
    """
    # One code is "NA": text, not a missing value.
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    projects = pd.read_csv(STUDIES, index_col="study")["project"]
    projects = table["Study Name"].str.strip().map(projects)
    return projects.set_axis(table["TSS Code"]).dropna().to_dict()


def read_mosaics(path):
    """Read the mosaics that `mosaic.extract_mosaics` wrote, as one table.

    Parameters
    ----------
    path : str or pathlib.Path
        Its folder of ``<slide>.parquet``, or one Parquet or CSV file.

    Returns
    -------
    pandas.DataFrame
        The rows with ``in_mosaic``, where there is such a column; else all.

    Raises
    ------
    FileNotFoundError
        If there is no table.
    """
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(
            f"{path}: no mosaics there; expected a Parquet or CSV file, or the out_dir "
            "of chapter 02 with one Parquet file per slide"
        )
    parts = [
        pd.read_parquet(file)
        if file.suffix == ".parquet"
        else pd.read_csv(file, keep_default_na=False, na_values="")
        for file in files
    ]
    parts = [part for part in parts if len(part)] or parts  # slides without tissue
    table = pd.concat(parts, ignore_index=True)
    if "in_mosaic" in table:
        table = table[table["in_mosaic"].eq(True)].reset_index(drop=True)
    return table


def weak_labels(mosaics, slides=None, projects=None):
    """Give every patch the label of its slide, its patient and its source site.

    KimiaNet (Riasatian et al. 2021) trains on such labels: a patch of a tumour's slide
    has the tumour's type, whatever it shows.

    Parameters
    ----------
    mosaics : pandas.DataFrame
        Patches with ``slide`` (see `read_mosaics`).
    slides : pandas.DataFrame, optional
        One row per slide: ``slide`` and any columns (label, split, image, …); where it
        has a value, that wins over the mosaics' own.
    projects : dict, optional
        Source-site code to label (`projects_of_sites`), for slides without a label.

    Returns
    -------
    pandas.DataFrame
        The mosaics' rows and columns, those of ``slides``, and ``label``, ``patient``,
        ``site``. Where no patient is stated, it is the first 12 characters of a TCGA
        name; where no site is, the two characters after ``TCGA-``; else both stay
        missing.

    Raises
    ------
    ValueError
        If a slide is listed twice, or has no label.
    """
    table = mosaics.reset_index(drop=True)
    names = table["slide"].astype(str)
    missing = pd.Series(None, index=table.index, dtype=object)

    def fill(column, values):
        table[column] = table.get(column, missing).where(lambda x: x.notna(), values)

    if slides is not None:
        listed = slides.set_index(slides["slide"].astype(str)).drop(columns="slide")
        if listed.index.duplicated().any():
            twice = listed.index[listed.index.duplicated()][0]
            raise ValueError(f"slide {twice!r} is listed twice; list each slide once")
        for name in listed:
            own, table[name] = table.get(name, missing), names.map(listed[name])
            fill(name, own)
    barcodes = names.map(BARCODE.match)
    codes = barcodes.map(lambda match: match[1] if match else None)
    fill("patient", barcodes.map(lambda match: match[0] if match else None))
    fill("site", codes)
    fill("label", codes.map(projects or {}))
    if table["label"].isna().any():
        name = names[table["label"].isna()].iloc[0]
        raise ValueError(
            f"slide {name!r} has no label; expected one in slides, or projects with "
            "its source-site code"
        )
    return table
