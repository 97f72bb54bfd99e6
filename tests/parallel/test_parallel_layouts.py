"""The layouts on eight simulated devices: the same losses as on one, parameters cut as the table says, guards."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, abstract_params
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.train.optimizer import OptimizerConfig
from tests.small import CONFIG

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import PUBLIC, builder
from flexolmo_jax.model.partition import belongs_to_expert, flatten, split
from flexolmo_jax.parallel import MeshConfig
from flexolmo_jax.train.expert_objective import ExpertTraining, RestraintConfig
from flexolmo_jax.train.objective import ObjectiveConfig
from flexolmo_jax.train.optimizer import OptimizerConfig
from flexolmo_jax.train.step import TrainState, make_step
from tests.small import CONFIG, random_params
from tests.train.test_train_step import batch_of

if len(sys.argv) > 2:
    jax.distributed.initialize(
        sys.argv[2], num_processes=2, process_id=int(sys.argv[3]), heartbeat_timeout_seconds=280
    )
task = ExpertTraining("math", ObjectiveConfig(), RestraintConfig())
optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1).build(10)
step = jax.jit(make_step(builder(CONFIG, (PUBLIC, "math")), task.weigh, task.loss, optimizer, accumulation=1))
result = {}
for name, axes in json.loads(sys.argv[1]).items():
    layout = MeshConfig(**axes).build()
    trainable, frozen = map(layout.place, split(random_params("math"), lambda path: belongs_to_expert(path, "math")))
    state = TrainState(trainable, layout.create(optimizer.init, trainable))
    losses = []
    for seed in range(3):
        batch = layout.place_batch(jax.tree.map(np.asarray, batch_of(rows=24, seed=seed)))
        with jax.set_mesh(layout.mesh):
            state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    gate = flatten(state.params)["experts", "math", "gate"]
    result[name] = {"losses": losses, "piece": gate.sharding.shard_shape(gate.shape), "devices": len(jax.devices())}
print(json.dumps(result))
"""

MESHES = {
    "replicated": {},
    "fsdp": {"layout": "fsdp"},
    "mixed": {"layout": "fsdp", "data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_expert": {"layout": "fsdp_expert", "fsdp": 2, "expert": 4},
}


def start(devices: int, meshes: dict, *process: str) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    program = [sys.executable, "-c", PROGRAM, json.dumps(meshes), *process]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen) -> dict:
    try:
        out, error = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, error[-2000:]
    return json.loads(out.splitlines()[-1])


def losses_on(devices: int, meshes: dict) -> dict:
    return finish(start(devices, meshes))


def test_every_layout_gives_the_losses_of_one_device():
    (alone,) = losses_on(1, {"alone": {}}).values()
    spread = losses_on(8, MESHES)
    for name, found in spread.items():
        assert found["devices"] == 8
        np.testing.assert_allclose(found["losses"], alone["losses"], atol=1e-4, err_msg=name)
    assert spread["replicated"]["piece"] == [2, 16, 24]
    assert spread["fsdp"]["piece"] == [2, 2, 24]
    assert spread["mixed"]["piece"] == [2, 8, 12]
    assert spread["fsdp_expert"]["piece"] == [2, 8, 6]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    processes = [start(4, MESHES, coordinator, str(number)) for number in range(2)]
    both = [finish(process) for process in processes]
    (alone,) = losses_on(1, {"alone": {}}).values()
    for found in both:
        for name in MESHES:
            assert found[name]["devices"] == 8
            np.testing.assert_allclose(found[name]["losses"], alone["losses"], atol=1e-4, err_msg=name)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    count = len(jax.devices())
    with pytest.raises(UserError, match=f"needs {3 * count} devices, but there are {count}"):
        MeshConfig(data=3 * count).build()
    with pytest.raises(UserError, match=r"MeshConfig.expert must be at least 1"):
        MeshConfig(expert=0)
    with pytest.raises(UserError, match=r"MeshConfig.layout is 'zero', but the layouts are replicated, fsdp, fsdp_exp"):
        MeshConfig(layout="zero")
    with pytest.raises(UserError, match=r"MeshConfig.expert is 2, but the layout fsdp cuts nothing over expert"):
        MeshConfig(layout="fsdp", expert=2)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh is made of, in a job of several slices."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"layout": "replicated"}, (16, 1, 1, 1)),
        ({"layout": "fsdp"}, (2, 8, 1, 1)),
        ({"layout": "fsdp", "fsdp": 4}, (4, 4, 1, 1)),
        ({"layout": "fsdp_expert", "expert": 4}, (2, 2, 4, 1)),
        ({"layout": "fsdp_expert", "data": 4, "expert": 2, "tensor": 2}, (4, 1, 2, 2)),
    ],
)
def test_between_slices_only_the_data_axis_runs(options, shape):
    devices = [Device(number, number // 8) for number in range(16)]
    mesh = MeshConfig(**options).build(devices).mesh
    assert mesh.devices.shape == shape
    for replica in mesh.devices:
        assert len({device.slice_index for device in replica.flat}) == 1
    with pytest.raises(UserError, match=r"MeshConfig.data is 1, but must be a multiple of the 2 slices"):
        MeshConfig(layout="fsdp", data=1, fsdp=16).build(devices)


def test_a_layout_that_leaves_much_of_a_model_whole_is_refused():
    devices = [Device(number, 0) for number in range(8)]
    layout = MeshConfig(layout="fsdp").build(devices)
    layout.check(abstract_params(CONFIG, (PUBLIC, "math")))
    wide = {
        "anchor": {"norm": jax.ShapeDtypeStruct((3, 100), "float32"), "head": jax.ShapeDtypeStruct((8, 8), "float32")}
    }
    with pytest.raises(
        UserError, match="82% of the parameters would stay whole on every device of fsdp, data 1 x fsdp 8"
    ):
        layout.check(wide)
    with pytest.raises(UserError, match="anchor/head has an axis of 12, which the mesh axes fsdp do not cut into 8"):
        layout.shardings({"anchor": {"head": jax.ShapeDtypeStruct((12, 8), "float32")}})


def test_an_optimizer_state_lies_where_its_parameters_do():
    layout = MeshConfig(layout="fsdp_expert", fsdp=2, expert=4).build([Device(number, 0) for number in range(8)])
    params = abstract_params(CONFIG, (PUBLIC, "math"))
    state = jax.eval_shape(OptimizerConfig(learning_rate=1e-2, warmup_steps=1).build(10).init, params)
    specs = [at.spec for at in jax.tree.leaves(layout.shardings(params))]
    found = [
        at.spec for leaf, at in zip(*map(jax.tree.leaves, (state, layout.shardings(state))), strict=True) if leaf.ndim
    ]
    assert found == 2 * specs
