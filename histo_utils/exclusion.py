"""Exclusion: which items of the gallery a query may not find.

Leaving out too little (the query itself, its slide, its patient) is the most common
way to too good a number, so it is decided here, once, by ids and never by rank.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

EXCLUSIONS = ("self", "touching", "slide", "patient")
PATCH = ["image", "x", "y", "size"]  # columns that say which patch a row is


class Exclusion:
    """Which gallery rows each query may not find.

    Parameters
    ----------
    gallery, queries : DataFrame
        Their patch tables; one and the same object where queries search among
        themselves, so that "self" goes by row.
    exclude : None, "self", "touching", "slide" or "patient"
        See `Archive.search`.

    Attributes
    ----------
    left : (m,) int array
        Gallery items that remain for each query.
    """

    def __init__(self, gallery, queries, exclude):
        if exclude is not None and exclude not in EXCLUSIONS:
            raise ValueError(
                f"unknown exclude={exclude!r}; valid are None, {', '.join(EXCLUSIONS)}"
            )
        self.name, self.n = exclude, len(gallery)
        self._tables = gallery, queries
        self._pairs = self._codes = None
        if exclude == "touching":
            self._pairs = _touching(gallery, queries)
            hidden = np.bincount(self._pairs[0], minlength=len(queries))
        elif exclude is not None:
            if exclude == "self" and queries is gallery:
                codes = np.arange(len(queries)), np.arange(self.n)
            else:
                columns = PATCH if exclude == "self" else [exclude]
                codes = _codes(queries, gallery, columns, f"exclude={exclude!r}")
            self._codes = codes
            hidden = np.bincount(codes[1], minlength=codes[0].max(initial=0) + 1)
            hidden = hidden[codes[0]]
        else:
            hidden = np.zeros(len(queries), np.int64)
        self.left = self.n - hidden
        if self._pairs is not None:
            self._keys = np.sort(self._pairs[0] * self.n + self._pairs[1])

    def check(self, k):
        """Raise where fewer than k items are left for a query."""
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"k={k!r}; expected a whole number of 1 or more")
        if not len(self.left) or k <= self.left.min():
            return
        query = int(self.left.argmin())
        left, whose = int(self.left[query]), ""
        if self.name in ("slide", "patient"):
            value = str(self._tables[1][self.name].iloc[query])
            whose = f" after leaving out its {self.name} {value!r}"
            if left == 0:
                raise ValueError(
                    f"query {query}: its {self.name} {value!r} is the whole gallery, "
                    f"so nothing is left to find; add other {self.name}s to the "
                    "gallery or leave out less with exclude="
                )
        elif self.name is not None:
            whose = f" after exclude={self.name!r}"
        raise ValueError(
            f"k={k} is larger than the {left} items that are left for query {query}"
            f"{whose}; lower k"
        )

    def forbids(self, rows, ids):
        """Whether query rows may not find gallery ids (arrays that broadcast)."""
        if self._codes is not None:
            return self._codes[0][rows] == self._codes[1][ids]
        key = rows * self.n + ids
        if self._pairs is None or not len(self._keys):
            return np.zeros(key.shape, bool)
        place = np.searchsorted(self._keys, key).clip(max=len(self._keys) - 1)
        return self._keys[place] == key

    def relevant(self, column="label"):
        """Count the allowed gallery items that share each query's label."""
        gallery, queries = self._tables
        ql, gl = _codes(queries, gallery, [column], "counting relevant items")
        size = 1 + max(ql.max(initial=0), gl.max(initial=0))
        count = np.bincount(gl, minlength=size)[ql]
        if self._pairs is not None:
            q, g = self._pairs
            return count - np.bincount(q[ql[q] == gl[g]], minlength=len(ql))
        if self._codes is None:
            return count
        both, mine = self._codes[1] * size + gl, self._codes[0] * size + ql
        kinds, counts = np.unique(both, return_counts=True)
        place = np.searchsorted(kinds, mine).clip(max=len(kinds) - 1)
        return count - np.where(kinds[place] == mine, counts[place], 0)


def _codes(queries, gallery, columns, why):
    """Give queries' and gallery's rows one number for each distinct value."""
    for which, table in (("queries'", queries), ("gallery's", gallery)):
        for name in columns:
            if name not in table:
                raise ValueError(
                    f"the {which} table has no column {name!r}, which {why} needs; "
                    f"it has {', '.join(map(str, table.columns))}"
                )
            if table[name].isna().any():
                row = int(table[name].isna().to_numpy().argmax())
                raise ValueError(
                    f"row {row} of the {which} table has no {name}, which {why} "
                    "needs; fill it in or drop the row"
                )
    total = np.zeros(len(queries) + len(gallery), np.int64)
    for name in columns:
        parts = [table[name].astype(object) for table in (queries, gallery)]
        kinds = {pd.api.types.infer_dtype(part) for part in parts if len(part)}
        if len(kinds) > 1 and not kinds <= {"integer", "floating"}:
            raise ValueError(
                f"{name} is {' in one table and '.join(sorted(kinds))} in the other; "
                "values would never match: convert one of them"
            )
        codes, kinds = pd.factorize(pd.concat(parts, ignore_index=True))
        total = pd.factorize(total * (len(kinds) + 1) + codes)[0]
    return total[: len(queries)], total[len(queries) :]


def _touching(gallery, queries):
    """Pairs (query row, gallery row) of one slide that overlap or touch."""
    where = [c for c in ("slide", "image") if c == "slide" or c in queries]
    qs, gs = _codes(queries, gallery, where, "exclude='touching'")
    for table in (queries, gallery):
        _codes(table, table, ["x", "y", "size"], "exclude='touching'")
    found = [np.empty((2, 0), np.int64)]
    for slide in np.intersect1d(qs, gs):
        q, g = np.flatnonzero(qs == slide), np.flatnonzero(gs == slide)
        mine, theirs = queries.iloc[q], gallery.iloc[g]
        scale = mine["mpp"] / mine["slide_mpp"] if "slide_mpp" in mine else 1.0
        reach = float(np.median(mine["size"] * scale)) * 1.001  # x, y: level-0 px
        tree = cKDTree(theirs[["x", "y"]].to_numpy(float))
        near = tree.query_ball_point(mine[["x", "y"]].to_numpy(float), reach, p=np.inf)
        counts = [len(rows) for rows in near]
        rows = np.concatenate([*near, []]).astype(np.int64)
        found.append(np.stack([np.repeat(q, counts), g[rows]]))
    return np.concatenate(found, axis=1)
