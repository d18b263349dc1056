"""Patches to vectors: images of a patch table or cached maps, with a disk cache."""

from __future__ import annotations

import hashlib
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from histo_utils import provenance
from histo_utils.embeddings import Embeddings, load_embeddings
from histo_utils.encoders.encoder import Encoder
from histo_utils.loaders import CachedMaps, PatchDataset, Turned, colour, outputs

# What decides a patch's pixels: the part of a table that a cache depends on.
PIXEL_COLUMNS = ("image", "x", "y", "size", "mpp", "slide_mpp", "slide")


def embed(
    encoder, table, transform=None, batch_size=None, device=None, progress=True, *,
    rows=None, workers=0, cache=None,
) -> Embeddings:  # fmt: skip
    """Turn every patch into a vector; the same whatever the batch size.

    Parameters
    ----------
    encoder : Encoder, or torch.nn.Module
        A module with a data set: the part of a network that takes its items.
    table : pandas.DataFrame, or loaders.PatchDataset or loaders.CachedMaps
        A patch table, read as images; or a data set (`inputs`), for a module.
    transform : callable, optional
        ``transform(image, slide)``: `loaders.colour` (default), `loaders.grey`, a
        `stains.StainMatch`.
    batch_size : int, optional
        Default 32 images, or 64 items of a data set. On two CPU cores 16 was faster
        than 64.
    device : str, optional
        Where an encoder runs (default: a GPU if there is one); it is moved back
        afterwards. A module runs where it is.
    progress : bool
        Show a bar.
    rows : (n,) bool array, or array of int, optional
        Of a data set: embed these alone.
    workers : int
        Processes that read patches.
    cache : path, optional
        A folder. Vectors are loaded from it if the same encoder (weights included),
        pixels and transform were embedded before, else made and saved there; labels
        and other columns are always those of ``table``.

    Returns
    -------
    Embeddings
        Of an encoder, with time and throughput in ``table.attrs["embedding"]``.

    Raises
    ------
    ValueError
        NaN or infinity in a vector (patch and batch are named), vectors of another
        dimension than the encoder says; a transform without a name of its own under
        ``cache``; and as `loaders.PatchDataset`.

    Warns
    -----
    UserWarning
        Patches more than 5 % off the µm per pixel that the encoder was trained at.
    """
    if not isinstance(table, pd.DataFrame):
        found = outputs(encoder, table, rows, batch_size or 64, workers=workers)
        some = table.table if rows is None else table.table.iloc[_positions(rows)]
        return Embeddings(_finite(found.numpy(), some, batch_size or 64), some)
    transform, batch_size = transform or colour, batch_size or 32
    _check_scale(encoder, table)
    data = PatchDataset(table, transform, prepare=encoder.preprocessing)
    place = cache and Path(cache) / cache_key(encoder, table, transform)
    known = _cached(place, table) if place else None
    if known is not None:
        return known
    home = next((p.device for p in encoder.network.parameters()), torch.device("cpu"))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    start, how = time.perf_counter(), {"workers": workers}
    how["progress"] = encoder.name if progress else None
    try:
        found = outputs(encoder.network.to(device), data, None, batch_size, **how)
    finally:
        encoder.network.to(home)
    if found.ndim != 2 or found.shape[1] != encoder.dimension:
        raise ValueError(
            f"{encoder.name} gave vectors of shape {tuple(found.shape)}; its dimension "
            f"is said to be {encoder.dimension}: correct the encoder"
        )
    seconds = time.perf_counter() - start
    made = Embeddings(_finite(found.numpy(), table, batch_size, encoder.name), table)
    made.table.attrs = {**table.attrs, "embedding": {
        "encoder": encoder.name, "weights": encoder.card.weights,
        "transform": identity(transform), "device": str(device),
        "batch_size": batch_size, "seconds": round(seconds, 3),
        "patches_per_second": round(len(table) / seconds, 2),
    }}  # fmt: skip
    if place:
        columns = [c for c in PIXEL_COLUMNS if c in made.table]
        Embeddings(made.vectors, made.table[columns]).save(place)
    return made


