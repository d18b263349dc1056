"""Embeddings: vectors and their patch table, as one checked object and one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from histo_utils import provenance

VECTORS, TABLE = "vectors.npy", "patches.parquet"
_ROWS = 65_536  # rows checked together, so that a check needs no second copy
_SEEDS = 100


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors with their patch table; row ``i`` of both is the same patch.

    Parameters
    ----------
    vectors : (n, d) array or tensor of floats
        One vector per patch, kept as float32; NaN is an error.
    table : DataFrame with n rows
        The patch table. Its index becomes 0 … n-1, the ids that a search returns.

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
            raise TypeError(f"table is a {type(self.table).__name__}, not a DataFrame")
        if not np.issubdtype(vectors.dtype, np.floating):
            raise TypeError(
                f"vectors are {vectors.dtype}; expected float32: use vectors.astype"
            )
        if vectors.ndim != 2 or vectors.shape[1] == 0:
            raise ValueError(f"vectors have shape {vectors.shape}; expected (n, d)")
        if len(vectors) != len(self.table):
            raise ValueError(
                f"{len(vectors)} vectors but {len(self.table)} rows in the table; "
                "expected one row per vector: embed exactly the rows of this table"
            )
        with np.errstate(over="ignore"):  # what overflows is named just below
            vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        for start in range(0, len(vectors), _ROWS):
            bad = ~np.isfinite(vectors[start : start + _ROWS]).all(axis=1)
            if bad.any():
                row = start + int(bad.argmax())
                what = "NaN" if np.isnan(vectors[row]).any() else "an infinite value"
                raise ValueError(
                    f"row {row} of the vectors holds {what}; expected finite numbers: "
                    "look at this patch and at the encoder that made it"
                )
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "table", self.table.reset_index(drop=True))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Length of one vector."""
        return self.vectors.shape[1]

    def take(self, rows) -> Embeddings:
        """Keep some rows in the order given: numbers 0 … n-1, or a mask of length n."""
        rows = np.asarray(rows)
        if rows.size == 0 and rows.dtype != bool:
            rows = rows.astype(np.int64)  # an empty list arrives as floats
        mask = rows.dtype == bool
        if rows.ndim != 1 or not (mask or np.issubdtype(rows.dtype, np.integer)) or (
            mask and len(rows) != len(self)
        ):  # fmt: skip
            raise IndexError(
                f"rows are {rows.dtype} of shape {rows.shape}; expected a list of row "
                f"numbers or a mask of length {len(self)}"
            )
        rows = np.flatnonzero(rows) if mask else rows
        outside = rows[(rows < 0) | (rows >= len(self))]
        if outside.size:
            raise IndexError(
                f"row {outside[0]} is outside 0 … {len(self) - 1}; give rows of these "
                "embeddings"
            )
        return Embeddings(self.vectors[rows], self.table.iloc[rows])

    def save(self, folder: str | Path) -> Path:
        """Write ``vectors.npy`` and ``patches.parquet`` into a folder, atomically.

        FileExistsError where the folder holds something else than saved embeddings.
        """
        with provenance.new_folder(
            folder, {VECTORS, TABLE}, "saved embeddings"
        ) as fresh:
            np.save(fresh / VECTORS, self.vectors, allow_pickle=False)
            self.table.to_parquet(fresh / TABLE, index=False)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Embeddings:
        """Read what `save` wrote; see `load_embeddings`."""
        return load_embeddings(folder)


def load_embeddings(folder: str | Path) -> Embeddings:
    """Read and check saved embeddings; errors for missing, damaged and odd files."""
    folder = Path(folder)
    missing = [name for name in (VECTORS, TABLE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}; embed the patches again"
        )
    try:
        vectors = np.load(folder / VECTORS, allow_pickle=False)
        table = pd.read_parquet(folder / TABLE)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{folder} holds damaged embeddings ({error}); embed the patches again"
        ) from error
    return Embeddings(vectors, table)


def save_runs(runs: list[list[Embeddings]], folder: str | Path) -> None:
    """Save the vectors of every seed (outer list) on every split, atomically."""
    names = {str(seed) for seed in range(_SEEDS)}
    with provenance.new_folder(folder, names, "vectors of runs") as fresh:
        for seed, parts in enumerate(runs):
            for number, one in enumerate(parts):
                one.save(fresh / str(seed) / str(number))


def load_runs(folder: str | Path, table: pd.DataFrame) -> list[list[Embeddings]]:
    """Load what `save_runs` saved; empty if nothing, or other patches or folds."""
    columns = ["image", "x", "y", "size", "mpp", "patient", "label", "fold"]
    wanted, runs = table[columns].reset_index(drop=True), []
    while (place := Path(folder) / str(len(runs))).is_dir():
        n = sum(1 for _ in place.iterdir())
        runs.append([load_embeddings(place / str(i)) for i in range(n)])
    tables = [one.table.reindex(columns=columns) for parts in runs for one in parts]
    return runs if all(found.equals(wanted) for found in tables) else []


def standardise(
    gallery: Embeddings, queries: Embeddings | None = None
) -> Embeddings | tuple[Embeddings, Embeddings]:
    """Scale every dimension to mean 0 and standard deviation 1 **of the gallery**.

    A dimension that is constant in the gallery is only centred. Returns both where
    queries are given.

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
    mean, deviation = (
        f(gallery.vectors, axis=0, dtype=float) for f in (np.mean, np.std)
    )
    deviation[np.ptp(gallery.vectors, axis=0) == 0] = 1.0
    scaled = tuple(
        Embeddings((part.vectors - mean) / deviation, part.table)
        for part in (gallery, queries)
        if part is not None
    )
    return scaled[0] if queries is None else scaled
