"""Make the picture that opens the README and the book: slide, mosaic, neighbours.

    HISTO_DATA=… HISTO_WEIGHTS=… python tools/first_picture.py

Of CMU-1-Small-Region.svs (OpenSlide's test data, CC0), by the package's own steps; it
takes seconds. Writes ``book/images/slide_mosaic_neighbours.jpg``.
"""

import os
from pathlib import Path

import matplotlib.pyplot as plt

from histo_utils import encoders, mosaic, patches, plots, slides
from histo_utils.search import Archive

ROOT = Path(__file__).parents[1]
OUT = ROOT / "book/images/slide_mosaic_neighbours.jpg"
SLIDE = Path(os.environ.get("HISTO_DATA", "data"), "slides/CMU-1-Small-Region.svs")
SIZE, MPP, VIEW = 224, 0.5, 2.0  # patches of 112 µm; µm per pixel of the overview
QUERY = 1  # row of the mosaic
RED, BLUE, GREEN = "#CC3311", "#332288", "#117733"


def searched():
    """Return slide, its tissue patches, the query's row and its neighbours' rows."""
    slide = slides.open_slide(SLIDE)
    found = mosaic.slide_mosaic(slide, SIZE, MPP, fraction=0.15)
    table = found.assign(image=str(SLIDE), slide=SLIDE.stem, patient=SLIDE.stem)
    table = table.reset_index(drop=True)
    made = encoders.embed(encoders.frozen("mobilenetv2_100"), table, progress=False)
    query = table.index[table["in_mosaic"]][QUERY]
    near = Archive(made).search(made.take([query]), k=5, exclude="touching")
    return slide, table, query, near.ids[0], near.distances[0]


def framed(axes, images, colours, titles):
    """Show patches with a coloured frame and a title; the first has the scale bar."""
    for ax, image, colour, title in zip(
        axes.flat, images, colours, titles, strict=True
    ):
        plots.show_tissue(ax, image, MPP if ax is axes.flat[0] else None)
        ax.spines[:].set(visible=True, color=colour, linewidth=2.5)
        ax.set_title(title, size=9, pad=3)


def main():
    plots.style()
    slide, table, query, near, distances = searched()
    chosen = table[table["in_mosaic"]]
    figure = plt.figure(figsize=(9.6, 3.5), facecolor="white")
    parts = figure.subfigures(1, 3, width_ratios=[0.92, 1.04, 1.5])
    titles = (
        "1 · a slide",
        f"2 · its mosaic: {len(chosen)} of {len(table)} patches",
        "3 · a query and its nearest patches",
    )
    for part, title in zip(parts, titles, strict=True):
        part.suptitle(title, size=11, weight="bold")

    ax = parts[0].subplots()
    plots.show_tissue(ax, slide.thumbnail(VIEW), VIEW)
    plots.outline_patches(ax, chosen, slide, VIEW, BLUE, line=1.6)
    plots.outline_patches(ax, chosen.loc[[query]], slide, VIEW, RED, line=2.4)

    images = [patches.read_patch(patch) for _, patch in chosen.iterrows()]
    colours = [RED if row == query else BLUE for row in chosen.index]
    framed(parts[1].subplots(3, 3), images, colours, [""] * len(images))

    rows = [query, *near]
    images = [patches.read_patch(table.loc[row]) for row in rows]
    titles = ["query", *(f"distance {d:.2f}" for d in distances)]
    framed(parts[2].subplots(2, 3), images, [RED] + [GREEN] * len(near), titles)

    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=150, pil_kwargs={"quality": 80})
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
