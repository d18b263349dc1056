"""Scores and comparisons: against loops, SciPy and hand calculations."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from histo_utils import metrics
from histo_utils.statistics import (
    bootstrap_ci,
    compare,
    compare_table,
    detectable_difference,
    eta_table,
    holm,
    nested,
    report,
    score,
    score_table,
)


@pytest.fixture
def outcomes():
    """Two systems, one of them with three seeds, on 40 queries of 8 patients."""
    rng, parts = np.random.default_rng(0), []
    label = rng.integers(0, 3, 40)
    runs = [("a", 0, 0.8), ("a", 1, 0.7), ("a", 2, 0.9), ("b", 0, 0.4)]
    for system, seed, right in runs:
        hit = rng.random(40) < right
        parts.append(pd.DataFrame({
            "system": system, "protocol": "scan", "seed": seed, "query": range(40),
            "patient": np.arange(40) // 5, "label": label,
            "predicted": np.where(hit, label, 9),
        }))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def test_score_is_the_mean_over_seeds_with_both_drawn(outcomes):
    row = score_table(outcomes).loc[("a", "scan")]
    a = outcomes[outcomes["system"] == "a"]
    hits = (a["label"] == a["predicted"]).to_numpy(float).reshape(3, 40)
    assert row["seeds"] == pytest.approx(hits.mean(axis=1))
    assert row["score"] == pytest.approx(hits.mean())
    assert (row["n"], row["queries"]) == (8, 40)
    rng, draws = np.random.default_rng(0), []
    drawn, which = rng.integers(8, size=(2000, 8)), rng.integers(3, size=(2000, 3))
    for patients, seeds in zip(drawn, which, strict=True):
        rows = np.concatenate([np.arange(5 * p, 5 * p + 5) for p in patients])
        draws.append(hits[np.ix_(seeds, rows)].mean())
    assert [row["low"], row["high"]] == pytest.approx(
        np.quantile(draws, [0.025, 0.975])
    )


def test_macro_is_the_mean_over_labels(outcomes):
    b = outcomes[outcomes["system"] == "b"]
    row = score_table(b, by="system", macro=True).loc["b"]
    hit = (b["label"] == b["predicted"]).groupby(b["label"]).mean()
    assert row["score"] == pytest.approx(hit.mean())
    values = np.stack([b["label"] == b["predicted"], b["label"]], 1).astype(float)

    def loops(rows):
        return pd.Series(rows[:, 0]).groupby(rows[:, 1]).mean().mean()

    expected = bootstrap_ci(values, b["patient"], statistic=loops)
    assert [row["low"], row["high"]] == pytest.approx(list(expected))


def test_value_is_a_metric_or_a_column(outcomes):
    one = score_table(outcomes, metrics.accuracy)
    hit = (outcomes["label"] == outcomes["predicted"]).astype(float)
    pd.testing.assert_frame_equal(one, score_table(outcomes.assign(hit=hit), "hit"))
    single = outcomes.drop(columns="seed").query("system == 'b'")
    assert score_table(single).iloc[0].to_dict() == one.loc[("b", "scan")].to_dict()
    with pytest.raises(ValueError, match="no column 'organ'"):
        score_table(outcomes, by="organ")


def test_one_patient_or_none_known_has_a_score_and_no_interval(outcomes):
    for patients, n in (["a", "a"], 1), ([None, None], 0):
        row = score([1, 0], patients)
        assert row["score"] == 0.5 and row["n"] == n
        assert np.isnan([row["low"], row["high"]]).all()
    with pytest.raises(ValueError, match="value 1 has no group"):
        score([1, 0], ["a", None])
    row = compare_table(outcomes.assign(patient=None), reference="b").iloc[0]
    hit = (
        (outcomes["label"] == outcomes["predicted"]).groupby(outcomes["system"]).mean()
    )
    assert row["difference"] == pytest.approx(hit["a"] - hit["b"])
    assert np.isnan(row["p_holm"]) and row["n"] == 0
    cell = report({"x": {"gap": row.to_dict()}}).loc["x", "gap"]
    assert cell == f"{row['difference']:+.3f}"


def test_compare_table_pairs_patients_and_corrects_families(outcomes):
    other = outcomes.query("system == 'b'").assign(system="c", predicted=9)
    both = pd.concat([outcomes, other])
    both = pd.concat([both, both.assign(protocol="organ")])
    table = compare_table(both, reference="b")
    assert list(table.index) == [(s, p) for p in ("scan", "organ") for s in "ac"]
    hits = {
        name: part.assign(hit=part["label"] == part["predicted"])
        .groupby("patient")["hit"].mean()
        for name, part in outcomes.groupby("system")
    }  # fmt: skip
    expected = compare(hits["a"].to_numpy(), hits["b"].to_numpy())
    row = table.loc[("a", "scan")]
    assert row.drop("p_holm").to_dict() == pytest.approx(expected)
    np.testing.assert_allclose(table["p_holm"], holm(table["p"]))
    own = compare_table(both, reference="b", family="protocol")
    np.testing.assert_allclose(own["p_holm"][:2], holm(own["p"][:2]))
    with pytest.raises(
        ValueError, match="reference 'd' has no outcomes; there are a, b"
    ):
        compare_table(outcomes, reference="d")


def test_seeds_must_have_the_same_queries(outcomes):
    with pytest.raises(ValueError, match="seeds have different queries"):
        score_table(outcomes.drop(index=45))


def test_tables_as_dicts_and_text(outcomes):
    table = score_table(outcomes)
    found = nested(table)
    assert found["a"]["scan"]["score"] == table["score"].iloc[0]
    text = report(found)
    pd.testing.assert_frame_equal(text, report(table))
    row = {"score": 0.5, "low": 0.25, "high": 0.75}
    cells = report({"x": {"p_at_1": row, "n": 3, "seeds": [0.5, 1.0]}, "y": {}})
    assert cells.loc["x"].tolist() == ["0.500\u00a0[0.25,\u00a00.75]", 3, "0.500 1.000"]
    assert cells.columns[0] == "p at 1" and cells.loc["y", "n"] == "not run"
    gap = {"difference": 0.1, "low": 0, "high": 0.2, "p": 0.2, "detectable": 0.07}
    assert "p = 0.200; ±0.07" in report({"x": {"gap": gap}}).loc["x", "gap"]


def test_bootstrap_equals_loops():
    rng = np.random.default_rng(0)
    values, groups = rng.random(50), rng.integers(0, 7, 50)
    interval = bootstrap_ci(values, groups, n_boot=300, seed=5)
    draws = np.random.default_rng(5).integers(0, 7, (300, 7))
    names = pd.unique(groups)
    means = [
        np.concatenate([values[groups == names[g]] for g in draw]).mean()
        for draw in draws
    ]
    assert interval == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    pairs = np.stack([values, values], 1)
    general = bootstrap_ci(
        pairs, groups, n_boot=300, seed=5, statistic=lambda rows: rows[:, 1].mean()
    )
    assert interval == pytest.approx(general)


def test_bootstrap_over_patients_is_wider_than_over_patches():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 30)
    values = rng.normal(size=10)[groups] + 0.1 * rng.normal(size=300)
    by_patient, by_patch = bootstrap_ci(values, groups), bootstrap_ci(values)
    assert np.ptp(by_patient) > 3 * np.ptp(by_patch)


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([0.0, np.nan], None, "value 1 is NaN"),
        ([0.0, 1.0], ["a"], "2 values but 1 groups"),
        ([0.0, 1.0], ["a", "a"], "1 group; an interval over groups"),
        ([0.0, 1.0], ["a", None], "value 1 has no group"),
        ([], None, "0 group"),
    ],
)
def test_bootstrap_bad_input(values, groups, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_ci(values, groups)
    with pytest.raises(ValueError, match="level=95"):
        bootstrap_ci([0, 1], level=95)


def test_sign_flip_is_exact_for_few_patients():
    rng = np.random.default_rng(2)
    groups = np.repeat(list("abcdefg"), [1, 5, 2, 2, 3, 1, 4])
    a, b = rng.random(18) + 0.2, rng.random(18)
    found = compare(a, b, groups)
    each = [(a - b)[groups == g].mean() for g in "abcdefg"]
    far = [
        abs(np.dot(signs, each)) >= abs(sum(each)) - 1e-12
        for signs in product([-1, 1], repeat=7)
    ]
    assert found["p"] == pytest.approx(np.mean(far))
    assert found["difference"] == pytest.approx(np.mean(each))
    assert found["n"] == 7
    assert found["low"] < found["difference"] < found["high"]


def test_sign_flip_by_monte_carlo():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30) + 1.5, rng.normal(size=30)
    assert 1 / 1000 <= compare(a, b, n_flips=999)["p"] <= 0.01
    null = [compare(*rng.normal(size=(2, 20)), n_flips=199)["p"] for _ in range(400)]
    assert abs(np.mean(np.array(null) <= 0.1) - 0.1) < 0.04
    assert compare(a, a)["p"] == 1
    assert compare(a, b) == compare(a, b)
    assert compare(b, a)["difference"] == -compare(a, b)["difference"]
    with pytest.raises(ValueError, match="on the same queries"):
        compare(a, b[:5])


def test_holm_by_hand():
    p = [0.01, 0.04, 0.03, 0.005]
    np.testing.assert_allclose(holm(p), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).tolist() == []
    np.testing.assert_allclose(holm([0.04, np.nan, 0.03]), [0.06, np.nan, 0.06])
    with pytest.raises(ValueError, match="numbers 0–1"):
        holm([0.1, 1.5])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_equals_loops(p):
    order = sorted(range(len(p)), key=lambda i: p[i])
    expected, worst = {}, 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        expected[i] = worst
    np.testing.assert_allclose(holm(p), [expected[i] for i in range(len(p))])


def test_detectable_difference():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(43), 16)
    differences = rng.normal(size=43)[groups] + rng.normal(size=len(groups))
    each = pd.Series(differences).groupby(groups).mean()
    expected = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * each.std() / np.sqrt(43)
    assert detectable_difference(differences, groups) == pytest.approx(expected)
    # A shift of this size is found in about 80 of 100 repetitions.
    size = detectable_difference(rng.normal(size=4000)) * np.sqrt(4000 / 60)
    found = [
        stats.ttest_1samp(rng.normal(size, 1, 60), 0).pvalue < 0.05 for _ in range(800)
    ]
    assert abs(np.mean(found) - 0.8) < 0.05


def test_eta_over_scans_by_hand():
    """Two seeds; intervals draw whole scans, η_total is their product in each draw."""
    outcomes = pd.DataFrame({
        "system": "net", "seed": [0] * 5 + [1] * 5, "query": [*range(5)] * 2,
        "label": list("aaabb") * 2, "predicted": list("aaaba" + "aabbb"),
    })  # fmt: skip
    found = eta_table(outcomes, seed=3).loc["net"]
    assert found["η_p"]["seeds"] == pytest.approx([4 / 5, 4 / 5])
    assert found["η_w"]["seeds"] == pytest.approx([3 / 4, 5 / 6])
    assert found["η_total"]["score"] == pytest.approx((3 / 5 + 2 / 3) / 2)
    drawn = np.random.default_rng(3).integers(2, size=(2000, 2))
    right, n = np.array([5, 3]), np.array([6, 4])
    p, w = right[drawn].sum(1) / n[drawn].sum(1), (right / n)[drawn].mean(1)
    ends = np.quantile(p * w, [0.025, 0.975])
    assert [found["η_total"][end] for end in ("low", "high")] == pytest.approx(ends)
    assert found["η_w"]["n"] == 2 and report({"net": found}).shape == (1, 3)
