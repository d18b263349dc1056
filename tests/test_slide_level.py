"""Measurements are predicted out of fold, patient by patient; leaks are found."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

from histo_utils.embeddings import Embeddings
from histo_utils.slide_level import (
    auroc,
    planted_outcomes,
    predict_status,
    predict_value,
    slide_means,
    spearman,
)

N, D = 40, 30
FOLDS = np.arange(N) % 5
PATIENTS = np.array([f"P{i:02d}" for i in range(N)])
FEW = {"alphas": [1.0, 0.2, 0.05], "l1_ratios": [0.5]}  # fast


def made(rng, n=N, d=D):
    """Vectors with a few strong directions, as features of slides have."""
    strong = rng.standard_normal((n, 8)) @ rng.standard_normal((8, d))
    return strong + 0.3 * rng.standard_normal((n, d))


def with_chosen_features(x, y, patients, folds, **_):
    """Predict with a leak: the features are chosen by all rows, test rows included."""
    centred = (x - x.mean(0)) / x.std(0)
    best = np.argsort(-abs(centred.T @ (y - y.mean())))[:5]
    parts = []
    for fold in np.unique(folds):
        fit, held = folds != fold, np.flatnonzero(folds == fold)
        line = Ridge(1.0).fit(x[fit][:, best], y[fit])
        score = line.predict(x[held][:, best]) - y[fit].mean()
        rows = {"row": held, "patient": patients[held], "fold": fold}
        parts.append(pd.DataFrame({**rows, "observed": y[held], "score": score}))
    return pd.concat(parts).sort_values("row", ignore_index=True)


def sees_its_test_rows(predict, x, y):
    """Whether a fold's scores change when that fold's own outcomes do."""
    before = predict(x, y, PATIENTS, folds=FOLDS, **FEW)
    for fold in range(5):
        own = fold == FOLDS
        other = np.where(own, y[::-1] * 3 - 2, y)
        after = predict(x, other, PATIENTS, folds=FOLDS, **FEW)
        if not np.array_equal(before["score"][own], after["score"][own]):
            return True
    return False


def test_no_model_sees_the_outcomes_that_it_predicts():
    rng = np.random.default_rng(0)
    x = made(rng)
    y = x[:, :20] @ rng.standard_normal(20) / 8 + rng.standard_normal(N)
    assert not sees_its_test_rows(predict_value, x, y)
    assert sees_its_test_rows(with_chosen_features, x, y)


@pytest.mark.slow
def test_no_model_sees_the_statuses_that_it_predicts():
    rng = np.random.default_rng(1)
    x = made(rng)
    y = (x[:, 0] + rng.standard_normal(N) > 0).astype(int)
    before = predict_status(x, y, PATIENTS, folds=FOLDS)
    for fold in range(5):
        own = fold == FOLDS
        after = predict_status(x, np.where(own, 1 - y, y), PATIENTS, folds=FOLDS)
        assert before["score"][own].nunique() > 1
        np.testing.assert_array_equal(before["score"][own], after["score"][own])
        assert not np.allclose(before["score"][~own], after["score"][~own])  # did learn


@pytest.mark.slow
@pytest.mark.parametrize("predict", [predict_value, predict_status])
def test_scale_comes_from_the_training_part(predict):
    """One test row made enormous changes no other row of its fold."""
    x = made(np.random.default_rng(2))
    y = (x[:, 0] > 0).astype(float)
    far = x.copy()
    far[0] *= 1e4
    how = FEW if predict is predict_value else {}
    a, b = (predict(v, y, PATIENTS, folds=FOLDS, **how) for v in (x, far))
    same = (FOLDS == 0) & (np.arange(N) > 0)
    assert a["score"][same].nunique() > 1
    np.testing.assert_array_equal(a["score"][same], b["score"][same])
    assert not np.allclose(a["score"][~same], b["score"][~same])


@pytest.mark.slow
def test_noise_stays_at_chance_and_the_leak_does_not():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((N, 150))
    ours, leaking, rejected = [], [], []
    for seed in range(20):
        y = rng.standard_normal(N)
        found = spearman(predict_value(x, y, PATIENTS, seed=seed, **FEW), n_boot=1)
        ours.append(found["score"])
        rejected.append(found["p"] < 0.05)
        leak = with_chosen_features(x, y, PATIENTS, FOLDS)
        leaking.append(spearman(leak, n_boot=1)["score"])
    assert abs(np.mean(ours)) < 0.1
    assert np.mean(rejected) < 0.15
    assert np.mean(leaking) > 0.5


def test_pooled_training_means_run_against_the_truth():
    """Why ``score`` leaves the training mean out: it is low where y is high."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((N, 5))
    found = [
        predict_value(x, rng.standard_normal(N), PATIENTS, alphas=[1.0], seed=s)
        for s in range(8)
    ]
    for run in found:
        assert (run["score"] == 0).all()  # nothing was predicted
        assert spearman(run, n_boot=1)["score"] == 0
        assert run["predicted"].corr(run["observed"]) < 0
        mean = run["observed"][run["fold"] != 0].mean()
        np.testing.assert_allclose(run["predicted"][run["fold"] == 0], mean)


