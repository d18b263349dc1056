"""Encoders on disk, and the authors' checkpoints."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file

from histo_utils import encoders
from histo_utils.encoders.checkpoints import fit_state
from histo_utils.loaders import Preprocessing
from histo_utils.networks import Joined, LocalGlobalFusionNeck, MultiScaleGeMHead
from histo_utils.networks.published import published_name

SMALL = "mobilenetv3_small_050"
MAPS = "test_convnext"  # timm's own for tests: 0.2 M parameters, four maps
MAP_CHANNELS = [24, 32, 48, 64]
GOLDEN = Path(__file__).parent / "golden" / "lgffem_toy.npz"

RECIPES = {
    "timm": {"network": "timm", "name": SMALL, "pooling": "mean"},
    "padded": {"network": "timm", "name": "mobilenetv2_035", "pad_type": "same"},
    "projected": {"network": "projected", "name": SMALL, "dim": 7},
    "fusion": {"network": "fusion", "name": MAPS, "channels": 8, "num_layers": 2},
    "cbr": {"network": "cbr", "widths": [4, 8], "dim": 5},
}


def images(n=2, side=64):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def vectors(encoder, x):
    encoder.network.eval()
    with torch.inference_mode():
        return encoder.network(x)


def an_encoder(recipe, seed=3, dimension=7):
    how = Preprocessing((0.1, 0.2, 1 / 3), (0.5, 0.6, 0.7), 64, "bicubic")
    card = encoders.Card("ours", "as the recipe", "MIT", 0.5, False, None)
    network = encoders.build(recipe, seed)
    for buffer in network.buffers():  # batch norm statistics must travel too
        if buffer.is_floating_point():
            buffer.add_(0.1)
    return encoders.Encoder("mine", network, how, dimension, card, recipe)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_loaded_encoder_gives_the_same_vectors(recipe, tmp_path):
    encoder = an_encoder(recipe)
    assert encoders.save(encoder, tmp_path / "e", {"seed": 3}) == tmp_path / "e"
    found = encoders.load(tmp_path / "e")
    assert found.fingerprint() == encoder.fingerprint()
    assert found.preprocessing == encoder.preprocessing and found.card == encoder.card
    assert found.recipe == recipe and found.dimension == 7
    assert not any(p.requires_grad for p in found.network.parameters())
    assert not any(m.training for m in found.network.modules())
    x = images()
    assert torch.equal(vectors(found, x), vectors(encoder, x))
    other = vectors(an_encoder(recipe, seed=4), x)
    assert not torch.equal(vectors(found, x), other), "the weights decide"
    extra = json.loads((tmp_path / "e" / "encoder.json").read_text())["extra"]
    assert extra == {"seed": 3}
    assert set(load_file(tmp_path / "e" / "weights.safetensors")) == set(
        found.network.state_dict()
    )


def test_joined_cosines_are_the_mean_of_the_learners():
    class Two(torch.nn.Module):
        def forward(self, x):
            return [F.normalize(x[:, :2], dim=1), F.normalize(x[:, 2:], dim=1)]

    x = torch.tensor([[3.0, 4.0, 1.0, 0.0], [1.0, 0.0, 0.0, 2.0]])
    a, b = Joined(Two())(x)
    assert float(a @ b) == pytest.approx((3 / 5 + 0) / 2)
    assert float(a.norm()) == pytest.approx(1)


def test_projected_by_hand():
    start = encoders.frozen(SMALL, seed=0, size=64)
    x = images()
    plain = vectors(start, x).clone()
    made = encoders.projected(start, dim=5, seed=1)
    layer = made.network.projection
    y = plain @ layer.weight.T + layer.bias
    by_hand = y / y.square().sum(1, keepdim=True).sqrt()
    np.testing.assert_allclose(vectors(made, x), by_hand.detach(), atol=1e-6)
    assert made.dimension == 5 and made.recipe["dim"] == 5
    assert all(p.requires_grad for p in made.network.parameters()), "to be trained"
    with pytest.raises(ValueError, match="mine is not a plain timm network"):
        encoders.projected(an_encoder(RECIPES["cbr"]))


def test_fused_keeps_the_backbone_as_it_was():
    start = encoders.frozen("mobilenetv2_100", seed=0)
    made = encoders.fused(start, channels=8, num_layers=1, out_indices=[1, 2, 3, 4])
    assert made.recipe["pad_type"] == "same", "the common network's padding"
    source = start.network.network.state_dict()
    own = made.network.backbone.state_dict()
    assert own and all(torch.equal(source[name], own[name]) for name in own)
    network = made.network.train()
    assert network.training and network.neck.training and network.head.training
    assert not any(m.training for m in network.backbone.modules())
    network(images(side=64)).square().sum().backward()
    after = network.backbone.state_dict()
    assert all(torch.equal(source[name], after[name]) for name in after)
    assert all(p.grad is None for p in network.backbone.parameters())
    assert any(p.grad is not None and p.grad.any() for p in network.neck.parameters())
    assert vectors(made, images()).shape == (2, 32) == (2, made.dimension)


def test_without_a_recipe_saving_is_refused_and_says_how(tmp_path):
    encoder = replace(an_encoder(RECIPES["cbr"]), recipe=None)
    with pytest.raises(ValueError, match=r"has no recipe.*recipe=.*NETWORKS: timm, pr"):
        encoders.save(encoder, tmp_path / "e")
    wrong = replace(encoder, recipe=RECIPES["cbr"] | {"dim": 6})
    with pytest.raises(ValueError, match=r"the network of mine does not fit CBRNet"):
        encoders.save(wrong, tmp_path / "e")
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_saving_replaces_an_encoder_and_nothing_else(tmp_path):
    first, second = (an_encoder(RECIPES["cbr"], seed) for seed in (0, 1))
    encoders.save(first, tmp_path / "e")
    encoders.save(second, tmp_path / "e")
    for extra in ({"x": math.nan}, {"x": np.float32(1)}):
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            encoders.save(first, tmp_path / "e", extra)
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    (tmp_path / "e" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes\.txt'"):
        encoders.save(first, tmp_path / "e")
    assert encoders.load(tmp_path / "e").fingerprint() == second.fingerprint()


@pytest.fixture
def saved(tmp_path):
    return encoders.save(an_encoder(RECIPES["cbr"]), tmp_path / "e")


def changed(folder, **facts):
    path = folder / "encoder.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf8")) | facts), "utf8")


def test_missing_and_damaged_files(saved):
    weights, facts = saved / "weights.safetensors", saved / "encoder.json"
    whole = weights.read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], r"weights\.safetensors cannot be read"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "is not the file that was saved"),
    ):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            encoders.load(saved)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights\.safetensors"):
        encoders.load(saved)
    weights.write_bytes(whole)
    for content, message in (
        ('{"format": 1, "recipe": {}}', "says nothing of card, dimension, name"),
        ("{", r"encoder\.json is damaged"),
    ):
        facts.write_text(content)
        with pytest.raises(ValueError, match=message):
            encoders.load(saved)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"format": 2}, r"has format 2; .* reads 1: update histo_utils"),
        ({"recipe": RECIPES["cbr"] | {"dim": 6}}, r"2 of another shape \(.*\(5, 8\) w"),
        ({"recipe": {"network": "cbrr"}}, "unknown network 'cbrr'; nearest: cbr"),
        ({"recipe": {"network": "cbr", "depth": 3}}, r"cannot be built: .*depth"),
    ],
)
def test_facts_that_do_not_fit(saved, facts, message):
    changed(saved, **facts)
    with pytest.raises(ValueError, match=message):
        encoders.load(saved)


# ----------------------------------------------------------------- the authors' files


class Trap:
    """What a hostile checkpoint does: run a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path):
    trace = tmp_path / "executed"
    path = tmp_path / "KimiaNetPyTorchWeights.pth"
    torch.save({"module.model.0.conv0.weight": Trap(trace)}, path)
    with pytest.raises(ValueError, match="it was not executed"):
        encoders.load_published(path)
    with pytest.raises(ValueError, match="it was not executed"):
        encoders.frozen(SMALL, path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the trap works, so not springing it means something"


@pytest.fixture(scope="module")
def densenet():
    """torchvision's DenseNet-121 with a 30-way head, everything random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.densenet121(weights=None, num_classes=30).eval()
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.ndim == 1:  # batch norms would be nearly the identity
                tensor.data.uniform_(0.5, 1.5)
        network.features.norm5.bias.data.normal_()
    return network


def as_kimianet(network):
    names = network.features.state_dict()
    head = {f"module.fc_4.{k}": v for k, v in network.classifier.state_dict().items()}
    return {f"module.model.0.{k}": v for k, v in names.items()} | head


@pytest.mark.slow
def test_kimianet_gives_torchvisions_features_without_the_relu(densenet, tmp_path):
    path = tmp_path / "KimiaNetPyTorchWeights.pth"
    torch.save(as_kimianet(densenet), path)
    encoder = encoders.load_published(path)
    x = images(side=96)
    with torch.inference_mode():
        expected = densenet.features(x).mean((2, 3))
        logits = densenet.classifier(expected)
    made = vectors(encoder, x)
    assert made.shape == (2, 1024) == (2, encoder.dimension)
    scale = float(expected.abs().mean())
    np.testing.assert_allclose(made / scale, expected / scale, atol=1e-4)
    assert (made < 0).any(), "before the ReLU"
    head = encoder.network.network.classifier
    np.testing.assert_allclose(
        head(made).detach(), logits, rtol=1e-3, atol=1e-3 * scale
    )
    card = encoder.card
    assert card.tcga is True and card.gated and card.mpp == 0.5
    assert "non-commercial" in card.licence and "no redistribution" in card.licence
    assert encoder.preprocessing == Preprocessing(
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None
    )
    assert not any(p.requires_grad for p in encoder.network.parameters())
    again = encoders.load(encoders.save(encoder, tmp_path / "kept"))
    assert again.fingerprint() == encoder.fingerprint()


def test_kimianet_without_its_head_and_with_damage(densenet, tmp_path):
    state = as_kimianet(densenet)
    path = tmp_path / "k.safetensors"
    bare = {k: v for k, v in state.items() if "fc_4" not in k}
    save_file(bare, path)
    assert encoders.load_published(path, kind="kimianet").dimension == 1024
    del bare["module.model.0.norm5.weight"]
    bare["module.model.0.norm6.weight"] = torch.ones(3)
    bare["module.model.0.norm5.bias"] = torch.ones(3)
    save_file(bare, path)
    with pytest.raises(ValueError) as caught:
        encoders.load_published(path)
    for words in (
        "1 missing (features.norm5.weight)",
        "1 unexpected (features.norm6.weight)",
        "1 of another shape (features.norm5.bias (3,) where (1024,) is expected)",
    ):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="a checkpoint of kimianet, not lgffem"):
        encoders.load_published(path, kind="lgffem")


@pytest.fixture(scope="module")
def lgffem():
    """The golden toy checkpoint, its first layer made for another backbone."""
    golden = np.load(GOLDEN)
    state = {
        name: torch.from_numpy(golden[name]).float()
        for name in golden.files
        if name.startswith(("neck.", "head."))
    }
    rng = torch.Generator().manual_seed(0)
    for level, c in enumerate(MAP_CHANNELS, 1):
        down = f"neck.neck_layer_0.p{level}_down_channel"
        for part, shape in {
            "pwconv1.weight": (c // 2, c, 1, 1),
            "norm.weight": (c // 2,),
            "norm.bias": (c // 2,),
            "pwconv2.weight": (12, c // 2, 1, 1),
        }.items():
            state[f"{down}.{part}"] = torch.randn(shape, generator=rng)
    return state


def test_lgffem_is_backbone_neck_and_head(lgffem, tmp_path):
    backbone = timm.create_model(MAPS)
    save_file(backbone.state_dict(), tmp_path / "b.safetensors")
    path = tmp_path / "lgffem.pth"
    wrapped = {f"module.{k}": v for k, v in lgffem.items()}
    torch.save({"epoch": 10, "model_state_dict": wrapped}, path)
    encoder = encoders.load_published(
        path, backbone=MAPS, backbone_weights=tmp_path / "b.safetensors"
    )
    assert encoder.recipe["channels"] == 12 and encoder.recipe["num_layers"] == 2
    assert encoder.recipe["grn"] == "as_published" and encoder.dimension == 48
    assert encoder.preprocessing.size == 224 and "none stated" in encoder.card.licence
    neck = LocalGlobalFusionNeck(MAP_CHANNELS, 12, 2, "as_published")
    head = MultiScaleGeMHead(12).eval()
    for module, part in ((neck, "neck."), (head, "head.")):
        own = {k.removeprefix(part): v for k, v in lgffem.items() if part in k}
        fit_state(module, own, part, published_name)
    x = images()
    with torch.inference_mode():
        maps = backbone.eval().forward_intermediates(x, intermediates_only=True)
        expected = head(neck(maps))
    np.testing.assert_allclose(vectors(encoder, x), expected, atol=1e-5)
    again = encoders.load(encoders.save(encoder, tmp_path / "kept"))
    assert torch.equal(vectors(again, x), vectors(encoder, x))


def test_lgffem_with_its_backbone_needs_no_other(lgffem, tmp_path):
    own = timm.create_model(MAPS, features_only=True).state_dict()
    path = tmp_path / "whole.pth"
    torch.save(lgffem | {f"backbone.{k}": v for k, v in own.items()}, path)
    encoder = encoders.load_published(path, backbone=MAPS)
    found = encoder.network.backbone.state_dict()
    assert all(torch.equal(own[name], found[name]) for name in own)


def test_lgffem_says_what_is_wrong(lgffem, tmp_path):
    path = tmp_path / "l.safetensors"
    save_file(lgffem, path)
    weights = tmp_path / "b.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    with pytest.raises(ValueError, match=r"fuses maps of \[24, 32, 48, 64\] channels"):
        encoders.load_published(path, backbone="test_resnet", backbone_weights=weights)
    short = {k: v for k, v in lgffem.items() if k != "neck.neck_layer_1.p3_1_weight"}
    save_file(timm.create_model(MAPS).state_dict(), weights)
    save_file(short, path)
    with pytest.raises(ValueError, match=r"1 missing \(neck_layer_1\.p3_1_weight"):
        encoders.load_published(path, backbone=MAPS, backbone_weights=weights)
    save_file(lgffem | {"loss.W": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"unexpected names loss\.W"):
        encoders.load_published(path)
    save_file({k: v for k, v in lgffem.items() if "h1.fc" not in k}, path)
    with pytest.raises(ValueError, match=r"no head\.h1\.fc\.weight in a checkpoint"):
        encoders.load_published(path)


def test_unknown_names_and_no_state_dict_say_what_was_found(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"encoder.a": torch.ones(1), "encoder.b": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"the names encoder\.a, encoder\.b are of no"):
        encoders.load_published(path)
    torch.save({"epoch": 3, "optimizer": {}}, path)
    with pytest.raises(ValueError, match="holds epoch, optimizer; expected a state"):
        encoders.load_published(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"x\.pth"):
        encoders.load_published(path)
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        encoders.load_published(tmp_path / "none.pth")


def test_somebodys_timm_model(tmp_path):
    """A folder stands in for the hub: the same branch of timm, no network needed."""
    network = timm.create_model("test_vit", num_classes=0)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 160, 160], "mean": [0.7, 0.5, 0.7], "std": [0.2] * 3}
    cfg["fixed_input_size"] = True
    facts = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    encoder = encoders.frozen(f"local-dir:{tmp_path}")
    assert encoder.preprocessing.mean == (0.7, 0.5, 0.7)
    assert encoder.preprocessing.size == 160
    x = images(side=160)
    with torch.inference_mode():
        expected = network.eval()(x)
    np.testing.assert_allclose(vectors(encoder, x), expected, atol=1e-6)
    row = encoder.describe()
    assert row["TCGA"] == row["gated"] == "unknown"
    assert row["trained at, µm/px"] == "not known"
    with pytest.raises(FileNotFoundError, match="HF_TOKEN"):
        encoders.frozen(f"local-dir:{tmp_path / 'none'}")
