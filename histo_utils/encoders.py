"""Encoders: a network with all that must travel with it, and patches to vectors.

What a vector means depends on the weights, the input size, the scaling, the pooling
and the µm per pixel. `Encoder` holds them together, `frozen` builds one from timm, and
`embed` runs one over a patch table.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

from histo_utils.embeddings import Embeddings, load_embeddings
from histo_utils.loaders import INTERPOLATIONS, Preprocessing, colour, loader

POOLINGS = ("head", "mean", "mean_before_relu")
# What decides a patch's pixels: the part of a table that a cache depends on.
PIXEL_COLUMNS = ("image", "x", "y", "size", "mpp", "slide_mpp", "slide")


@dataclass(frozen=True)
class Card:
    """What a reader must know of an encoder before believing its scores.

    Attributes
    ----------
    weights : str
        Where they come from.
    pooling : str
        How a feature map becomes a vector.
    licence : str
        Of the weights.
    mpp : float or None
        µm per pixel of the images it was trained on; None for natural images.
    gated : bool
        Whether the weights need an account or an agreement.
    tcga : bool or None
        Whether TCGA slides were trained on; None: not known.
    """

    weights: str
    pooling: str
    licence: str = "unknown"
    mpp: float | None = None
    gated: bool = False
    tcga: bool | None = None


@dataclass(frozen=True, eq=False)
class Encoder:
    """A network, its preprocessing and its card; any network can be one.

    Parameters
    ----------
    name : str
    network : torch.nn.Module
        (b, 3, h, w) float tensor in, (b, dimension) out.
    preprocessing : histo_utils.loaders.Preprocessing
    dimension : int
    card : Card

    Examples
    --------
    An adapter for a network of one's own:

    >>> network = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten())
    >>> mine = Encoder(
    ...     name="mean colour",
    ...     network=network,
    ...     preprocessing=Preprocessing(size=32),
    ...     dimension=3,
    ...     card=Card("none", "mean", licence="MIT", mpp=0.5, tcga=False),
    ... )
    >>> mine.describe()["trained at, µm/px"]
    0.5
    """

    name: str
    network: torch.nn.Module
    preprocessing: Preprocessing
    dimension: int
    card: Card

    def describe(self):
        """Return one row of a table of encoders, as a dict."""
        size = self.preprocessing.size
        return {
            "encoder": self.name,
            "weights": self.card.weights,
            "input, px": "as it is" if size is None else size,
            "dimension": self.dimension,
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "pooling": self.card.pooling,
            "trained at, µm/px": self.card.mpp or "natural images",
            "licence": self.card.licence,
            "gated": "yes" if self.card.gated else "no",
            "TCGA": {True: "yes", False: "no", None: "unknown"}[self.card.tcga],
        }

    def fingerprint(self):
        """Hash of everything that decides its vectors."""
        digest = hashlib.sha256(str(self.network).encode())
        digest.update(repr((self.name, self.preprocessing, self.card)).encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        return digest.hexdigest()


class Pooled(torch.nn.Module):
    """A timm network up to its vector.

    Parameters
    ----------
    network : torch.nn.Module
        From timm.
    pooling : {"head", "mean", "mean_before_relu"}
        ``head``: what timm's own head hands to the classifier (the second fully
        connected layer for VGG, the pooled map for most others). ``mean``: global
        average of the last feature map. ``mean_before_relu``: DenseNet's last
        batch norm without its ReLU, averaged, as KimiaNet's features are made; timm's
        ``norm5`` holds the ReLU inside, so its feature map is another one.

    Raises
    ------
    ValueError
        An unknown pooling, or ``mean_before_relu`` for a network without ``norm5``.
    """

    def __init__(self, network, pooling="head"):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(
                f"unknown pooling {pooling!r}; valid are {', '.join(POOLINGS)}"
            )
        if pooling == "mean_before_relu" and not hasattr(
            getattr(network, "features", None), "norm5"
        ):
            raise ValueError(
                f"pooling='mean_before_relu' for a {type(network).__name__}; it is "
                "there for timm's DenseNets, whose last layer is features.norm5"
            )
        self.network, self.pooling = network, pooling

    def forward(self, x):
        """Return (b, dimension) vectors of (b, 3, h, w) images."""
        if self.pooling == "mean_before_relu":
            norm = self.network.features.norm5
            for layer in self.network.features[:-1]:
                x = layer(x)
            x = F.batch_norm(
                x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                training=False, eps=norm.eps,
            )  # fmt: skip
            return x.mean((2, 3))
        x = self.network.forward_features(x)
        if self.pooling == "mean":
            return x.mean((2, 3))
        return self.network.forward_head(x, pre_logits=True)


# The book's common network: an 8-bit release with the batch norm folded in, decoded to
# floats; padded as TensorFlow pads. timm's own weights of that name are others.
_MOBILENET = "mobilenetv2_100"


def frozen(
    name, weights=None, *, pooling="head", size=None, seed=None, device="cpu"
) -> Encoder:  # fmt: skip
    """Build an encoder from timm, in evaluation mode, its parameters frozen.

    Weights are those of ``seed`` (random), or of ``weights``, or of
    ``$HISTO_WEIGHTS/<name>.safetensors`` (or ``<name>.<tag>.safetensors``) if there is
    such a file, else timm's from the Hugging Face hub.

    Parameters
    ----------
    name : str
        As timm knows it: ``vgg16.tv_in1k``, ``inception_v3.tv_in1k``, ….
    weights : path, optional
        A ``.safetensors`` or PyTorch state dict; loaded strictly.
    pooling : {"head", "mean", "mean_before_relu"}
        See `Pooled`.
    size : int, optional
        Input side in pixels; default that of the weights.
    seed : int, optional
        Random weights, for tests and as a baseline.
    device : str
        Where the network is put.

    Raises
    ------
    ValueError
        A name that timm does not know (the nearest are named), weights and seed both,
        or weights of another network.
    FileNotFoundError
        Weights neither here nor on the hub; the message says what to do.

    Notes
    -----
    ``mobilenetv2_100`` without a tag, from a file or a seed, is the book's common
    network: padded as TensorFlow does (``pad_type="same"``), RGB/127.5 - 1, 224 px,
    bilinear. With a tag, or from the hub, it is timm's.
    """
    if weights is not None and seed is not None:
        raise ValueError(f"weights={weights} and seed={seed} were given; expected one")
    _check_name(name)
    path = None if seed is not None else _local(name) if weights is None else weights
    ours = name == _MOBILENET and (seed is not None or path is not None)
    options = {"pad_type": "same"} if ours else {}
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = timm.create_model(name, **options)
        source, licence = f"random, seed {seed}", "none"
    elif path is not None:
        network = _load(timm.create_model(name, **options), Path(path))
        source = Path(path).name
        licence = "Apache-2.0" if ours else network.pretrained_cfg.get("license")
    else:
        network = _from_hub(name)
        source = network.pretrained_cfg.get("hf_hub_id") or name
        licence = network.pretrained_cfg.get("license")
    pooled = Pooled(network, pooling).requires_grad_(False).eval().to(device)
    card = Card(source, pooling, licence or "unknown", None, False, False)
    dimension = _dimension(network, pooling)
    return Encoder(name, pooled, _preprocessing(network, ours, size), dimension, card)


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
        `loaders.StainMatch`.
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


def _check_name(name):
    stem = name.split(".")[0]
    if not timm.is_model(stem):
        near = difflib.get_close_matches(stem, timm.list_models(), 3, 0.5)
        raise ValueError(
            f"timm has no network {stem!r}; nearest: {', '.join(near) or 'none'}"
        )
    tags = timm.list_pretrained(f"{stem}.*")
    if "." in name and name not in tags:
        raise ValueError(
            f"timm has no weights {name!r}; it has {', '.join(tags) or 'none'}"
        )


def _local(name):
    """Return the weight file of that name in HISTO_WEIGHTS, or None."""
    folder = os.environ.get("HISTO_WEIGHTS")
    if not folder:
        return None
    exact = Path(folder) / f"{name}.safetensors"
    tagged = [] if "." in name else sorted(Path(folder).glob(f"{name}.*.safetensors"))
    found = [path for path in (exact, *tagged) if path.is_file()]
    return found[0] if found else None


def _load(network, path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        network.load_state_dict(state, strict=True)
    except Exception as error:  # damaged files fail in many ways
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} does not fit {type(network).__name__}: {first}; expected a state "
            "dict with exactly its parameters: give the network's own weights"
        ) from error
    return network


def _from_hub(name):
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # no network, no such weights, no room: many types
        cfg = timm.get_pretrained_cfg(name)
        hub = cfg.hf_hub_id if cfg is not None and cfg.hf_hub_id else name
        folder = os.environ.get("HISTO_WEIGHTS")
        where = f"{folder} has no" if folder else "HISTO_WEIGHTS is not set, so no"
        raise FileNotFoundError(
            f"{name}: {where} {name}.safetensors, and the hub gave nothing "
            f"({type(error).__name__}). Where there is a network, download "
            f"https://huggingface.co/{hub}/resolve/main/model.safetensors, save it as "
            f"{name}.safetensors and name its folder in HISTO_WEIGHTS; or pass "
            "weights=<file>; or seed=0 for random weights"
        ) from error


def _preprocessing(network, ours, size):
    if ours:
        return Preprocessing((0.5,) * 3, (0.5,) * 3, size or 224, "bilinear")
    cfg = network.pretrained_cfg
    how = cfg.get("interpolation", "bilinear")
    how = how if how in INTERPOLATIONS else "bilinear"
    size = size or cfg["input_size"][-1]
    return Preprocessing(tuple(cfg["mean"]), tuple(cfg["std"]), size, how)


def _dimension(network, pooling):
    if pooling != "head":
        return network.num_features
    return getattr(network, "head_hidden_size", network.num_features)


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
