"""The facts typed in `published` against the golden files they come from."""

import json

import numpy as np
import pytest

from histo_utils import published
from histo_utils.metrics import cumulative_cutoff_score, eta_scores


@pytest.fixture
def matrix(golden):
    return np.load(golden / "dml_published_confusion.npz")


def test_test_counts(matrix, golden):
    etas = json.loads((golden / "eta_metrics.json").read_text())
    counts = list(published.PATH24_TEST_COUNTS)
    assert counts == matrix["test_counts"].tolist() == etas["kimia_path24_test_counts"]
    assert sum(counts) == etas["total"]


def test_yang_matrix_and_eta(matrix, golden):
    truth, predicted = published.yang_predictions()
    found = np.zeros((24, 24), int)
    np.add.at(found, (truth, predicted), 1)
    np.testing.assert_array_equal(found, matrix["confusion"])
    assert (truth == published.path24_labels()).all()
    etas = json.loads((golden / "eta_metrics.json").read_text())
    assert tuple(etas["published"].values()) == published.YANG_ETA
    found = eta_scores(truth, predicted, 24)
    np.testing.assert_allclose(found, published.YANG_ETA, atol=1e-12)


def test_kieffer_table(golden):
    table = json.loads((golden / "kieffer_table1.json").read_text())
    found = {name: list(row) for name, row in published.KIEFFER_TABLE.items()}
    assert found == table["kieffer2017_table1_percent"]


def test_expected_cutoff_score_is_the_mean_over_random_vectors(golden):
    sizes = np.array([4, 2, 7, 3])
    labels = np.repeat(range(4), sizes)
    rng = np.random.default_rng(0)
    draws = [
        cumulative_cutoff_score(rng.standard_normal((16, 3)), labels)[:2]
        for _ in range(1000)
    ]
    error = np.std(draws, axis=0) / np.sqrt(len(draws))
    expected = published.expected_cutoff_score(sizes)
    assert (abs(np.mean(draws, axis=0) - expected) < 4 * error).all()
    etas = json.loads((golden / "eta_metrics.json").read_text())
    runs = etas["ffnir_metric_random_embeddings_true_counts"]
    known = runs["published_code_mean_over_20_seeds"][:2]
    found = published.expected_cutoff_score(published.PATH24_TEST_COUNTS)
    assert list(found) == pytest.approx(known, abs=0.008)  # three standard errors


def test_claims_carry_what_was_found():
    numbers = {key: [0.5] * form.count("{") for key, *_, form, _ in published.CLAIMS}
    rows = published.claims({key: n for key, n in numbers.items() if n})
    found = [row["here"] for row in rows if row["work"] == "LGFFEM 2025"]
    assert found == ["random vectors: 0.5 ± 0.5", "–"]
    tags = (published.RECOMPUTED, published.ELSEWHERE, "not run: make book")
    assert all(row["tag"].startswith(tags) for row in rows)
