"""The atlas of a collection: which patches it can show, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from histo_utils.atlas import atlas
from histo_utils.collection.upkeep import NOTE, write
from histo_utils.embeddings import TABLE, VECTORS, Embeddings
from histo_utils.provenance import file_hash

ATLAS_PATCHES = 20_000  # searched for the atlas; minutes, where all take hours
K = 8  # neighbours shown
NO_LABEL = "not labelled"


def draw(archive, out, note, notes):
    """Write the atlas, unless it is that of this archive already."""
    page = out / "atlas.html"
    files = [file_hash(out / "archive" / name) for name in (VECTORS, TABLE)]
    if note.get("atlas_of") != files or not page.exists():
        shown, exclude, said = for_the_atlas(archive)
        hidden = 1 if exclude == "self" else shown.table["patient"].value_counts().max()
        k = min(K, len(shown) - int(hidden))
        if k < 1:
            page.unlink(missing_ok=True)
            notes.append("There is one patch: no atlas, since nothing could be found.")
            return
        atlas(
            shown, page, k=k, exclude=exclude, progress=False,
            title=f"Slides of {Path(note['slides']).name}",
            note=" ".join([f"Encoder: {note['encoder']}.", *said]),
        )  # fmt: skip
        note |= {"atlas_of": files, "atlas_notes": said}
    notes.extend(note.get("atlas_notes", []))
    write(out / NOTE, json.dumps(note | {"running": None}, indent=1))


def for_the_atlas(archive):
    """Patches that the atlas can show, what it leaves out of a search, and notes."""
    said = []
    step = -(-len(archive) // ATLAS_PATCHES)
    if step > 1:
        archive = archive.take(np.arange(0, len(archive), step))
        said.append(f"The atlas searches one patch in {step}.")
    table = archive.table
    label = table["label"] if "label" in table else pd.Series(None, table.index, object)
    label = label.fillna(NO_LABEL).astype(str)
    archive = Embeddings(archive.vectors, table.assign(label=label))
    if table["patient"].nunique() == 1:
        said.append("There is one patient: the atlas shows its own patches.")
        alike = Embeddings(archive.vectors, table.assign(label=NO_LABEL))
        return alike, "self", said
    patients = table["patient"].groupby(label).transform("nunique")
    if (patients > 1).all():
        return archive, "patient", said
    if table["patient"][patients > 1].nunique() < 2:
        said.append("Each label has one patient: the atlas does not show labels.")
        alike = Embeddings(archive.vectors, table.assign(label=NO_LABEL))
        return alike, "patient", said
    alone = sorted(label[patients == 1].unique())
    said.append(
        f"Labels of one patient are in the archive and not in the atlas: "
        f"{', '.join(alone)}."
    )
    return archive.take((patients > 1).to_numpy()), "patient", said
