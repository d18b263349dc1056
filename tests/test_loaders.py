"""Data sets of either kind; batches whose order follows from seed and epoch alone."""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.ndimage import median_filter
from torch import nn

from histo_utils import catalog, patches
from histo_utils.loaders import (
    BatchOrder,
    CachedMaps,
    MedianBlur,
    PatchDataset,
    Preprocessing,
    Resized,
    Turned,
    colour,
    grey,
    outputs,
    resized_once,
    training_batches,
)

LABELS = np.repeat(["a", "b", "c", "d"], [3, 10, 10, 17])


@pytest.fixture(scope="module")
def table(phantoms):
    folder, _ = phantoms
    return catalog.patch_table(str(folder), 256, 0.5).iloc[:12].reset_index(drop=True)


class Noise:
    """An augmentation with torch's random numbers, as torchvision's are."""

    def __call__(self, image):
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        return image ^ torch.randint(0, 255, image.shape, dtype=torch.uint8)


def test_items_are_the_patches_in_table_order(table):
    data = PatchDataset(table)
    assert len(data) == len(table)
    for i in (0, 7, len(table) - 1):
        pixels = patches.read_patch(table.iloc[i]).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(data[i].numpy(), pixels, atol=1e-6)
    small = Preprocessing(size=48)
    image = PatchDataset(table, grey, prepare=small)[5]
    assert torch.equal(image, small(grey(patches.read_patch(table.iloc[5]))))


def test_nothing_is_opened_before_it_is_needed_and_a_copy_gives_the_same(table):
    data = PatchDataset(table.assign(image=[*table["image"][:-1], "gone.png"]))
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 100_000
    assert torch.equal(copy[0], data[0])
    with pytest.raises(Exception, match=r"gone\.png"):
        data[len(table) - 1]
    with pytest.raises(ValueError, match="the patch table is empty"):
        PatchDataset(table.iloc[:0])


def test_augmentation_follows_from_the_draw_alone(table):
    data = PatchDataset(table, augment=Noise(), prepare=Preprocessing(size=64))
    torch.manual_seed(0)
    first = data[3, 11]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(data[3, 11], first)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's is left alone
    assert not torch.equal(data[3, 12], first)
    assert torch.equal(data[3], PatchDataset(table, prepare=Preprocessing(size=64))[3])


def test_cached_maps_give_the_first_view_or_that_of_the_draw(table):
    views = [torch.full((12, 2), float(v)) for v in range(3)]
    data = CachedMaps(views, table)
    assert data[1].tolist() == [0, 0] and data[1, 7].tolist() == [1, 1]
    maps = CachedMaps([(torch.zeros(12, 1), torch.ones(12, 2))], table)
    assert [part.tolist() for part in maps[0]] == [[0.0], [1.0, 1.0]]
    assert [part.tolist() for part in maps[0, 5]] == [[0.0], [1.0, 1.0]]


def test_training_batches_number_the_classes_of_their_rows(table):
    labels = np.array(list("cabcabcabcab"))
    one = torch.arange(12).float()[:, None]
    rows = np.array([7, 2, 5, 0])  # a b b c
    for given in (rows, np.isin(np.arange(12), rows)):
        batches = training_batches(CachedMaps([one], table), labels, given, 4)
        inputs, codes = next(iter(batches))
        names = np.array(list("abc"))[codes.numpy()]
        assert names.tolist() == labels[inputs[:, 0].int().numpy()].tolist()
    wide = {"classes": list("0abc")}  # numbered over more than these rows
    batches = training_batches(CachedMaps([one], table), labels, rows, 4, **wide)
    assert set(next(iter(batches))[1].tolist()) == {1, 2, 3}


def test_workers_change_nothing(table):
    data = PatchDataset(table, augment=Noise(), prepare=Preprocessing(size=32))
    found = []
    for workers in (0, 2):
        rows = np.arange(12) > 1
        batches = training_batches(
            data, table["label"], rows, 4, seed=3, workers=workers
        )
        batches.batch_sampler.set_epoch(2)
        found.append(list(batches))
    for (x, y), (again, labels) in zip(*found, strict=True):
        assert torch.equal(x, again) and torch.equal(y, labels)


