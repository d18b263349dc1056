"""From a patch table to batches of tensors: the data set, its transforms, the loader.

A *transform* changes what is seen and keeps 8-bit RGB: ``transform(image, slide)`` ->
image, for `colour`, `grey` and `StainMatch`. *Preparing* then turns the image into what
a network takes: `Preprocessing`. The two are kept apart because the first is a choice
of the experiment and the second a property of the network.

Stains are fitted after Macenko et al. (ISBI 2009), by `stains.macenko_stains`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from histo_utils import patches

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class PatchDataset(Dataset):
    """Patches of a table as tensors, read when asked for.

    Slides are opened on first use, in the process that uses them: the data set holds
    no file, so it can be pickled, and a `Slide` opens its file anew after a fork.

    Parameters
    ----------
    table : pandas.DataFrame
        A patch table; checked.
    transform : callable, optional
        ``transform(image, slide)`` on uint8 (h, w, 3); default `colour`. A function of
        a module or an object, so that spawned workers can load it (no lambda).
    prepare : callable, optional
        Image -> float tensor; default `Preprocessing` without resizing or scaling
        beyond 0–1.

    Raises
    ------
    ValueError
        As `patches.check_patches`.
    """

    def __init__(self, table, transform=None, prepare=None):
        self.table = patches.check_patches(table).reset_index(drop=True)
        self.transform = colour if transform is None else transform
        self.prepare = _UNSCALED if prepare is None else prepare

    def __len__(self):
        return len(self.table)

    def __getitem__(self, position):
        """Return the prepared patch and its position in the table."""
        row = self.table.iloc[position]
        image = self.transform(patches.read_patch(row), row["slide"])
        return self.prepare(image), position


def loader(
    table, transform=None, prepare=None, *, batch_size=64, shuffle=False, seed=0,
    workers=0, start=None,
) -> DataLoader:  # fmt: skip
    """Batches of (tensor (b, 3, h, w), positions (b,)) over a patch table.

    Parameters
    ----------
    table, transform, prepare
        See `PatchDataset`.
    batch_size : int
    shuffle : bool
        Table order, or an order that depends on ``seed`` and the epoch alone.
    seed : int
    workers : int
        Processes that read; 0 reads in this one.
    start : {"fork", "spawn", "forkserver"}, optional
        How workers start; the platform's default.

    Raises
    ------
    ValueError
        A batch size below 1, fewer than 0 workers; and as `PatchDataset`.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(
            f"batch_size={batch_size}, workers={workers}; expected 1 or more patches a "
            "batch and 0 or more workers"
        )
    return DataLoader(
        PatchDataset(table, transform, prepare),
        batch_size=batch_size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        multiprocessing_context=start if workers else None,
    )


@dataclass(frozen=True)
class Preprocessing:
    """What a network wants done to an image: resize, scale to 0–1, subtract, divide.

    The whole patch is resized; nothing is cropped, since its edge belongs to the field
    of view.

    Parameters
    ----------
    mean, std : tuple of 3 floats
        Of the 0–1 scale. (0.5, 0.5, 0.5) for both is RGB/127.5 - 1.
    size : int or None
        Side in pixels that images are resized to; None leaves them as they are.
    interpolation : {"nearest", "bilinear", "bicubic"}
        Of Pillow, which smooths when it makes images smaller.

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


_UNSCALED = Preprocessing()


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

    Tissue has no upright; these turns move pixels and change none.

    Parameters
    ----------
    view : int
        0–7; 0 leaves the patch as it is.
    first : callable, optional
        A transform that is applied before (`loaders.grey`).
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
    """Make a patch ``size`` px wide before it is cropped or turned (Yang 2019: 300).

    Parameters
    ----------
    size : int
    interpolation : {"nearest", "bilinear", "bicubic"}
    """

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
