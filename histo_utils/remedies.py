"""Remedies against batch effects that act on vectors; those on images: `loaders`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from histo_utils.embeddings import Embeddings


def centred(embeddings: Embeddings, gallery, by: str | None = None) -> Embeddings:
    """Subtract the gallery's mean vector, or that of each group (preparation).

    The means are those of gallery rows alone; queries are moved by them too. What a
    group's patches have in common is gone afterwards, be it the preparation or a class
    that only occurs in it.

    Parameters
    ----------
    embeddings : Embeddings
        Of queries and gallery.
    gallery : (n,) bool array
        Rows that the means are taken of.
    by : str, optional
        Column with the group of each row; one mean for all if not given.

    Raises
    ------
    ValueError
        A mask of another length, without rows; a column that is not there; a group
        without gallery rows.

    Examples
    --------
    >>> table = pd.DataFrame({"preparation": ["FFPE", "FFPE", "frozen", "frozen"]})
    >>> pairs = Embeddings(np.float32([[1, 0], [3, 0], [0, 5], [0, 6]]), table)
    >>> centred(pairs, [True, True, True, False], "preparation").vectors.tolist()
    [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    """
    table, gallery = embeddings.table, np.asarray(gallery)
    if gallery.dtype != bool or gallery.shape != (len(table),) or not gallery.any():
        raise ValueError(
            f"the gallery mask is {gallery.dtype} of shape {gallery.shape}; expected "
            f"({len(table)},) bool with a row or more"
        )
    if by is not None and by not in table:
        raise ValueError(
            f"the table has no column {by!r}; it has {', '.join(map(str, table))}"
        )
    group = np.zeros(len(table)) if by is None else table[by].to_numpy()
    vectors = embeddings.vectors.astype(np.float64)
    for value in pd.unique(group):
        mine = group == value
        if not (mine & gallery).any():
            raise ValueError(
                f"no gallery row has {by} {value!r}, but {int(mine.sum())} queries do: "
                "leave them out, or centre by a column that the gallery knows"
            )
        vectors[mine] -= vectors[mine & gallery].mean(axis=0)
    return Embeddings(vectors.astype(np.float32), table)
