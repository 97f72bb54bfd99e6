"""Compiles a job ahead of time for TPUs that this machine does not have."""

import math
import os
import re
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies

from flexolmo_jax.errors import UserError
from flexolmo_jax.parallel import Layout
from flexolmo_jax.plan.chips import Topology
from flexolmo_jax.plan.jobs import Program

INSTALL = "pip install 'flexolmo_jax[plan]'"

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud's metadata server what this machine is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is opened, so nothing needs to be locked
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any that exists
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class Memory(NamedTuple):
    """HBM of one device, in bytes.

    Attributes:
      arguments: parameters, optimizer state and batch.
      outputs: results that do not take the place of an argument.
      temporaries: everything that lives only while the program runs.
      code: the program itself.
      available: what the compiler may use.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    available: int

    @property
    def needed(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
      memory: what it needs.
      text: its instructions, as `flexolmo_jax.plan.hlo` reads them; empty where it does not fit.
      seconds: how long compiling took.
    """

    memory: Memory
    text: str
    seconds: float


def tpu_devices(topology: Topology) -> list:
    """The devices of a topology, none of which is here.

    Raises:
      UserError: libtpu is not installed, or it knows no such topology.
    """
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(
            f"planning for {topology.name} needs the TPU compiler: {INSTALL} (it runs on any Linux machine)"
        ) from None
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Unless it is told, the compiler takes four chips for the least that a host can have.
    host = {"chips_per_host_bounds": (1, 1, 1)} if topology.chips == 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **host)
    except Exception as error:
        raise UserError(f"the TPU compiler knows no topology {topology.name}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def compile_program(program: Program, layout: Layout, available: int) -> Compiled:
    """Compiles a program for the devices of a layout, of which `available` bytes of HBM each may be used."""
    began = time.monotonic()
    with layout.active():
        lowered = program.function.lower(*program.arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if needed := needed_memory(str(error)):
                held = _argument_bytes(program)
                memory = Memory(held, 0, max(needed - held, available - held + 1), 0, available)
                return Compiled(memory, "", time.monotonic() - began)
            raise
    found = compiled.memory_analysis()
    memory = Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        available=available,
    )
    return Compiled(memory, compiled.as_text(), time.monotonic() - began)


def needed_memory(message: str) -> int | None:
    """Bytes of HBM that a program would take which the compiler gave up for its size; None for any other complaint."""
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    stated = re.search(r"Used ([\d.]+)([KMGT]) of", message) or re.search(r"temporaries \(([\d.]+)([KMGT])\)", message)
    return round(float(stated[1]) * 1024 ** (1 + "KMGT".index(stated[2]))) if stated else 1


def _argument_bytes(program: Program) -> int:
    """Bytes of a device's pieces of the arguments."""
    leaves = [leaf for leaf in jax.tree.leaves(program.arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
