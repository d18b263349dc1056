"""What a frozen part of a network gives for every patch, kept to train behind it."""

from __future__ import annotations

import torch

from histo_utils.encoders.embedding import embed
from histo_utils.encoders.encoder import Encoder
from histo_utils.loaders import Turned, colour


class Flat(torch.nn.Module):
    """All maps of a network side by side as one vector; ``shapes`` puts them back.

    Parameters
    ----------
    network : torch.nn.Module
        (b, 3, h, w) in; a map (b, c, h, w) or a list of maps out.
    size : int
        Side of the images in pixels.
    """

    def __init__(self, network, size):
        super().__init__()
        self.network = network
        with torch.inference_mode():
            self.shapes = [
                m.shape[1:] for m in _maps(network, torch.zeros(1, 3, size, size))
            ]

    @property
    def dimension(self):
        """Length of a vector."""
        return sum(shape.numel() for shape in self.shapes)

    def forward(self, x):
        """Return (b, dimension)."""
        return torch.cat([m.flatten(1) for m in _maps(self.network, x)], 1)

    def back(self, vectors):
        """Return the maps of (b, dimension) vectors: one tensor, or a tuple of them."""
        sizes = [shape.numel() for shape in self.shapes]
        parts = torch.as_tensor(vectors).split(sizes, 1)
        maps = [p.unflatten(1, s) for p, s in zip(parts, self.shapes, strict=True)]
        return maps[0] if len(maps) == 1 else tuple(maps)


def stored(
    encoder, front, table, turns=(0,), transform=colour, batch_size=16, *, cache=None,
    progress=True,
) -> list:  # fmt: skip
    """Run the frozen front of a network once over every patch, under some turns.

    Parameters
    ----------
    encoder : Encoder
        Whose preprocessing is used.
    front : torch.nn.Module
        Its first part (`networks.stages.cut`), or what gives its maps; no gradient,
        evaluation mode.
    table : pandas.DataFrame
    turns : sequence of int
        Views of `loaders.Turned`; the first should be 0, the patch as it is.
    transform, batch_size, cache, progress
        As `embed`.

    Returns
    -------
    list of tensors (n, c, h, w), or of tuples of them
        One a turn, for `batches.StoredInputs`.
    """
    flat = Flat(front, encoder.preprocessing.size)
    name = f"front of {encoder.name}"
    part = Encoder(name, flat, encoder.preprocessing, flat.dimension, encoder.card)
    how = {"batch_size": batch_size, "cache": cache, "progress": progress}
    return [
        flat.back(embed(part, table, Turned(turn, transform), **how).vectors)
        for turn in turns
    ]


def _maps(network, x):
    maps = network(x)
    return [maps] if torch.is_tensor(maps) else list(maps)
