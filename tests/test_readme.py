"""The README's figures are those of the results files."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import readme  # noqa: E402


def test_the_readme_is_what_the_files_say():
    text = (ROOT / "README.md").read_text("utf-8")
    assert readme.written(text) == text, "run python tools/readme.py"
    assert "make book" in text and "make test" in text and "US10628736B2" in text


def test_a_changed_result_makes_the_readme_stale(tmp_path):
    for name in ("notebooks", "results/tissue"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "_config.yml").write_text((ROOT / "_config.yml").read_text("utf-8"))
    row = {"P@1": 0.251, "low": 0.2, "high": 0.3, "by chance": 0.144, "patients": 43}
    found = {
        "colour": {"label": row, "preparation": row},
        "provenance": {"date": "2026-01-02T03:04", "commit": "abc"},
    }
    path = tmp_path / "results/tissue/01_data_preparation.json"
    path.write_text(json.dumps(found))
    table = readme.results(tmp_path)
    assert "| 0.25 [0.20, 0.30], chance 0.14 | 43 patients |" in table
    assert table.count("not run") == len(readme.HEADLINES) - 2
    found["colour"]["label"] = {**row, "P@1": 0.9}
    path.write_text(json.dumps(found))
    assert readme.results(tmp_path) != table
