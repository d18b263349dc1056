"""KimiaNet's paper profile on a miniature of TCGA; its published counts."""

import json
import re
from pathlib import Path

import miniatures
import pandas as pd
import papermill
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CHAPTER = "05_gpu_fine_tuning"
NOTEBOOK = ROOT / "notebooks" / f"{CHAPTER}.ipynb"
PROFILE = ROOT / "profiles/paper" / f"{CHAPTER}.IV.yaml"
PROFILE = yaml.safe_load(PROFILE.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The paper profile on six small slides: what it wrote, and its executed copy."""
    folder = tmp_path_factory.mktemp("paper-05")
    tcga = miniatures.tcga(folder / "tcga", n_slides=6)
    names = list(tcga["projects"])
    # one patient of each project for training, validation and test
    splits = ["train", "train", "validation", "validation", "test", "test"]
    pd.DataFrame({"slide": names, "split": splits}).to_csv(
        folder / "slides.csv", index=False
    )
    small = {
        "mosaics": str(tcga["mosaics"]),
        "slides": str(folder / "slides.csv"),
        "sites": str(tcga["sites"]),
        "weights": "random",
        "input_size": 32,
        "configurations": {"I": [1, 2], "IV": [1, 2]},
        "workers": 0,
        "precision": "32-true",
        "results": str(folder / "results.json"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTO_CACHE", str(folder / "cache"))
        papermill.execute_notebook(
            NOTEBOOK, folder / "out.ipynb", PROFILE | small, cwd=ROOT,
            progress_bar=False,
        )  # fmt: skip
    return json.loads((folder / "results.json").read_text()), folder


@pytest.mark.slow
def test_the_paper_profile_on_a_miniature(run):
    result, folder = run
    assert result["provenance"]["profile"] == "paper"
    scores = result["scores"]
    assert {"i_most_cellular", "i_random", "iv_most_cellular"} < scores.keys()
    whole = scores["frozen_baseline"]["P@1"]
    assert whole["n"] == 2 < whole["queries"], "patches of the two test slides"
    # I twice (cellular, random), IV, and I pooled after the ReLU
    assert len(list((folder / "cache" / CHAPTER).iterdir())) == 4
    assert [row["rate"] for row in result["tried_rates"]] == PROFILE["rates"]


def test_the_pages_counts_are_those_of_the_released_coordinates():
    golden = json.loads(
        (ROOT / "tests/golden/kimianet_tcga_split_counts.json").read_text()
    )
    assert len(golden) == 30
    page = "\n".join(
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"]
    )
    for part in ("Train", "Validation", "Test"):
        line = re.search(rf"^\| {part.lower()} \| (.+) \|$", page, re.MULTILINE)[1]
        slides, _, patches, _ = (int(n.replace(",", "")) for n in line.split(" | "))
        assert slides == sum(row[part][0] for row in golden.values())
        assert patches == sum(row[part][1] for row in golden.values())
