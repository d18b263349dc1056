"""The page on encoders: its example runs, its numbers are the code's."""

import re
from pathlib import Path

import pytest
import timm
import torch

from histo_utils import encoders

PAGE = (Path(__file__).parents[1] / "book" / "encoders.md").read_text("utf8")


def test_the_example_runs_and_gives_what_it_says():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (example,) = [block for block in blocks if "class TokenAndMean" in block]
    made = {}
    exec(compile(example, "book/encoders.md", "exec"), made)
    mine = made["mine"]
    images = torch.rand(2, 3, 160, 160)
    with torch.inference_mode():
        vectors = mine.network.eval()(images)
        tokens = mine.network.vit.forward_features(images)
    assert vectors.shape == (2, mine.dimension) == (2, 128)
    torch.testing.assert_close(vectors[:, :64], tokens[:, 0])
    torch.testing.assert_close(vectors[:, 64:], tokens[:, 1:].mean(1))


@pytest.mark.slow
def test_dimensions_inputs_and_licences_are_those_of_the_code():
    for name, row in (
        ("vgg16.tv_in1k", "VGG16"),
        ("inception_v3.tv_in1k", "Inception-v3"),
        ("legacy_xception.tf_in1k", "Xception"),
    ):
        lines = [line for line in PAGE.splitlines() if line.startswith(f"| {row}")]
        what, rights = lines[:2]
        encoder = encoders.frozen(name, seed=0)
        cells = [cell.strip() for cell in what.strip("|").split("|")]
        assert cells[2] == str(encoder.dimension)
        assert cells[3] == str(encoder.preprocessing.size)
        licence = timm.get_pretrained_cfg(name).license
        assert f"`{name}`" in rights and licence in rights.lower()
        half = encoder.preprocessing.mean == (0.5, 0.5, 0.5)
        assert ("RGB / 127.5" in rights) == half
