"""TCGA's names, and weak labels: every patch is called as its slide is."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

BARCODE = re.compile(r"TCGA-(\w{2})-\w{4}")

# Abbreviations of the Genomic Data Commons for the study names of its site table.
STUDIES = {
    "Acute Myeloid Leukemia": "LAML",
    "Adrenocortical carcinoma": "ACC",
    "Bladder Urothelial Carcinoma": "BLCA",
    "Brain Lower Grade Glioma": "LGG",
    "Breast invasive carcinoma": "BRCA",
    "Cervical squamous cell carcinoma and endocervical adenocarcinoma": "CESC",
    "Cholangiocarcinoma": "CHOL",
    "Colon adenocarcinoma": "COAD",
    "Esophageal carcinoma": "ESCA",
    "Glioblastoma multiforme": "GBM",
    "Head and Neck squamous cell carcinoma": "HNSC",
    "Kidney Chromophobe": "KICH",
    "Kidney renal clear cell carcinoma": "KIRC",
    "Kidney renal papillary cell carcinoma": "KIRP",
    "Liver hepatocellular carcinoma": "LIHC",
    "Lung adenocarcinoma": "LUAD",
    "Lung squamous cell carcinoma": "LUSC",
    "Lymphoid Neoplasm Diffuse Large B-cell Lymphoma": "DLBC",
    "Mesothelioma": "MESO",
    "Ovarian serous cystadenocarcinoma": "OV",
    "Pancreatic adenocarcinoma": "PAAD",
    "Pheochromocytoma and Paraganglioma": "PCPG",
    "Prostate adenocarcinoma": "PRAD",
    "Rectum adenocarcinoma": "READ",
    "Sarcoma": "SARC",
    "Skin Cutaneous Melanoma": "SKCM",
    "Stomach adenocarcinoma": "STAD",
    "Testicular Germ Cell Tumors": "TGCT",
    "Thymoma": "THYM",
    "Thyroid carcinoma": "THCA",
    "Uterine Carcinosarcoma": "UCS",
    "Uterine Corpus Endometrial Carcinoma": "UCEC",
    "Uveal Melanoma": "UVM",
}


def projects_of_sites(path):
    """Read the table of tissue source sites of the Genomic Data Commons.

    Parameters
    ----------
    path : str or pathlib.Path
        Tab-separated, with the columns ``TSS Code`` and ``Study Name``.

    Returns
    -------
    dict
        Source-site code (str) to project abbreviation; control lines and studies
        outside the 33 projects are left out.
    """
    # One code is "NA": text, not a missing value.
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    known = {
        code: STUDIES.get(study.strip())
        for code, study in zip(table["TSS Code"], table["Study Name"], strict=True)
    }
    return {code: project for code, project in known.items() if project}


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
            "of chapter 02 with one Parquet file a slide"
        )
    parts = [_read(file) for file in files]
    parts = [part for part in parts if len(part)] or parts  # slides without tissue
    table = pd.concat(parts, ignore_index=True)
    if "in_mosaic" in table:
        table = table[table["in_mosaic"].eq(True)].reset_index(drop=True)
    return table


def weak_labels(mosaics, slides=None, projects=None):
    """Give every patch the label of its slide, its patient and its source site.

    KimiaNet (Riasatian et al. 2021) trains on such labels: a patch of a tumour's slide
    is called by the tumour's type, whatever it shows.

    Parameters
    ----------
    mosaics : pandas.DataFrame
        Patches with ``slide`` (see `read_mosaics`).
    slides : pandas.DataFrame, optional
        One row a slide: ``slide`` and any columns (label, split, image, …); where it
        has a value, that wins over the mosaics' own.
    projects : dict, optional
        Source-site code to label (`projects_of_sites`), for slides without a label.

    Returns
    -------
    pandas.DataFrame
        The mosaics' rows and columns, those of ``slides``, and ``label``, ``patient``,
        ``site``. Where no patient is stated, or the slide is stated to be its own, it
        is the first 12 characters of a TCGA name, else the slide; where no site is, the
        two characters after ``TCGA-``, else missing.

    Raises
    ------
    ValueError
        If a slide is listed twice, or has no label.
    """
    table = mosaics.reset_index(drop=True)
    names = table["slide"].astype(str)
    if slides is not None:
        listed = slides.set_index(slides["slide"].astype(str)).drop(columns="slide")
        if listed.index.duplicated().any():
            twice = listed.index[listed.index.duplicated()][0]
            raise ValueError(f"slide {twice!r} is listed twice; list each slide once")
        for name in listed:
            table[name] = _first(names.map(listed[name]), table.get(name))
    barcodes = names.map(BARCODE.match)
    codes = barcodes.map(lambda match: match[1] if match else None)
    coded = barcodes.map(lambda match: match[0] if match else None)
    # Slide tables without patients call each slide a patient; its name may know better.
    stated = (
        table["patient"].where(table["patient"] != names)
        if "patient" in table
        else None
    )
    table["patient"] = _first(stated, coded, names)
    table["site"] = _first(table.get("site"), codes)
    table["label"] = _first(table.get("label"), codes.map(projects or {}))
    if table["label"].isna().any():
        name = names[table["label"].isna()].iloc[0]
        raise ValueError(
            f"slide {name!r} has no label; expected one in slides, or projects with "
            "its source-site code"
        )
    return table


def _first(*sources):
    """First value that is not missing, row by row; None is no source."""
    values, *others = (source for source in sources if source is not None)
    for other in others:
        values = values.where(values.notna(), other)
    return values


def _read(file):
    if file.suffix == ".parquet":
        return pd.read_parquet(file)
    return pd.read_csv(file, keep_default_na=False, na_values="")