def batches_of(order, epoch):
    order.set_epoch(epoch)
    return list(order)


def test_every_batch_holds_so_many_of_each_class():
    for batch in batches_of(BatchOrder(LABELS, 12, 4, seed=2), 5):
        names, counts = np.unique(LABELS[[i for i, _ in batch]], return_counts=True)
        assert len(names) == 3 and set(counts) == {4}


def test_items_come_round_before_they_repeat():
    batches = batches_of(BatchOrder(np.repeat(["a", "b"], 8), 8, 4, steps=2), 1)
    assert len({i for batch in batches for i, _ in batch}) == 16
    items = [i for batch in batches_of(BatchOrder(LABELS, 8), 3) for i, _ in batch]
    assert sorted(items) == list(range(40))


def test_the_order_is_that_of_seed_and_epoch():
    first, again = (BatchOrder(LABELS, 8, 4, seed=1) for _ in range(2))
    batches_of(first, 1)  # an epoch before changes nothing
    assert batches_of(first, 2) == batches_of(again, 2)
    assert batches_of(first, 2) != batches_of(first, 3)
    assert batches_of(first, 2) != batches_of(BatchOrder(LABELS, 8, 4, seed=2), 2)


def test_processes_share_one_global_batch():
    whole = batches_of(BatchOrder(LABELS, 8, 4), 1)
    orders = [BatchOrder(LABELS, 8, 4) for _ in range(2)]
    for rank, order in enumerate(orders):
        order.share(rank, 2)
    parts = [batches_of(order, 1) for order in orders]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(shares[0] + shares[1])
        assert len(shares[0]) == 4


@pytest.mark.parametrize(
    "how", [{"batch_size": 41}, {"batch_size": 10, "per_class": 4},
            {"batch_size": 20, "steps": 3}],
)  # fmt: skip
def test_impossible_batches_are_refused(how):
    with pytest.raises(ValueError, match="expected at least one whole batch"):
        BatchOrder(LABELS, **how)
    with pytest.raises(ValueError, match="batches of 9 over 2 processes"):
        BatchOrder(LABELS, 9).share(0, 2)


