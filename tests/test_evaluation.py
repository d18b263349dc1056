"""One system under all protocols, remedies and silence, against loops."""

import numpy as np
import pandas as pd
import pytest

from histo_utils import (
    bench,
    confounders,
    evaluation,
    metrics,
    protocols,
    selective,
    statistics,
)
from histo_utils.embeddings import Embeddings

HOW = {"metric": "cosine"}


def hits(outcomes):
    return metrics.accuracy(outcomes, per_query=True)


def moved(archive, seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=archive.vectors.shape).astype(np.float32)
    return Embeddings(archive.vectors + noise, archive.table)


def test_a_trained_system_is_asked_the_honest_questions_only(bench_archive):
    every = evaluation.under_all(bench_archive, **HOW)
    assert set(evaluation.TITLES) < set(every)
    # as many neighbours as MAP@R needs: 15 others of a scan, 48 of a label
    assert len(every["scan_leave_one_out"]["neighbours"][0]) == 15
    assert len(every["organ"]["neighbours"][0]) == 48
    scans = [bench_archive, moved(bench_archive, 1)]
    some = evaluation.under_own(scans, [], **HOW)
    assert set(some) == set(evaluation.SCAN_SPLIT)
    for task, runs in some.items():
        assert len(runs) == 2
        assert (hits(runs[0]) == hits(every[task])).all()


def test_networks_of_their_own_for_each_fold_may_be_asked_for_labels(bench_archive):
    folds = np.unique(bench_archive.table["fold"])
    own = [moved(bench_archive, int(f)) for f in folds]
    some = evaluation.under_own([bench_archive], [own, own], **HOW)
    assert set(some) == {*evaluation.SCAN_SPLIT, "organ"} and len(some["organ"]) == 2
    alone = {
        f: evaluation.under_all(made, **HOW)["organ"]
        for f, made in zip(folds, own, strict=True)
    }
    for row, fold in enumerate(bench_archive.table["fold"]):
        here, there = some["organ"][1].iloc[row], alone[fold].iloc[row]
        assert here["neighbours"].tolist() == there["neighbours"].tolist()


def test_scores_of_seeds_are_means(bench_archive):
    made = [moved(bench_archive, s) for s in range(3)]
    runs = [evaluation.under_all(m, **HOW)["scan_split"] for m in made]
    row = evaluation.judged("scan_split", runs)
    each = [evaluation.judged("scan_split", run) for run in runs]
    for name in ("eta_w", "eta_total"):
        assert row[name] == pytest.approx(np.mean([x[name] for x in each]))
    for name in ("majority_at_5", "map_at_r"):
        mean = np.mean([x[name]["score"] for x in each])
        assert row[name]["score"] == pytest.approx(mean)
    assert row["seeds"] == pytest.approx([x["score"] for x in each])


def test_scores_are_those_of_the_metrics(bench_archive):
    every = evaluation.under_all(bench_archive, **HOW)
    scan = evaluation.judged("scan_split", every["scan_split"])
    assert scan["eta_p"] == pytest.approx(scan["score"])
    assert scan["eta_total"] == pytest.approx(scan["eta_p"] * scan["eta_w"])
    organ = evaluation.judged("organ", every["organ"])
    assert organ["map_at_r"]["score"] == pytest.approx(metrics.map_at_r(every["organ"]))
    label = every["organ"]["label"]
    by_label = pd.Series(hits(every["organ"])).groupby(label.to_numpy()).mean()
    assert organ["macro"]["score"] == pytest.approx(by_label.mean())


def test_differences_leave_out_who_was_not_asked(bench_archive):
    other = Embeddings(bench_archive.vectors[:, :2].copy(), bench_archive.table)
    runs = {
        "a": evaluation.under_all(bench_archive, **HOW),
        "b": evaluation.under_all(other, **HOW),
        "trained": evaluation.under_own([other, bench_archive], [], **HOW),
    }
    assert set(evaluation.differences(runs, "a", "organ")) == {"b"}
    found = evaluation.differences(runs, "a", "scan_split")
    assert set(found) == {"b", "trained"}
    by_hand = bench.compared(runs["b"]["scan_split"], runs["a"]["scan_split"])
    assert found["b"]["difference"] == by_hand["difference"]
    assert found["b"]["p_holm"] == pytest.approx(min(1, 2 * by_hand["p"]))
    found = evaluation.differences(runs, "a", "organ", "map_at_r")["b"]
    means = [
        pd.Series(metrics.map_at_r(runs[n]["organ"], per_query=True))
        .groupby(bench_archive.table["patient"])
        .mean()
        for n in "ba"
    ]
    assert found["difference"] == pytest.approx((means[0] - means[1]).mean())
    assert found["n"] == bench_archive.table["patient"].nunique()


def test_what_is_apart_is_said():
    rows = {"a": {"difference": 0.1, "p_holm": 0.04}}
    rows["b"] = {"difference": -0.2, "p_holm": 0.06}
    said = evaluation.apart({"P@1": {"organ": rows}, "MAP@R": {"scan_split": {}}})
    assert said.splitlines() == [
        "* P@1, label, patient folds: `a` +0.10.",
        "* MAP@R, scan, upper → lower right: none.",
    ]


