"""A topology of your own, in a file of your own: copy this anywhere, change the formula, and every command takes it.

    python -m spiral_jax.check    --config=experiments/own_topology.py
    python -m spiral_jax.train    --config=experiments/own_topology.py --workdir=runs/own
    python -m spiral_jax.generate --import=experiments/own_topology.py --workdir=runs/own --prompt="def "

`blend` chooses, for every token and iteration, between the update, the state and where the loop began:
h(t+1) = a e(t) + b h(t) + c h(0), (a, b, c) = softmax(mix_t(h(t))). docs/topologies.md explains each line.

Expect: a model of 1.1M parameters on a part of Python's standard library, byte by byte; about half a minute for 100
steps on two CPU cores.
"""

import sysconfig

import jax
import jax.numpy as jnp

from spiral_jax.model.operators import Linear
from spiral_jax.model.topology import Topology, topologies
from spiral_jax.run.config import default_config


@topologies.register("blend")
class Blend(Topology):
    """h(t+1) = a e(t) + b h(t) + c h(0), (a, b, c) = softmax(mix_t(h(t)))."""

    def linears(self, level):
        return {"mix": Linear(inputs=self.config.d_model, outputs=3)}

    def next_state(self, states, e_BxLxD, linears):
        abc_BxLx3 = jax.nn.softmax(linears["mix"](states.h_BxLxD), axis=-1)
        a_BxLx1, b_BxLx1, c_BxLx1 = jnp.split(abc_BxLx3, 3, axis=-1)
        return a_BxLx1 * e_BxLxD + b_BxLx1 * states.h_BxLxD + c_BxLx1 * states.h0_BxLxD


def get_config(argument: str = ""):
    """The configuration; `argument` is the topology's name, to compare with one of the package's."""
    config = default_config()
    config.model.topology = argument or "blend"
    config.model.vocab_size = 264
    config.model.d_model = 128
    config.model.num_heads = 2
    config.model.prelude_layers, config.model.core_layers, config.model.coda_layers = 1, 2, 1
    config.model.chunks = (4, 2, 1)
    config.model.dtype = "float32"
    config.model.unroll = True

    config.data.paths = (f"{sysconfig.get_paths()['stdlib']}/[a-h]*.py",)
    config.data.tokenizer = "bytes"
    config.data.validation_fraction = 0.05
    config.data.invalid = "skip"

    config.train.steps = 100
    config.train.batch_size = 8
    config.train.sequence_length = 256
    config.optimizer.peak_learning_rate = 2e-3
    config.optimizer.warmup_fraction = 0.1
    config.checkpoint.every_steps = 25
    config.evaluation.every_steps = 0
    config.summary.sample_tokens = 0
    return config
