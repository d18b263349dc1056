"""Embeddings: vectors and the patch table they belong to, kept together.

A vector without its patch says nothing about who may be found by whom, so both
travel as one checked object and are saved as one folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from histo_utils import provenance

VECTORS, TABLE = "vectors.npy", "patches.parquet"
_ROWS = 65_536  # rows looked at together, so that a check needs no second copy


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors with their patch table; row ``i`` of both is the same patch.

    Parameters
    ----------
    vectors : (n, d) array of floats
        One vector a patch. Kept as float32; other float types are converted.
    table : DataFrame with n rows
        The patch table (``label``, ``slide``, ``patient``, …). Its index is
        replaced by 0 … n-1, the ids that a search returns.

    Raises
    ------
    TypeError
        Vectors that are not floats, or a table that is not a DataFrame.
    ValueError
        Vectors that are not (n, d), another number of rows than the table's,
        or NaN or infinity in a vector (the first such row is named).

    Examples
    --------
    >>> table = pd.DataFrame({"label": ["tumour", "stroma"], "slide": ["a", "b"]})
    >>> pair = Embeddings(np.eye(2, dtype=np.float32), table)
    >>> len(pair), pair.dim, pair.take([1]).table["label"].tolist()
    (2, 2, ['stroma'])
    """

    vectors: np.ndarray
    table: pd.DataFrame

    def __post_init__(self):
        vectors = np.asarray(self.vectors)
        if not isinstance(self.table, pd.DataFrame):
            raise TypeError(
                f"table is a {type(self.table).__name__}; expected a pandas "
                "DataFrame with one row per vector"
            )
        if not np.issubdtype(vectors.dtype, np.floating):
            raise TypeError(
                f"vectors are {vectors.dtype}; expected float32: convert them "
                "with vectors.astype('float32')"
            )
        if vectors.ndim != 2 or vectors.shape[1] == 0:
            raise ValueError(
                f"vectors have shape {vectors.shape}; expected (n, d), one row per "
                "patch: reshape them first"
            )
        if len(vectors) != len(self.table):
            raise ValueError(
                f"{len(vectors)} vectors but {len(self.table)} rows in the table; "
                "expected one row per vector: embed exactly the rows of this table"
            )
        with np.errstate(over="ignore"):  # what overflows is named just below
            vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        _check_finite(vectors)
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "table", self.table.reset_index(drop=True))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Length of one vector."""
        return self.vectors.shape[1]

    def take(self, rows) -> Embeddings:
        """Keep some rows, in the order given.

        Parameters
        ----------
        rows : array of int or of bool
            Row numbers 0 … n-1, or a mask of length n.

        Raises
        ------
        IndexError
            A row number outside 0 … n-1, or a mask of another length.
        """
        rows = np.asarray(rows)
        if rows.size == 0 and rows.dtype != bool:
            rows = rows.astype(np.int64)  # an empty list arrives as floats
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise IndexError(
                    f"the mask has shape {rows.shape}; expected ({len(self)},), one "
                    "value per patch"
                )
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise IndexError(
                f"rows are {rows.dtype} of shape {rows.shape}; expected a list of row "
                f"numbers or a mask of length {len(self)}"
            )
        outside = rows[(rows < 0) | (rows >= len(self))]
        if outside.size:
            raise IndexError(
                f"row {outside[0]} is outside 0 … {len(self) - 1}; give rows of these "
                "embeddings"
            )
        return Embeddings(self.vectors[rows], self.table.iloc[rows])

    def save(self, folder: str | Path) -> Path:
        """Write ``vectors.npy`` and ``patches.parquet`` into a folder, whole or not.

        Both files are written into a hidden neighbour, which is renamed when it is
        complete: whoever is killed on the way leaves the old folder or none, never
        new vectors beside an old table.

        Raises
        ------
        FileExistsError
            The folder exists and holds something else than saved embeddings.
        """
        with provenance.new_folder(
            folder, {VECTORS, TABLE}, "saved embeddings"
        ) as fresh:
            np.save(fresh / VECTORS, self.vectors, allow_pickle=False)
            self.table.to_parquet(fresh / TABLE, index=False)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Embeddings:
        """Read what :meth:`save` wrote; see :func:`load_embeddings`."""
        return load_embeddings(folder)


def load_embeddings(folder: str | Path) -> Embeddings:
    """Read saved embeddings and check them again.

    Raises
    ------
    FileNotFoundError
        A file is missing (the folder is named, and what to do).
    ValueError
        A file is damaged, or the two do not belong together.
    """
    folder = Path(folder)
    missing = [name for name in (VECTORS, TABLE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}; expected a folder written by "
            "Embeddings.save: embed the patches again"
        )
    try:
        vectors = np.load(folder / VECTORS, allow_pickle=False)
        table = pd.read_parquet(folder / TABLE)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{folder} holds damaged embeddings ({error}); remove the folder and embed "
            "the patches again"
        ) from error
    return Embeddings(vectors, table)


def standardise(
    gallery: Embeddings, queries: Embeddings | None = None
) -> Embeddings | tuple[Embeddings, Embeddings]:
    """Scale every dimension to mean 0 and standard deviation 1 **of the gallery**.

    Image statistics (:mod:`histo_utils.baselines`) are compared by Euclidean
    distance after this step. Queries are scaled with the gallery's numbers, never
    with their own; a dimension that is constant in the gallery is only centred.

    Returns
    -------
    Embeddings, or (gallery, queries) where queries are given

    Examples
    --------
    >>> two = Embeddings(np.float32([[1, 5], [3, 5]]), pd.DataFrame({"label": [0, 1]}))
    >>> standardise(two).vectors.tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    if len(gallery) == 0:
        raise ValueError("the gallery is empty; its mean and deviation need patches")
    if queries is not None and queries.dim != gallery.dim:
        raise ValueError(
            f"queries have {queries.dim} dimensions, the gallery {gallery.dim}; both "
            "must come from the same encoder"
        )
    mean = gallery.vectors.mean(axis=0, dtype=np.float64)
    deviation = gallery.vectors.std(axis=0, dtype=np.float64)
    constant = gallery.vectors.max(axis=0) == gallery.vectors.min(axis=0)
    deviation[constant] = 1.0
    scaled = [
        Embeddings((part.vectors - mean) / deviation, part.table)
        for part in (gallery, queries)
        if part is not None
    ]
    return scaled[0] if queries is None else (scaled[0], scaled[1])


def _check_finite(vectors: np.ndarray) -> None:
    for start in range(0, len(vectors), _ROWS):
        bad = ~np.isfinite(vectors[start : start + _ROWS]).all(axis=1)
        if bad.any():
            row = start + int(bad.argmax())
            what = "NaN" if np.isnan(vectors[row]).any() else "an infinite value"
            raise ValueError(
                f"row {row} of the vectors holds {what}; expected finite numbers: look "
                "at this patch and at the encoder that made it"
            )
