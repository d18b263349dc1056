"""Search an archive of embeddings: the nearest items, and which of them may be found.

*Exclusion* is a mask over (queries, gallery), made for some rows of queries at a time.
*Ties.* Distances are float64, rounded to 12 digits; neighbours are sorted by (distance,
gallery row), so among equals the lower row comes first, also where a list is cut.
Float32 products propose candidates, with a margin that covers their rounding; SciPy's
`cdist` ranks them, which treats every pair alike: equal vectors are equally far.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from sklearn.preprocessing import normalize

from histo_utils.embeddings import Embeddings

INDEXES = ("flat", "barcode")
EXCLUSIONS = ("self", "touching", "slide", "patient")
PATCH = ["image", "x", "y", "size"]  # columns that identify a patch
_CELLS = 2**24  # pairs of query and gallery item held at once
_PATCHES = 2**15  # of the gallery at once, in slide-to-slide search
_ROWS = 512  # of the queries at once
_RULES = {"median": np.median, "mean": np.mean}
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
        Compare vectors, or their `minmax_barcode` bits.
    metric : {"cosine", "euclidean", "hamming"}, optional
        Default ``cosine`` (1 - similarity), or ``hamming`` for barcodes alone.
    rerank : int, optional
        Barcodes only: rank this many nearest barcodes again by the vectors' ``metric``.

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
        by_bits = index == "barcode" and rerank is None
        if metric is None:
            metric = "hamming" if by_bits else "cosine"
        valid = ("hamming",) if by_bits else ("cosine", "euclidean")
        if metric not in valid:
            raise ValueError(
                f"metric={metric!r} with index={index!r}, rerank={rerank}; valid here: "
                f"{', '.join(valid)}"
            )
        if rerank is not None and (index == "flat" or rerank < 1):
            raise ValueError(
                f"rerank={rerank} with index={index!r}; expected 1 or more, for a "
                "barcode index (a flat index is exact already)"
            )
        if len(embeddings) == 0:
            raise ValueError("the gallery is empty; nothing can be found in it")
        self.embeddings, self.index = embeddings, index
        self.metric, self.rerank = metric, rerank
        _check_lengths(embeddings.vectors, metric, "gallery")
        self._centre = 0.0
        if index == "flat":  # any centre will do; short vectors round less
            some = embeddings.vectors[:: max(1, len(embeddings) // 1000)]
            self._centre = self._form(some).mean(axis=0, dtype=float)
        self._forms = self._form(embeddings.vectors)
        if index == "flat":
            self._squares = np.einsum("ij,ij->i", self._forms, self._forms)

    def search(self, queries, k, exclude=None) -> Neighbours:
        """Find the k nearest allowed gallery items of every query.

        ``queries`` are Embeddings, or an (m, d) array, which has no table and can only
        be searched with ``exclude=None``; ``exclude`` is a rule of `exclusion_mask`.
        A k beyond what is left for some query is an error, never silently fewer; so are
        other dimensions, NaN, and a table without the columns that the rule needs.
        """
        if isinstance(queries, np.ndarray):
            if exclude is not None:
                raise ValueError(
                    f"exclude={exclude!r} needs a table of the queries; give Embeddings"
                    ", not an array"
                )
            queries = Embeddings(queries, pd.DataFrame(index=range(len(queries))))
        gallery = self.embeddings
        if queries.dim != gallery.dim:
            raise ValueError(
                f"queries have {queries.dim} dimensions, the archive {gallery.dim}; "
                "embed both with the same encoder"
            )
        _check_lengths(queries.vectors, self.metric, "query")
        check_k(k, queries.table, gallery.table, exclude)
        if self.rerank is not None and self.rerank < k:
            raise ValueError(f"rerank={self.rerank} is smaller than k={k}; raise it")
        shape = len(queries), k
        found = Neighbours(np.empty(shape, np.int64), np.empty(shape))
        for rows, mask in _blocks(queries.table, gallery.table, exclude):
            self._rank(queries.vectors[rows], mask, *(part[rows] for part in found))
        return found

    def _rank(self, vectors, mask, ids, distances):
        """Write the nearest allowed items of some queries into ids and distances."""
        rough, margin = self._rough(self._form(vectors))
        rough[mask] = np.inf
        k = ids.shape[1]
        width = min(self.rerank or k, len(self.embeddings))
        cut = np.partition(rough, width - 1, axis=1)[:, width - 1] + margin
        for i, far in enumerate(rough):
            near = np.flatnonzero((far <= cut[i]) & ~mask[i])
            if self.index == "barcode":  # no margin: of equal ones the lower row
                near = np.sort(near[np.argsort(far[near], kind="stable")[:width]])
            exact = far[near].astype(float)
            if self.metric != "hamming":
                others = self.embeddings.vectors[near]
                exact = cdist(vectors[i : i + 1], others, self.metric)[0]
            exact = np.round(np.maximum(exact, 0), 12)
            order = np.argsort(exact, kind="stable")[:k]
            ids[i], distances[i] = near[order], exact[order]

    def _rough(self, forms):
        """First distances of queries to the gallery, and the margin of their order.

        Squared Euclidean ones without the query's own square; a sum of d products in
        float32 is off by at most about d·2⁻²⁴ times the product of the norms.
        """
        if self.index == "barcode":
            return _hamming(forms, self._forms).astype(np.float32), 0
        reach = np.linalg.norm(forms, axis=1) + self._squares.max() ** 0.5
        margin = 2 * (self.embeddings.dim + 8) * _ROUNDING * reach**2 + 1e-11 * reach
        return self._squares - 2 * (forms @ self._forms.T), margin

    def _form(self, vectors):
        """Prepare what is compared first: packed bits, or centred (unit) vectors."""
        if self.index == "barcode":
            return np.packbits(minmax_barcode(vectors), axis=1)
        forms, step = np.empty(vectors.shape, np.float32), 1024
        for rows in (slice(i, i + step) for i in range(0, len(vectors), step)):
            part = vectors[rows].astype(np.float64)
            part = normalize(part) if self.metric == "cosine" else part
            forms[rows] = part - self._centre
        return forms


def exclusion_mask(queries, gallery, exclude=None) -> np.ndarray:
    """Which gallery rows each query may not find.

    Parameters
    ----------
    queries, gallery : DataFrame with m and n rows
        Patch tables; the same object where queries search among themselves, so that
        "self" goes by row (else by ``image, x, y, size``).
    exclude : None, "self", "touching", "slide" or "patient"
        Nothing; the same patch; it and the patches of its slide that overlap or touch
        it, corners included; its whole slide; everything of its patient.

    Returns
    -------
    (m, n) bool array

    Examples
    --------
    >>> table = pd.DataFrame({"patient": ["a", "a", "b"]})
    >>> exclusion_mask(table.iloc[:1], table, "patient").tolist()
    [[True, True, False]]
    """
    mask = np.zeros((len(queries), len(gallery)), bool)
    for rows, part in _blocks(queries, gallery, exclude):
        mask[rows] = part
    return mask


def check_k(k, queries, gallery, exclude=None) -> None:
    """Raise ValueError where fewer than k gallery items are left for a query."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k={k!r}; expected a whole number of 1 or more")
    parts = [(~mask).sum(axis=1) for _, mask in _blocks(queries, gallery, exclude)]
    left = np.concatenate([*parts, []]).astype(int)
    if not len(left) or k <= left.min():
        return
    query, whose = int(left.argmin()), ""
    if exclude in ("slide", "patient"):
        value = str(queries[exclude].iloc[query])
        whose = f" after leaving out its {exclude} {value!r}"
        if left[query] == 0:
            raise ValueError(
                f"query {query}: its {exclude} {value!r} is the whole gallery, so "
                f"nothing is left to find; add other {exclude}s, or exclude less"
            )
    elif exclude is not None:
        whose = f" after exclude={exclude!r}"
    raise ValueError(
        f"k={k} is larger than the {left[query]} items that are left for query {query}"
        f"{whose}; lower k"
    )