def test_planted_signal_is_found():
    rng = np.random.default_rng(5)
    x = made(rng)
    signal = x @ rng.standard_normal(D)
    found = spearman(predict_value(x, signal, PATIENTS, **FEW))
    assert found["score"] > 0.8
    assert found["low"] < found["score"] < found["high"]
    assert found["p"] < 1e-6 and found["n"] == N
    status = auroc(predict_status(x, signal > 0, PATIENTS))
    assert status["score"] > 0.8 and status["low"] > 0.6
    assert (status["n"], status["positive"]) == (N, int((signal > 0).sum()))


def test_slides_of_a_patient_are_kept_together():
    """Noise, but every patient has two equal slides: only a torn patient helps."""
    rng = np.random.default_rng(6)
    drawn = rng.standard_normal((N, D)), rng.standard_normal(N)
    x, y = (np.repeat(values, 2, axis=0) for values in drawn)
    patients, torn = np.repeat(PATIENTS, 2), np.arange(2 * N)
    how = {"alphas": [1.0, 0.05], "l1_ratios": [0.5]}
    whole, leaky = (predict_value(x, y, p, **how) for p in (patients, torn))
    assert whole.groupby("patient")["fold"].nunique().max() == 1
    assert spearman(whole)["n"] == N and abs(spearman(whole)["score"]) < 0.4
    assert spearman(leaky)["score"] > 0.5
    # inside, too: with torn inner folds the weak penalty seems to work
    assert (whole["alpha"] == 1.0).mean() > 0.5
    assert (leaky["alpha"] == 0.05).mean() > 0.5


def test_elastic_net_by_hand():
    """One feature: the weight is soft-thresholded by a share of what kills it."""
    x = np.array([[-1.0], [1.0], [-1.0], [1.0], [-1.0], [1.0], [5.0], [-3.0]])
    y = np.array([-2.0, 2.0, -2.0, 2.0, -2.0, 2.0, 0.0, 0.0]) + 10
    folds = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    found = predict_value(
        x, y, np.arange(8), alphas=[0.5], l1_ratios=[1.0], folds=folds, n_splits=2
    )
    # trained on the first six: x and y - 10 are ±1 and ±2, so the weight is 2 - 0.5 · 2
    held = found[found["fold"] == 1]
    np.testing.assert_allclose(held["score"], [5.0, -3.0], atol=1e-6)
    np.testing.assert_allclose(held["predicted"], [15.0, 7.0], atol=1e-6)


def test_same_seed_same_predictions_and_order_of_rows():
    rng = np.random.default_rng(7)
    x, y = made(rng), rng.standard_normal(N)
    a, b = (predict_value(x, y, PATIENTS, seed=3, **FEW) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)
    assert a["row"].tolist() == list(range(N))
    np.testing.assert_array_equal(a["observed"], y)
    assert not predict_value(x, y, PATIENTS, seed=4, **FEW)["fold"].equals(a["fold"])


