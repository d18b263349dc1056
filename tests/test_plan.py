"""What `make plan` says a training step keeps, beside what a real step keeps."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import cost as costs
import plan as plans

RATES = {16: 1e14, 32: 1e13, "bytes": 1e12, "megapixel": 0.03}
PAPER = sorted(Path(__file__).parents[1].glob("profiles/paper/*.yaml"))


@pytest.mark.parametrize(
    "name, side", [("mobilenetv2_100", 96), ("densenet121", 64), ("seresnet50", 64)]
)
def test_memory_is_that_of_a_real_step(name, side):
    network = timm.create_model(name).train()
    x = torch.randn(2, 3, side, side)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        output = network(x)
    kept = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    said = costs.step(network.to("meta"), x.to("meta"))
    assert output.shape == (2, 1000)
    assert said.saved == pytest.approx(kept, rel=0.25)
    assert said.trained == said.weights == sum(p.numel() for p in network.parameters())
    assert said.flops == pytest.approx(3 * said.forward[0], rel=0.1)


def test_frozen_parts_keep_nothing():
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    network[0].requires_grad_(False)
    said = costs.step(network.to("meta"), torch.zeros(5, 8, device="meta"))
    assert (said.weights, said.trained) == (108, 36)
    assert said.saved == 5 * 8 * 4, "what enters the trained layer"
    assert said.forward[0] == 2 * 5 * (8 * 8 + 8 * 4)
    assert said.flops - said.forward[0] == 2 * 5 * 8 * 4, "one product, not two"


# GB per image, measured (SEEDS.md, 11): DenseNet-121 at 512 px and scaled to 1000 px
@pytest.mark.parametrize("name, wanted", [("III", 0.73), ("IV", 1.3)])
def test_memory_in_half_precision(name, wanted):
    how = {"kind": "05", "name": "densenet121", "size": 512, "trained": name}
    network, shape = costs.network_of(**how, classes=30)
    x = torch.zeros(4, *shape, device="meta")
    found = costs.step(network, x, "16-mixed").saved / 4 * (1000 / 512) ** 2 / 1e9
    assert found == pytest.approx(wanted, rel=0.25)


@pytest.mark.slow
def test_every_experiment_has_its_row_without_data(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path))
    monkeypatch.chdir(PAPER[0].parents[2])
    for path in PAPER:
        row = plans.plan(path, 1, RATES)
        assert row["data"] == "not found" and row["training h"] >= 0
        assert row["if it does not fit"] or row["GPU GB"] < 1


def test_images_are_counted_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTO_DATA", str(tmp_path))
    monkeypatch.setenv("HISTO_CACHE", str(tmp_path / "cache"))
    there, published, side, _ = plans.counts_of("kimia_path24c")
    assert (there, side) == (False, 1000)
    assert published == {"train": 22_591, "test": 1325}
    for part, n in (("train", 3), ("test", 2)):
        folder = tmp_path / "kimia_path24c" / part / "s0"
        folder.mkdir(parents=True)
        for i in range(n):
            (folder / f"{i}.jpg").write_bytes(b"x" * 500)
    there, found, _, disk = plans.counts_of("kimia_path24c")
    assert there and found == {"train": 3, "test": 2} and disk == 2500 / 1e9
