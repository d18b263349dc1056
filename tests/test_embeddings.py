import os

import numpy as np
import pandas as pd
import pytest

from histo_utils import embeddings as module
from histo_utils.embeddings import (
    Embeddings,
    load_embeddings,
    load_runs,
    save_runs,
    standardise,
)


def some(n=6, d=3, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    table = pd.DataFrame({"label": list("abcdef")[:n], "x": range(n)})
    return Embeddings(vectors, table)


def test_vectors_become_float32_and_the_index_row_numbers():
    table = pd.DataFrame({"label": ["a", "b"]}, index=[7, 7])
    made = Embeddings(np.array([[1.0, 2.0], [3.0, 4.0]]), table)
    assert made.vectors.dtype == np.float32
    assert made.table.index.tolist() == [0, 1]
    assert table.index.tolist() == [7, 7]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_is_named_with_its_row(bad, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 2)
    vectors = some().vectors.copy()
    vectors[3, 1] = bad
    with pytest.raises(ValueError, match=r"row 3 of the vectors holds (NaN|an inf)"):
        Embeddings(vectors, some().table)


def test_float64_too_large_for_float32_is_refused():
    with pytest.raises(ValueError, match=r"row 1 .* infinite"):
        Embeddings(np.array([[1.0], [1e300]]), pd.DataFrame({"label": [0, 1]}))


def test_other_bad_input():
    table = some().table
    with pytest.raises(ValueError, match="5 vectors but 6 rows"):
        Embeddings(some().vectors[:5], table)
    with pytest.raises(TypeError, match="vectors are int64; expected float32"):
        Embeddings(np.ones((6, 2), np.int64), table)
    with pytest.raises(ValueError, match=r"shape \(6,\); expected \(n, d\)"):
        Embeddings(np.ones(6), table)
    with pytest.raises(TypeError, match="table is a dict"):
        Embeddings(some().vectors, {"label": 1})


def test_take_by_rows_and_by_mask():
    made = some()
    assert made.take([4, 1]).table["label"].tolist() == ["e", "b"]
    np.testing.assert_array_equal(made.take([4, 1]).vectors, made.vectors[[4, 1]])
    mask = made.table["x"] > 3
    assert made.take(mask).table["label"].tolist() == ["e", "f"]
    assert made.take(mask).table.index.tolist() == [0, 1]
    assert len(made.take([])) == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 6], "row 6 is outside 0 … 5"),
        ([-1], "row -1 is outside"),
        ([True, False], r"rows are bool of shape \(2,\); .* mask of length 6"),
        ([0.5], "expected a list of row numbers"),
    ],
)
def test_take_refuses(rows, message):
    with pytest.raises(IndexError, match=message):
        some().take(rows)


def test_saved_and_loaded_are_equal(tmp_path):
    made = some()
    made.save(tmp_path / "deep" / "set")
    for back in (
        load_embeddings(tmp_path / "deep" / "set"),
        Embeddings.load(tmp_path / "deep" / "set"),
    ):
        np.testing.assert_array_equal(back.vectors, made.vectors)
        pd.testing.assert_frame_equal(back.table, made.table)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set"]


@pytest.mark.parametrize("step", ["np.save", "pd.DataFrame.to_parquet"])
def test_a_killed_process_leaves_nothing_loadable(tmp_path, step):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork, to kill a process in the middle of save")
    child = os.fork()
    if child == 0:
        owner, name = (np, "save") if step == "np.save" else (pd.DataFrame, step[13:])
        setattr(owner, name, lambda *a, **k: os._exit(1))
        some().save(tmp_path / "set")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not (tmp_path / "set").exists()
    some().save(tmp_path / "set")
    assert len(load_embeddings(tmp_path / "set")) == 6


def test_loading_damage_says_so(tmp_path):
    some().save(tmp_path / "set")
    path = tmp_path / "set" / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged embeddings"):
        load_embeddings(tmp_path / "set")
    np.save(path, some().vectors[:4])
    with pytest.raises(ValueError, match="4 vectors but 6 rows"):
        load_embeddings(tmp_path / "set")
    (tmp_path / "set" / "patches.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no patches\.parquet"):
        load_embeddings(tmp_path / "set")


def test_standardise_uses_the_gallery_only():
    gallery, queries = some(seed=1), some(n=4, seed=2)
    mean, deviation = gallery.vectors.mean(0), gallery.vectors.std(0)
    own, other = standardise(gallery, queries)
    np.testing.assert_allclose(own.vectors, (gallery.vectors - mean) / deviation, 1e-5)
    np.testing.assert_allclose(
        other.vectors, (queries.vectors - mean) / deviation, rtol=1e-4, atol=1e-6
    )
    pd.testing.assert_frame_equal(other.table, queries.table)


def test_standardise_keeps_constant_dimensions_finite():
    flat = Embeddings(np.full((5, 2), 0.1), pd.DataFrame({"label": range(5)}))
    np.testing.assert_allclose(standardise(flat).vectors, 0, atol=1e-7)
    with pytest.raises(ValueError, match="3 dimensions, the gallery 2"):
        standardise(flat, some())
    with pytest.raises(ValueError, match="gallery is empty"):
        standardise(some().take([]))


def test_runs_are_saved_and_loaded_for_the_same_patches_and_folds(
    tmp_path, bench_archive
):
    rng, table = np.random.default_rng(0), bench_archive.table

    def runs(seeds):
        return [
            [Embeddings(rng.normal(size=(len(table), 4)), table) for _ in range(3)]
            for _ in range(seeds)
        ]

    place, made = tmp_path / "vectors", runs(2)
    save_runs(runs(3), place)
    save_runs(made, place)  # the third seed of before is gone
    back = load_runs(place, table)
    assert [len(parts) for parts in back] == [3, 3]
    for seed, split in np.ndindex(2, 3):
        np.testing.assert_array_equal(
            back[seed][split].vectors, made[seed][split].vectors
        )
    moved = table.assign(x=table["x"] + 1), table.assign(fold=(table["fold"] + 1) % 4)
    for other in (table.iloc[1:], *moved):
        assert load_runs(place, other) == []
    assert load_runs(tmp_path / "none", table) == []
