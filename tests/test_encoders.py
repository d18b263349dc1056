import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from histo_utils import catalog, patches
from histo_utils.embeddings import Embeddings
from histo_utils.encoders import Card, Encoder, Pooled, cache_key, embed, frozen
from histo_utils.loaders import Preprocessing, grey
from histo_utils.metrics import accuracy
from histo_utils.protocols import leave_one_out, patient_folds
from histo_utils.stains import StainFit, StainMatch

SMALL = "mobilenetv3_small_050"
SIDE = 40


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Eleven patches of noise around their own colour, in two slides."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("encoders")
    rows = []
    for name, n in (("a", 6), ("b", 5)):
        centre = rng.integers(60, 200, (1, n, 1, 3))
        image = centre + rng.integers(-50, 50, (SIDE, n, SIDE, 3))
        path = folder / f"{name}.png"
        Image.fromarray(image.reshape(SIDE, n * SIDE, 3).astype(np.uint8)).save(path)
        rows += [{"image": str(path), "x": i * SIDE, "slide": name} for i in range(n)]
    table = pd.DataFrame(rows).assign(y=0, size=SIDE, mpp=0.5, slide_mpp=0.5)
    return table.assign(patient=table["slide"], label=table["slide"])


class MeanAndMax(torch.nn.Module):
    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


def hand_made(network=None, dimension=6, mpp=None):
    card = Card("none", "mean and maximum", "MIT", mpp=mpp, tcga=False)
    return Encoder("by hand", network or MeanAndMax(), Preprocessing(), dimension, card)


def test_vectors_of_a_network_made_by_hand(table):
    made = embed(hand_made(), table, batch_size=4, progress=False)
    assert isinstance(made, Embeddings) and made.vectors.shape == (11, 6)
    for vector, row in zip(made.vectors, table.to_dict("records"), strict=True):
        pixels = patches.read_patch(row) / 255
        by_hand = [*pixels.mean((0, 1)), *pixels.max((0, 1))]
        np.testing.assert_allclose(vector, by_hand, atol=1e-6)
    assert made.table["x"].tolist() == table["x"].tolist()
    facts = made.table.attrs["embedding"]
    assert facts["patches_per_second"] > 0 and facts["encoder"] == "by hand"
    assert "embedding" not in table.attrs


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 2), (64, 0)])
def test_batches_change_nothing(table, batch_size, workers):
    encoder = frozen(SMALL, seed=0, size=64)
    whole = embed(encoder, table, batch_size=11, progress=False).vectors
    parts = embed(
        encoder, table, batch_size=batch_size, progress=False, workers=workers
    ).vectors
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_the_same_again_and_for_permuted_rows(table):
    encoder = frozen(SMALL, seed=0, size=64)
    first = embed(encoder, table, grey, progress=False).vectors
    assert (embed(encoder, table, grey, progress=False).vectors == first).all()
    order = np.random.default_rng(0).permutation(len(table))
    moved = embed(encoder, table.iloc[order], grey, progress=False).vectors
    np.testing.assert_allclose(moved, first[order], atol=1e-5)


