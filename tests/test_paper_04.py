"""Fine-tuning as in Kieffer et al.; chapter 04's paper profile, two steps on Path24."""

import json

import numpy as np
import pandas as pd
import papermill
import pytest
import timm
import torch
import yaml
from miniatures import path24_h5
from torch import nn

from histo_utils import catalog, classifiers, encoders, loaders, metrics
from histo_utils.networks import stages
from histo_utils.networks.tuned import eight_views, halves, new_head, outputs
from histo_utils.provenance import project_folder
from histo_utils.readers.path24 import convert_path24

CHAPTER = "04_pretrained_features"


def test_the_papers_heads_and_blocks_have_the_counts_of_its_arithmetic():
    with torch.device("meta"):
        vgg, inception = timm.create_model("vgg16"), timm.create_model("inception_v3")
        heads = new_head(7 * 7 * 512, 256, 24), new_head(2048, 1024, 24)
    counts = [[sum(p.numel() for p in x.parameters()) for x in head] for head in heads]
    assert counts == [[6_422_784, 0, 6_168], [2_098_176, 0, 24_600]]
    for net, part in ((vgg, "vgg16"), (inception, "inception_v3")):
        (beginnings,) = stages.PARTS[part].values()
        expected = stages.train_only(net, beginnings)
        assert sum(p.numel() for p in halves(net)[1].parameters()) == expected
        front = [p.requires_grad for p in halves(net)[0].parameters()]
        assert front and not any(front)
    assert sum(p.numel() for p in halves(vgg)[1].parameters()) == 7_079_424


@pytest.mark.parametrize(
    ("name", "side"), [("vgg11", 64), ("vgg16", 64), ("inception_v3", 96)]
)
def test_a_cut_network_gives_what_the_whole_gives(name, side):
    if name == "vgg11":
        with torch.device("meta"), pytest.raises(ValueError, match="no known cut"):
            halves(timm.create_model(name))
        return
    net = timm.create_model(name).eval()
    front, back = halves(net)
    images = torch.rand(3, 3, side, side)
    with torch.no_grad():
        whole = net.forward_features(images)
        whole = whole.flatten(1) if name == "vgg16" else whole.mean((2, 3))
        torch.testing.assert_close(back(front(images)), whole)
    found = outputs(nn.Sequential(front, back), images, 2)
    torch.testing.assert_close(found, whole, rtol=0.01, atol=1e-5)


def test_new_head_leaves_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = new_head(4, 3, 2, seed=1), new_head(4, 3, 2, seed=1)
    torch.testing.assert_close(torch.rand(3), expected)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, new_head(4, 3, 2, seed=2)[0].weight)


def test_eight_views_are_those_of_the_loaders():
    image = np.random.default_rng(0).integers(0, 255, (6, 6, 3), np.uint8)
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    ours = {tuple(view.flatten().tolist()) for view in eight_views(tensor)}
    theirs = {
        tuple(loaders.Turned(k)(image).transpose(2, 0, 1).ravel().tolist())
        for k in range(8)
    }
    assert ours == theirs and len(ours) == 8


