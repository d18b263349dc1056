"""Kieffer et al.: chapter 04's paper profile on a miniature of Path24."""

import json

import papermill
import pytest
import yaml
from miniatures import path24_h5

from histo_utils.provenance import project_folder
from histo_utils.readers.path24 import convert_path24

CHAPTER = "04_pretrained_features"


@pytest.mark.slow
def test_the_paper_profile_on_a_miniature(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    truth = path24_h5(tmp_path)
    convert_path24(truth["file"], tmp_path / "kimia_path24", progress=False)
    root = project_folder()
    text = (root / "profiles" / "paper" / f"{CHAPTER}.tl_vgg16.yaml").read_text("utf8")
    small = {
        "dataset": str(tmp_path / "kimia_path24"), "patch_size": 64, "per_class": 4,
        "input_size": 32, "weights": "random", "c_values": [0.001, 0.1],
        "svm_jobs": 1, "epochs": {"head": 1, "tuned": 1, "scratch": 1},
        "batch_size": 4, "scratch": {"size": 16, "widths": [4, 8]}, "seeds": [0],
        "workers": 0, "hidden": 8, "results": str(tmp_path / "results.json"),
    }  # fmt: skip
    papermill.execute_notebook(
        str(root / "notebooks" / f"{CHAPTER}.ipynb"), str(tmp_path / "out.ipynb"),
        yaml.safe_load(text) | small, cwd=str(root), progress_bar=False,
    )  # fmt: skip
    found = json.loads((tmp_path / "results.json").read_text("utf8"))
    assert set(found["scores"]) == {"scan"}, "no patient is left out in Path24"
    ways = {"head, grey", "tuned, grey", "scratch, grey"}
    assert ways <= set(found["trained"]) and ways <= set(found["against"])
    share = found["trained"]["tuned, grey"]["share right"]
    assert share["queries"] == 6 and len(share["seeds"]) == 1
    assert "its head" in found["against"]["tuned, grey"]
    assert found["checks"]["VGG16"] == [7_079_424, 25_088, 6_422_784, 6_168]
    assert {run["way"] for run in found["runs"]} == {"head", "tuned", "scratch"}
    assert found["chosen_rates"] == dict.fromkeys(("head", "tuned", "scratch"), 1e-4)
    sizes = found["splits"]["train"], found["splits"]["validation"]
    assert sizes == (9, 3), "3 of each of 3 classes train, 1 is held out"