def count_relevant(queries, gallery, exclude=None) -> np.ndarray:
    """Count the allowed gallery items that share each query's label; (m,) int."""
    own, theirs = _codes(queries, gallery, ["label"], "counting relevant items")
    relevant = np.zeros(len(queries), np.int64)
    for rows, mask in _blocks(queries, gallery, exclude):
        relevant[rows] = ((own[rows, None] == theirs) & ~mask).sum(axis=1)
    return relevant


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
    Kalra et al. 2020, as in the released code. Other code sets the opposite bit and a
    leading 0; Hamming distances differ only where neighbouring values are equal.

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
    """Distance of slide a to slide b (Yottixel): median over a of the minimum over b.

    Not symmetric. `bag_distances` says what slides are.

    Examples
    --------
    >>> a, b = np.uint8([[0, 0], [1, 1]]), np.uint8([[0, 0]])
    >>> median_of_min(a, b), median_of_min(b, a)
    (1.0, 0.0)
    """
    return float(bag_distances([a], [b], metric)[0, 0])


def bag_distances(
    queries, gallery=None, metric=None, reduce="median", listed=None
) -> np.ndarray:
    """Distances of slides by their patches' nearest patches, (queries, gallery).

    ``queries`` and ``gallery`` (default: the queries) are lists of slides, each an
    (n_i, bits) array of whole numbers, compared by Hamming distance in bits, or an
    (n_i, d) array of floats, compared by ``metric`` "euclidean" (default) or "cosine".
    ``reduce`` summarises the minima of a query's patches: by their "median" (Yottixel),
    or their "mean", which under cosine is 1 - MaxSim / n of late interaction (Khattab
    and Zaharia 2020). ``listed``, an (queries, m) array, names the gallery slides that
    each query is compared with; the others are infinitely far. Not symmetric.

    Examples
    --------
    >>> a, b = np.uint8([[0, 0], [0, 0], [1, 1]]), np.uint8([[0, 0]])
    >>> bag_distances([a], [a, b], reduce="mean").round(2).tolist()
    [[0.0, 0.67]]
    """
    if reduce not in _RULES:
        raise ValueError(f"reduce={reduce!r}; valid are {', '.join(_RULES)}")
    alone = gallery is None
    queries = [np.asarray(bag) for bag in queries]
    gallery = queries if alone else [np.asarray(bag) for bag in gallery]
    bits = _check_bags(queries if alone else queries + gallery, metric)
    metric = metric or ("hamming" if bits else "euclidean")
    form, compare = {
        "hamming": (lambda bag: np.packbits(bag.astype(bool), axis=1), _hamming),
        "euclidean": (np.float64, cdist),
        "cosine": (lambda bag: normalize(bag.astype(float)), lambda a, b: 1 - a @ b.T),
    }[metric]
    own = [form(bag) for bag in queries]
    theirs = own if alone else [form(bag) for bag in gallery]
    halves = alone and listed is None  # a pair's distances serve both directions
    distances = np.full((len(own), len(theirs)), np.inf)
    if listed is None:
        run = np.cumsum([len(bag) for bag in theirs]) // _PATCHES
        parts = np.split(np.arange(len(theirs)), np.flatnonzero(np.diff(run)) + 1)
        work = [(np.arange(len(own)), part) for part in parts]
    else:
        work = [(np.array([i]), np.asarray(near)) for i, near in enumerate(listed)]

    def summary(block, sizes, others):
        minima = np.minimum.reduceat(block, np.cumsum([0, *others[:-1]]), axis=1)
        if metric == "cosine":  # products round by shape: equal vectors are equal
            minima = np.round(np.maximum(minima, 0), 12)
        bags = np.split(minima, np.cumsum(sizes)[:-1])
        return np.stack([_RULES[reduce](least, axis=0) for least in bags])

    for mine, part in work:
        # several queries at once: products of matrices are fast when they are large
        run = np.cumsum([len(own[i]) for i in mine]) // _ROWS
        for some in np.split(mine, np.flatnonzero(np.diff(run)) + 1):
            near = part[part >= some[0]] if halves else part
            if not len(near):
                continue
            a, b = [own[i] for i in some], [theirs[j] for j in near]
            sizes = [len(bag) for bag in a], [len(bag) for bag in b]
            block = compare(np.concatenate(a), np.concatenate(b))
            distances[np.ix_(some, near)] = summary(block, *sizes)
            if halves:
                distances[np.ix_(near, some)] = summary(block.T, *sizes[::-1])
    return distances


