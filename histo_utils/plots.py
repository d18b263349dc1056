"""Figures: tissue with a scale bar, contact sheets, patches on a slide, scores.

One class has one colour through the whole book (`colour_of`), readable with
colour-blind eyes and on a light and a dark page. Images are uint8 (h, w, 3), ``mpp`` is
µm per pixel of what is shown; without it there is no scale bar.
"""

from __future__ import annotations

import zlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import PatchCollection
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar

from histo_utils.patches import read_patch

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
MARKERS = "osD^vP<>X*"
LENGTHS = (5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10_000)  # µm


def colour_of(label) -> str:
    """Colour of a class, the same in every chapter.

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


def style():
    """Set the book's figure style; called by each chapter's setup cell."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.bbox": "tight",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def show_tissue(ax, image, mpp=None, title=None):
    """Show an image without ticks, with a scale bar."""
    ax.imshow(image, interpolation="nearest" if image.shape[0] < 100 else "antialiased")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title)
    if mpp:
        scale_bar(ax, image.shape[1], mpp)
    return ax


def show_heat(ax, image, heat, mpp=None, title=None):
    """Show an image under a heat map (u, v) of 0–1, the hotter the more opaque."""
    heat = np.asarray(heat, float)
    if heat.ndim != 2 or not ((heat >= 0) & (heat <= 1)).all():
        raise ValueError(
            f"the heat map is {heat.shape}, {heat.min():.3g} to {heat.max():.3g}; "
            "expected (u, v), 0–1: give one image's, divided by its highest value"
        )
    show_tissue(ax, image, mpp, title)
    height, width = image.shape[:2]
    ax.imshow(
        heat, cmap="viridis", vmin=0, vmax=1, alpha=0.65 * heat,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear",
    )  # fmt: skip
    return ax


def scale_bar(ax, width, mpp):
    """Add a scale bar, the longest round length below a third of ``width`` px."""
    fitting = [um for um in LENGTHS if um <= width * mpp / 3] or [LENGTHS[0]]
    um = fitting[-1]
    text = f"{um} µm" if um < 1000 else f"{um // 1000} mm"
    bar = AnchoredSizeBar(
        ax.transData, um / mpp, text, "lower right", pad=0.25, borderpad=0.3, sep=2,
        color="black", size_vertical=max(1.0, width / 150),
        fontproperties=FontProperties(size=8),
    )  # fmt: skip
    bar.patch.set(facecolor="white", edgecolor="none", alpha=0.8)
    ax.add_artist(bar)


def contact_sheet(
    images, mpp=None, titles=None, colours=None, columns=8, inch=1.15, heats=None
):
    """Show images of one size in rows, each ``inch`` wide; one scale bar holds for all.

    One per image: ``titles``, ``colours`` of the frames, ``heats`` (`show_heat`).
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = inch * (1.0 if titles is None else 1.2)
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * inch, rows * height), squeeze=False
    )
    for ax in axes.flat[len(images) :]:
        ax.set_axis_off()
    for i, (ax, image) in enumerate(zip(axes.flat, images, strict=False)):
        bar = None if i else mpp
        if heats is None:
            show_tissue(ax, image, bar)
        else:
            show_heat(ax, image, heats[i], bar)
    for ax, title in zip(axes.flat, () if titles is None else titles, strict=False):
        ax.set_title(title, fontsize=7, pad=2)
    for ax, colour in zip(axes.flat, () if colours is None else colours, strict=False):
        ax.spines[:].set(visible=True, color=colour, linewidth=2.5)
    return figure


def tile(table, row, query=None, note=""):
    """Image, title and frame colour of a row; ✓ or ✗: whether it has the query's label.

    The title ends with the end of the patient's name and the note.
    """
    patch = table.iloc[row]
    mark = "" if query is None else "✗ " if patch["label"] != query["label"] else "✓ "
    title = f"{mark}{patch['label']}\n…{str(patch['patient'])[-7:]} {note}".rstrip()
    return read_patch(patch), title, colour_of(patch["label"])


def tiles(table, outcome, k=5):
    """Tiles of a query and its k nearest, of one row of outcomes of the table."""
    row, near = outcome["query"], outcome["neighbours"][:k]
    notes = [f"{far:.3f}" for far in outcome["distances"][:k]]
    found = zip(near, notes, strict=True)
    return [tile(table, row)] + [tile(table, i, table.iloc[row], n) for i, n in found]


def retrieval_atlas(searches, names, mpp=None, inch=1.2):
    """Show queries with their neighbours, a named row per search, ``inch`` per image.

    Each search lists `tile`, the query first; the first scale bar holds for all.
    """
    wide = max(len(search) for search in searches)
    figure, axes = plt.subplots(
        len(searches), wide + 1, squeeze=False,
        figsize=((wide + 0.2) * inch, len(searches) * inch * 1.32),
        width_ratios=[1, 0.15] + [1] * (wide - 1),
    )  # fmt: skip
    for ax in axes.flat:
        ax.set_axis_off()
    for line, search, name in zip(axes, searches, names, strict=True):
        places = [line[0], *line[2:]]
        for ax, (image, title, colour) in zip(places, search, strict=False):
            ax.set_axis_on()
            show_tissue(ax, image, mpp if ax is axes[0, 0] else None)
            ax.set_title(title, fontsize=6.5, pad=2)
            ax.spines[:].set(visible=True, color=colour, linewidth=2.5)
        line[0].set_ylabel(name, fontsize=7)
    return figure


def outline_patches(ax, patches, slide, mpp, colours="black", fill=0.0, line=1.0):
    """Outline patches on ``slide.thumbnail(mpp)``; ``colours``: one, or one per patch.

    ``fill`` is the opacity of the inside, 0–1; ``line`` the outline's width in points.
    """
    scale = slide.mpp / mpp
    squares = [
        Rectangle((r.x * scale, r.y * scale), *[r.size * r.mpp / mpp] * 2)
        for r in patches.itertuples(index=False)
    ]
    if fill:
        faces = {"facecolor": colours, "alpha": fill, "edgecolor": "none"}
        ax.add_collection(PatchCollection(squares, **faces))
    edges = {"facecolor": "none", "edgecolor": colours, "linewidth": line}
    ax.add_collection(PatchCollection(squares, **edges))


def mask_outline(ax, mask, width, height, colour="black", line=1.2):
    """Outline a bool mask on an image of ``width`` × ``height`` px."""
    rows, columns = mask.shape
    ax.contour(
        (np.arange(columns) + 0.5) * width / columns - 0.5,
        (np.arange(rows) + 0.5) * height / rows - 0.5,
        mask, levels=[0.5], colors=[colour], linewidths=line,
    )  # fmt: skip


def intervals(ax, scores, chance=None, colour=PALETTE[0], missing="not run"):
    """Show scores as dots with intervals, the first on top; chance as a dashed line.

    ``scores``: name to ``{"score", "low", "high"}``, or to None, which reads
    ``missing``.
    """
    for place, found in enumerate(scores.values()):
        if found is None:
            ax.text(
                0.02, place, missing, va="center", fontsize=8, color="0.45",
                bbox={"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 1},
            )  # fmt: skip
            continue
        ax.plot([found["low"], found["high"]], [place] * 2, color=colour, lw=1.6)
        ax.plot(found["score"], place, "o", color=colour, ms=5)
    if chance is not None:
        ax.axvline(chance, color="0.5", lw=1, ls="--")
    ax.set(xlim=(0, 1), ylim=(len(scores) - 0.5, -0.5))
    ax.set_yticks(range(len(scores)), list(scores))
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)


def forest(panels, chances, columns=3, inch=0.21, missing="not run", label="P@1"):
    """Show one panel of `intervals` per task: title to scores, title to chance.

    All panels have the same systems, each on a line of ``inch``; ``label``: the x axis.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    lines = len(next(iter(panels.values())))
    figure, axes = plt.subplots(
        rows, columns, figsize=(9.5, rows * (0.75 + inch * lines)),
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, scores) in zip(axes.flat, panels.items(), strict=False):
        intervals(ax, scores, chances[title], missing=missing)
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set_xlabel(label)
    return figure


