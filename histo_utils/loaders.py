"""Data sets to train on and to embed: images of a patch table, or cached maps.

Both kinds give a plain item for a position, ``data[i]``, and a varied one (augmented,
or another cached view) for a position with a random number, ``data[i, draw]``; so one
way to train and one to embed serve both. A *transform* changes what is seen and keeps
8-bit RGB: ``transform(image, slide)`` -> image, for `colour`, `grey` and
`stains.StainMatch`. `Preprocessing` then makes the tensor that a network takes.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset
from tqdm import tqdm

from histo_utils import patches

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class Preprocessing:
    """What a network takes: resized (never cropped), scaled to 0–1, normalised.

    ``mean`` and ``std`` are on the scale 0–1; ``size`` in pixels, None: as it is;
    ``interpolation`` is Pillow's, which smooths when it makes images smaller.

    Examples
    --------
    >>> white = np.full((250, 250, 3), 255, np.uint8)
    >>> tensor = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, size=224)(white)
    >>> tuple(tensor.shape), float(tensor.min()), float(tensor.max())
    ((3, 224, 224), 1.0, 1.0)
    """

    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    size: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"unknown interpolation {self.interpolation!r}; valid are "
                f"{', '.join(INTERPOLATIONS)}"
            )
        scale = [*self.mean, *self.std]
        if len(scale) != 6 or min(self.std) <= 0 or not all(map(math.isfinite, scale)):
            raise ValueError(
                f"mean={self.mean}, std={self.std}; expected three numbers each, the "
                "deviations above 0, on the scale 0–1"
            )

    def __call__(self, image):
        """Turn uint8 (h, w, 3) into float32 (3, size, size)."""
        if self.size is not None and image.shape[:2] != (self.size, self.size):
            how = INTERPOLATIONS[self.interpolation]
            resized = Image.fromarray(image).resize((self.size, self.size), how)
            image = np.asarray(resized)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (tensor - mean) / std


def colour(image, slide=None):
    """Leave the image as it is."""
    return image


def grey(image, slide=None):
    """Luma (0.299 R + 0.587 G + 0.114 B, rounded), the same in all three channels.

    Examples
    --------
    >>> grey(np.uint8([[[255, 0, 0]]])).tolist()
    [[[76, 76, 76]]]
    """
    luma = np.asarray(Image.fromarray(image).convert("L"))
    return np.repeat(luma[..., None], 3, axis=-1)


class Turned:
    """Turn a patch by quarter turns, and mirror it from the fourth on: eight views.

    ``first`` is a transform that is applied before, `grey` say.
    """

    def __init__(self, view, first=colour):
        if not 0 <= view < 8:
            raise ValueError(f"view={view}; expected 0 to 7")
        self.view, self.first = view, first

    @property
    def identity(self):
        """A name that differs where the result would; part of a cache's key."""
        own = getattr(self.first, "identity", None) or self.first.__qualname__
        return f"turned-{self.view}-{own}"

    def __call__(self, image, slide=None):
        """Return the turned image, uint8 (h, w, 3)."""
        image = np.rot90(self.first(image, slide), self.view % 4)
        return np.ascontiguousarray(image[:, ::-1] if self.view > 3 else image)


@dataclass(frozen=True)
class Resized:
    """Make a patch ``size`` px wide before it is cropped or turned."""

    size: int
    interpolation: str = "bicubic"

    @property
    def identity(self):
        """A name that differs where the result would; part of a cache's key."""
        return f"resized-{self.size}-{self.interpolation}"

    def __call__(self, image, slide=None):
        """Return uint8 (size, size, 3)."""
        how = INTERPOLATIONS[self.interpolation]
        return np.asarray(Image.fromarray(image).resize((self.size, self.size), how))


class PatchDataset(Dataset):
    """Images of a patch table, read and prepared at each access.

    Slides are opened on first use, in the process that uses them: the data set holds no
    file, so it can be pickled, and a `Slide` opens its file anew after a fork.

    Parameters
    ----------
    table : pandas.DataFrame
        A patch table; checked.
    transform : callable, optional
        ``transform(image, slide)`` on uint8 (h, w, 3); default `colour`. A function of
        a module or an object, so that spawned workers can load it (no lambda).
    augment : callable, optional
        uint8 tensor (3, h, w) -> the like, for ``data[i, draw]``; any of
        torchvision.transforms.v2. Its random numbers follow from ``draw``.
    prepare : callable, optional
        Image -> float tensor; default: to 0–1.
    """

    def __init__(self, table, transform=None, augment=None, *, prepare=None):
        self.table = patches.check_patches(table).reset_index(drop=True)
        self.transform = colour if transform is None else transform
        self.augment = augment
        self.prepare = Preprocessing() if prepare is None else prepare

    def __len__(self):
        return len(self.table)

    def __getitem__(self, item):
        """Return the image at ``i``, or the augmented one at ``(i, draw)``."""
        position, draw = item if isinstance(item, tuple) else (item, None)
        row = self.table.iloc[position]
        image = self.transform(patches.read_patch(row), row["slide"])
        if draw is not None and self.augment is not None:
            tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(draw)
                image = self.augment(tensor).permute(1, 2, 0).numpy()
        return self.prepare(image)


