"""The accelerators that can be planned for, by what their makers publish, and how many of them in which shape."""

import dataclasses
import math
import re

from flexolmo_jax.errors import UserError, did_you_mean

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip, as published.

    Attributes:
      name: as in a topology.
      usable: bytes of its memory that a program may take: on TPU what the compiler says, which is a little less, or
        for v5p more, than the round number that is published.
      flops: bfloat16 operations per second, at most.
      hbm_bandwidth: bytes per second between the chip and its memory.
      link_bandwidth: bytes per second that a chip can receive from its neighbours, all links together.
      devices: JAX devices per chip, which share its memory, its arithmetic and its links evenly.
      axes: axes of a slice's shape; 0 where the chips have no shape, and cannot be compiled for ahead of time.
      source: where it is published.
    """

    name: str
    usable: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    devices: int = 1
    axes: int
    source: str


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            usable=round(15.75 * GIB),
            flops=197e12,
            hbm_bandwidth=819e9,
            link_bandwidth=400e9 / 2,
            axes=2,
            source="docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GB/s, 400 GB/s both ways",
        ),
        Chip(
            name="v5p",
            usable=round(95.74 * GIB),
            flops=459e12,
            hbm_bandwidth=2765e9,
            link_bandwidth=1200e9 / 2,
            axes=3,
            source="docs.cloud.google.com/tpu/docs/tpu7x: 459 TFLOPs, 95 GiB, 2765 GB/s, 1200 GB/s both ways",
        ),
        Chip(
            name="v6e",
            usable=round(31.25 * GIB),
            flops=918e12,
            hbm_bandwidth=1638e9,
            link_bandwidth=800e9 / 2,
            axes=2,
            source="docs.cloud.google.com/tpu/docs/tpu7x: 918 TFLOPs, 32 GiB, 1638 GB/s, 800 GB/s both ways",
        ),
        Chip(
            name="tpu7x",
            usable=round(2 * 94.75 * GIB),
            flops=2307e12,
            hbm_bandwidth=7380e9,
            link_bandwidth=1200e9 / 2,
            devices=2,
            axes=3,
            source="docs.cloud.google.com/tpu/docs/tpu7x: 2307 TFLOPs, 192 GiB, 7380 GB/s, 1200 GB/s both ways",
        ),
        Chip(
            name="h100",
            usable=80 * 10**9,
            flops=989e12,
            hbm_bandwidth=3350e9,
            link_bandwidth=50e9,
            axes=0,
            source="NVIDIA's data sheet of the H100: 989 TFLOPS dense, 80 GB, 3.35 TB/s; a port of 400 Gb/s per GPU, "
            "as in a DGX H100, because a job larger than a host is bound by it",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a shape.

    Attributes:
      chip: which.
      shape: how many along each axis of the slice; a single count where chips have no shape.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices


def parse_topology(text: str) -> Topology:
    """Reads `v5p:4x4x4`, `v5e:16x16` or `h100:64`.

    Raises:
      UserError: the chip is unknown, or the shape is not one that it has.
    """
    name, _, shape = text.strip().lower().partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology {text!r} names no chip that can be planned for; {did_you_mean(name, CHIPS)}")
    chip = CHIPS[name]
    example = "64" if not chip.axes else "x".join(["4"] * chip.axes)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 != max(chip.axes, 1):
        raise UserError(f"--topology {text!r} has no shape of {name}: write for example {name}:{example}")
    return Topology(chip, tuple(map(int, shape.split("x"))))
