"""A data set of augmented copies, split by file and split by what was copied."""

from __future__ import annotations

import numpy as np
import pandas as pd

from histo_utils import bench, metrics
from histo_utils.embeddings import Embeddings
from histo_utils.patches import assign_folds
from histo_utils.protocols import linear_probe, patient_folds

UNITS = {"file": "image", "tile": "slide"}  # the column that a split keeps whole


def by_unit(embeddings, unit, c=0.001, seed=0, **space) -> dict:
    """Ask every image with its fold left out, folds keeping a unit whole.

    Parameters
    ----------
    embeddings : Embeddings
        ``slide`` names what an image is a copy of.
    unit : {"file", "tile"}
    c : float
        The SVM's constant, not chosen.
    **space
        ``metric`` and ``standardised`` of the neighbour search.

    Returns
    -------
    dict of outcomes
        ``neighbour`` and ``linear SVM``, rows as those of the embeddings.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; valid are {', '.join(UNITS)}")
    table = embeddings.table.assign(patient=embeddings.table[UNITS[unit]])
    fold = assign_folds(table, 5, seed=seed).to_numpy()
    made = Embeddings(embeddings.vectors, table.assign(fold=fold))
    parts = []
    for value in range(5):
        train, test = made.take(fold != value), made.take(fold == value)
        part = linear_probe(train, test, [c], seed=seed)
        parts.append(part.assign(query=np.flatnonzero(fold == value)))
    svm = pd.concat(parts).sort_values("query", ignore_index=True)
    return {"neighbour": patient_folds(made, 1, **space), "linear SVM": svm}


def compared(embeddings, n_boot=2000, seed=0, **space) -> tuple[dict, float]:
    """Scores by file and by tile, and what the split by file adds.

    Returns
    -------
    row : dict
        For each way to ask ``…, by file``, ``…, by tile`` (`bench.scored`) and
        ``…, difference`` (`bench.compared`); n counts source tiles.
    copies : float
        Share of images whose neighbour, split by file, is a copy of their own tile.
    """
    found = {unit: by_unit(embeddings, unit, seed=seed, **space) for unit in UNITS}
    tile, row = embeddings.table["slide"].to_numpy(), {}
    for how in found["file"]:
        hit = {u: metrics.accuracy(found[u][how], per_query=True) for u in UNITS}
        for u in UNITS:
            row[f"{how}, by {u}"] = bench.scored(hit[u], tile, n_boot, seed)
        row[f"{how}, difference"] = bench.compared(hit["file"], hit["tile"], tile, seed)
    near = np.stack(found["file"]["neighbour"]["neighbours"])[:, 0]
    return row, float((tile[near] == tile).mean())
