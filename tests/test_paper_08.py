"""Two steps of chapter 08's `paper` profile on a miniature of Path24C."""

import json
from pathlib import Path

import papermill
import pytest
import yaml
from miniatures import path24c

CHAPTER = "08_feature_fusion_neck"
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_steps_of_the_paper_profile(tmp_path, monkeypatch):
    """All of the chapter, its own augmentation and loop; only sizes are small."""
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    profile = yaml.safe_load((ROOT / f"profiles/paper/{CHAPTER}.yaml").read_text())
    small = {
        "dataset": str(path24c(tmp_path)), "patch_size": 64, "weights": "random",
        "network": "convnextv2_atto", "input_size": 64, "baseline_size": 64,
        "channels": 8, "batch_size": 4, "epochs": 1, "workers": 0,
        "results": str(tmp_path / "found.json"),
    }  # fmt: skip
    assert small.keys() <= profile.keys()
    papermill.execute_notebook(
        ROOT / f"notebooks/{CHAPTER}.ipynb", tmp_path / "out.ipynb", profile | small,
        progress_bar=False, kernel_name="python3", cwd=ROOT,
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    scores = found["scores"]["neck"]["scan"]
    assert scores["queries"] == 6 and len(scores["seeds"]) == 1
    assert set(found["ablation"]) == {
        "no neck", "neck, s = 17.5", "neck, GRN as published"
    }  # fmt: skip
    last = sorted((tmp_path / "cache" / CHAPTER).glob("*/*/last.pt"))
    assert len(last) == 4, "one run per system"
    (kept,) = (tmp_path / "cache/trained").glob("neck_scan_*/encoder.json")
    saved = json.loads(kept.read_text())
    assert saved["recipe"]["num_layers"] == 3 and saved["dimension"] == 4 * 8