def test_seeds_make_the_weights_and_leave_torch_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (frozen(SMALL, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert first.card.weights == "random, seed 0"
    assert not any(p.requires_grad for p in first.network.parameters())
    assert not any(m.training for m in first.network.modules())


def test_embedding_is_done_in_evaluation_mode_and_leaves_the_mode(table):
    encoder = frozen(SMALL, seed=0, size=64)
    calm = embed(encoder, table, progress=False).vectors
    before = encoder.fingerprint()
    encoder.network.train()
    encoder.network.network.bn1.eval()
    np.testing.assert_array_equal(embed(encoder, table, progress=False).vectors, calm)
    assert encoder.network.training and not encoder.network.network.bn1.training
    assert encoder.fingerprint() == before, "batch norm's statistics moved"


def test_weights_from_a_file_are_loaded_strictly(tmp_path, monkeypatch):
    source = frozen(SMALL, seed=7)
    state = source.network.network.state_dict()
    save_file(state, tmp_path / f"{SMALL}.mine.safetensors")
    monkeypatch.setenv("HISTO_WEIGHTS", str(tmp_path))
    found = frozen(SMALL)
    assert found.card.weights == f"{SMALL}.mine.safetensors"
    for a, b in zip(
        found.network.parameters(), source.network.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    torch.save(state, tmp_path / "plain.pth")
    given = frozen(SMALL, tmp_path / "plain.pth")
    assert given.card.weights == "plain.pth"
    state.pop("conv_stem.weight")
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(
        ValueError, match=r"short\.safetensors does not fit MobileNetV3"
    ):
        frozen(SMALL, tmp_path / "short.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        frozen(SMALL, tmp_path / "none.safetensors")


def test_neither_hub_nor_file_names_the_remedy(monkeypatch, tmp_path):
    def unreachable(name, pretrained=False, **options):
        assert pretrained
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", unreachable)
    monkeypatch.setenv("HISTO_WEIGHTS", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        frozen("vgg16.tv_in1k")
    page = "https://huggingface.co/timm/vgg16.tv_in1k/resolve/main/model.safetensors"
    for word in (str(tmp_path), "vgg16.tv_in1k.safetensors", page, "seed=0"):
        assert word in str(caught.value)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="no network 'mobilnetv2_100'; nearest: mobil"):
        frozen("mobilnetv2_100", seed=0)
    with pytest.raises(ValueError, match=r"no weights .vgg16.tv.; it has vgg16"):
        frozen("vgg16.tv", seed=0)
    with pytest.raises(ValueError, match="expected one"):
        frozen(SMALL, "file.safetensors", seed=0)


def test_preprocessing_is_that_of_the_weights():
    ours = frozen("mobilenetv2_100", seed=0)
    assert ours.preprocessing == Preprocessing((0.5,) * 3, (0.5,) * 3, 224, "bilinear")
    assert ours.dimension == 1280
    theirs = frozen("mobilenetv2_100.ra_in1k", seed=0)
    assert theirs.preprocessing.mean == (0.485, 0.456, 0.406)
    assert theirs.preprocessing.interpolation == "bicubic"


def test_kimianet_pooling_by_hand():
    torch.manual_seed(0)
    encoder = frozen("densenet121", seed=0, pooling="mean_before_relu")
    net = encoder.network.network
    norm = net.features.norm5
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        got = encoder.network(x)
        seen = []
        hook = norm.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        after = net.forward_features(x)
        hook.remove()
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    by_hand = (seen[0] - norm.running_mean[:, None, None]) * scale[:, None, None]
    by_hand = by_hand + norm.bias[:, None, None]
    assert got.shape == (2, 1024) == (2, encoder.dimension)
    np.testing.assert_allclose(got, by_hand.mean((2, 3)).detach(), atol=1e-5)
    np.testing.assert_allclose(F.relu(by_hand).detach(), after, atol=1e-5)
    usual = frozen("densenet121", seed=0).network(x)
    assert (got < 0).any() and (usual >= 0).all(), "another vector than timm's"


def test_pooling_is_checked():
    with pytest.raises(ValueError, match="unknown pooling 'max'; valid are head, mean"):
        frozen(SMALL, seed=0, pooling="max")
    with pytest.raises(ValueError, match="timm's DenseNets"):
        frozen(SMALL, seed=0, pooling="mean_before_relu")
    net = timm.create_model(SMALL).eval()
    x = torch.rand(1, 3, 64, 64)
    mean = net.forward_features(x).mean((2, 3))
    np.testing.assert_allclose(Pooled(net, "mean")(x).detach(), mean.detach())
    assert frozen(SMALL, seed=0, pooling="mean").dimension == mean.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dimension", "side"),
    [("vgg16.tv_in1k", 4096, 224), ("inception_v3.tv_in1k", 2048, 299)],
)
def test_the_papers_networks(table, name, dimension, side):
    encoder = frozen(name, seed=0)
    assert (encoder.dimension, encoder.preprocessing.size) == (dimension, side)
    made = embed(encoder, table.iloc[:2], progress=False)
    assert made.vectors.shape == (2, dimension)
    assert (made.vectors >= 0).all(), "after the ReLU"
    if dimension == 4096:
        net = encoder.network.network
        x = torch.stack([encoder.preprocessing(patches.read_patch(table.iloc[0]))])
        with torch.inference_mode():
            fc1 = F.relu(net.pre_logits.fc1(net.features(x)))
            fc2 = F.relu(net.pre_logits.fc2(fc1))[:, :, 0, 0]
        np.testing.assert_allclose(made.vectors[:1], fc2, atol=1e-5)


def test_nan_stops_with_patch_and_batch(table):
    class Breaks(torch.nn.Module):
        def forward(self, x):
            out = x.mean((2, 3))
            out[len(out) - 1] = float("nan")
            return out

    with pytest.raises(
        ValueError, match=r"for 1 of 4 patches in the batch of rows 0–3, .* row 3 \(.*a"
    ):
        embed(hand_made(Breaks(), 3), table, batch_size=4, progress=False)


def test_a_wrong_dimension_is_refused(table):
    with pytest.raises(
        ValueError, match=r"shape \(11, 6\); its dimension is said .* 7"
    ):
        embed(hand_made(dimension=7), table, progress=False)


def test_another_scale_than_the_encoders_warns(table):
    with pytest.warns(UserWarning, match=r"at 0.25 µm/px; 11 of 11 patches"):
        embed(hand_made(mpp=0.25), table, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed(hand_made(mpp=0.51), table, progress=False)


def test_cache_is_loaded_for_the_same_and_made_for_another(table, tmp_path):
    calls = []

    class Counting(MeanAndMax):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    encoder = hand_made(Counting())

    def run(table, transform=None, encoder=encoder):
        calls.clear()
        made = embed(encoder, table, transform, progress=False, cache=tmp_path)
        return made, sum(calls)

    first, n = run(table)
    assert n == 11
    again, n = run(table.assign(label="other"))
    assert n == 0 and (again.vectors == first.vectors).all()
    assert set(again.table["label"]) == {"other"}, "labels are the caller's"
    assert again.table.attrs["embedding"] == first.table.attrs["embedding"]
    assert run(table, grey)[1] == 11
    assert run(table.iloc[::-1])[1] == 11
    assert run(table.assign(size=SIDE - 1))[1] == 11
    assert run(table)[1] == 0
    folder = tmp_path / cache_key(encoder, table)
    (folder / "vectors.npy").write_bytes(b"damaged")
    made, n = run(table)
    assert n == 11 and (made.vectors == first.vectors).all()
    with pytest.raises(ValueError, match="has no name that tells it from another"):
        run(table, lambda image, slide: image)


def test_cache_key_follows_weights_files_and_transform(table):
    base = cache_key(frozen(SMALL, seed=0), table)
    assert cache_key(frozen(SMALL, seed=0), table) == base
    assert cache_key(frozen(SMALL, seed=1), table) != base
    assert cache_key(frozen(SMALL, seed=0, size=96), table) != base
    match = StainMatch({}, StainFit(np.eye(2, 3), np.ones(2), False))
    assert cache_key(frozen(SMALL, seed=0), table, match) != base
    path = Path(table["image"][0])
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert cache_key(frozen(SMALL, seed=0), table) != base


@pytest.fixture(scope="module")
def common(monuseg):
    folder = Path(os.environ.get("HISTO_WEIGHTS", "weights"))
    if not any(folder.glob("mobilenetv2_100.*safetensors")):
        pytest.skip(
            f"no weights: {folder} has no mobilenetv2_100; set HISTO_WEIGHTS to a "
            "folder that holds mobilenetv2_100.imagenet.safetensors"
        )
    table = catalog.patch_table("monuseg", folder=monuseg)
    return embed(frozen("mobilenetv2_100"), table, progress=False)


@pytest.mark.tissue
@pytest.mark.slow
def test_the_common_network_on_real_tissue(common):
    """Scores measured beforehand with the same weights: see the design's table."""
    scans = Embeddings(common.vectors, common.table.assign(label=common.table["slide"]))
    assert accuracy(leave_one_out(scans, 1)) == pytest.approx(0.824, abs=0.015)
    apart = leave_one_out(scans, 1, "touching")
    assert accuracy(apart) == pytest.approx(0.698, abs=0.015)
    organs = patient_folds(common, 1)
    assert accuracy(organs) == pytest.approx(0.442, abs=0.015)
    assert organs["patient"].nunique() == 43 and len(organs) == 688
