"""A split by file lets a copy find its twin; a split by tile does not."""

import numpy as np
import pandas as pd
import pytest

from histo_utils.copies import by_unit, compared
from histo_utils.embeddings import Embeddings


def copied(n_tiles=60, times=4):
    """Tiles of two classes whose vectors say nothing of the class, and their copies."""
    rng = np.random.default_rng(0)
    tile = np.repeat(np.arange(n_tiles), times)
    vectors = rng.standard_normal((n_tiles, 32))[tile]
    vectors = vectors + 0.1 * rng.standard_normal((len(tile), 32))
    table = pd.DataFrame({
        "image": [f"{i}.png" for i in range(len(tile))], "x": 0, "y": 0, "size": 8,
        "mpp": np.nan, "slide_mpp": np.nan, "slide": tile.astype(str),
        "patient": tile.astype(str), "label": np.array(["a", "b"])[tile % 2],
    })  # fmt: skip
    return Embeddings(vectors.astype(np.float32), table)


def test_the_split_by_file_adds_what_the_copies_know():
    row, copies = compared(copied(), n_boot=100, metric="euclidean")
    assert copies > 0.95  # now and then all copies fall into one fold
    assert row["neighbour, by file"]["score"] >= copies
    assert 0.25 < row["neighbour, by tile"]["score"] < 0.75
    assert row["neighbour, difference"]["n"] == 60  # tiles, not images
    gap = row["linear SVM, by file"]["score"] - row["linear SVM, by tile"]["score"]
    assert gap > 0.2
    assert row["linear SVM, difference"]["difference"] == pytest.approx(gap)


def test_a_unit_stays_whole():
    made = copied()
    found = by_unit(made, "tile", metric="euclidean")["neighbour"]
    tile = made.table["slide"].to_numpy()
    near = np.stack(found["neighbours"])[:, 0]
    assert (tile[near] != tile).all()
    with pytest.raises(ValueError, match="unknown unit 'row'; valid are file, tile"):
        by_unit(made, "row")
