"""Hours that `make plan` foretells, beside measured ones of other networks and sizes.

Run by hand: ``python benchmarks/bench_plan.py`` (a minute). The rate is taken from a
ResNet-18 at 128 px (tools/cost.py); wanted (issue 12): within a factor of 2.
Time is the processor's per thread, so a busy machine is no slower.
"""

import sys
import time
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from cost import measured, step

OTHERS = [("seresnet50", 4, 160), ("densenet121", 4, 192), ("convnext_tiny", 4, 128),
          ("vgg16", 2, 64)]  # fmt: skip


def seconds(network, x):
    """Shortest of three training steps."""
    times = []
    for _ in range(4):
        start = time.process_time()
        network(x).square().mean().backward()
        times.append((time.process_time() - start) / torch.get_num_threads())
    return min(times[1:])


def main():
    """Measure, and print what was measured."""
    rates = measured()
    print(f"{rates[32] / 1e9:.1f} GFLOP/s, {rates['bytes'] / 1e9:.1f} GB/s")
    for name, batch, side in OTHERS:
        network = timm.create_model(name).train()
        x = torch.randn(batch, 3, side, side)
        took = seconds(network, x)
        c = step(network.to("meta"), x.to("meta"))
        said = c.flops / rates[32] + c.bytes / rates["bytes"]
        ratio = f"{said / took:.2f}×"
        print(f"{name} at {side} px: {took:.2f} s, foretold {said:.2f} s: {ratio}")


if __name__ == "__main__":
    main()
