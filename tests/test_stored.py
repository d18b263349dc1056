"""Stored inputs are what the frozen front gives for the turned patch."""

import pytest
import torch
from torch import nn

from histo_utils import catalog, encoders, patches
from histo_utils.loaders import Turned, grey
from histo_utils.networks.stages import cut


@pytest.fixture(scope="module")
def table(phantoms):
    folder, _ = phantoms
    return catalog.patch_table(str(folder), 256, 0.5).iloc[:5].reset_index(drop=True)


@pytest.fixture(scope="module")
def encoder():
    return encoders.frozen("mobilenetv2_035", seed=0, size=64)


def test_one_map(table, encoder):
    front, back = cut(encoder.network.network, 5)
    views = encoders.stored(encoder, front, table, (0, 5), grey, progress=False)
    row = table.iloc[3]
    image = Turned(5)(grey(patches.read_patch(row)))
    with torch.inference_mode():
        expected = front(encoder.preprocessing(image)[None])
        whole = back(views[0])
    torch.testing.assert_close(views[1][3:4], expected, atol=1e-4, rtol=1e-4)
    known = encoders.embed(encoder, table, grey, progress=False).vectors
    torch.testing.assert_close(whole, torch.from_numpy(known), atol=1e-4, rtol=1e-4)


class TwoMaps(nn.Module):
    def forward(self, x):
        return [x, x[:, :1, ::2, ::2] + 1]


def test_several_maps(table, encoder):
    (view,) = encoders.stored(encoder, TwoMaps(), table, progress=False)
    image = encoder.preprocessing(patches.read_patch(table.iloc[2]))
    torch.testing.assert_close(view[0][2], image)
    torch.testing.assert_close(view[1][2], image[:1, ::2, ::2] + 1)
