"""Published facts, as far as their authors released them, for the audit of chapter 3.

Each entry names its source and, for repositories, the commit that was read. They are
the only results typed by hand in this project; tests compare them with
``tests/golden``.
"""

from __future__ import annotations

import numpy as np

# Kimia Path24: test patches of scans s0 … s23, 1,325 in all.
# Source: row sums of figs/confusion_mat.jpeg, easonyang1996/DML_HistoImgRetrieval at
# commit 9b01805.
PATH24_TEST_COUNTS = (
    65, 65, 65, 75, 15, 40, 70, 50, 60, 60, 70, 70,
    70, 60, 60, 30, 45, 45, 25, 25, 65, 65, 65, 65,
)  # fmt: skip

# Yang et al. 2019: the wrong cells of the same figure, (truth, predicted, count).
YANG_ERRORS = (
    (0, 1, 1), (4, 7, 1), (4, 12, 1), (4, 16, 2), (5, 6, 1), (6, 2, 1), (6, 5, 1),
    (6, 7, 1), (6, 16, 1), (7, 5, 1), (8, 21, 2), (11, 17, 4), (15, 20, 1),
    (16, 4, 2), (16, 11, 1), (17, 11, 2), (18, 15, 1), (20, 18, 1), (21, 8, 1),
    (23, 5, 1), (23, 7, 1),
)  # fmt: skip

# Yang et al. 2019, best checkpoint: result/se_resnet_results.txt, same commit.
YANG_ETA = (0.9788679245283018, 0.9699727818477818, 0.9494752438162815)

# Kieffer et al. 2017, Table 1 in percent: η_p, η_w, η_total. CNN1: Babaie et al. 2017.
KIEFFER_TABLE = {
    "CNN1": (64.98, 64.75, 41.80),
    "FE-VGG16": (65.21, 64.96, 42.36),
    "TL-VGG16": (63.85, 66.23, 42.29),
    "FE-Inception-v3": (70.94, 71.24, 50.54),
    "TL-Inception-v3": (74.87, 76.10, 56.98),
}
KIEFFER_GAIN = 8.74  # "≈ 8.74 %" of the same paper's text

# LGFFEM (Nuñez-Fernández et al. 2025), Kimia Path24C, checkpoint of epoch 499, percent.
# Source: output of notebook 02, camilo-nunez/ffnir at commit cac8757.
LGFFEM_ETA = (99.40, 99.47, 98.87)

# KimiaNet (Riasatian et al. 2021), vertical search, F1 in percent: slides n, then the
# ImageNet DenseNet-121 (DN) and KimiaNet I to IV. Read from the table in the authors'
# repository (KimiaLabMayo/KimiaNet at commit 8a2f120, image-1.png); rows by site.
KIMIANET_COLUMNS = ("n", "DN", "I", "II", "III", "IV")
KIMIANET_F1 = {
    "brain": {
        "LGG": (39, 71, 75, 82, 85, 81),
        "GBM": (35, 77, 73, 80, 83, 81),
    },
    "endocrine": {
        "THCA": (51, 94, 98, 98, 99, 100),
        "ACC": (6, 25, 25, 20, 55, 44),
        "PCPG": (15, 57, 75, 73, 80, 85),
    },
    "gastrointestinal": {
        "ESCA": (14, 50, 73, 50, 83, 78),
        "COAD": (32, 65, 76, 75, 75, 76),
        "STAD": (30, 63, 77, 73, 84, 86),
        "READ": (12, 22, 30, 26, 29, 30),
    },
    "gynaecological": {
        "UCS": (3, 75, 86, 60, 75, 86),
        "CESC": (17, 88, 97, 84, 97, 94),
        "OV": (10, 67, 89, 74, 95, 95),
    },
    "liver and pancreas": {
        "CHOL": (4, 29, 40, 31, 40, 40),
        "LIHC": (35, 86, 94, 87, 97, 96),
        "PAAD": (12, 70, 73, 56, 82, 76),
    },
    "melanocytic": {
        "SKCM": (24, 92, 94, 94, 98, 94),
        "UVM": (4, 0, 40, 40, 86, 67),
    },
    "prostate and testis": {
        "PRAD": (40, 99, 100, 99, 100, 100),
        "TGCT": (13, 96, 100, 96, 100, 100),
    },
    "pulmonary": {
        "LUAD": (38, 65, 73, 72, 69, 78),
        "LUSC": (43, 69, 74, 74, 75, 84),
        "MESO": (5, 0, 0, 0, 33, 75),
    },
    "urinary": {
        "BLCA": (34, 90, 96, 93, 93, 93),
        "KIRC": (50, 83, 95, 99, 97, 97),
        "KIRP": (28, 77, 91, 91, 91, 91),
        "KICH": (11, 48, 86, 78, 84, 86),
    },
}