def _check_bags(bags, metric):
    """Return whether the bags hold bits; raise where they or the metric are wrong."""
    shapes = {bag.shape[1:] for bag in bags if bag.ndim == 2 and bag.size}
    if len(shapes) != 1 or not all(bag.ndim == 2 and bag.size for bag in bags):
        raise ValueError(
            f"slides have shapes {[bag.shape for bag in bags][:4]}; expected (patches, "
            "d), at least one patch each and one d: leave slides without patches out"
        )
    kinds = {not np.issubdtype(bag.dtype, np.floating) for bag in bags}
    if len(kinds) != 1:
        raise ValueError("some slides are bits, some are float features; give one kind")
    (bits,) = kinds
    valid = ("hamming",) if bits else ("euclidean", "cosine")
    if metric is not None and metric not in valid:
        raise ValueError(
            f"metric={metric!r} for {'bits' if bits else 'float features'}; valid here:"
            f" {', '.join(valid)}"
        )
    for i, bag in enumerate(bags):
        if bits and ((bag != 0) & (bag != 1)).any():
            raise ValueError(f"slide {i} holds whole numbers other than 0 and 1")
        if not bits and not np.isfinite(bag).all():
            raise ValueError(f"slide {i} holds NaN or infinity; expected finite floats")
        if metric == "cosine" and not bag.any(axis=1).all():
            raise ValueError(f"slide {i} has a zero vector, which has no cosine")
    return bits


