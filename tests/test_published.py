"""The facts typed in `published` against the golden files they come from."""

import json
from pathlib import Path

import numpy as np
import pytest

from histo_utils import published
from histo_utils.metrics import cumulative_cutoff_score, eta_scores

ROOT = Path(__file__).parents[1]


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
    found = json.loads(
        (ROOT / "results/tissue/03_measuring_retrieval.json").read_text()
    )
    found["audit"]["cutoff"] = {"mean": 0.5, "sd": 0.25}
    rows = published.claims(found)
    here = [row["here"] for row in rows if row["work"] == "LGFFEM 2025"]
    assert here == ["random vectors: 50.0% ± 25.0%", "–"]
    tags = (published.RECOMPUTED, published.ELSEWHERE, "not run: make book")
    assert all(row["tag"].startswith(tags) for row in rows)
    assert rows[0]["here"] == rows[0]["published"]  # the scores of Yang's matrix


def test_one_row_of_kieffers_table_is_not_its_own_product():
    table = published.kieffer_table()
    assert table.index[~table["multiplies"]].tolist() == ["CNN1"]
    assert table["whole number"].all()


def test_cutoff_experiment_depends_on_the_order_of_the_classes():
    cutoff, orders, found = published.cutoff_experiment(20)
    assert len(cutoff) == len(orders) == found["n"] == 20
    assert found["mean"] == pytest.approx(found["expected"], abs=0.01)
    assert found["toy_high"] - found["toy_low"] > 0.01
    assert found["top_1"] < 0.1 < found["mean"]
