"""One colour a class through the whole book, figures and pages alike.

Chosen to be told apart with colour-blind eyes and on a light and a dark page.
"""

from __future__ import annotations

import zlib

# Paul Tol's muted set, and two greys-with-hue for what it lacks.
PALETTE = (
    "#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE",
    "#882255", "#44AA99", "#999933", "#AA4499", "#6F6F6F",
)  # fmt: skip
CLASSES = (
    ("bladder", "brain", "breast", "colon", "kidney", "liver", "lung", "prostate",
     "stomach"),
    ("fibrous", "glandular", "lymphoid", "papillary"),
    ("lung_aca", "lung_n", "lung_scc"),
    ("FFPE", "frozen"),
    ("train", "validation", "test"),
)  # fmt: skip


def colour_of(label):
    """Return the colour of a class, the same in every chapter.

    Names that the book does not know get one by their spelling, so that it does not
    depend on what else is in the figure.

    Examples
    --------
    >>> colour_of("breast") == colour_of("breast") != colour_of("colon")
    True
    """
    for names in CLASSES:
        if label in names:
            return PALETTE[names.index(label)]
    return PALETTE[zlib.crc32(str(label).encode()) % len(PALETTE)]
