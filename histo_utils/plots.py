"""Pictures: tissue with a scale bar, contact sheets, patches on a slide.

One class has one colour through the whole book (`colour_of`), chosen to be told apart
with colour-blind eyes and on a light and a dark page.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import PatchCollection
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from scipy.spatial.distance import cdist

from histo_utils.atlas import atlas as atlas  # also asked for as plots.atlas
from histo_utils.colours import PALETTE, colour_of

MARKERS = "osD^vP<>X*"
LENGTHS = (5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10_000)  # µm


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
    """Show an image (h, w, 3) without ticks; with a scale bar if ``mpp`` is known."""
    ax.imshow(image, interpolation="nearest" if image.shape[0] < 100 else "antialiased")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title)
    if mpp:
        scale_bar(ax, image.shape[1], mpp)
    return ax


def show_heat(ax, image, heat, mpp=None, title=None):
    """Show an image with a heat map over it, the hotter the more opaque.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    image : (h, w, 3) uint8 array
    heat : (u, v) array, 0–1
        Stretched over the image, such as one of `networks.gradcam.grad_cam`.
    mpp : float, optional
        µm per pixel of the image, for a scale bar.
    title : str, optional

    Raises
    ------
    ValueError
        A heat map that is not (u, v), or holds values outside 0–1.
    """
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
    """Draw a scale bar on an image ``width`` px wide at ``mpp`` µm per pixel.

    Its length is the longest round number below a third of the width.
    """
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


def contact_sheet(images, mpp=None, titles=None, colours=None, columns=8, inch=1.15):
    """Show images of one size in rows.

    Parameters
    ----------
    images : sequence of numpy.ndarray
        uint8 (h, w, 3).
    mpp : float, optional
        µm per pixel; the first image gets the scale bar, which holds for all.
    titles, colours : sequence of str, optional
        Text above each image, and the colour of its frame.
    columns : int
    inch : float
        Width of one image.

    Returns
    -------
    matplotlib.figure.Figure
    """
    titles = None if titles is None else list(titles)
    colours = None if colours is None else list(colours)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = inch * (1.0 + (0.2 if titles is not None else 0))
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * inch, rows * height), squeeze=False
    )
    for i, ax in enumerate(axes.flat):
        if i >= len(images):
            ax.set_axis_off()
            continue
        show_tissue(ax, images[i], mpp if i == 0 else None)
        if titles is not None:
            ax.set_title(titles[i], fontsize=7, pad=2)
        if colours is not None:
            ax.spines[:].set(visible=True, color=colours[i], linewidth=2.5)
    return figure


def outline_patches(ax, patches, slide, mpp, colours="black", fill=0.0, line=1.0):
    """Draw patches as squares on a thumbnail of their slide.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Showing ``slide.thumbnail(mpp)``.
    patches : pandas.DataFrame
        ``x``, ``y`` (level-0 pixels), ``size``, ``mpp``.
    slide : histo_utils.slides.Slide
    mpp : float
        µm per pixel of the thumbnail.
    colours : str or sequence of str
        One colour, or one a patch.
    fill : float
        Opacity of the inside, 0–1.
    line : float
        Width of the outline in points.
    """
    scale = slide.mpp / mpp
    squares = [
        Rectangle(
            (r.x * scale, r.y * scale), r.size * r.mpp / mpp, r.size * r.mpp / mpp
        )
        for r in patches.itertuples(index=False)
    ]
    if fill:
        faces = PatchCollection(
            squares, facecolor=colours, alpha=fill, edgecolor="none"
        )
        ax.add_collection(faces)
    edges = PatchCollection(
        squares, facecolor="none", edgecolor=colours, linewidth=line
    )
    ax.add_collection(edges)


def mask_outline(ax, mask, width, height, colour="black", line=1.2):
    """Draw the border of a bool mask over an image of ``width`` × ``height`` px."""
    rows, columns = mask.shape
    ax.contour(
        (np.arange(columns) + 0.5) * width / columns - 0.5,
        (np.arange(rows) + 0.5) * height / rows - 0.5,
        mask, levels=[0.5], colors=[colour], linewidths=line,
    )  # fmt: skip


def intervals(ax, scores, chance=None, colour=PALETTE[0]):
    """Draw scores as dots with their intervals, the first on top.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    scores : dict
        Name to ``{"score", "low", "high"}`` (`bench.scored`), or to None where a
        system was not run; its line stays empty and says so.
    chance : float, optional
        Drawn as a dashed line.
    colour : str
    """
    for place, found in enumerate(scores.values()):
        if found is None:
            ax.text(
                0.02, place, "not run", va="center", fontsize=8, color="0.45",
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


def forest(panels, chances, columns=3, inch=0.21):
    """Draw a panel of `intervals` for each task, systems from top to bottom.

    Parameters
    ----------
    panels : dict
        Title to ``{system: {"score", "low", "high"} or None}``; the same systems in
        every panel.
    chances : dict
        Title to what chance scores there.
    columns : int
        Panels side by side.
    inch : float
        Height of one system's line.

    Returns
    -------
    matplotlib.figure.Figure
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
        intervals(ax, scores, chances[title])
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set_xlabel("P@1")
    return figure