@pytest.mark.slow
@pytest.mark.parametrize("predict", [predict_value, predict_status])
def test_a_fold_is_predicted_by_its_own_vectors_alone(predict):
    rng = np.random.default_rng(8)
    x = made(rng)
    y = (x[:, 0] > 0).astype(float)
    how = {"folds": FOLDS, **(FEW if predict is predict_value else {})}
    one = predict(x, y, PATIENTS, **how)
    each = predict(np.stack([x] * 5), y, PATIENTS, **how)
    pd.testing.assert_frame_equal(one, each)
    noise = rng.standard_normal(x.shape)
    mixed = predict(np.stack([x] + [noise] * 4), y, PATIENTS, **how)
    own = FOLDS == 0
    np.testing.assert_allclose(mixed["score"][own], one["score"][own])
    assert not np.allclose(mixed["score"][~own], one["score"][~own])
    with pytest.raises(ValueError, match="one per fold"):
        predict(np.stack([x] * 4), y, PATIENTS, **how)


def test_spearman_by_hand_over_patients():
    outcomes = pd.DataFrame({
        "patient": ["a", "a", "b", "c", "d"],
        "observed": [0.0, 2.0, 2.0, 3.0, 4.0],  # patients: 1, 2, 3, 4
        "score": [5.0, 1.0, 0.5, 4.0, 9.0],  # patients: 3, 0.5, 4, 9
    })  # fmt: skip
    # ranks 1 2 3 4 against 2 1 3 4: 1 - 6 · 2 / (4 · 15)
    found = spearman(outcomes)
    assert found["score"] == pytest.approx(0.8) and found["n"] == 4
    # t = 0.8 · sqrt(2 / 0.36); with two degrees 1 - cdf = (1 - t / sqrt(2 + t²)) / 2
    assert found["p"] == pytest.approx((1 - 0.8) / 2)
    against = outcomes.assign(score=-outcomes["score"])
    assert spearman(against)["p"] == pytest.approx(0.9)


def test_auroc_by_hand_over_patients():
    outcomes = pd.DataFrame({
        "patient": ["a", "a", "b", "c", "d", "e"], "observed": [1, 1, 1, 0, 0, 0],
        "score": [4.0, 0.0, 1.0, 1.0, 0.0, 3.0],  # a: 2
    })  # fmt: skip
    # a beats c and d; b ties with c and beats d: 3.5 of 6
    found = auroc(outcomes)
    assert found["score"] == pytest.approx(3.5 / 6)
    assert (found["n"], found["positive"]) == (5, 2)
    perfect = outcomes.assign(score=outcomes["observed"])
    assert [auroc(perfect)[k] for k in ("score", "low", "high")] == [1, 1, 1]
    flat = outcomes.assign(score=0.0)
    assert [auroc(flat)[k] for k in ("score", "low", "high")] == [0.5] * 3


def test_the_interval_of_the_auroc_by_loops():
    rng = np.random.default_rng(8)
    observed = np.repeat([0, 1], [12, 9])
    scores, draws = observed + rng.standard_normal(21), []
    for _ in range(2000):
        ill, well = rng.choice(scores[12:], 9), rng.choice(scores[:12], 12)
        draws.append(np.mean(ill[:, None] > well) + np.mean(ill[:, None] == well) / 2)
    rows = {"patient": np.arange(21), "observed": observed, "score": scores}
    found, ends = auroc(pd.DataFrame(rows)), np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose([found["low"], found["high"]], ends, atol=0.03)


