"""Search a collection with an image of one's own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pandas as pd

from histo_utils.collection.drawing import K
from histo_utils.collection.upkeep import NOTE
from histo_utils.collection.vectors import checked_encoder
from histo_utils.embeddings import load_embeddings
from histo_utils.encoders import embed
from histo_utils.search import Archive
from histo_utils.slides import MissingScaleError, open_slide


def find(out, image, k=K, mpp=None):
    """Search a collection with an image of one's own.

    A square from the middle of the image is looked for, as wide in µm as the
    collection's patches, or the largest there is.

    Parameters
    ----------
    out : str or pathlib.Path
        Folder that `index_slides` made.
    image : str or pathlib.Path
        A PNG, JPEG, TIFF or slide.
    k : int
        Neighbours wanted.
    mpp : float, optional
        µm per pixel of the image; without it the file's own, else that of the
        collection's patches (with a warning).

    Returns
    -------
    pandas.DataFrame
        The k nearest patches, nearest first, with ``distance`` (cosine).
    """
    note = json.loads((Path(out) / NOTE).read_text("utf-8"))
    model = checked_encoder(note["encoder"], note["weights"], note["fingerprint"])
    query = embed(model, _query(Path(image), mpp, note), progress=False)
    gallery = load_embeddings(Path(out) / "archive")
    found = Archive(gallery).search(query.vectors, k)
    best = gallery.table.iloc[found.ids[0]].reset_index(drop=True)
    best.insert(0, "distance", found.distances[0])
    first = ["distance", "slide", "patient", "x", "y"]
    return best[[*first, *best.columns.difference(first, sort=False)]]


def _query(image, mpp, note):
    """Patch table of one row: the middle of an image."""
    try:
        known = open_slide(image, mpp)
    except MissingScaleError:
        warnings.warn(
            f"{image.name} holds no µm per pixel; it is taken to be at "
            f"{note['patch_mpp']:g}, like the collection's patches: pass mpp= if not",
            stacklevel=3,
        )
        known = open_slide(image, note["patch_mpp"])
    with known as slide:
        scale = note["patch_mpp"] / slide.mpp
        size = min(note["size"], int(min(slide.dimensions) / scale))
        x, y = (round((side - size * scale) / 2) for side in slide.dimensions)
    row = {"image": str(image), "x": x, "y": y, "size": size, "mpp": note["patch_mpp"]}
    own = {"slide": image.stem, "patient": image.stem, "slide_mpp": slide.mpp}
    return pd.DataFrame([{**row, **own}])
