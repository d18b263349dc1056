"""Logistic regression on turned vectors is the plain one; repeats are no patients."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histo_utils import bench, logistic
from histo_utils.trials import Split


def made(n=60, d=90, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = rng.standard_normal((n, d))
    x[:, 0] += 1.5 * (y == 1)
    x[:, 1] += 1.5 * (y == 2)
    return x.astype(np.float32), np.array(["a", "b", "c"])[y]


def thirds(n=60):
    part = np.arange(n) // 20
    return Split("organ", part == 0, part == 1, part < 2, part == 2)


def test_axes_keep_inner_products_with_known_rows():
    x, _ = made()
    known = np.arange(60) < 40
    turned = logistic.axes(x, known)
    scaled = StandardScaler().fit(x[known]).transform(x)
    assert turned.shape == (60, 40)
    expected = scaled @ scaled[known].T
    np.testing.assert_allclose(turned @ turned[known].T, expected, atol=2e-3)
    x[:, 5] = 7  # a number that never changes says nothing
    assert np.isfinite(logistic.axes(x, known)).all()


def test_probe_answers_as_the_plain_classifier_and_never_sees_the_test_labels():
    x, y = made()
    split = thirds()
    said, c = logistic.probe(x, y, split, [0.01])
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    expected = plain.fit(x[split.gallery], y[split.gallery]).predict(x[split.test])
    assert (said == expected).mean() > 0.94  # solvers stop a little apart
    other = np.where(split.test, "a", y)
    again = logistic.probe(x, other, split, [1e-4, 0.01, 1.0])
    first = logistic.probe(x, y, split, [1e-4, 0.01, 1.0])
    assert (again[0] == first[0]).all() and again[1] == first[1]
    assert c == 0.01


def test_probe_takes_the_smallest_of_equally_good_constants():
    x, y = made()
    x[:, 0] += 50 * (y == "b")
    x[:, 1] += 50 * (y == "c")
    assert logistic.probe(x, y, thirds(), [10.0, 1.0, 5.0])[1] == 1.0


def test_random_folds_ask_each_row_once_and_find_copies():
    x, _ = made(seed=3)
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, 30).repeat(2)  # labels of pairs, tied to nothing else
    x = rng.standard_normal((30, 90)).repeat(2, axis=0)
    right = [logistic.random_folds(x, y, 1.0, repeat).mean() for repeat in range(3)]
    assert min(right) > 0.75  # the twin is in the training folds
    away = [logistic.random_folds(x[::2], y[::2], 1.0, r).mean() for r in range(8)]
    assert np.mean(away) < 0.65
    same = logistic.random_folds(x, y, 1.0, 0)
    np.testing.assert_array_equal(same, logistic.random_folds(x, y, 1.0, 0))


def test_p_over_repeats_falls_with_the_repeats_alone():
    rng = np.random.default_rng(5)
    a = 0.90 + 0.004 * rng.standard_normal(50)
    b = 0.897 + 0.004 * rng.standard_normal(50)
    p = logistic.p_by_repeats(a, b)
    assert len(p) == 49 and p[-1] < 0.05 < p[3]
    assert p[-1] == pytest.approx(stats.ttest_1samp(a - b, 0).pvalue)
    assert np.isnan(logistic.p_by_repeats([0.5, 0.6], [0.4, 0.5])).all()


def test_in_words():
    hits = {"FTX": [[1, 1, 0, 1], [1, 1, 1, 1]], "IMGNET": [[1, 0, 0, 1]] * 2}
    found = {"repeats": 2, **logistic.over_repeats(hits)}
    found["by patients"] = bench.compared([1.0, 0, 1], [0.0, 0, 1], ["p", "q", "r"])
    said = logistic.in_words(found).splitlines()
    assert "2 times: FTX 0.875 (sd over repeats 0.1768), IMGNET 0.500" in said[0]
    assert said[1].startswith("* by patients: +0.333") and "n = 3" in said[1]
    assert "not defined" in logistic.in_words(found | {"p_by_repeats": [None]})
