"""Labelled batches to train on: who stands in which batch, and how it is turned.

The order of a run depends on the seed and the epoch alone, and every patch is drawn
with a number of its own from which its augmentation follows. So a run that was killed
goes on as if it had not been, whatever the number of worker processes, and several
training processes share one global batch. (pytorch-metric-learning's sampler draws
from a global generator and can do neither.)
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from histo_utils import patches
from histo_utils.loaders import colour


class BatchOrder(Sampler):
    """Which items form each batch of an epoch.

    Parameters
    ----------
    labels : (n,) array
    batch_size : int
        Of all processes together.
    per_class : int, optional
        So many items of each class in a batch; classes are drawn anew for each batch,
        items of a class come round before they repeat within an epoch. Default: every
        item once an epoch, in any mixture.
    steps : int, optional
        Batches an epoch; default ``n // batch_size``: the rest is left out, since a
        metric loss of a small last batch is another loss.
    seed, rank, world : int
        Process ``rank`` of ``world`` gets its part of every batch.

    Raises
    ------
    ValueError
        A batch larger than the data or not a multiple of ``per_class`` or ``world``,
        or more steps than the data gives without ``per_class``.
    """

    def __init__(
        self, labels, batch_size, per_class=None, steps=None, seed=0, rank=0, world=1
    ):
        self.codes = np.unique(np.asarray(labels), return_inverse=True)[1]
        whole = len(self.codes) // batch_size
        uneven = batch_size % world or (per_class and batch_size % per_class)
        if not whole or uneven or (steps and steps > whole and not per_class):
            raise ValueError(
                f"batches of {batch_size} (per_class={per_class}, steps={steps}) from "
                f"{len(self.codes)} items over {world} processes; expected at least "
                "one whole batch, a multiple of per_class and of the processes, and no "
                f"more steps than the data has ({whole}): lower batch_size or steps"
            )
        self.batch_size, self.per_class, self.seed = batch_size, per_class, seed
        self.steps, self.rank, self.world, self.epoch = steps or whole, rank, world, 0

    def set_epoch(self, epoch):
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self):
        return self.steps

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = self._by_class(rng) if self.per_class else self._mixed(rng)
        for batch in order:
            draws = rng.integers(2**31, size=len(batch))
            pairs = zip(batch.tolist(), draws.tolist(), strict=True)
            yield list(pairs)[self.rank :: self.world]

    def _mixed(self, rng):
        every = rng.permutation(len(self.codes))[: self.steps * self.batch_size]
        return every.reshape(self.steps, self.batch_size)

    def _by_class(self, rng):
        members = [np.flatnonzero(self.codes == c) for c in range(self.codes.max() + 1)]
        waiting = [rng.permutation(group) for group in members]
        many = self.batch_size // self.per_class
        for _ in range(self.steps):
            batch = []
            for c in np.resize(rng.permutation(len(members)), many):
                if len(waiting[c]) < self.per_class:
                    more = rng.permutation(members[c])
                    times = -(-self.per_class // len(more))
                    waiting[c] = np.concatenate([waiting[c], np.tile(more, times)])
                batch.append(waiting[c][: self.per_class])
                waiting[c] = waiting[c][self.per_class :]
            yield np.concatenate(batch)


class LabelledPatches(Dataset):
    """Augmented, prepared patches with their class numbers.

    Parameters
    ----------
    table : pandas.DataFrame
        A patch table.
    labels : (n,) array
        Classes are numbered in sorted order.
    transform : callable, optional
        ``transform(image, slide)`` -> uint8 image (`loaders.colour`, …).
    augment : callable, optional
        uint8 tensor (3, h, w) -> the like; any of torchvision.transforms.v2. Its
        random numbers follow from the draw of `BatchOrder`.
    prepare : histo_utils.loaders.Preprocessing
    """

    def __init__(self, table, labels, transform=None, augment=None, *, prepare):
        self.table = patches.check_patches(table).reset_index(drop=True)
        self.codes = np.unique(np.asarray(labels), return_inverse=True)[1]
        self.transform = colour if transform is None else transform
        self.augment, self.prepare = augment, prepare

    def __len__(self):
        return len(self.table)

    def __getitem__(self, drawn):
        """Return the image and class of ``drawn = (position, draw)``."""
        position, draw = drawn
        row = self.table.iloc[position]
        image = self.transform(patches.read_patch(row), row["slide"])
        if self.augment is not None:
            tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(draw)
                image = self.augment(tensor).permute(1, 2, 0).numpy()
        return self.prepare(image), int(self.codes[position])


class StoredInputs(Dataset):
    """What a frozen part gave for every patch, once for each view, with class numbers.

    Parts of a network that are not trained need to run only once: training then costs
    only the part behind them.

    Parameters
    ----------
    views : list of (n, …) tensors, or of tuples of them (several maps)
        A view is what all patches give under one turn (`loaders.Turned`).
    labels : (n,) array
    """

    def __init__(self, views, labels):
        self.views = views
        self.codes = np.unique(np.asarray(labels), return_inverse=True)[1]

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, drawn):
        """Return the input and class of ``drawn = (position, draw)``."""
        position, draw = drawn
        view = self.views[draw % len(self.views)]
        several = isinstance(view, tuple)
        item = tuple(part[position] for part in view) if several else view[position]
        return item, int(self.codes[position])


def training_data(
    table, labels, rows, views=None, transform=None, augment=None, *, prepare=None,
    classes=None,
):  # fmt: skip
    """Make labelled items of some rows: of stored maps if given, else of images.

    Parameters
    ----------
    table : pandas.DataFrame
        A patch table.
    labels : (n,) array
        Of the whole table.
    rows : array of int
    views : list of (n, …) tensors, or of tuples of them, optional
        Of the whole table, as for `StoredInputs`.
    transform, augment, prepare
        As for `LabelledPatches`; not used with ``views``.
    classes : array, optional
        Sorted; labels are numbered by their place in it. Default: those of the rows.
    """
    labels = np.asarray(labels)[rows]
    if views is None:
        some = table.iloc[rows]
        data = LabelledPatches(some, labels, transform, augment, prepare=prepare)
    else:
        data = StoredInputs([_rows_of(view, rows) for view in views], labels)
    if classes is not None:
        data.codes = np.searchsorted(classes, labels)
    return data


def _rows_of(view, rows):
    if isinstance(view, tuple):
        return tuple(part[rows] for part in view)
    return view[rows]


def training_batches(
    data, batch_size, per_class=None, *, steps=None, seed=0, workers=0, fabric=None
) -> DataLoader:
    """Batches for `training.fit`, in an order of the seed and the epoch alone.

    Parameters
    ----------
    data : LabelledPatches or StoredInputs
    batch_size, per_class, steps, seed
        See `BatchOrder`.
    workers : int
        Processes that read.
    fabric : lightning.fabric.Fabric, optional
        Where several processes train: each gets its part of the global batch.
    """
    place = {"rank": fabric.global_rank, "world": fabric.world_size} if fabric else {}
    order = BatchOrder(data.codes, batch_size, per_class, steps, seed, **place)
    return DataLoader(
        data, batch_sampler=order, num_workers=workers, pin_memory=_on_gpu(fabric),
        persistent_workers=False,
    )  # fmt: skip


def _on_gpu(fabric):
    return fabric is not None and fabric.device.type == "cuda"
