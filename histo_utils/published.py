"""Facts published by the papers (``published.yaml``), for the audit of chapter 03."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy.spatial.distance import cdist

from histo_utils import metrics, protocols

_FACTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
ETAS = ("η_p", "η_w", "η_total")  # of Kimia Path24
PATH24_TEST_COUNTS = tuple(_FACTS["path24_test_counts"])
YANG_ERRORS = _FACTS["yang_errors"]
YANG_ETA = tuple(_FACTS["yang_eta"])
YANG_BY_SHARE = {  # of each class's training patches
    f"{percent}%": dict(zip(ETAS, [x / 100 for x in bars], strict=True))
    for percent, bars in _FACTS["yang_size_curve"].items()
} | {"100%": dict(zip(ETAS, YANG_ETA, strict=True))}
KIEFFER_TABLE = _FACTS["kieffer_table"]
KIEFFER_GAIN = _FACTS["kieffer_gain"]
LGFFEM_ETA = tuple(_FACTS["lgffem_eta"])
LGFFEM_COLUMNS = [f"{way} {eta}" for way in ("cut-off", "true")
                  for eta in ("η_p", "η_w", "η_total")]  # fmt: skip
LGFFEM_TABLE = _FACTS["lgffem_table"]  # by the cut-off metric, percent
KIMIANET_COLUMNS = tuple(_FACTS["kimianet_columns"])
KIMIANET_F1 = _FACTS["kimianet_f1"]
CLAIMS = _FACTS["claims"]  # work, claim, published, form of what is found, tag
RECOMPUTED = _FACTS["tags"]["recomputed"]
ELSEWHERE = _FACTS["tags"]["elsewhere"]


def claims(found: dict) -> list[dict]:
    """Table of claims, with the numbers of chapter 03's results."""
    tags, paper = _FACTS["tags"], _FACTS["tags"]["paper"]
    return [
        {"work": work, "claim": claim, "published": value,
         "here": form.format(**found), "tag": tags.get(tag, paper.format(tag))}
        for work, claim, value, form, tag in CLAIMS
    ]  # fmt: skip


def kieffer_table() -> pd.DataFrame:
    """Kieffer's table with the product η_p η_w and the number of right patches.

    ``multiplies``: η_total is the product within rounding; ``whole number``: η_p is one
    of 1,325 patches; ``η_w as printed``: by the formula without the division by n_s.
    """
    table = pd.DataFrame(KIEFFER_TABLE, index=["eta_p", "eta_w", "eta_total"]).T
    eta_p, eta_w, eta_total = (table[name] for name in table)
    table["product"] = eta_p * eta_w / 100
    rounding = 0.005 + 0.005 * (eta_p + eta_w) / 100
    table["multiplies"] = (table["product"] - eta_total).abs() <= rounding
    table["right of 1,325"] = (eta_p * 13.25).round().astype(int)
    back = table["right of 1,325"] / 13.25
    table["whole number"] = (back.round(2) - eta_p).abs() < 0.006
    table["η_w as printed"] = 1325 / 24 * eta_p
    return table


def path24_labels() -> np.ndarray:
    """Scan number of each of the 1,325 test patches, scan by scan."""
    return np.repeat(np.arange(len(PATH24_TEST_COUNTS)), PATH24_TEST_COUNTS)


def yang_predictions() -> tuple[np.ndarray, np.ndarray]:
    """Return true and predicted scan of each test patch, from the published matrix.

    Which patch of a scan was wrong is not known; within a scan the wrong ones come
    first.
    """
    truth = path24_labels()
    wrong = np.repeat([e[:2] for e in YANG_ERRORS], [e[2] for e in YANG_ERRORS], axis=0)
    predicted = truth.copy()
    for scan in np.unique(wrong[:, 0]):
        instead = wrong[wrong[:, 0] == scan, 1]
        predicted[np.flatnonzero(truth == scan)[: len(instead)]] = instead
    return truth, predicted


def lgffem_scores(embeddings) -> dict[str, float]:
    """Score a search of test patches among themselves, as published and truly.

    Raw vectors, Euclidean; the class is the scan, in the order of the table (Path24's:
    by folder number). η_p of the true scores is Recall@1, the query itself left out.
    """
    made = protocols.as_scans(embeddings)
    made = made.take(pd.factorize(made.table["label"])[0].argsort(kind="stable"))
    made = made.take(made.table["label"].duplicated(keep=False).to_numpy())
    sizes = made.table["label"].value_counts()
    hits = protocols.leave_one_out(made, int(sizes.max()) - 1, metric="euclidean")
    cut = metrics.cumulative_cutoff_score(made.vectors, made.table["label"])
    true = metrics.eta_scores(hits["label"], hits["predicted"], len(sizes))
    row = dict(zip(LGFFEM_COLUMNS, cut + true, strict=True))
    return row | {"MAP@R": metrics.map_at_r(hits)}


def lgffem_table(rows: dict) -> pd.DataFrame:
    """Table of `lgffem_scores` by name, below the published ones."""
    known = pd.DataFrame(LGFFEM_TABLE, LGFFEM_COLUMNS[:3]).T / 100
    return pd.concat([known.rename("published: {}".format), pd.DataFrame(rows).T])


def expected_cutoff_score(sizes) -> tuple[float, float]:
    """η_p and η_w that `metrics.cumulative_cutoff_score` gives random vectors.

    Of a class with n items, ending at position h of N, the query is always inside its
    own cut; each other item is with probability (h - 1)/(N - 1).
    """
    sizes = np.asarray(sizes)
    ends, total = np.cumsum(sizes), sizes.sum()
    found = 1 + (sizes - 1) * (ends - 1) / (total - 1)
    return float(found.sum() / total), float((found / sizes).mean())


def cutoff_experiment(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict]:
    """Score vectors of Path24's class sizes by `metrics.cumulative_cutoff_score`.

    Returns the (n,) η_p of random vectors, the (n,) η_p of one toy embedding with its
    classes in n random orders, and a summary with the true top-1 of both (random: mean
    of 20) and the expectation.
    """
    classes, rng = path24_labels(), np.random.default_rng(seed)
    noise = [rng.standard_normal((len(classes), 16)) for _ in range(n)]
    toy = noise[0] + 0.6 * rng.standard_normal((24, 16))[classes]
    score, orders, top_1 = metrics.cumulative_cutoff_score, np.empty(n), []
    for i in range(n):
        order = np.argsort(rng.permutation(24))[classes]  # rank of each item's class
        rows = np.argsort(order, kind="stable")
        orders[i] = score(toy[rows], classes[rows])[0]
    for vectors in (toy, *noise[:20]):
        distances = cdist(*[vectors.astype("float32")] * 2).round(12)
        np.fill_diagonal(distances, np.inf)
        top_1.append(float((classes[distances.argmin(axis=1)] == classes).mean()))
    cutoff = np.array([score(vectors, classes)[0] for vectors in noise])
    return cutoff, orders, {
        "n": n, "mean": cutoff.mean(), "sd": cutoff.std(ddof=1),
        "expected": expected_cutoff_score(PATH24_TEST_COUNTS)[0],
        "top_1": np.mean(top_1[1:]), "toy_top_1": top_1[0],
        "toy_low": orders.min(), "toy_high": orders.max(),
    }  # fmt: skip
