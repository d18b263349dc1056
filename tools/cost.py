"""What a training step of a network costs, and how fast this machine is.

A network takes one step on PyTorch's meta device, which is what fake tensors compute
with: shapes, no numbers, no device. Counted are the tensors that autograd keeps for the
backward pass, FLOPs (torch.utils.flop_counter's formulas) and bytes moved.
"""

import contextlib
import functools
import io
import json
import math
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from histo_utils import encoders
from histo_utils.networks import CBRNet, finetune

LOW = {F.conv2d, F.conv_transpose2d, F.linear, torch.matmul, torch.Tensor.matmul,
       torch.Tensor.__matmul__, torch.bmm, F.scaled_dot_product_attention}  # fmt: skip
HIGH = {F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax, torch.pow,
        torch.Tensor.pow, torch.linalg.vector_norm, F.normalize}  # fmt: skip


class Unfilled(TorchFunctionMode):
    """Weights are made on the meta device: nothing is drawn."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        on = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **on})


class Half(TorchFunctionMode):
    """Mixed precision as autocast does it on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def cast(x):
            known = torch.is_tensor(x) and x.is_floating_point()
            return (
                x.to(torch.bfloat16 if func in LOW else torch.float32) if known else x
            )

        given = args, kwargs or {}
        args, kwargs = tree_map(cast, given) if func in LOW | HIGH else given
        return func(*args, **kwargs)


class Count(TorchDispatchMode):
    """FLOPs (2 per multiplication) and bytes read and written."""

    flops = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:
            # flop_counter's own formula forgets groups, so depthwise layers cost
            # hundreds of times what they do
            places = args[1] if args[7] else args[0]  # transposed, or not
            each = 2 * places.numel() * math.prod(args[2].shape[1:])
            self.flops += each * sum(args[10][:2])
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        if not func.is_view:
            seen = [x for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)]
            self.bytes += sum(x.numel() * x.element_size() for x in seen)
        return out


class Cost(NamedTuple):
    """Of one training step, and of the forward pass in it."""

    weights: int
    trained: int
    saved: int  # bytes
    flops: float
    bytes: float
    forward: tuple[float, float]


def step(network, x, precision="32-true"):
    """Cost of a training step of a network that is on the meta device."""
    saved, sizes = {}, [p.numel() for p in network.parameters()]
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    half = Half() if "16" in precision else contextlib.nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with Count() as count:
        with hooks, half:
            outputs = [y.float() for y in tree_leaves(network(x))]
        forward = count.flops, count.bytes
        if trained:
            sum(y.square().mean() for y in outputs).backward()
    kept = sum(storage.nbytes() for storage in saved.values()) if trained else 0
    return Cost(sum(sizes), trained, kept, count.flops, count.bytes, forward)


def network_of(kind, name, **how):
    """Build what a chapter trains, on the meta device; and the shape of its items."""
    shape = (3, how.get("size") or 224, how.get("size") or 224)
    with Unfilled():
        if kind == "08":
            net = encoders.build({"network": "fusion", "name": name.split(".")[0],
                **how["options"]}).train()  # fmt: skip
        elif kind == "cbr":
            net = CBRNet(how["widths"], how["classes"])
        elif name in encoders.NETWORKS:
            net = encoders.build({"network": name, **how["options"]}).train()
        else:
            pooling = "mean_before_relu" if kind == "05" and "dense" in name else "head"
            net = encoders.frozen(name.split(".")[0], seed=0, device="meta",
                pooling=pooling).network  # fmt: skip
    if kind == "04":
        front, net = finetune.cut(net.to("meta"))
        shape = front(torch.zeros(1, *shape, device="meta")).shape[1:]
    if kind == "05":
        finetune.train_only(net.network, finetune.PARTS["densenet121"][how["trained"]])
        net.network.get_classifier().requires_grad_(False)
    elif kind in ("04", "06", "07"):
        net.requires_grad_(True)
    if how.get("classes") and kind != "cbr":
        with Unfilled():
            n = net.to("meta")(torch.zeros(1, *shape, device="meta")).shape[1]
            width = how.get("hidden")
            last = finetune.new_head(n, width, how["classes"]) if width else nn.Linear(
                n, how["classes"])  # fmt: skip
            net = nn.Sequential(net, last)
    return net.to("meta"), shape


@functools.cache
def cost(text, batch, precision):
    """Cost of a step of the network that a chapter builds (its settings as JSON)."""
    net, shape = network_of(**json.loads(text))
    return step(net, torch.zeros(batch, *shape, device="meta"), precision)


def measured():
    """Rates of this machine: of a small network, of memory, of decoding a JPEG."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def clock():  # on a CPU shared with others: the time that was ours
        if device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

    def seconds(network, x):
        times = []
        for _ in range(4):
            start = clock()
            network(x).square().mean().backward()
            times.append(clock() - start)
        return min(times[1:])

    def probe(network, *shape):
        x = torch.randn(*shape, device=device)
        known = seconds(network.to(device), x)
        return known, step(network.to("meta"), torch.zeros(*shape, device="meta"))

    norms = [layer for _ in range(3) for layer in (nn.BatchNorm2d(64), nn.ReLU())]
    moved, c = probe(nn.Sequential(*norms), 8, 64, 112, 112)
    found = {"bytes": c.bytes / moved}
    whole, c = probe(encoders.frozen("resnet18", seed=0).network.requires_grad_(True),
        8, 3, 128, 128)  # fmt: skip
    rate = c.flops / max(whole - c.bytes / found["bytes"], whole / 5)
    noise = np.random.default_rng(0).integers(0, 255, (125, 125, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((1000, 1000)).save(file, "JPEG", quality=90)
    start = time.process_time()
    for _ in range(5):
        Image.open(io.BytesIO(file.getvalue())).load()
    return found | {16: rate, 32: rate, "megapixel": (time.process_time() - start) / 5}