@pytest.fixture(scope="module")
def path24(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path24")
    truth = path24_h5(folder)
    convert_path24(truth["file"], folder / "kimia_path24", progress=False)
    return folder / "kimia_path24"


def test_drawn_takes_so_many_of_each_class_and_all_test_patches(path24):
    whole = catalog.patch_table(path24)
    table, split = classifiers.drawn(whole, 3)
    assert "split" not in table
    sizes = {part: int(getattr(split, part).sum()) for part in classifiers.PARTS}
    assert sizes == {"train": 9, "choose": 3, "test": 6}
    assert set(table["slide"][split.train].value_counts()) == {3}
    asked = set(whole.loc[whole["split"] == "test", "image"])
    assert set(table["image"][split.test]) == asked
    masks = np.stack([split.train, split.choose, split.test])
    assert (masks.sum(axis=0) == 1).all()
    assert (split.gallery == split.train).all()
    other, _ = classifiers.drawn(whole, 3, seed=1)
    assert set(other["image"]) != set(table["image"])


def test_etas_by_hand():
    """SEEDS' toy: 7 of 10 right; recalls 4/6, 2/3 and 1 give 0.7 · 0.7777…"""
    label = pd.Series([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
    told = [0, 0, 0, 0, 1, 2, 1, 1, 0, 2]
    patient = [f"p{i % 4}" for i in range(10)]
    rows = pd.DataFrame({"label": label, "predicted": told, "patient": patient})
    found = classifiers.etas(rows, n_boot=200)
    assert found["eta_p"] == pytest.approx(0.7)
    assert found["eta_w"] == pytest.approx(7 / 9)
    assert found["eta_total"] == pytest.approx(0.7 * 7 / 9)
    assert found["low"] <= 0.7 <= found["high"]
    assert found["eta_total_low"] <= found["eta_total"] <= found["eta_total_high"]
    assert (found["queries"], found["patients"]) == (10, 4)


@pytest.fixture(scope="module")
def tiny(path24):
    encoder = encoders.frozen("mobilenetv2_035", size=32, seed=0)
    table, split = classifiers.drawn(catalog.patch_table(path24), 4)
    how = {"turns": 2, "small": 16}
    return classifiers.gather(encoder, table, split, loaders.grey, **how)


def test_bottleneck_features_are_the_encoders_vectors(tiny):
    made = encoders.embed(tiny.encoder, tiny.table, loaders.grey, progress=False)
    found = tiny.views["head"][0].numpy()
    np.testing.assert_allclose(found, made.vectors, atol=1e-5)
    assert len(tiny.views["head"]) == len(tiny.views["tuned"]) == 2
    assert [v.shape[1:] for v in tiny.views["scratch"]] == [(3, 16, 16)] * 8


@pytest.mark.parametrize("images", [False, True])
def test_the_front_stays_as_it_was_and_the_rest_moves(tiny, tmp_path, images):
    own = encoders.frozen("mobilenetv2_035", size=32, seed=0)
    views = tiny.views | ({"tuned": None} if images else {})
    inputs = tiny._replace(encoder=own, views=views)
    how = {"rate": 0.05, "epochs": 2, "batch_size": 6}
    head = classifiers.start(inputs, "head", hidden=8)
    head = classifiers.train(head, inputs, "head", folder=tmp_path / "h", **how).network
    before = {k: v.clone() for k, v in own.network.state_dict().items()}
    first = head[0].weight.clone()
    net = classifiers.start(inputs, "tuned", head=head)
    made = classifiers.train(net, inputs, "tuned", folder=tmp_path / "t", **how)
    after = own.network.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and not torch.equal(first, made.network[-1][0].weight)
    behind = ("network.blocks.6.", "network.conv_head.", "network.bn2.")
    assert all(name.startswith(behind) for name in moved)
    assert not any("running" in name for name in moved), "batch norm keeps its numbers"
    outcome = classifiers.told(made.network, inputs, "tuned")
    whole = (
        made.network if images else nn.Sequential(halves(own.network.network)[0], net)
    )
    rows = inputs.table.iloc[inputs.rows["test"]]
    logits = encoders.stored(own, whole, rows, (0,), loaders.grey, progress=False)[0]
    expected = inputs.classes[logits.argmax(1)]
    assert outcome["predicted"].tolist() == expected.tolist()
    assert outcome["label"].tolist() == rows["slide"].tolist()
    assert outcome["query"].tolist() == inputs.rows["test"].tolist()


def test_scratch_learns_what_it_trains_on(tiny, tmp_path):
    """The miniature's classes differ in grain and brightness: 100 steps know them."""
    net = classifiers.start(tiny, "scratch", widths=(8, 16))
    same = tiny._replace(rows=tiny.rows | {"choose": tiny.rows["train"]})
    how = {"rate": 0.05, "epochs": 50, "batch_size": 6, "folder": tmp_path}
    made = classifiers.train(net, same, "scratch", **how)
    right = metrics.accuracy(classifiers.told(made.network, same, "scratch", "choose"))
    assert right > 0.9
    assert made.history["loss"].iloc[-1] < 0.5 * made.history["loss"].iloc[0]


def test_a_wrong_way_and_a_missing_head_are_refused(tiny):
    with pytest.raises(ValueError, match="expected one of head, tuned, scratch"):
        classifiers.start(tiny, "frozen")
    with pytest.raises(ValueError, match="for tuned a trained head"):
        classifiers.start(tiny, "tuned")


def test_augmentation_changes_pixels_and_keeps_white_at_the_edge():
    image = torch.full((3, 40, 40), 255, dtype=torch.uint8)
    image[:, 15:25, 18:21] = 0
    torch.manual_seed(0)
    turned = [classifiers.augmentation()(image) for _ in range(8)]
    assert all(x.shape == image.shape and x.dtype == torch.uint8 for x in turned)
    assert len({tuple(x.flatten().tolist()) for x in turned}) > 4
    assert all((x[:, 0] == 255).all() and (x[:, :, -1] == 255).all() for x in turned)


def test_two_steps_of_the_paper_profile_on_a_miniature(path24, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    root = project_folder()
    text = (root / "profiles" / "paper" / f"{CHAPTER}.yaml").read_text("utf8")
    paper = yaml.safe_load(text)
    small = {
        "dataset": str(path24), "patch_size": 64, "draw": 3, "input_size": 32,
        "network": "vgg16", "weights": "random", "c_values": [0.001, 0.1],
        "svm_jobs": 1, "epochs": {"head": 1, "tuned": 1, "scratch": 1}, "steps": 2,
        "train_batch": 4, "scratch_size": 16, "scratch_widths": [4, 8],
        "train_seeds": [0], "workers": 0, "n_boot": 50, "hidden": 8,
        "results": str(tmp_path / "results.json"),
    }  # fmt: skip
    papermill.execute_notebook(
        str(root / "notebooks" / f"{CHAPTER}.ipynb"), str(tmp_path / "out.ipynb"),
        paper | small, cwd=str(root), progress_bar=False,
    )  # fmt: skip
    found = json.loads((tmp_path / "results.json").read_text("utf8"))
    assert set(found["scores"]) == {"scan"}, "no patient is left out in Path24"
    assert {"head, grey", "tuned, grey", "scratch, grey"} <= set(found["trained"])
    assert found["trained"]["tuned, grey"]["share right"]["queries"] == 6
    assert found["checks"]["VGG16"] == [7_079_424, 25_088, 6_422_784, 6_168]
    assert {run["way"] for run in found["runs"]} == {"head", "tuned", "scratch"}
    assert found["chosen_rates"] == dict.fromkeys(("head", "tuned", "scratch"), 1e-4)
