"""Chapter 08's four experiments on miniatures: training here, test there, released."""

import json
from pathlib import Path

import numpy as np
import papermill
import pytest
import timm
import torch
import yaml
from miniatures import colour_texture, pannuke, path24c
from PIL import Image

from histo_utils import catalog
from histo_utils.encoders.published import LGFFEM_BACKBONES
from histo_utils.networks.fusion import LocalGlobalFusionNeck, MultiScaleGeMHead
from histo_utils.networks.published import published_name
from histo_utils.readers.class_folders import convert_pannuke

CHAPTER = "08_feature_fusion_neck"
ROOT = Path(__file__).parents[1]
COLUMNS = {f"{way} η_{x}" for way in ("cut-off", "true") for x in ("p", "w", "total")}
SMALL = {
    "weights": "random", "network": "convnextv2_atto", "input_size": 32,
    "baseline_size": 32, "channels": 8, "batch_size": 4, "epochs": 1, "workers": 0,
    "validate_every": 1, "precision": "32-true", "pictures": [],
}  # fmt: skip


def experiment(name, folder, monkeypatch, **more):
    """Run an experiment on the data sets in ``folder``; its profile and results."""
    monkeypatch.setenv("HISTO_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HISTO_DATA", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    profile = ROOT / f"profiles/paper/{CHAPTER}.{name}.yaml"
    profile = yaml.safe_load(profile.read_text("utf8"))
    assert profile["results"] == f"results/paper/{CHAPTER}.{name}.json"
    assert profile["dataset"] == "kimia_path24c"
    where = {"dataset": str(folder / "kimia_path24c")}
    small = SMALL | where | {"results": str(folder / "found.json")} | more
    papermill.execute_notebook(
        ROOT / f"notebooks/{CHAPTER}.ipynb", folder / "out.ipynb", profile | small,
        progress_bar=False, kernel_name="python3", cwd=ROOT,
    )  # fmt: skip
    return profile, json.loads((folder / "found.json").read_text("utf8"))


def imagenet(folder, n=6):
    """Oblong photographs of two classes, in the folders of ILSVRC 2012."""
    rng = np.random.default_rng(0)
    for kind, synset in enumerate(("n01440764", "n01443537")):
        place = folder / "imagenet/train" / synset
        place.mkdir(parents=True)
        for i in range(n):
            picture = colour_texture(60, kind, rng)[: 40 + i]
            Image.fromarray(picture).save(place / f"{synset}_{i}.JPEG")


def checkpoint(path, config="config/backbone/convnextv2_base.json"):
    """A random neck (512 × 3) and heads as the released training scripts save them."""
    torch.manual_seed(0)
    neck = LocalGlobalFusionNeck(LGFFEM_BACKBONES["convnextv2_base.fcmae"], 512, 3)
    head = MultiScaleGeMHead(512)
    states = {
        name: {published_name(k): v for k, v in part.state_dict().items()}
        for name, part in (("neck", neck), ("head", head))
    }
    torch.save({
        "epoch": 499, "best_loss": np.float64(0.25), "scheduler_state_dict": None,
        "model_neck_state_dict": states["neck"],
        "model_head_state_dict": states["head"],
        "loss_state_dict": {"W": torch.zeros(2048, 24 * 6)},
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "fn_cfg_model_backbone": config, "fn_cfg_model_neck": "neck",
        "fn_cfg_model_head": "head",
    }, path)  # fmt: skip


@pytest.mark.slow
def test_path24c(tmp_path, monkeypatch):
    """As meant, without a neck and as released; CAMs; one run per system."""
    path24c(tmp_path)
    profile, found = experiment(
        "path24c", tmp_path, monkeypatch, pictures=["cam"], schedule=[1, 1]
    )
    assert profile["network"] == "convnextv2_base.fcmae" and profile["num_layers"] == 3
    assert profile["constants"] == [0.6, 6, 1e-4, 1e-4] and profile["epochs"] == 499
    assert set(found["ablation"]) == {"no neck", "neck, as released"}
    table = found["paper_table"]
    assert table["published: Kimia Path24C, epoch 499"]["cut-off η_p"] == 0.994
    assert table["published: Kimia Path24C, epoch 499"]["true η_p"] is None
    assert COLUMNS | {"MAP@R"} == set(table["neck"]) and table["neck"]["MAP@R"] > 0
    last = sorted((tmp_path / "cache" / CHAPTER).glob("*/*/last.pt"))
    assert len(last) == 3, "one run per system"
    small = list((tmp_path / "cache/small").rglob("*.png"))
    assert len(small) == 18, "every tile made small once, duplicates left out"
    assert {Image.open(path).size for path in small} == {(32, 32)}
    (kept,) = (tmp_path / "cache/trained").glob("neck_scan_*/encoder.json")
    saved = json.loads(kept.read_text("utf8"))
    assert saved["recipe"]["num_layers"] == 3 and saved["dimension"] == 4 * 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pannuke", "imagenet"])
def test_trained_elsewhere_tested_on_path24c(name, tmp_path, monkeypatch):
    path24c(tmp_path)
    if name == "pannuke":
        convert_pannuke(pannuke(tmp_path, n=8), progress=False)
    else:
        imagenet(tmp_path)
    profile, found = experiment(name, tmp_path, monkeypatch)
    assert profile["train_dataset"] == name
    assert profile["constants"] == [0.6, 6, 0.01, 1e-4]
    assert found["scores"]["neck"]["scan"]["queries"] == 6, "Path24C's test patches"
    assert set(found["paper_table"]["neck, as released"]) >= COLUMNS
    assert list((tmp_path / "cache/trained").glob(f"neck_scan_{name}"))


@pytest.mark.slow
def test_released_checkpoint_at_full_size(tmp_path, monkeypatch):
    """ConvNeXt V2 base, neck 512 × 3 and heads, from a file in the released layout."""
    path24c(tmp_path, n_train=2)
    checkpoint(tmp_path / "FFN-EMB-KIMIA-epoch499.pth")
    _, found = experiment(
        "released", tmp_path, monkeypatch, network="not asked for", input_size=64,
        checkpoint=str(tmp_path / "FFN-EMB-KIMIA-epoch499.pth"),
    )  # fmt: skip
    row = found["paper_table"]["released"]
    assert COLUMNS | {"MAP@R"} == set(row) and all(0 <= v <= 1 for v in row.values())
    assert row["true η_total"] == pytest.approx(row["true η_p"] * row["true η_w"])
    assert not list((tmp_path / "cache").rglob("last.pt")), "nothing is trained"
    (kept,) = (tmp_path / "cache/trained").glob("released_scan_*/encoder.json")
    recipe = json.loads(kept.read_text("utf8"))["recipe"]
    assert recipe["name"] == "convnextv2_base.fcmae"
    assert (recipe["channels"], recipe["num_layers"]) == (512, 3)


def test_oblong_photographs_give_their_central_square(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    imagenet(tmp_path)
    table = catalog.patch_table("imagenet")
    assert table["split"].eq("train").all() and table["label"].nunique() == 2
    first = table.iloc[0]
    assert (first["x"], first["y"], first["size"]) == (10, 0, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", LGFFEM_BACKBONES)
def test_all_ten_backbones_give_the_published_maps(name):
    with torch.device("meta"):
        made = timm.create_model(name, features_only=True, out_indices=(0, 1, 2, 3))
        assert made.feature_info.channels() == LGFFEM_BACKBONES[name]
        maps = made.eval()(torch.empty(1, 3, 224, 224))
        neck = LocalGlobalFusionNeck(LGFFEM_BACKBONES[name], 16, 1)
        assert [x.shape[1] for x in neck(maps)] == [16] * 4