RECOMPUTED = "recomputed from what was released"
ELSEWHERE = "re-implemented on other data"
_PAPER = "not run: make book PROFILE=paper, with the paper's data (chapter {})"
# What chapter 3 looks at: key, work, claim, published value, what was found here (a
# format for its numbers), tag.
CLAIMS = (
    ("yang", "Yang 2019", "η_p, η_w, η_total", "97.89 / 97.00 / 94.95",
     "{:.2f} / {:.2f} / {:.2f}", RECOMPUTED),
    ("scorer", "Path24's Python scorer", "η_w is mean recall", "–",
     "{:.3f} on Yang's matrix; mean recall is {:.3f}", RECOMPUTED),
    ("gallery", "Yang 2019 beside Kieffer 2017", "one ranking", "–",
     "P@1 {:.3f} test among test, {:.3f} against a training half", ELSEWHERE),
    ("duplicate", "Yang 2019", "position 1 is the nearest other", "–",
     "{:+.3f} by 5 % planted copies", ELSEWHERE),
    ("cutoff", "LGFFEM 2025", "Recall@1 on Path24C", "99.40",
     "random vectors: {:.1f} ± {:.1f}", ELSEWHERE),
    ("recall", "LGFFEM 2025", "true Recall@1", "–", "–", _PAPER.format("08")),
    ("kieffer_product", "Kieffer 2017", "CNN1, η_total", "41.80", "{:.2f}",
     RECOMPUTED),
    ("kieffer_gain", "Kieffer 2017", "gain over CNN1", "8.74", "{:.2f}", RECOMPUTED),
    ("tl", "Kieffer 2017", "TL-Inception, η_total", "56.98", "–", _PAPER.format("04")),
    ("ftx", "Li 2022", "accuracy, 9 tissues", "98.4", "–", _PAPER.format("06")),
    ("kimianet", "KimiaNet 2021", "F1, vertical search", "–", "–",
     _PAPER.format("10")),
    ("map_at_r", "AccuracyCalculator(k=10)", "MAP@R", "–",
     "{:.3f} in full, {:.3f} by k=10, {:.3f} by k=max_bin_count", ELSEWHERE),
)  # fmt: skip


def claims(here: dict) -> list[dict]:
    """Put the numbers found here, a sequence for each key, into the table of claims."""
    return [
        {"work": work, "claim": claim, "published": value,
         "here": form.format(*here[key]) if key in here else form, "tag": tag}
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
    predicted = truth.copy()
    place = np.concatenate([[0], np.cumsum(PATH24_TEST_COUNTS)])
    taken = np.zeros(len(PATH24_TEST_COUNTS), int)
    for scan, wrong, count in YANG_ERRORS:
        start = place[scan] + taken[scan]
        predicted[start : start + count] = wrong
        taken[scan] += count
    return truth, predicted


def expected_cutoff_score(sizes) -> tuple[float, float]:
    """η_p and η_w that `metrics.cumulative_cutoff_score` gives random vectors.

    Of a class with n items, ending at position h of N, the query is always inside its
    own cut; each other item is with probability (h - 1)/(N - 1).

    Examples
    --------
    >>> expected_cutoff_score([1, 1])
    (1.0, 1.0)
    """
    sizes = np.asarray(sizes)
    ends, total = np.cumsum(sizes), sizes.sum()
    found = 1 + (sizes - 1) * (ends - 1) / (total - 1)
    return float(found.sum() / total), float((found / sizes).mean())
