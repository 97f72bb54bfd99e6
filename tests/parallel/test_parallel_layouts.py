"""The layouts on eight simulated devices: the same losses as on one, parameters cut as the table says, guards."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from flexolmo_jax.errors import UserError
from flexolmo_jax.parallel import MeshConfig

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

task = ExpertTraining("math", ObjectiveConfig(), RestraintConfig())
optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1).build(10)
step = jax.jit(make_step(builder(CONFIG, (PUBLIC, "math")), task.weigh, task.loss, optimizer, accumulation=1))
result = {}
for name, axes in json.loads(sys.argv[1]).items():
    layout = MeshConfig(**axes).build()
    trainable, frozen = map(layout.place, split(random_params("math"), lambda path: belongs_to_expert(path, "math")))
    state = TrainState(trainable, jax.jit(optimizer.init)(trainable))
    losses = []
    for seed in range(3):
        batch = layout.place_batch(jax.tree.map(np.asarray, batch_of(rows=24, seed=seed)))
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    gate = flatten(state.params)["experts", "math", "gate"]
    result[name] = {"losses": losses, "piece": gate.sharding.shard_shape(gate.shape), "devices": len(jax.devices())}
print(json.dumps(result))
"""

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
    "expert": {"fsdp": 2, "expert": 4},
}


def losses_on(devices: int, meshes: dict) -> dict:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    program = [sys.executable, "-c", PROGRAM, json.dumps(meshes)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_layout_gives_the_losses_of_one_device():
    (alone,) = losses_on(1, {"alone": {}}).values()
    spread = losses_on(8, MESHES)
    for name, found in spread.items():
        assert found["devices"] == 8
        np.testing.assert_allclose(found["losses"], alone["losses"], atol=1e-4, err_msg=name)
    assert spread["data"]["piece"] == [2, 16, 24]
    assert spread["fsdp"]["piece"] == [2, 2, 24]
    assert spread["mixed"]["piece"] == [2, 8, 12]
    assert spread["expert"]["piece"] == [2, 8, 6]


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    count = len(jax.devices())
    with pytest.raises(UserError, match=f"needs {3 * count} devices, but there are {count}"):
        MeshConfig(data=3 * count).build()
    with pytest.raises(UserError, match=r"MeshConfig.fsdp must be at least 1"):
        MeshConfig(fsdp=0)
