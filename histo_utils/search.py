"""Search an archive of embeddings: who is nearest, and who may be found.

*Tie rule.* A distance is computed in float64 from the stored float32 vectors by one
fixed sequence of operations, the same for every pair. It therefore does not depend on
chunk, thread, BLAS or machine, and equal vectors have equal distances bit for bit.
Neighbours are sorted by (distance, gallery row): among equals the lower row comes
first, also where the list of k is cut. faiss proposes candidates; they are accepted
only if its rounding error cannot have hidden a nearer item, else more are asked for.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from histo_utils.embeddings import Embeddings

__all__ = [
    "Archive",
    "Neighbours",
    "median_of_min",
    "median_of_min_matrix",
    "minmax_barcode",
]

INDEXES = ("flat", "barcode")
_SPARE = 8  # candidates beyond k, so that rounding in faiss rarely needs a second look
_CELLS = 2**22  # numbers held at once
_ROUNDING = 2.0**-24  # of float32


class Neighbours(NamedTuple):
    """Ranked gallery rows of every query: ``ids`` int64 and ``distances``, (n, k)."""

    ids: np.ndarray
    distances: np.ndarray


class Archive:
    """A searchable archive of embeddings.

    Parameters
    ----------
    embeddings : Embeddings
        The gallery; found ids are its row numbers.
    index : {"flat", "barcode"}
        ``flat`` compares with every vector. ``barcode`` compares `minmax_barcode` bits.
    metric : {"cosine", "euclidean", "hamming"}, optional
        Default ``cosine``, or ``hamming`` for barcodes without re-ranking. Cosine
        distance is 1 - cosine similarity.
    rerank : int, optional
        Barcodes only: so many nearest barcodes (after exclusion) are ranked again by
        ``metric`` on the vectors, and its distances are returned.

    Raises
    ------
    ValueError
        Unknown index or metric, an empty gallery, a zero vector under cosine.

    Examples
    --------
    >>> table = pd.DataFrame({"patient": ["a", "a", "b"]})
    >>> gallery = Embeddings(np.float32([[0, 1], [0, 2], [3, 0]]), table)
    >>> Archive(gallery, metric="euclidean").search(gallery, 1, "patient").ids.tolist()
    [[2], [2], [0]]
    """

    def __init__(self, embeddings, index="flat", metric=None, rerank=None):
        if index not in INDEXES:
            raise ValueError(f"unknown index {index!r}; valid are {', '.join(INDEXES)}")
        if metric is None:
            metric = "hamming" if index == "barcode" and rerank is None else "cosine"
        ranked_by_vectors = index == "flat" or rerank is not None
        valid = ("cosine", "euclidean") if ranked_by_vectors else ("hamming",)
        if metric not in valid:
            raise ValueError(
                f"metric={metric!r} with index={index!r}, rerank={rerank}; valid here: "
                f"{', '.join(valid)} (hamming: index='barcode' without rerank)"
            )
        if rerank is not None and (index == "flat" or rerank < 1):
            raise ValueError(
                f"rerank={rerank} with index={index!r}; expected 1 or more, with "
                "index='barcode' (a flat index is exact already)"
            )
        if len(embeddings) == 0:
            raise ValueError("the gallery is empty; nothing can be found in it")
        self.embeddings, self.index = embeddings, index
        self.metric, self.rerank = metric, rerank
        _check_lengths(embeddings.vectors, metric, "gallery")
        faiss = _import_faiss()
        if index == "barcode":
            self._faiss = faiss.IndexBinaryFlat(8 * -(-(embeddings.dim - 1) // 8))
        else:
            self._centre = embeddings.vectors.mean(axis=0, dtype=np.float64)
            kind = faiss.IndexFlatIP if metric == "cosine" else faiss.IndexFlatL2
            self._faiss = kind(embeddings.dim)
        self._longest = 0.0  # centred norm, bounds the rounding of faiss
        step = max(1, _CELLS // embeddings.dim)
        for start in range(0, len(embeddings), step):
            form = self._as_faiss(embeddings.vectors[start : start + step])
            if index == "flat":
                self._longest = max(self._longest, np.linalg.norm(form, axis=1).max())
            self._faiss.add(form)

    def search(self, queries, k, exclude=None) -> Neighbours:
        """Find the k nearest allowed gallery items of every query.

        Parameters
        ----------
        queries : Embeddings or (m, d) array of floats
            An array has no table and can only be searched with ``exclude=None``.
        k : int
        exclude : None, "self", "touching", "slide" or "patient"
            What a query may not find: the same patch (by row where the queries *are*
            the archive's embeddings, else by ``image, x, y, size``); it and the patches
            of its slide that overlap or touch it, corners included; its whole slide;
            everything of its patient.

        Raises
        ------
        ValueError
            k beyond what is left for some query (never silently fewer), other
            dimensions, NaN, or a table without the columns that ``exclude`` needs.
        """
        if isinstance(queries, np.ndarray):
            if exclude is not None:
                raise ValueError(
                    f"exclude={exclude!r} needs to know whose the queries are; give "
                    "Embeddings (vectors with their table), not an array"
                )
            queries = Embeddings(queries, pd.DataFrame(index=range(len(queries))))
        gallery = self.embeddings
        if queries.dim != gallery.dim:
            raise ValueError(
                f"queries have {queries.dim} dimensions, the archive {gallery.dim}; "
                "embed both with the same encoder"
            )
        _check_lengths(queries.vectors, self.metric, "query")
        banned = Exclusion(gallery.table, queries.table, exclude)
        banned.check(k)
        k = int(k)  # faiss takes no NumPy integers
        if self.rerank is None:
            return self._ranked(queries.vectors, k, banned)
        if self.rerank < k:
            raise ValueError(f"rerank={self.rerank} is smaller than k={k}; raise it")
        wide = min(self.rerank, len(gallery))
        ids, first = self._ranked(queries.vectors, wide, banned)
        distances, step = np.empty(ids.shape), max(1, _CELLS // queries.dim)
        for s in range(0, len(ids), step):
            rows = np.arange(s, min(s + step, len(ids)))
            distances[rows] = self._exact(queries.vectors, rows, ids[rows])
        return _sorted(ids, np.where(np.isinf(first), np.inf, distances), k)

    def _ranked(self, vectors, k, banned):
        """Exact top k by (distance, row); places that nothing is left for are inf."""
        n = len(self.embeddings)
        ids = np.empty((len(vectors), k), np.int64)
        distances = np.empty((len(vectors), k))
        unranked, keep = np.arange(len(vectors)), min(n, k + _SPARE)
        while unranked.size:
            width = min(n, keep + int((n - banned.left[unranked]).max()))
            step = max(1, _CELLS // max(width, vectors.shape[1]))
            unsure = []
            for part in np.split(unranked, range(step, unranked.size, step)):
                best, sure = self._round(vectors, part, k, keep, width, banned)
                ids[part], distances[part] = best
                unsure.append(part[~sure])
            unranked, keep = np.concatenate(unsure), min(n, 4 * keep)
        return Neighbours(ids, distances)

    def _round(self, vectors, rows, k, keep, width, banned):
        """Best k among faiss's candidates, and whether no other item can be nearer."""
        form = self._as_faiss(vectors[rows])
        rough, ids = self._faiss.search(form, width)
        bad = banned.forbids(rows[:, None], ids)
        if bad.any():  # allowed candidates first, their order kept
            order = np.argsort(bad, axis=1, kind="stable")[:, :keep]
            rough, ids, bad = (
                np.take_along_axis(a, order, axis=1) for a in (rough, ids, bad)
            )
        rough, ids, bad = rough[:, :keep], ids[:, :keep], bad[:, :keep]
        if self.index == "barcode":
            distances = beyond = rough.astype(np.float64)
        else:
            distances = self._exact(vectors, rows, ids)
            beyond = self._at_least(form, rough)
        best = _sorted(ids, np.where(bad, np.inf, distances), k)
        nothing_else = banned.left[rows] <= keep
        return best, nothing_else | (best.distances[:, -1] < beyond[:, -1])

    def _as_faiss(self, vectors):
        """Prepare what faiss compares: packed bits, unit or centred vectors."""
        if self.index == "barcode":
            return np.packbits(minmax_barcode(vectors), axis=1)
        if self.metric == "cosine":
            norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
            return (vectors / norms).astype(np.float32)
        return (vectors - self._centre).astype(np.float32)

    def _at_least(self, form, rough):
        """Lower bound of the true distance, given faiss's float32 value.

        A sum of d products in float32 is off by at most about d·2⁻²⁴ times the sum of
        the products' sizes; here, times the product of the norms.
        """
        d = self.embeddings.dim
        rough = rough.astype(np.float64)
        if self.metric == "cosine":
            return 1 - rough - (d + 8) * _ROUNDING
        reach = np.linalg.norm(form, axis=1, keepdims=True).astype(float)
        slack = (2 * d + 32) * _ROUNDING * (reach + self._longest) ** 2
        return np.sqrt(np.maximum(rough - slack, 0))

    def _exact(self, vectors, rows, ids):
        """Distances of the pairs (rows[i], ids[i, j]) by the fixed sequence."""
        own = vectors[rows].astype(np.float64)
        lengths = _fold(own * own)
        q, g = np.repeat(np.arange(len(rows)), ids.shape[1]), ids.ravel()
        out, step = np.empty(len(g)), max(1, _CELLS // self.embeddings.dim)
        for s in range(0, len(g), step):
            a = own[q[s : s + step]]
            b = self.embeddings.vectors[g[s : s + step]].astype(np.float64)
            if self.metric == "euclidean":
                out[s : s + step] = np.sqrt(_fold((a - b) ** 2))
            else:
                norms = np.sqrt(lengths[q[s : s + step]] * _fold(b * b))
                out[s : s + step] = 1 - np.clip(_fold(a * b) / norms, -1, 1)
        return out.reshape(ids.shape)


def _fold(values):
    """Sum over the last axis, always by adding its second half to its first."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        if values.shape[-1] % 2:
            folded[..., 0] += values[..., -1]
        values = folded
    return values[..., 0]


def _sorted(ids, distances, k):
    order = np.lexsort((ids, distances), axis=-1)[:, :k]
    pick = (np.take_along_axis(a, order, axis=1) for a in (ids, distances))
    return Neighbours(*pick)


def _check_lengths(vectors, metric, which):
    zero = ~vectors.any(axis=1)
    if metric == "cosine" and zero.any():
        raise ValueError(
            f"{which} row {int(zero.argmax())} is all zeros and has no direction; use "
            "metric='euclidean' or look at the encoder"
        )
    if vectors.size and max(vectors.max(), -vectors.min()) > 1e15:
        raise ValueError(
            f"{which} vectors hold values beyond 1e15, whose squares overflow float32; "
            "standardise them first (embeddings.standardise)"
        )


def _import_faiss():
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "searching needs faiss: pip install 'histo_utils[networks]'"
        ) from error
    return faiss


_FLOAT_METRICS = ("euclidean", "cosine")

_RULES = {"median": np.median, "mean": np.mean}

_PATCHES = 2**15  # of the gallery at once, so that millions of them fit in memory

_ROWS = 512  # of the queries at once, for products of matrices

_FEW = 2**14  # pairs of patches


def minmax_barcode(features) -> np.ndarray:
    """Turn vectors into bits: 1 where the next value is smaller (Yottixel).

    Parameters
    ----------
    features : (n, d) array of numbers, d ≥ 2

    Returns
    -------
    (n, d - 1) uint8 array of 0 and 1

    Notes
    -----
    Kalra et al. 2020 (Yottixel), as in the released code. Other code sets the opposite
    bit and a leading 0; Hamming distances differ only where neighbours are equal.

    Examples
    --------
    >>> minmax_barcode([[3, 1, 2, 2]]).tolist()
    [[1, 0, 0]]
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] < 2:
        raise ValueError(
            f"features have shape {features.shape}; expected (n, d) with d of 2 or more"
        )
    if np.isnan(features).any():
        row = int(np.isnan(features).any(axis=1).argmax())
        raise ValueError(f"row {row} of the features holds NaN; it has no barcode")
    return (features[:, 1:] < features[:, :-1]).astype(np.uint8)


def median_of_min(a, b, metric=None) -> float:
    """Distance of slide a to slide b: median over a of the minimum over b.

    Parameters
    ----------
    a, b : (n, bits) arrays of 0 and 1, or (n, d) arrays of floats
        The patches of two slides.
    metric : {"hamming", "euclidean", "cosine"}, optional
        Default by type: whole numbers are bits and compared by Hamming distance (in
        bits); floats are features and compared by Euclidean distance.

    Notes
    -----
    Yottixel's distance; it is **not** symmetric. An even number of patches gives the
    mean of the two middle minima.

    Examples
    --------
    >>> a, b = np.uint8([[0, 0], [1, 1]]), np.uint8([[0, 0]])
    >>> median_of_min(a, b), median_of_min(b, a)
    (1.0, 0.0)
    """
    return float(median_of_min_matrix([a, b], metric)[0, 1])


def median_of_min_matrix(bags, metric=None) -> np.ndarray:
    """All distances between slides; entry (i, j) is ``median_of_min(bag i, bag j)``.

    Parameters
    ----------
    bags : list of (n_i, bits) or (n_i, d) arrays
    metric : see `median_of_min`

    Returns
    -------
    (slides, slides) float64 array
    """
    return bag_distances(bags, metric=metric)


def bag_distances(
    queries, gallery=None, metric=None, reduce="median", listed=None
) -> np.ndarray:
    """Distances of query slides to gallery slides by their patches' nearest patches.

    Parameters
    ----------
    queries : list of (n_i, bits) or (n_i, d) arrays
    gallery : list of such arrays, optional
        Without it the queries search among themselves, and each pair of patches is
        compared once for both directions.
    metric : see `median_of_min`
    reduce : {"median", "mean"}
        What becomes of a query's minima, one a patch: their median (Yottixel), or
        their mean, which under cosine is 1 - MaxSim / n of late interaction (Khattab
        and Zaharia 2020; n patches in the query).
    listed : (queries, m) array of int, optional
        Gallery slides to compare each query with; the others are infinitely far.

    Returns
    -------
    (queries, gallery) float64 array
        Not symmetric under either rule.

    Raises
    ------
    ValueError
        Bags of unlike kind or width, an empty bag, NaN, an unknown metric or rule.

    Examples
    --------
    >>> a, b = np.uint8([[0, 0], [0, 0], [1, 1]]), np.uint8([[0, 0]])
    >>> bag_distances([a], [a, b]).tolist()
    [[0.0, 0.0]]
    >>> bag_distances([a], [a, b], reduce="mean").round(2).tolist()
    [[0.0, 0.67]]
    """
    if reduce not in _RULES:
        raise ValueError(f"reduce={reduce!r}; valid are {', '.join(_RULES)}")
    alone = gallery is None
    queries = [np.asarray(bag) for bag in queries]
    gallery = queries if alone else [np.asarray(bag) for bag in gallery]
    bags = queries if alone else queries + gallery
    bits = _check_bags(bags)
    metric = metric or ("hamming" if bits else "euclidean")
    if (metric == "hamming") != bits or metric not in ("hamming", *_FLOAT_METRICS):
        raise ValueError(
            f"metric={metric!r} for {'bits' if bits else 'float features'}; valid here:"
            f" {'hamming' if bits else ', '.join(_FLOAT_METRICS)}"
        )
    if metric == "cosine" and not all(bag.any(axis=1).all() for bag in bags):
        raise ValueError(
            "a patch has the zero vector, which has no cosine; leave it out, or use "
            "metric='euclidean'"
        )
    rows, row_starts = _stacked(queries, metric)
    columns, starts = (rows, row_starts) if alone else _stacked(gallery, metric)
    kind = np.min_scalar_type(queries[0].shape[1]) if bits else np.float64
    minima = np.zeros((len(rows), len(gallery)), kind)
    if listed is None:
        for i, j in _blocks(row_starts, 0, 1 if bits else _ROWS):
            top, bottom = row_starts[i], row_starts[j]
            for first, last in _blocks(starts, i if alone else 0, _PATCHES):
                left, right = starts[first], starts[last]
                pairs = _pairs(rows[top:bottom], columns[left:right], metric, kind)
                found = np.minimum.reduceat(pairs, starts[first:last] - left, axis=1)
                minima[top:bottom, first:last] = found
                if alone:
                    found = np.minimum.reduceat(pairs, row_starts[i:j] - top, axis=0)
                    minima[left:right, i:j] = found.T
    else:
        for near, (top, bottom) in zip(listed, pairwise(row_starts), strict=True):
            few = [columns[starts[j] : starts[j + 1]] for j in near]
            pairs = _pairs(rows[top:bottom], np.concatenate(few), metric, kind)
            places = np.cumsum([0] + [len(part) for part in few[:-1]])
            minima[top:bottom, near] = np.minimum.reduceat(pairs, places, axis=1)
    parts = np.split(minima, row_starts[1:-1])
    matrix = np.stack([_RULES[reduce](part, axis=0) for part in parts]).astype(float)
    if listed is not None:
        absent = np.ones(matrix.shape, bool)
        np.put_along_axis(absent, np.asarray(listed), False, axis=1)
        matrix[absent] = np.inf
    return matrix


def _check_bags(bags):
    kinds = {np.issubdtype(bag.dtype, np.floating) for bag in bags}
    shapes = {bag.shape[1:] for bag in bags}
    if any(bag.ndim != 2 or 0 in bag.shape for bag in bags) or len(shapes) != 1:
        raise ValueError(
            f"slides have shapes {[bag.shape for bag in bags][:4]}; expected (patches, "
            "d), at least one patch each and one d: leave slides without patches out"
        )
    if len(kinds) != 1:
        raise ValueError(
            "some slides are bits and some are float features; give one kind"
        )
    bits = not kinds.pop()
    for i, bag in enumerate(bags):
        if bits and ((bag != 0) & (bag != 1)).any():
            raise ValueError(
                f"slide {i} holds whole numbers other than 0 and 1; expected bits "
                "(minmax_barcode) or floats"
            )
        if not bits and not np.isfinite(bag).all():
            raise ValueError(f"slide {i} holds NaN or infinity; expected finite floats")
    return bits


def _stacked(bags, metric):
    """Stack bags into one array, ready for their metric; and where each one starts."""
    together = np.concatenate(bags)
    starts = np.cumsum([0] + [len(bag) for bag in bags])
    if metric == "hamming":
        return _words(together), starts
    together = together.astype(np.float64)
    if metric == "cosine":
        together /= np.linalg.norm(together, axis=1, keepdims=True)
    return together, starts


def _blocks(starts, first, patches):
    """Cut slides from ``first`` on into runs of about so many patches."""
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + patches, "right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def _pairs(a, b, metric, kind):
    """Distances of all patches of a to all of b, both from `_stacked`."""
    if metric == "hamming":
        return _hamming(a, b, kind)
    if metric == "euclidean":
        return cdist(a, b)
    # A small product of matrices waits for its threads where the cores are busy.
    few = len(a) * len(b) < _FEW
    cosines = np.einsum("ik,jk->ij", a, b) if few else a @ b.T
    # Products round by shape: without the last digits equal vectors are equally far,
    # and ties go by place in the table.
    return np.round(np.maximum(1 - cosines, 0), 12)


def _words(bits):
    """Pack rows of bits into uint64 words."""
    packed = np.packbits(bits.astype(bool), axis=1)
    spare = -packed.shape[1] % 8
    return np.pad(packed, ((0, 0), (0, spare))).view(np.uint64)


def _hamming(a, b, kind):
    """Hamming distances of packed rows, (len(a), len(b)), in bits."""
    total = np.zeros((len(a), len(b)), kind)
    differing = np.empty(total.shape, np.uint64)
    counts = np.empty(total.shape, np.uint8)
    a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    for mine, theirs in zip(a, b, strict=True):
        np.bitwise_xor(mine[:, None], theirs, out=differing)
        total += np.bitwise_count(differing, out=counts)
    return total


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