def test_slide_means_by_hand():
    table = pd.DataFrame({
        "slide": ["t", "s", "t", "s", "s"], "patient": ["q", "p", "q", "p", "p"],
        "x": [0, 1, 2, 3, 4], "site": ["B", "A", "B", "A", "A"],
    })  # fmt: skip
    vectors = np.float32([[1, 0], [3, 3], [3, 4], [0, 3], [0, 0]])
    means, slides = slide_means(Embeddings(vectors, table))
    np.testing.assert_allclose(means, [[2, 2], [1, 2]])
    assert slides.to_dict("list") == {
        "slide": ["t", "s"], "patient": ["q", "p"], "site": ["B", "A"],
        "patches": [2, 3],
    }  # fmt: skip
    table.loc[4, "patient"] = "r"
    with pytest.raises(ValueError, match="slide 's' has 2 patients"):
        slide_means(Embeddings(vectors, table))


def test_planted_outcomes_know_their_truth(phantoms):
    folder, slides = phantoms
    again = pd.concat([slides] * 8, ignore_index=True)
    again["patient"] = again["slide"] + (np.arange(64) // 8).astype(str)
    again = pd.concat([again, again[:5]], ignore_index=True)  # second slides
    found = planted_outcomes(again, folder, seed=1, n_tied=3, n_noise=6)
    shown = [c for c in found if c.startswith(("gene", "mutation", "nuclei"))]
    assert found.groupby("patient")[shown].nunique().max().max() == 1
    first = found.drop_duplicates("patient")
    assert first["nuclei_share"].between(0.01, 0.6).all()
    tied = [first["nuclei_share"].corr(first[f"gene_tied_{i:02d}"]) for i in range(3)]
    np.testing.assert_allclose(tied, [0.9, -0.9, 0.9], atol=0.08)
    noise = [first["nuclei_share"].corr(first[f"gene_noise_{i:02d}"]) for i in range(6)]
    assert np.abs(noise).max() < 0.4  # 3 / sqrt(64)
    label = again.drop_duplicates("patient")["label"]
    half = label.isin(["fibrous", "lymphoid"]).to_numpy()
    assert (first["mutation_tied"] != half).sum() == 6
    assert first["mutation_noise"].sum() == 32
    assert found.equals(planted_outcomes(again, folder, seed=1, n_tied=3, n_noise=6))


def test_bad_input_says_what_to_do():
    x, y, six = np.eye(6), np.arange(6.0), list("abcdef")
    cases = {
        "n_folds=5 for 3 groups": (x, y, list("aabbcc"), {}),
        "all 6 values are 1.0": (x, np.ones(6), six, {}),
        "row 2 of the values": (x, [0, 1, np.nan, 1, 0, 1], six, {}),
        "row 0 of the vectors": (x * np.nan, y, six, {}),
        "row 1 of the patients": (x, y, ["a", None, *"cdef"], {}),
        r"\(5,\)": (x, y[:5], six, {}),
        "alphas are": (x, y, six, {"alphas": [0.0]}),
        "patient a in 2": (x, y, list("aabbcc"), {"folds": [0, 1] * 3}),
        "1 folds": (x, y, six, {"folds": [0] * 6}),
    }
    for message, (vectors, values, patients, how) in cases.items():
        with pytest.raises(ValueError, match=message):
            predict_value(vectors, values, patients, **how)
    cases = {
        "status 1; two": ([1, 0, 0, 0, 0, 0], six),
        "status 0; two": (np.ones(6), six),
        "one status per patient": ([0, 1] * 3, list("aabbcc")),
        r"holds \[0.0, 1.0, 2.0\]": ([0, 1, 2] * 2, six),
    }
    for message, (values, patients) in cases.items():
        with pytest.raises(ValueError, match=message):
            predict_status(x, values, patients, n_splits=3)
    one = pd.DataFrame({"patient": [1, 2], "observed": [1, 1], "score": [0.0, 1]})
    with pytest.raises(ValueError, match="needs both"):
        auroc(one)
    with pytest.raises(ValueError, match="3 or more"):
        spearman(one)
    with pytest.raises(ValueError, match="label, nuclei_mask"):
        planted_outcomes(pd.DataFrame({"slide": ["s"], "patient": ["p"]}), ".")
