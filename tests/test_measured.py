"""Measurements by descriptions side by side; a fold is predicted by its own vectors."""

import numpy as np
import pandas as pd
import pytest

from histo_utils import measured
from histo_utils.measurements import predict_status, predict_value, spearman

N = 20  # slides, each of its own patient


def patches(seed=0):
    rng = np.random.default_rng(seed)
    slide = np.repeat(np.arange(N), 3)
    table = pd.DataFrame({
        "image": "none", "x": 0, "y": 0, "size": 8, "mpp": 0.5, "slide_mpp": 0.5,
        "slide": slide.astype(str), "patient": slide.astype(str), "fold": slide % 4,
    })  # fmt: skip
    known = rng.standard_normal(N)
    vectors = known[slide, None] * np.array([1.0, -1, 0, 0])
    return table, vectors + 0.1 * rng.standard_normal((3 * N, 4)), known


def test_equal_vectors_in_every_fold_are_one_description():
    table, vectors, known = patches()
    one = measured.out_of_fold(predict_value, table, vectors, known)
    each = measured.out_of_fold(predict_value, table, [vectors] * 4, known)
    np.testing.assert_allclose(each["score"], one["score"])
    assert each["row"].tolist() == list(range(N))
    status = (known > 0).astype(int)
    one = measured.out_of_fold(predict_status, table, vectors, status)
    each = measured.out_of_fold(predict_status, table, [vectors] * 4, status)
    np.testing.assert_allclose(each["score"], one["score"])


def test_a_fold_is_predicted_by_its_own_vectors_alone():
    table, vectors, known = patches()
    noise = np.random.default_rng(1).standard_normal(vectors.shape)
    found = measured.out_of_fold(predict_value, table, [vectors] + [noise] * 3, known)
    first = np.arange(N) % 4 == 0
    truth = measured.out_of_fold(predict_value, table, vectors, known)
    np.testing.assert_allclose(found["score"][first], truth["score"][first])
    assert not np.allclose(found["score"][~first], truth["score"][~first])
    with pytest.raises(ValueError, match="shorter"):
        measured.out_of_fold(predict_value, table, [vectors] * 3, known)


def test_numbers_by_hand():
    table, vectors, known = patches()
    noise = np.random.default_rng(2).standard_normal(vectors.shape)
    described = {"good": [vectors], "none": [noise, vectors]}
    found = measured.numbers(table, described, known, "good", n_boot=50)
    run = measured.out_of_fold(predict_value, table, vectors, known, seed=0)
    error = abs(run["predicted"] - known)
    assert found["good"]["error"] == pytest.approx(error.mean())
    other = measured.out_of_fold(predict_value, table, noise, known, seed=0)
    missed = (abs(other["predicted"] - known) + error) / 2  # mean of the two seeds
    line = found["none"]["error − good"]
    assert line["difference"] == pytest.approx((missed - error).mean())
    assert line["n"] == N and found["good"]["error − good"] == "–"
    both = [spearman(r, 50)["score"] for r in (other, run)]
    assert found["none"]["rank correlation"]["score"] == pytest.approx(np.mean(both))


def test_genes_that_follow_the_vectors_are_found():
    table, vectors, known = patches()
    rng = np.random.default_rng(3)
    values = pd.DataFrame({f"gene_tied_{i}": known * (-1) ** i for i in range(3)})
    for i in range(6):
        values[f"gene_noise_{i}"] = rng.standard_normal(N)
    values["mutation_tied"] = known > 0  # no gene
    noise = rng.standard_normal(vectors.shape)
    found = measured.genes_found(
        table, {"good": vectors, "none": noise}, values, n_boot=5
    )
    assert found["good"]["tied genes found"] == "3 of 3"
    assert found["none"]["tied genes found"] == "0 of 3"
    assert found["good"]["noise genes found"] == "0 of 6"
    found = measured.mutations_found(
        table, {"good": vectors, "none": [noise] * 4}, values, n_boot=5
    )
    assert found["good"]["mutation_tied"]["score"] > 0.95
    assert 0.1 < found["none"]["mutation_tied"]["score"] < 0.9
    assert found["good"]["mutation_tied"]["n"] == N