def _hamming(a, b):
    """Hamming distances of packed rows in bits, (len(a), len(b)) int32."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError("barcodes need faiss: histo_utils[networks]") from error
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    far = np.empty((len(a), len(b)), np.int32)
    where, to = (faiss.swig_ptr(x) for x in (a, b)), faiss.swig_ptr(far)
    faiss.hammings(*where, len(a), len(b), a.shape[1], to)
    return far


def _blocks(queries, gallery, exclude):
    """Rows of queries (slices) and their `exclusion_mask`, `_CELLS` pairs at a time."""
    if exclude is not None and exclude not in EXCLUSIONS:
        raise ValueError(
            f"unknown exclude={exclude!r}; valid are None, {', '.join(EXCLUSIONS)}"
        )
    m, n, why = len(queries), len(gallery), f"exclude={exclude!r}"
    own, theirs, reach = np.zeros(m, int), np.ones(n, int), None
    if exclude == "self" and queries is gallery:
        own = theirs = np.arange(n)
    elif exclude == "touching":
        columns = [c for c in ("slide", "image") if c == "slide" or c in queries]
        own, theirs = _codes(queries, gallery, columns, why)
        for table in (queries, gallery):
            _codes(table, table, ["x", "y", "size"], why)
        scale = queries["mpp"] / queries["slide_mpp"] if "slide_mpp" in queries else 1
        size = (queries["size"] * scale).groupby(own).transform("median")
        reach = size.to_numpy(float)[:, None] * 1.001  # x, y: level-0 px
        place, places = (t[["x", "y"]].to_numpy(float) for t in (queries, gallery))
    elif exclude is not None:
        columns = PATCH if exclude == "self" else [exclude]
        own, theirs = _codes(queries, gallery, columns, why)
    step = max(1, _CELLS // max(1, n))
    for rows in (slice(start, start + step) for start in range(0, m, step)):
        mask = own[rows, None] == theirs
        if reach is not None:
            mask &= cdist(place[rows], places, "chebyshev") <= reach[rows]
        yield rows, mask


def check_columns(table, names, whose="the", why="", remedy="") -> None:
    """Raise ValueError where a table lacks one of the columns, or a value in it."""
    for name in names:
        if name not in table:
            raise ValueError(
                f"{whose} table has no column {name!r}{why}; it has "
                f"{', '.join(map(str, table.columns))}: add it{remedy}"
            )
        if table[name].isna().any():
            row = int(table[name].isna().to_numpy().argmax())
            raise ValueError(
                f"row {row} of {whose} table has no {name}{why}; fill it in or drop "
                "the row"
            )


def _codes(queries, gallery, columns, why):
    """Give queries' and gallery's rows one number for each distinct value."""
    check_columns(queries, columns, "the queries'", f", which {why} needs")
    check_columns(gallery, columns, "the gallery's", f", which {why} needs")
    for name in columns:
        kinds = {
            pd.api.types.infer_dtype(table[name].astype(object))
            for table in (queries, gallery)
            if len(table)
        }
        if len(kinds) > 1 and not kinds <= {"integer", "floating"}:
            raise ValueError(
                f"{name} is {' in one table and '.join(sorted(kinds))} in the other; "
                "values would never match: convert one of them"
            )
    both = pd.concat([queries[columns], gallery[columns]])
    codes = both.groupby(columns, sort=False, observed=True).ngroup().to_numpy()
    return codes[: len(queries)], codes[len(queries) :]


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
