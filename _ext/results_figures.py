"""Draw the two figures that open the results page, from ``results/tissue/`` alone.

They are drawn anew at every build into ``_build/figures/``, so no picture can fall
behind its numbers. Without the results of chapter 9 nothing is drawn.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

FILE = "results/tissue/09_retrieval_evaluation.json"
# Chapter 9's systems from top to bottom; those above None need no training.
SYSTEMS = {
    "histogram": "colour histogram",
    "mean_rgb": "mean colour",
    "random_0": "MobileNetV2, random weights",
    "mobilenetv2": "MobileNetV2, ImageNet: frozen baseline",
    "mobilenetv2_grey": "frozen baseline, greyscale",
    None: None,
    "kieffer": "Kieffer 2017, fine-tuned",
    "kimianet": "KimiaNet 2021",
    "ftx": "FTX-2048 2022, two-step",
    "yang": "Yang 2019, metric learning",
    "neck": "LGFFEM 2025, fusion neck",
}
QUESTIONS = {
    "scan_split": "Scan recognition (stain and texture)",
    "organ": "Organ across patients",
}
# Readable in both editions: the theme puts a white plate behind figures in dark mode.
BLUE, RED, GREEN = "#332288", "#CC6677", "#117733"


def axes(width, height, panels, **options):
    """Return a figure with panels side by side that share their y axis."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    found = figure.subplots(1, panels, sharey=True, squeeze=False, **options)[0]
    for ax in found:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
    return figure, found


def draw_systems(found):
    """P@1 and MAP@R of all systems on each question, with 95 % intervals."""
    figure, panels = axes(9.2, 4.4, len(QUESTIONS))
    for ax, (question, title) in zip(panels, QUESTIONS.items(), strict=True):
        for place, system in enumerate(SYSTEMS):
            row = found[question].get(system)
            if row is None:
                if system:
                    ax.text(0.02, place, "not run", va="center", size=8, color="0.45")
                continue
            both = (row, BLUE, "o", -0.14), (row["map_at_r"], RED, "D", 0.18)
            for score, colour, marker, shift in both:
                ends = [score["low"], score["high"]]
                ax.plot(ends, [place + shift] * 2, color=colour, lw=1.6)
                ax.plot(score["score"], place + shift, marker, color=colour, ms=5)
        chance = found["chance"]["scan" if question == "scan_split" else "label"]
        ax.axvline(chance, color="0.5", lw=1, ls="--")
        ax.axhline([*SYSTEMS].index(None), color="0.7", lw=0.8)
        ax.set(xlim=(0, 1), ylim=(len(SYSTEMS) - 0.4, -0.6), xlabel="score")
        ax.set_title(title, size=11)
    places = [place for place, name in enumerate(SYSTEMS) if name]
    panels[0].set_yticks(places, [name for name in SYSTEMS.values() if name])
    handles = [
        Line2D([], [], color=BLUE, marker="o", lw=1.6, label="P@1"),
        Line2D([], [], color=RED, marker="D", lw=1.6, label="MAP@R"),
        Line2D([], [], color="0.5", ls="--", lw=1, label="P@1 by chance"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_risk(found):
    """Error among the answered queries against the share that is answered."""
    figure, panels = axes(9.2, 3.4, 2)
    titles = {"mobilenetv2": "frozen MobileNetV2", "histogram": "colour histogram"}
    rules = {"agreement": ("10 neighbours' agreement", BLUE, "-"),
             "distance": ("distance of the nearest", GREEN, "--")}  # fmt: skip
    for ax, (system, title) in zip(panels, titles.items(), strict=True):
        for rule, (name, colour, dashes) in rules.items():
            points = found["risk_coverage"][f"{system}_{rule}"]
            way = {"color": colour, "ls": dashes, "lw": 1.8, "label": name}
            ax.plot(points["coverage"], points["risk"], **way)
        everything = found["selective"][f"{system}_agreement"]["error_of_all"]["score"]
        ax.axhline(everything, color="0.5", lw=1, ls=":", label="no abstention")
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="coverage: share of queries answered")
        ax.set_title(title, size=11)
    panels[0].set_ylabel("risk: error among the answered")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw(source, folder):
    """Write both figures; return their paths."""
    if not Path(source).exists():
        return []
    found = json.loads(Path(source).read_text("utf8"))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in (("systems", draw_systems), ("risk_coverage", draw_risk)):
        paths.append(folder / f"{name}.svg")
        make(found).savefig(paths[-1], metadata={"Date": None})
    return paths


def setup(app):
    """Register with Sphinx."""
    root = Path(app.srcdir)
    app.connect(
        "builder-inited",
        lambda app: draw(root / FILE, root / "_build/figures") and None,
    )
    return {"version": "1", "parallel_read_safe": True}
