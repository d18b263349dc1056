"""Two steps of chapter 07's paper profile, on a miniature of KIMIAPath24_RGB."""

import json
from pathlib import Path

import papermill
import pytest
import yaml
from miniatures import path24_rgb

from histo_utils.embeddings import load_embeddings

ROOT = Path(__file__).parents[1]
NAME = "07_metric_learning"


@pytest.mark.slow
def test_two_steps_of_the_paper_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    place = path24_rgb(tmp_path, n_classes=2, n_train=6, n_test=2)
    paper = yaml.safe_load((ROOT / "profiles" / "paper" / f"{NAME}.yaml").read_text())
    assert (paper["batch_size"], paper["decay_at"]) == (60, 50)
    assert paper["epochs"] == {"scan": 100}
    assert (paper["resize"], paper["input_size"], paper["dim"]) == (300, 224, 512)
    assert paper["optimisers"] == ["sgd 0.001"] and paper["per_class"] == 0
    small = {
        "dataset": str(place), "input_size": 32, "resize": 43, "batch_size": 4,
        "steps": 2, "epochs": {"scan": 1}, "seeds": [0], "shares": [1.0], "workers": 0,
        "results": str(tmp_path / "found.json"),
    }  # fmt: skip
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{NAME}.ipynb"), str(tmp_path / "out.ipynb"),
        parameters=paper | small, progress_bar=False, cwd=str(ROOT),
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert [run["images"] for run in found["runs"]] == [8, 8]  # the try, and seed 0
    assert found["trained_parameters"] == 45_731_440
    assert found["splits"] == {
        "scan 0": {"train": 10, "validation": 2, "gallery": 12, "test": 4}
    }
    assert set(found["scores"]["multi_similarity"]) == {"scan", "test_among_test"}
    kept = tmp_path / "cache" / "trained"
    saved, vectors = (kept / f"yang_{w}_{place.name}" for w in ("scan", "scan_vectors"))
    assert {p.name for p in saved.iterdir()} == {"encoder.json", "weights.safetensors"}
    made = load_embeddings(vectors / "0" / "0")  # the one seed, the one split
    assert made.vectors.shape == (16, 512)