def test_remedied_equals_a_loop(bench_archive):
    table = bench_archive.table
    found = evaluation.remedied(bench_archive, "site", "site", **HOW)
    fold, site = table["fold"].to_numpy(), table["site"].to_numpy()
    for row in (0, 50, 127):
        gallery = fold != fold[row]
        vectors = bench_archive.vectors.astype(float).copy()
        for value in "AB":
            mean = bench_archive.vectors[gallery & (site == value)].mean(axis=0)
            vectors[site == value] -= mean
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        near = np.where(gallery, unit @ unit[row], -2).argmax()
        assert found["predicted"][row] == table["label"][near]
        assert found["same"][row] == (site[near] == site[row])


def test_without_a_remedy_it_is_the_protocol(bench_archive):
    found = evaluation.remedied(bench_archive, "site", **HOW)
    plain = protocols.patient_folds(bench_archive, 1, **HOW)
    assert found["predicted"].tolist() == plain["predicted"].tolist()


def test_effects_are_paired_and_corrected_over_all(bench_archive):
    ways = evaluation.centrings(bench_archive, "site", **HOW)
    found = evaluation.effects({"x": ways}, "site")["x"]
    assert list(found) == ["none", "centred", "centred_by_site"]
    assert "label_minus_none" not in found["none"]
    cell = found["centred_by_site"]["same_site_minus_none"]
    means = [
        ways[way]["same"].groupby(bench_archive.table["patient"]).mean()
        for way in ("centred_by_site", "none")
    ]
    assert cell["difference"] == pytest.approx((means[0] - means[1]).mean())
    ps = [c[k] for c in list(found.values())[1:] for k in c if "minus" in k]
    expected = statistics.holm([c["p"] for c in ps])
    assert [c["p_holm"] for c in ps] == pytest.approx(list(expected))


def test_silence_and_the_unknown_by_hand(bench_archive):
    ruled = {
        aim: selective.abstain(bench_archive, selective.agreement, aim, k=5)
        for aim in (0.3, 1.0)
    }
    row = evaluation.silence(ruled)
    out = ruled[1.0]
    assert row["coverage_at_100"]["score"] == pytest.approx(
        (out["confidence"] >= out["threshold"]).mean()
    )
    assert row["gain"]["score"] == pytest.approx(
        out["wrong"].mean() - row["area"]["score"]
    )
    asked = selective.without_each_class(bench_archive, k=5)
    # two labels: without one of them, all neighbours agree on the other
    row, each = evaluation.unknown(asked, selective.agreement, ruled)
    assert row["AUROC"]["score"] == 0.5 and each == {"a": 0.5, "b": 0.5}
    answered = (out["threshold"] <= 1).mean()
    assert row["absent_answered_at_100"]["score"] == pytest.approx(answered)


def test_a_risk_without_answers_is_not_a_number_of_the_table(bench_archive):
    out = selective.abstain(bench_archive, selective.agreement, 1.0, k=5)
    none = out.assign(answered=False)
    one = out.assign(answered=(out["patient"] == 3).to_numpy())
    row = evaluation.silence({0.1: none, 0.2: one})
    assert row["risk_at_10"] == "–"
    assert row["risk_at_20"] == pytest.approx(out["wrong"][48:64].mean())


def test_scores_by_value(bench_archive):
    out = protocols.patient_folds(bench_archive, 1, **HOW)
    found = evaluation.by_value({"x": out}, bench_archive.table, "site")
    inside = (bench_archive.table["site"] == "A").to_numpy()
    assert found["A"]["patients"] == 4
    assert found["A"]["x"]["score"] == pytest.approx(hits(out)[inside].mean())
    two = bench_archive.table.assign(pair=bench_archive.table["patient"] // 2)
    assert evaluation.by_value({"x": out}, two, "pair")["0"]["x"] == pytest.approx(
        hits(out)[:32].mean()
    ), "two patients: no interval"


def test_histogram_of_transformed_patches(monkeypatch):
    """Four pixels in two bins."""
    image = np.uint8([[[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [255, 0, 64]]])
    monkeypatch.setattr(evaluation, "read_patch", lambda row: image)
    table = pd.DataFrame({"slide": ["s"], "label": ["a"]})
    found = evaluation.histogram_of(table, lambda image, slide: image).vectors[0]
    assert found[0] ** 2 == pytest.approx(3 / 4)
    assert found[3 * 16 + 0 * 4 + 1] ** 2 == pytest.approx(1 / 4)
    assert (found > 0).sum() == 2


def test_rules_of_failure_take_what_the_protocol_gives(bench_archive):
    out = protocols.patient_folds(bench_archive, 5, **HOW)
    found = confounders.causes(out, out, bench_archive.table, "site")
    assert len(found) == (hits(out) == 0).sum()
    assert found["colour"].all(), "a system's wrong hit is in its own slide"