class TwoMaps(nn.Module):
    """Two maps, and a dropout that must be off."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return [self.dropout(x), x[:, :1] + 1]


def test_outputs_are_those_of_one_batch_in_evaluation_mode(table):
    data = CachedMaps([torch.randn(12, 4)], table)
    network = TwoMaps().train()
    rows = np.array([5, 1, 8, 2, 11])
    first, second = outputs(network, data, rows, batch_size=2)
    assert torch.equal(first, data.tensors[0][rows])
    assert torch.equal(second, data.tensors[0][rows, :1] + 1)
    assert network.training and network.dropout.training
    mask = np.isin(np.arange(12), rows)
    whole = outputs(nn.Identity(), data, mask)
    assert (
        torch.equal(whole, data.tensors[0][np.sort(rows)]) and not whole.requires_grad
    )
    with pytest.raises(ValueError, match="no rows"):
        outputs(network, data, [])


def test_eight_turns_are_all_different_and_keep_the_pixels():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    views = [Turned(v)(image) for v in range(8)]
    assert len({view.tobytes() for view in views}) == 8
    for view in views:
        pixels = sorted(map(tuple, image.reshape(-1, 3)))
        assert sorted(map(tuple, view.reshape(-1, 3))) == pixels
    assert np.array_equal(views[1], np.rot90(image))
    assert np.array_equal(views[4], image[:, ::-1])
    assert Turned(1).identity != Turned(1, grey).identity != Turned(2, grey).identity


def test_preprocessing_by_hand():
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    made = Preprocessing((0.1, 0.2, 0.3), (0.5, 0.25, 2.0))(image)
    for c, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (0.5, 0.25, 2), strict=True)):
        by_hand = (image[..., c] / 255 - mean) / std
        np.testing.assert_allclose(made[c].numpy(), by_hand, atol=1e-6)
    half = Preprocessing((0.5,) * 3, (0.5,) * 3, size=2)(image)
    small = np.asarray(Image.fromarray(image).resize((2, 2), Image.Resampling.BILINEAR))
    expected = small.transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(half.numpy(), expected, atol=1e-6)
    assert Resized(30)(np.zeros((100, 100, 3), np.uint8)).shape == (30, 30, 3)
    with pytest.raises(ValueError, match="unknown interpolation 'cubic'; valid are"):
        Preprocessing(interpolation="cubic")
    with pytest.raises(ValueError, match="the deviations above 0"):
        Preprocessing(std=(1.0, 0.0, 1.0))


def test_grey_is_grey():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    made = grey(image)
    assert made.shape == image.shape and made.dtype == np.uint8
    assert (made[..., 0] == made[..., 1]).all() and (made[..., 1] == made[..., 2]).all()
    luma = image @ np.array([0.299, 0.587, 0.114])
    assert abs(made[..., 0] - luma).max() <= 1
    assert (grey(made) == made).all()
    assert colour(image) is image


@pytest.mark.parametrize("workers", [0, 2])
def test_patches_are_resized_once(tmp_path, monkeypatch, workers):
    """Values as Pillow's; what is there is not read again; a new source is."""
    rng, rows = np.random.default_rng(0), []
    for part in ("train", "test"):  # the same name twice
        (tmp_path / part / "s0").mkdir(parents=True)
        path = tmp_path / part / "s0" / "s0_1.png"
        Image.fromarray(rng.integers(0, 255, (50, 50, 3), np.uint8)).save(path)
        rows.append({"image": str(path), "x": 0, "y": 0, "size": 50, "mpp": 0.5})
    table = pd.DataFrame(rows).assign(slide="s0", slide_mpp=0.5, patient=None, label=1)
    made = resized_once(table, 20, "bicubic", tmp_path / "small", workers)
    for image, row in zip(table["image"], made.to_dict("records"), strict=True):
        expected = Image.open(image).resize((20, 20), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(Image.open(row["image"])), expected)
        assert np.array_equal(patches.read_patch(row), expected)
        assert (row["size"], row["mpp"], row["slide_mpp"]) == (20, 1.25, 1.25)
    assert made["label"].tolist() == [1, 1] and made["image"].nunique() == 2
    assert not list((tmp_path / "small").rglob("*.part"))
    read, original = [], patches.read_patch
    monkeypatch.setattr(patches, "read_patch", lambda r: read.append(r) or original(r))
    Path(made["image"][1]).unlink()  # as after a kill
    resized_once(table, 20, "bicubic", tmp_path / "small")
    assert [r["image"] for r in read] == [table["image"][1]]
    Image.new("RGB", (50, 50), "red").save(table["image"][0])
    patches._opened.cache_clear()  # it holds the old file
    again = resized_once(table, 20, "bicubic", tmp_path / "small")
    assert patches.read_patch(again.iloc[0])[0, 0].tolist() == [255, 0, 0]
    assert again["image"][1] == made["image"][1]


def test_resized_copies_as_jpeg_and_what_is_refused(tmp_path, table):
    made = resized_once(table, 64, "bilinear", tmp_path, suffix=".jpg")
    for i in (0, 11):
        whole = patches.read_patch(table.iloc[i])
        expected = Resized(64, "bilinear")(whole).astype(float)
        assert np.abs(patches.read_patch(made.iloc[i]) - expected).mean() < 3
    assert not made["x"].any() and made["mpp"].eq(0.5 * 256 / 64).all()
    for wrong in ({"suffix": ".gif"}, {"interpolation": "best"}, {"size": 0}):
        how = {"size": 64, "interpolation": "bicubic", "folder": tmp_path} | wrong
        with pytest.raises(ValueError, match="expected 1 px or more"):
            resized_once(table, **how)


@pytest.mark.parametrize("side", [3, 5])
def test_median_blur_is_scipys(side):
    image = np.random.default_rng(0).integers(0, 256, (3, 17, 12), np.uint8)
    expected = median_filter(image, (1, side, side), mode="mirror")
    assert np.array_equal(MedianBlur(side)(torch.from_numpy(image)), expected)
