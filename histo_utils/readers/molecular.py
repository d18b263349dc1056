"""Expression and mutations of TCGA's patients, in the folders of the GDC.

The GDC's transfer tool leaves one folder per file, ``<file id>/<file name>``; whose
file it is says the portal's sample sheet (``gdc_sample_sheet.<date>.tsv``) beside them.
Primary tumours alone are read (sample type 01); tables have one row per patient.
"""

import difflib
import re
from pathlib import Path

import numpy as np
import pandas as pd

PRIMARY = re.compile(r"(TCGA-\w{2}-\w{4})-01[A-Z]")
# What counts as a mutation is ours: the variants that change the protein.
VARIANTS = {
    "Missense_Mutation", "Nonsense_Mutation", "Nonstop_Mutation", "Splice_Site",
    "Translation_Start_Site", "Frame_Shift_Del", "Frame_Shift_Ins", "In_Frame_Del",
    "In_Frame_Ins",
}  # fmt: skip


def read_expression(folder, genes) -> pd.DataFrame:
    """log2(TPM + 1) of genes (names, or Ensembl ids without version), from STAR counts.

    Genes of one name are added, several samples of a patient averaged.
    """
    rows = []
    for file, patient in _files(folder, "*star_gene_counts.tsv"):
        table = _read(file, ["gene_id", "gene_name", "tpm_unstranded"])
        names = table["gene_name"], table["gene_id"].str.partition(".")[0]
        tpm = table["tpm_unstranded"].astype(float)  # none in lines such as N_unmapped
        tpm = pd.concat([tpm.groupby(name).sum() for name in names])
        if unknown := [name for name in genes if name not in tpm.index]:
            near = ", ".join(difflib.get_close_matches(unknown[0], tpm.index)) or "none"
            raise ValueError(f"{file.name} has no gene {unknown[0]!r}; nearest: {near}")
        rows.append(np.log2(tpm[list(genes)] + 1).rename(patient))
    return pd.DataFrame(rows).groupby(level=0).mean()


def read_mutations(folder, genes) -> pd.DataFrame:
    """Whether genes are mutated (1, a variant of `VARIANTS`) or not (0), from MAFs."""
    found = pd.DataFrame(columns=list(genes), dtype=int)
    for file, patient in _files(folder, "*.maf*"):
        table = _read(file, ["Hugo_Symbol", "Variant_Classification"])
        table = table[table["Variant_Classification"].isin(VARIANTS)]
        found.loc[f"{patient} {file.name}"] = pd.Index(genes).isin(table["Hugo_Symbol"])
    return found.astype(int).groupby(lambda name: name.split()[0]).max()


def _read(file, columns):
    return pd.read_csv(file, sep="\t", comment="#", usecols=columns, dtype=str)


def _files(folder, pattern):
    """Files of a pattern that the sheet gives to a primary tumour, and its patient."""
    folder = Path(folder)
    sheets = sorted(folder.glob("gdc_sample_sheet*.tsv"))
    files = sorted(folder.glob(f"*/{pattern}"))
    if not sheets or not files:
        raise FileNotFoundError(
            f"{folder}: {len(sheets)} sample sheets, {len(files)} files */{pattern}; "
            "expected the GDC's folders, one per file, and the cart's sample sheet"
        )
    sheet = pd.concat(pd.read_csv(path, sep="\t", dtype=str) for path in sheets)
    samples = sheet.set_index("File ID")["Sample ID"]
    for file in files:
        if file.parent.name not in samples:
            raise ValueError(f"{file} is not in {sheets[0].name}; get a sheet of all")
        if barcode := PRIMARY.search(samples[file.parent.name]):
            yield file, barcode[1]
