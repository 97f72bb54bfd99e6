"""Compiles a job ahead of time for TPUs that this machine does not have."""

import os
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies

from flexolmo_jax.errors import UserError
from flexolmo_jax.plan.chips import Topology

INSTALL = "pip install 'flexolmo_jax[plan]'"

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud's metadata server what this machine is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is opened, so nothing needs to be locked
    "TPU_ACCELERATOR_TYPE": "none",
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
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except Exception as error:
        raise UserError(f"the TPU compiler knows no topology {topology.name}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def compile_program(program, layout, available: int) -> Compiled:
    """Compiles for the devices of a layout.

    Args:
      program: of `flexolmo_jax.plan.jobs`.
      layout: on whose mesh it runs.
      available: HBM of a device, in bytes, where the compiler does not say.
    """
    began = time.monotonic()
    with jax.set_mesh(layout.mesh):
        lowered = program.function.lower(*program.arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return Compiled(_too_large(str(error), available), "", time.monotonic() - began)
    found = compiled.memory_analysis()
    memory = Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        available=available,
    )
    return Compiled(memory, compiled.as_text(), time.monotonic() - began)


def _too_large(message: str, available: int) -> Memory:
    """What the compiler says about a program that it gave up because of its size."""
    raise NotImplementedError(message[:3000])
