"""Write the README's chapter list and results from notebooks and results files.

python tools/readme.py            # rewrites README.md
python tools/readme.py --check    # exit status 1 if it would change
"""

import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
INTERVAL = "{score:.2f} [{low:.2f}, {high:.2f}]"
DIFFERENCE = "{difference:+.2f} [{low:+.2f}, {high:+.2f}], MDD {detectable:.2f}"
SPREAD = "{mean:.1%} ± {sd:.1%}"


def chapters(root=ROOT):
    """One table row per notebook: number, title, Colab link."""
    config = yaml.safe_load((root / "_config.yml").read_text("utf-8"))["repository"]
    where = config["url"].removeprefix("https://github.com/") + "/blob/main"
    rows = ["| | chapter | run it |", "|---|---|---|"]
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        title = re.search(r"^# (.+)$", "".join(cells[0]["source"]), re.MULTILINE)[1]
        colab = (
            f"https://colab.research.google.com/github/{where}/notebooks/{path.name}"
        )
        name = f"[{title}](notebooks/{path.name})"
        rows.append(f"| {path.name[:2]} | {name} | [Colab]({colab}) |")
    return "\n".join(rows)


def results(root=ROOT):
    """One table row per headline, each from its results file."""
    rows = ["| question | result | n | from |", "|---|---|---|---|"]
    for name, question, *paths in HEADLINES:
        path = root / "results" / "tissue" / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text("utf-8"))
            text, n = answer(found, *paths)
            made = found["provenance"]
            source = f"`{path.name}`, {made['date'][:10]}, `{made['commit']}`"
        else:
            text, n, source = "not run", "", f"`{path.name}`"
        rows.append(f"| {question} | {text} | {n} | {source} |")
    return "\n".join(rows)


def answer(found, path, chance=None):
    """Text and n of a score, a difference or a spread, by the keys that lead to it."""
    row = _walk(found, path)
    if "difference" in row and "score" not in row:
        return DIFFERENCE.format(**row), f"{row['n']} patients"
    if "sd" in row:
        return SPREAD.format(**row), f"{row['n']} random embeddings"
    score = {"score": row["P@1"]} | row if "P@1" in row else row
    chance = _walk(found, chance) if chance else row.get("by chance")
    text = INTERVAL.format(**score) + (f", chance {chance:.2f}" if chance else "")
    if "n" not in row and "patients" not in row:  # chapter 2 counts regions
        return text, f"{_walk(found, path.rpartition('/')[0])['regions']} regions"
    return text, f"{row.get('patients', row.get('n'))} patients"


def _walk(found, path):
    for key in path.split("/"):
        found = found[key]
    return found


HEADLINES = (  # file, question, keys to the answer, keys to what chance gives
    ("03_measuring_retrieval",
     "Scan of a patch, touching patches excluded, P@1: colour histogram",
     "colour_table/histogram/scan_not_touching"),
    ("03_measuring_retrieval", "… frozen ImageNet MobileNetV2 (frozen baseline)",
     "colour_table/network/scan_not_touching"),
    ("07_metric_learning", "… multi-similarity loss (Yang 2019)",
     "scores/multi_similarity/scan_not_touching"),
    ("07_metric_learning", "… … minus the colour histogram",
     "differences/multi_similarity − histogram/scan_not_touching"),
    ("08_feature_fusion_neck", "… feature-fusion neck (LGFFEM)",
     "scores/neck/scan_apart"),
    ("08_feature_fusion_neck", "… … the same heads without the neck, minus with it",
     "ablation/no neck/scan_apart"),
    ("04_pretrained_features",
     "Scan in greyscale, share right: fine-tuned (Kieffer 2017)",
     "trained/tuned, grey/share right"),
    ("04_pretrained_features", "… minus its linear probe",
     "against/tuned, grey/its head"),
    ("03_measuring_retrieval", "Organ of another patient, P@1: colour histogram",
     "colour_table/histogram/organ"),
    ("03_measuring_retrieval", "… frozen baseline", "colour_table/network/organ"),
    ("05_gpu_fine_tuning", "… trained on the most cellular patches (KimiaNet)",
     "scores/i_most_cellular/P@1"),
    ("05_gpu_fine_tuning", "… … minus as many random patches",
     "cellular_against_random"),
    ("06_two_step_fine_tuning", "… fine-tuned in two steps (FTX-2048)",
     "scores/organ, nearest neighbour, FTX"),
    ("06_two_step_fine_tuning", "… … minus the ImageNet features",
     "differences/organ, nearest neighbour: FTX − IMGNET"),
    ("09_retrieval_evaluation",
     "Organ by MAP@R: multi-similarity loss minus the frozen baseline, to be confirmed",
     "differences_from_start/map_at_r/organ/yang"),
    ("10_slide_search", "Slide search by barcodes: organ by majority of three slides",
     "horizontal/mobilenetv2/barcodes/majority"),
    ("03_measuring_retrieval",
     "The frozen network's nearest other patient has the same preparation",
     "confounders/network/preparation", "confounders/by_chance/preparation"),
    ("01_data_preparation",
     "The patch of another patient nearest in mean colour: same organ",
     "colour/label"),
    ("01_data_preparation", "… same preparation (FFPE or frozen)",
     "colour/preparation"),
    ("03_measuring_retrieval", 'A published "Recall@1" metric, given random vectors',
     "audit/cutoff"),
    ("02_mosaic_extraction",
     "Nuclear area, rank correlation with experts' nuclei: ours",
     "cellularity/ours/test/patches"),
    ("02_mosaic_extraction", "… Macenko's stains with Otsu's threshold",
     "cellularity/Macenko/test/patches"),
    ("02_mosaic_extraction", "… one fixed threshold",
     "cellularity/fixed/test/patches"),
)  # fmt: skip


def written(text, root=ROOT):
    """Return the README with both parts written anew."""
    for name, part in (("chapters", chapters(root)), ("results", results(root))):
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, p=part: f"{m[1]}{p}\n{m[2]}", text, flags=re.S)
    return text


def main():
    readme = ROOT / "README.md"
    before = readme.read_text("utf-8")
    after = written(before)
    if "--check" in sys.argv:
        raise SystemExit(
            "README.md is stale: run tools/readme.py" if after != before else 0
        )
    readme.write_text(after, "utf-8")


if __name__ == "__main__":
    main()
