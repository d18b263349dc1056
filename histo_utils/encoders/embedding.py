"""Patches to vectors: one pass over a patch table, and its cache."""

from __future__ import annotations

import contextlib
import hashlib
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from histo_utils.embeddings import Embeddings, load_embeddings
from histo_utils.loaders import colour, loader

# What decides a patch's pixels: the part of a table that a cache depends on.
PIXEL_COLUMNS = ("image", "x", "y", "size", "mpp", "slide_mpp", "slide")


def embed(
    encoder, table, transform=None, batch_size=32, device=None, progress=True, *,
    workers=0, cache=None,
) -> Embeddings:  # fmt: skip
    """Turn every patch of a table into a vector; the same whatever the batch size.

    The network is in evaluation mode meanwhile. Time and throughput stand in
    ``embeddings.table.attrs["embedding"]``.

    Parameters
    ----------
    encoder : Encoder
    table : pandas.DataFrame
        A patch table.
    transform : callable, optional
        ``transform(image, slide)``: `loaders.colour` (default), `loaders.grey`, a
        `stains.StainMatch`.
    batch_size : int
        On two CPU cores 16 was faster than 64.
    device : str, optional
        Default: a GPU if there is one.
    progress : bool
        Show a bar.
    workers : int
        Processes that read patches.
    cache : path, optional
        A folder. Vectors are loaded from it if the same encoder (weights included),
        pixels and transform were embedded before, else made and saved there; labels
        and other columns are always those of ``table``.

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
    transform = colour if transform is None else transform
    _check_scale(encoder, table)
    batches = loader(
        table, transform, encoder.preprocessing, batch_size=batch_size, workers=workers
    )
    place = None
    if cache is not None:
        place = Path(cache) / cache_key(encoder, table, transform)
        known = _cached(place, table)
        if known is not None:
            return known
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = encoder.network.to(device)
    vectors = np.empty((len(table), encoder.dimension), np.float32)
    start = time.perf_counter()
    bar = tqdm(
        total=len(table), desc=encoder.name, unit="patch", ascii=True,
        disable=not progress,
    )  # fmt: skip
    with bar, torch.inference_mode(), _evaluating(network), _full_precision(device):
        for images, positions in batches:
            found = network(images.to(device)).float().cpu().numpy()
            vectors[positions.numpy()] = _checked(found, positions, encoder, table)
            bar.update(len(positions))
    seconds = time.perf_counter() - start
    made = Embeddings(vectors, table)
    made.table.attrs = {**table.attrs, "embedding": {
        "encoder": encoder.name, "weights": encoder.card.weights,
        "transform": identity(transform), "device": str(device),
        "batch_size": batch_size, "seconds": round(seconds, 3),
        "patches_per_second": round(len(table) / seconds, 2),
    }}  # fmt: skip
    if place is not None:
        columns = [c for c in PIXEL_COLUMNS if c in made.table]
        Embeddings(vectors, made.table[columns]).save(place)
    return made


def cache_key(encoder, table, transform=None):
    """Return the name of the folder that `embed` keeps these vectors in.

    It changes with the weights, the preprocessing, the pixels asked for, the image
    files (path, size, time of change) and the transform.
    """
    digest = hashlib.sha256(encoder.fingerprint().encode())
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
    it stands.

    Raises
    ------
    ValueError
        For a lambda or a function inside another, whose name does not tell it apart.

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


def _checked(found, positions, encoder, table):
    if found.ndim != 2 or found.shape[1] != encoder.dimension:
        raise ValueError(
            f"{encoder.name} gave vectors of shape {found.shape}; its dimension is "
            f"said to be {encoder.dimension}: correct the encoder"
        )
    bad = ~np.isfinite(found).all(axis=1)
    if bad.any():
        row = int(positions[bad][0])
        raise ValueError(
            f"{encoder.name} gave NaN or infinity for {int(bad.sum())} of {len(found)} "
            f"patches in the batch of rows {int(positions.min())}–"
            f"{int(positions.max())}, the first is row {row} "
            f"({table['image'].iloc[row]}): look at this patch and at the weights"
        )
    return found


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


@contextlib.contextmanager
def _evaluating(network):
    """Switch to evaluation mode inside, to each part's own mode again afterwards."""
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
