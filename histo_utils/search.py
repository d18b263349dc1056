"""Search an archive of embeddings: who is nearest, and who may be found.

*Tie rule.* A distance is computed in float64 from the stored float32 vectors by one
fixed sequence of operations, the same for every pair. It therefore does not depend on
chunk, thread, BLAS or machine, and equal vectors have equal distances bit for bit.
Neighbours are sorted by (distance, gallery row): among equals the lower row comes
first, also where the list of k is cut. faiss proposes candidates; they are accepted
only if its rounding error cannot have hidden a nearer item, else more are asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from histo_utils.barcodes import median_of_min, median_of_min_matrix, minmax_barcode
from histo_utils.embeddings import Embeddings
from histo_utils.exclusion import Exclusion

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