def confusion(ax, outcomes):
    """Show what the queries of each label were answered with; rows sum to 100 %.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    outcomes : pandas.DataFrame
        ``label``, ``predicted``, ``patient``.

    Returns
    -------
    pandas.DataFrame
        Counts, rows the truth.
    """
    import seaborn  # here, since it takes a second and other chapters need none of it

    label, patient = outcomes["label"], outcomes["patient"]
    names = sorted({*label, *outcomes["predicted"]})
    counts = pd.crosstab(label, outcomes["predicted"])
    counts = counts.reindex(index=sorted(set(label)), columns=names, fill_value=0)
    patients = patient.groupby(label).nunique()
    sizes = counts.sum(axis=1)
    seaborn.heatmap(
        100 * counts.div(sizes, axis=0), ax=ax, annot=True, fmt=".0f", cmap="Blues",
        vmin=0, vmax=100, linewidths=0.5, square=True, annot_kws={"size": 8},
        cbar_kws={"label": "% of the label's queries", "shrink": 0.7},
    )  # fmt: skip
    ax.set(xlabel="label of the nearest neighbour", ylabel="label of the query")
    lines = [f"{name} ({sizes[name]} of {patients[name]})" for name in counts.index]
    ax.set_yticks(np.arange(len(lines)) + 0.5, lines, rotation=0)
    ax.tick_params(axis="x", rotation=40)
    return counts


def scatter_by(ax, points, values):
    """Draw points (n, 2), one colour and one marker a value, with a legend.

    Axes have no ticks: in a UMAP neither place nor distance has a unit.
    """
    values = np.asarray(values).astype(str)
    for i, name in enumerate(np.unique(values)):
        x, y = np.asarray(points)[values == name].T
        marker = MARKERS[i % len(MARKERS)]
        colour = colour_of(name)
        ax.scatter(
            x, y, s=14, marker=marker, color=colour, label=name, alpha=0.75, lw=0
        )
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=8,
        markerscale=1.4, handletextpad=0.1, columnspacing=1,
    )  # fmt: skip


def neighbours_kept(vectors, points, k=10, metric="euclidean"):
    """Share of each vector's k nearest others that are k nearest on a map, too; (n,).

    Parameters
    ----------
    vectors : (n, d) array
        What was mapped, compared by ``metric`` ("euclidean" or "cosine").
    points : (n, 2) array
        The map, compared by Euclidean distance. All pairs are held at once: for some
        thousands of points.

    Raises
    ------
    ValueError
        k beyond the other points.
    """
    if not 1 <= k < len(vectors):
        raise ValueError(f"k={k} for {len(vectors)} points; expected 1 to n - 1")
    near = np.zeros((2, len(vectors), len(vectors)), bool)
    for found, space, how in zip(
        near, (vectors, points), (metric, "euclidean"), strict=True
    ):
        far = cdist(space, space, how)
        np.fill_diagonal(far, np.inf)
        order = np.argsort(far, axis=1, kind="stable")[:, :k]
        np.put_along_axis(found, order, True, axis=1)
    return near.all(axis=0).sum(axis=1) / k


def retrieval_atlas(searches, names, mpp=None, inch=1.2):
    """Show queries with what was found for them, a row a search.

    Parameters
    ----------
    searches : sequence of sequences of (image, title, colour)
        The query first, then its neighbours, nearest first. Images are uint8
        (h, w, 3); the colour is that of the frame.
    names : sequence of str
        Said at the left of each row.
    mpp : float, optional
        µm per pixel; the very first image gets the scale bar, which holds for all.
    inch : float
        Width of one image.

    Returns
    -------
    matplotlib.figure.Figure
    """
    wide = max(len(search) for search in searches)
    figure, axes = plt.subplots(
        len(searches), wide + 1, squeeze=False,
        figsize=((wide + 0.2) * inch, len(searches) * inch * 1.32),
        width_ratios=[1, 0.15] + [1] * (wide - 1),
    )  # fmt: skip
    for ax in axes.flat:
        ax.set_axis_off()
    bar = mpp
    for line, search, name in zip(axes, searches, names, strict=True):
        places = [line[0], *line[2:]]
        for ax, (image, title, colour) in zip(places, search, strict=False):
            ax.set_axis_on()
            show_tissue(ax, image, bar)
            ax.set_title(title, fontsize=6.5, pad=2)
            ax.spines[:].set(visible=True, color=colour, linewidth=2.5)
            bar = None
        line[0].set_ylabel(name, fontsize=7)
    return figure