def inputs(
    encoder, table, front=None, turns=(0,), transform=colour, augment=None, *,
    batch_size=16, cache=None, progress=False, workers=0,
) -> PatchDataset | CachedMaps:  # fmt: skip
    """Make the data set that the trained part of an encoder takes.

    ``front`` is the frozen part in front of it (`networks.finetune.cut`): it runs once
    over every patch under each of ``turns`` (`loaders.Turned`; the first should be 0),
    and its maps are the items. Without it (None) they are images, read and augmented at
    each access. Other parameters: `loaders.PatchDataset` and `embed`.
    """
    if front is None:
        return PatchDataset(table, transform, augment, prepare=encoder.preprocessing)
    flat, name = _Flat(front, encoder.preprocessing.size), f"front of {encoder.name}"
    part = Encoder(name, flat, encoder.preprocessing, flat.dimension, encoder.card)
    how = {"batch_size": batch_size, "cache": cache, "progress": progress}
    how["workers"] = workers
    made = [embed(part, table, Turned(turn, transform), **how) for turn in turns]
    return CachedMaps([flat.back(one.vectors) for one in made], table)


class _Flat(torch.nn.Module):
    """All maps of a network side by side as one vector; `back` puts them back."""

    def __init__(self, network, size):
        super().__init__()
        self.network = network
        place = next((p.device for p in network.parameters()), None)
        with torch.no_grad():
            maps = self._maps(torch.zeros(1, 3, size, size, device=place))
        self.shapes = [m.shape[1:] for m in maps]
        self.dimension = sum(shape.numel() for shape in self.shapes)

    def _maps(self, x):
        maps = self.network(x)
        return [maps] if torch.is_tensor(maps) else list(maps)

    def forward(self, x):
        return torch.cat([m.flatten(1) for m in self._maps(x)], 1)

    def back(self, vectors):
        parts = torch.as_tensor(vectors).split([s.numel() for s in self.shapes], 1)
        maps = [p.unflatten(1, s) for p, s in zip(parts, self.shapes, strict=True)]
        return maps[0] if len(maps) == 1 else tuple(maps)


def cache_key(encoder, table, transform=None):
    """Name a folder of vectors by encoder, pixels, image files, transform and code."""
    digest = hashlib.sha256(encoder.fingerprint().encode())
    digest.update(provenance.code_hash("encoders").encode())
    name = identity(colour if transform is None else transform)
    digest.update(name.encode())
    columns = [c for c in PIXEL_COLUMNS if c in table]
    digest.update(repr(columns).encode())
    digest.update(table[columns].to_csv(index=False).encode())
    for image in sorted(set(table["image"])):
        facts = Path(image).stat()
        digest.update(f"{image} {facts.st_size} {facts.st_mtime_ns}".encode())
    plain = "".join(c if c.isalnum() else "-" for c in encoder.name)
    return f"{plain}-{digest.hexdigest()[:20]}"


def identity(transform):
    """Name a transform such that two that differ have two names.

    An object says it itself (an attribute ``identity``); a function is named by where
    it stands, so a lambda or a function inside another is refused.

    Examples
    --------
    >>> identity(colour)
    'histo_utils.loaders.colour'
    """
    own = getattr(transform, "identity", None)
    if own is not None:
        return own
    name = getattr(transform, "__qualname__", "<no name>")
    if "<" in name:
        raise ValueError(
            f"the transform {name!r} has no name that tells it from another; make it "
            "a function of a module, or an object with an attribute `identity`"
        )
    return f"{transform.__module__}.{name}"


def _check_scale(encoder, table):
    trained = encoder.card.mpp
    if trained is None or "mpp" not in table:
        return
    off = (table["mpp"] / trained - 1).abs() > 0.05
    if off.any():
        warnings.warn(
            f"{encoder.name} was trained at {trained} µm/px; {int(off.sum())} of "
            f"{len(table)} patches are at another, the first at "
            f"{table['mpp'][off].iloc[0]}: read patches at the encoder's own",
            stacklevel=3,
        )


def _finite(vectors, table, batch_size, name="the network"):
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        first = row - row % batch_size
        count = int(bad[first : first + batch_size].sum())
        last = min(first + batch_size, len(vectors)) - 1
        raise ValueError(
            f"{name} gave NaN or infinity for {count} of {last - first + 1} patches in "
            f"the batch of rows {first}–{last}, the first is row {row} "
            f"({table['image'].iloc[row]}): look at this patch and at the weights"
        )
    return vectors


def _positions(rows):
    rows = np.asarray(rows)
    return np.flatnonzero(rows) if rows.dtype == bool else rows


def _cached(place, table):
    if not place.is_dir():
        return None
    try:
        known = load_embeddings(place)
    except (ValueError, FileNotFoundError):
        return None  # damaged: made again and replaced
    if len(known) != len(table):
        return None
    made = Embeddings(known.vectors, table)
    made.table.attrs = {**table.attrs, **known.table.attrs}
    return made
