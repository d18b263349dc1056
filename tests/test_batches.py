"""Batches: their order follows from seed and epoch, their classes are balanced."""

import numpy as np
import pytest
import torch

from histo_utils import catalog, patches
from histo_utils.batches import (
    BatchOrder,
    LabelledPatches,
    StoredInputs,
    training_batches,
    training_data,
)
from histo_utils.loaders import Preprocessing, Resized, Turned, grey

LABELS = np.repeat(["a", "b", "c", "d"], [3, 10, 10, 17])


def drawn(order, epoch):
    order.set_epoch(epoch)
    return list(order)


def test_every_batch_holds_so_many_of_each_class():
    for batch in drawn(BatchOrder(LABELS, 12, 4, seed=2), 5):
        names, counts = np.unique(LABELS[[i for i, _ in batch]], return_counts=True)
        assert len(names) == 3 and set(counts) == {4}


def test_items_come_round_before_they_repeat():
    batches = drawn(BatchOrder(np.repeat(["a", "b"], 8), 8, 4, steps=2), 1)
    assert len({i for batch in batches for i, _ in batch}) == 16


def test_mixed_batches_hold_each_item_once():
    items = [i for batch in drawn(BatchOrder(LABELS, 8), 3) for i, _ in batch]
    assert sorted(items) == list(range(40))


def test_the_order_is_that_of_seed_and_epoch():
    first, again = (BatchOrder(LABELS, 8, 4, seed=1) for _ in range(2))
    drawn(first, 1)  # an epoch before changes nothing
    assert drawn(first, 2) == drawn(again, 2)
    assert drawn(first, 2) != drawn(first, 3)
    assert drawn(first, 2) != drawn(BatchOrder(LABELS, 8, 4, seed=2), 2)


def test_processes_share_one_global_batch():
    whole = drawn(BatchOrder(LABELS, 8, 4), 1)
    parts = [drawn(BatchOrder(LABELS, 8, 4, rank=r, world=2), 1) for r in (0, 1)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(shares[0] + shares[1])
        assert len(shares[0]) == 4


@pytest.mark.parametrize(
    "how", [{"batch_size": 41}, {"batch_size": 10, "per_class": 4},
            {"batch_size": 9, "world": 2}, {"batch_size": 20, "steps": 3}],
)  # fmt: skip
def test_impossible_batches_are_refused(how):
    with pytest.raises(ValueError, match="expected at least one whole batch"):
        BatchOrder(LABELS, **how)


def test_eight_turns_are_all_different_and_keep_the_pixels():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    views = [Turned(v)(image) for v in range(8)]
    assert len({view.tobytes() for view in views}) == 8
    for view in views:
        assert sorted(map(tuple, view.reshape(-1, 3))) == sorted(
            map(tuple, image.reshape(-1, 3))
        )
    assert np.array_equal(views[1], np.rot90(image))
    assert np.array_equal(views[4], image[:, ::-1])
    assert Turned(1).identity != Turned(1, grey).identity != Turned(2, grey).identity


def test_stored_inputs_take_the_view_that_was_drawn():
    views = [torch.full((5, 2), float(v)) for v in range(3)]
    data = StoredInputs(views, list("abcab"))
    assert data[(1, 7)][0].tolist() == [1.0, 1.0] and data[(1, 7)][1] == 1
    maps = StoredInputs([(torch.zeros(5, 1), torch.ones(5, 2))], list("abcab"))
    assert [part.tolist() for part in maps[(0, 0)][0]] == [[0.0], [1.0, 1.0]]


@pytest.fixture(scope="module")
def table(phantoms):
    folder, _ = phantoms
    return catalog.patch_table(str(folder), 256, 0.5).iloc[:12].reset_index(drop=True)


class Noise:
    """An augmentation with torch's random numbers, as torchvision's are."""

    def __call__(self, image):
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        return image ^ torch.randint(0, 255, image.shape, dtype=torch.uint8)


def test_augmentation_follows_from_the_draw_alone(table):
    data = LabelledPatches(
        table, table["label"], augment=Noise(), prepare=Preprocessing(size=64)
    )
    torch.manual_seed(0)
    first = data[(3, 11)][0]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(data[(3, 11)][0], first)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's is left alone
    assert not torch.equal(data[(3, 12)][0], first)


def test_workers_change_nothing(table):
    data = LabelledPatches(
        table, table["label"], augment=Noise(), prepare=Preprocessing(size=32)
    )
    found = []
    for workers in (0, 2):
        batches = training_batches(data, 4, seed=3, workers=workers)
        batches.batch_sampler.set_epoch(2)
        found.append(list(batches))
    for (x, y), (again, labels) in zip(*found, strict=True):
        assert torch.equal(x, again) and torch.equal(y, labels)


def test_without_augmentation_it_is_the_prepared_patch(table):
    prepare = Preprocessing(size=48)
    data = LabelledPatches(table, table["label"], grey, prepare=prepare)
    image, code = data[(5, 1)]
    row = table.iloc[5]
    assert torch.equal(image, prepare(grey(patches.read_patch(row))))
    assert code == sorted(set(table["label"])).index(row["label"])


def test_rows_train_from_stored_maps_or_from_images(table):
    labels, rows = table["label"].to_numpy(), np.array([7, 2, 5])
    one = torch.arange(len(table)).float()[:, None]
    data = training_data(table, labels, rows, [one, (one, one + 100)])
    assert [data[(i, 0)][0].item() for i in range(3)] == [7, 2, 5]
    assert [part.item() for part in data[(0, 1)][0]] == [7, 107]
    prepare = Preprocessing(size=32)
    data = training_data(table, labels, rows, transform=grey, prepare=prepare)
    seen = prepare(grey(patches.read_patch(table.iloc[2])))
    assert torch.equal(data[(1, 0)][0], seen)
    names = np.unique(labels[rows])
    assert list(names[data.codes]) == list(labels[rows])
    every = np.array(["0", *np.unique(labels)])  # numbered over more than these rows
    data = training_data(table, labels, rows, [one], classes=every)
    assert list(every[data.codes]) == list(labels[rows])


def test_resized():
    assert Resized(30)(np.zeros((100, 100, 3), np.uint8)).shape == (30, 30, 3)
