"""Chapter 07's experiments, two steps of each, on a miniature of KIMIAPath24_RGB."""

import json
from pathlib import Path

import papermill
import pytest
import torch
import yaml
from miniatures import path24_rgb

from histo_utils.embeddings import load_embeddings
from histo_utils.loaders import Resized
from histo_utils.patches import read_patch

ROOT = Path(__file__).parents[1]
NAME = "07_metric_learning"
# Override: sizes, epochs, seeds and counts; never network, loss, layout or protocol.
SMALL = {
    "input_size": 32, "resize": 43, "batch_size": 4, "steps": 2, "epochs": {"scan": 1},
    "seeds": [0], "workers": 0,
}  # fmt: skip
SIZES = {
    "yang2019": 45_731_440, "contrastive": 45_731_440, "abe_m": 10_534_720,
    "branched_attention": 47_131_840, "size_curve": 45_731_440,
}  # fmt: skip


def profile(experiment):
    path = ROOT / "profiles" / "paper" / f"{NAME}.{experiment}.yaml"
    return yaml.safe_load(path.read_text("utf8"))


def run(tmp_path, experiment, **more):
    """Run the chapter; its results."""
    results = tmp_path / f"{NAME}.{experiment}.json"
    papermill.execute_notebook(
        str(ROOT / "notebooks" / f"{NAME}.ipynb"), str(tmp_path / "out.ipynb"),
        parameters=profile(experiment) | SMALL | {"results": str(results)} | more,
        progress_bar=False, cwd=str(ROOT),
    )  # fmt: skip
    return json.loads(results.read_text())


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The data lie under HISTO_DATA, as the profiles name them."""
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    return path24_rgb(tmp_path, n_classes=2, n_train=6, n_test=2)


def test_the_experiments_are_the_released_ones():
    for experiment in SIZES:
        paper = profile(experiment)
        assert paper["dataset"] == "KIMIAPath24_RGB" and paper["tasks"] == ["published"]
        assert (paper["decay_at"], paper["epochs"]) == (50, {"scan": 100})
        assert (paper["resize"], paper["input_size"], paper["dim"]) == (300, 224, 512)
        assert paper["optimisers"] == ["sgd 0.001"] and paper["per_class"] == 0
        assert paper["batch_size"] == (20 if experiment == "size_curve" else 60)
        assert paper["results"] == f"results/paper/{NAME}.{experiment}.json"
        ensemble = experiment in ("abe_m", "branched_attention")
        assert (paper["loss_names"] == ["abe"]) == ensemble
    assert {0.2, 0.4, 0.6, 0.8, 1.0} < set(profile("size_curve")["shares"])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["yang2019", "abe_m", "branched_attention"])
def test_two_steps_of_an_experiment(tmp_path, place, experiment):
    """Table, curve and matrix of the paper; images are read once, resized once."""
    found = run(tmp_path, experiment)
    assert [r["images"] for r in found["runs"]] == [8], "one optimiser: nothing to try"
    assert found["trained_parameters"] == SIZES[experiment]
    assert found["splits"] == {
        "scan 0": {"train": 10, "validation": 2, "gallery": 12, "test": 4}
    }
    (loss,) = profile(experiment)["loss_names"]
    assert set(found["scores"][loss]) == {"scan", "test_among_test"}
    assert list(found["eta"]) == [loss, "frozen baseline", "histogram"]
    etas = found["eta"][loss]["100%"]
    assert list(etas) == ["η_p", "η_w", "η_total"]
    total = etas["η_p"]["score"] * etas["η_w"]["score"]
    assert etas["η_total"]["score"] == pytest.approx(total)
    assert etas["η_total"]["n"] == 2 and len(etas["η_p"]["seeds"]) == 1
    assert etas["η_p"]["score"] == found["scores"][loss]["test_among_test"]["score"]
    assert found["as_published"] is False  # 2 + 2 patches are not 1,325
    copies = sorted((tmp_path / "cache" / "resized").rglob("*.png"))
    assert len(copies) == 16
    kept = tmp_path / "cache" / "trained"
    saved, vectors = (
        kept / f"{experiment}_{w}_{place.name}" for w in ("scan", "scan_vectors")
    )
    assert {p.name for p in saved.iterdir()} == {"encoder.json", "weights.safetensors"}
    made = load_embeddings(vectors / "0" / "0")  # the one seed, the one split
    assert made.vectors.shape == (16, 512)
    assert made.table["mpp"].iloc[0] == pytest.approx(0.5 * 64 / 43)
    source = {"x": 0, "y": 0, "size": 64, "mpp": 0.5, "slide_mpp": 0.5}
    row = made.table.iloc[0]
    image = place / "Training" / row["label"] / "s0_0.jpg"
    expected = Resized(43)(read_patch(source | {"image": str(image)}))
    assert torch.equal(*map(torch.from_numpy, (read_patch(row).copy(), expected)))


@pytest.mark.slow
def test_the_size_curve_and_numbered_folders(tmp_path, place):
    for folder in list(place.glob("*/s*")):
        folder.rename(folder.with_name(folder.name[1:]))
    found = run(tmp_path, "size_curve", shares=[0.5, 1.0], steps=1, batch_size=3)
    curve = found["eta"]["multi_similarity"]
    assert sorted(curve) == ["100%", "50%"]
    page = (tmp_path / "out.ipynb").read_text("utf8")
    assert "published, 20% of each class" in page
    assert "multi_similarity, 50% of each class" in page


@pytest.mark.slow
def test_accumulation_is_refused_because_the_losses_look_at_pairs(tmp_path, place):
    with pytest.raises(papermill.PapermillExecutionError, match="accumulate=2"):
        run(tmp_path, "contrastive", accumulate=2)