def confusion(ax, outcomes) -> pd.DataFrame:
    """Show the confusion matrix of outcomes, rows in percent; return its counts."""
    import seaborn  # here, since it takes a second and other chapters need none of it

    names = sorted({*outcomes["label"], *outcomes["predicted"]})
    counts = pd.crosstab(outcomes["label"], outcomes["predicted"])
    counts = counts.reindex(columns=names, fill_value=0)
    patients = outcomes.groupby("label")["patient"].nunique()
    sizes = counts.sum(axis=1)
    seaborn.heatmap(
        100 * counts.div(sizes, axis=0), ax=ax, annot=True, fmt=".0f", cmap="Blues",
        vmin=0, vmax=100, linewidths=0.5, square=True, annot_kws={"size": 8},
        cbar_kws={"label": "% of the label's queries", "shrink": 0.7},
    )  # fmt: skip
    ax.set(xlabel="predicted label (nearest neighbour)", ylabel="label of the query")
    counted = (f"{n}, {of}" if of else n for n, of in zip(sizes, patients, strict=True))
    lines = [f"{name} ({n})" for name, n in zip(counts.index, counted, strict=True)]
    ax.set_yticks(np.arange(len(lines)) + 0.5, lines, rotation=0)
    ax.tick_params(axis="x", rotation=40)
    return counts


def confusions(panels):
    """Show confusion matrices of many classes side by side, without numbers.

    ``panels``: title to (labels, predicted labels). Rows are shares of the label's
    queries; the colour is full at a fifth, so that rare errors can be seen.
    """
    from sklearn.metrics import ConfusionMatrixDisplay  # here: it takes a second

    size = (5 * len(panels), 5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for ax, (title, (truth, predicted)) in zip(axes.flat, panels.items(), strict=True):
        names = sorted({*truth, *predicted}, key=lambda name: (len(str(name)), name))
        ConfusionMatrixDisplay.from_predictions(
            truth, predicted, labels=names, normalize="true", include_values=False,
            ax=ax, cmap="Blues", colorbar=False, im_kw={"vmax": 0.2},
            xticks_rotation="vertical",
        )  # fmt: skip
        ax.set_title(title)
        ax.tick_params(labelsize=7)
    return figure


def scatter_by(ax, points, values):
    """Show points (n, 2) of a map, one colour and marker per value, without ticks."""
    values = np.asarray(values).astype(str)
    for i, name in enumerate(np.unique(values)):
        x, y = np.asarray(points)[values == name].T
        ax.scatter(
            x, y, s=14, marker=MARKERS[i % len(MARKERS)], color=colour_of(name),
            label=name, alpha=0.75, lw=0,
        )  # fmt: skip
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=8,
        markerscale=1.4, handletextpad=0.1, columnspacing=1,
    )  # fmt: skip
