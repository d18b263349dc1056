"""Facts published by the papers (``published.yaml``), for the audit of chapter 03."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

_FACTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
PATH24_TEST_COUNTS = tuple(_FACTS["path24_test_counts"])
YANG_ERRORS = _FACTS["yang_errors"]
YANG_ETA = tuple(_FACTS["yang_eta"])
KIEFFER_TABLE = _FACTS["kieffer_table"]
KIEFFER_GAIN = _FACTS["kieffer_gain"]
LGFFEM_ETA = tuple(_FACTS["lgffem_eta"])
KIMIANET_COLUMNS = tuple(_FACTS["kimianet_columns"])
KIMIANET_F1 = _FACTS["kimianet_f1"]
CLAIMS = _FACTS["claims"]  # key, work, claim, published, form of what is found, tag
RECOMPUTED = _FACTS["tags"]["recomputed"]
ELSEWHERE = _FACTS["tags"]["elsewhere"]


def claims(here: dict) -> list[dict]:
    """Table of claims, with the numbers found here (a sequence for each key)."""
    tags, paper = _FACTS["tags"], _FACTS["tags"]["paper"]
    return [
        {"work": work, "claim": claim, "published": value,
         "here": form.format(*here[key]) if key in here else form,
         "tag": tags.get(tag, paper.format(tag))}
        for key, work, claim, value, form, tag in CLAIMS
    ]  # fmt: skip


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


def expected_cutoff_score(sizes) -> tuple[float, float]:
    """η_p and η_w that `metrics.cumulative_cutoff_score` gives random vectors.

    Of a class with n items, ending at position h of N, the query is always inside its
    own cut; each other item is with probability (h - 1)/(N - 1).
    """
    sizes = np.asarray(sizes)
    ends, total = np.cumsum(sizes), sizes.sum()
    found = 1 + (sizes - 1) * (ends - 1) / (total - 1)
    return float(found.sum() / total), float((found / sizes).mean())