class CachedMaps(TensorDataset):
    """What a frozen part of a network gave for every patch, once for each view.

    Parts that are not trained run only once; training costs only the part behind them.
    ``views``: a list of (n, …) tensors, or of tuples of them (several maps), one per
    turn (`Turned`); the first is the plain one.
    """

    def __init__(self, views, table):
        views = [view if isinstance(view, tuple) else (view,) for view in views]
        super().__init__(*(maps for view in views for maps in view))
        self.table, self.n_views = table.reset_index(drop=True), len(views)

    def __getitem__(self, item):
        """Return the first view at ``i``, or the view of a draw at ``(i, draw)``."""
        position, draw = item if isinstance(item, tuple) else (item, 0)
        several = len(self.tensors) // self.n_views
        first = draw % self.n_views * several
        maps = tuple(t[position] for t in self.tensors[first : first + several])
        return maps if several > 1 else maps[0]


def training_batches(
    data, labels, rows, batch_size, per_class=None, *, classes=None, steps=None, seed=0,
    workers=0,
) -> DataLoader:  # fmt: skip
    """Batches of (inputs, class numbers) for `training.fit`.

    Parameters
    ----------
    data : PatchDataset or CachedMaps
    labels : (n,) array
        Of the whole data set.
    rows : (n,) bool array, or array of int
        Items to train on.
    batch_size : int
        Of all processes together.
    per_class : int, optional
        Items of each class in a batch; classes are drawn anew for each batch, items of
        a class come round before they repeat within an epoch. Default: every item once
        per epoch, in any mixture.
    classes : array, optional
        Sorted; labels are numbered by their place in it. Default: those of the rows.
    steps : int, optional
        Batches per epoch; default ``n // batch_size``: the rest is left out, since a
        metric loss of a small last batch is another loss.
    seed, workers : int

    Raises
    ------
    ValueError
        A batch larger than the data or not a multiple of ``per_class``, or more steps
        than the data gives without ``per_class``.
    """
    rows = np.arange(len(data))[rows]
    known, codes = np.unique(np.asarray(labels)[rows], return_inverse=True)
    if classes is not None:
        codes = np.searchsorted(classes, known)[codes]
    order = BatchOrder(codes, batch_size, per_class, steps, seed)
    return DataLoader(
        _Labelled(data, rows, codes), batch_sampler=order, num_workers=workers,
        pin_memory=torch.cuda.device_count() > 0,  # is_available would forbid forks
    )  # fmt: skip


class _Labelled(Dataset):
    """Varied items of some rows, with their class numbers."""

    def __init__(self, data, rows, codes):
        self.data, self.rows, self.codes = data, rows.tolist(), codes.tolist()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        position, draw = item
        return self.data[self.rows[position], draw], self.codes[position]


class BatchOrder(Sampler):
    """Which items form each batch of an epoch, by seed and epoch alone.

    Yields lists of (item, draw); an item's augmentation follows from its draw, so a run
    that was killed goes on as if it had not been, whatever the number of workers, and
    several processes share one global batch. (pytorch-metric-learning's sampler draws
    from a global generator and can do neither.) Parameters: `training_batches`.
    """

    def __init__(self, labels, batch_size, per_class=None, steps=None, seed=0):
        self.codes = np.unique(np.asarray(labels), return_inverse=True)[1]
        whole = len(self.codes) // batch_size
        uneven = per_class and batch_size % per_class
        if not whole or uneven or (steps and steps > whole and not per_class):
            raise ValueError(
                f"batches of {batch_size} (per_class={per_class}, steps={steps}) from "
                f"{len(self.codes)} items; expected at least one whole batch, a "
                "multiple of per_class, and no more steps than the data has "
                f"({whole}): lower batch_size or steps"
            )
        self.batch_size, self.per_class, self.seed = batch_size, per_class, seed
        self.steps, self.rank, self.world, self.epoch = steps or whole, 0, 1, 0

    def share(self, rank, world):
        """Yield only the items of one of several processes."""
        if self.batch_size % world:
            raise ValueError(
                f"batches of {self.batch_size} over {world} processes; expected a "
                "multiple: change batch_size or devices"
            )
        self.rank, self.world = rank, world

    def set_epoch(self, epoch):
        """Set the epoch whose order comes next."""
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


def outputs(network, data, rows=None, batch_size=64, *, workers=0, progress=None):
    """Run a network over plain items of a data set, on the device it is on.

    In evaluation mode, without gradients. Returns float32 on the CPU: (n, …), or a
    tuple for a network with several maps. ``rows``: a mask or positions, default all;
    ``progress`` names a bar.
    """
    rows = np.arange(len(data))[slice(None) if rows is None else rows].tolist()
    place = next((p.device for p in network.parameters()), torch.device("cpu"))
    found, start = None, 0
    bar = tqdm(
        total=len(rows), desc=progress, unit="patch", ascii=True, disable=not progress
    )
    with bar, torch.no_grad(), _evaluating(network), _full_precision(place):
        for batch in DataLoader(Subset(data, rows), batch_size, num_workers=workers):
            several = isinstance(batch, list)
            batch = [x.to(place) for x in batch] if several else batch.to(place)
            given = network(batch)
            maps = [given] if torch.is_tensor(given) else list(given)
            if found is None:
                found = [torch.empty(len(rows), *m.shape[1:]) for m in maps]
            for whole, part in zip(found, maps, strict=True):
                whole[start : start + len(part)] = part.float().cpu()
            start += len(maps[0])
            bar.update(len(maps[0]))
    if found is None:
        raise ValueError("no rows to run the network on; give one at least")
    return found[0] if torch.is_tensor(given) else tuple(found)


@contextlib.contextmanager
def _evaluating(network):
    """Switch to evaluation mode inside, to each part's own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _full_precision(device):
    """On a GPU: no TF32, no search for the fastest convolution, so CPU's vectors."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
