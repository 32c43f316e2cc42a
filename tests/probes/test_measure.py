"""A whole probe against the NumPy reference, which computes every number one query, token and chunk at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jaxprs import shapes_in

from spiral_jax.data.windows import TokensInMemory
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.parallel.placed_model import place
from spiral_jax.probes.measure import batches, measure
from spiral_jax.probes.passes import look
from spiral_jax.probes.states import centred_alignment, linear_kernel, rbf_kernel

SPIRAL = ModelConfig(vocab_size=24, d_model=16, num_heads=4, prelude_layers=1, core_layers=2, coda_layers=1,
                     chunks=(4, 1), rotary_fraction=0.5, dtype="float32")  # fmt: skip
LOOPED = dataclasses.replace(SPIRAL, chunks=(1, 1), topology="gated", prelude_layers=0, shared_core=False)
LENGTH, SAMPLES = 43, 7


def attention_of(config, weights, x_NxD):
    """Each head's map [H, N, N], from the input of a layer."""
    x_NxD = reference.layer_norm(weights / "input_layernorm", x_NxD, config["layer_norm_eps"])
    (N, D), H = x_NxD.shape, config["num_attention_heads"]
    qkv_NxHx3xK = reference.linear(weights / "attention" / "query_key_value", x_NxD).reshape(N, H, 3, D // H)
    rot, base = int(D // H * config["rotary_pct"]), config["rotary_emb_base"]
    q, k = ([reference.rotate(qkv_NxHx3xK[i, :, part], i, rot, base) for i in range(N)] for part in (0, 1))
    map_HxNxN = np.zeros((H, N, N))
    for i in range(N):
        scores_HxJ = np.stack([(q[i] * k[j]).sum(axis=-1) for j in range(i + 1)], axis=-1) / np.sqrt(D // H)
        map_HxNxN[:, i, : i + 1] = reference.softmax(scores_HxJ)
    return map_HxNxN


def statistics_of(map_NxN, chunk):
    """Section 6, as it reads."""
    N, M = len(map_NxN), int(np.ceil(32 / chunk))
    p_N = map_NxN.mean(axis=0) / map_NxN.mean(axis=0).sum()
    near = [map_NxN[q, max(q - M, 0) : q].sum() for q in range(N)]
    return -(p_N * np.log(p_N)).sum() / np.log(N), np.mean(near)


def change(h_NxD, f_NxD):
    size = np.linalg.norm
    return np.mean([2 * size(f - h) / (size(f) + size(h)) for h, f in zip(h_NxD, f_NxD, strict=True)])


class Expected:
    """What the reference shows of some sequences: `mean` of each sequence's numbers, `states` [S, tokens, D]."""

    def __init__(self, config, tensors, tokens_BxL, monkeypatch):
        self.config, self.weights = config, reference.Weights(tensors) / "spiralformer"
        rows, states = [], []
        for tokens_L in tokens_BxL:
            calls, routed = self._record(tensors, tokens_L, monkeypatch)
            rows.append(self._row(calls, routed))
            states.append(self.states_of_row)
        self.mean = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
        self.states = np.concatenate(states, axis=1)

    def _record(self, tensors, tokens_L, monkeypatch):
        """Inputs and outputs of every layer, and of every route, on the way of one sequence."""
        calls, routed = [], []
        layer, route = reference.layer, reference.route

        def recorded_layer(config, weights, x_NxD):
            out_NxD = layer(config, weights, x_NxD)
            calls.append((weights, x_NxD, out_NxD))
            return out_NxD

        def recorded_route(weights, k, memory_SxLxD, state_LxD, new_LxD):
            h_LxD = route(weights, k, memory_SxLxD, state_LxD, new_LxD)
            routed.append((state_LxD, h_LxD))
            return h_LxD

        with monkeypatch.context() as patch:
            patch.setattr(reference, "layer", recorded_layer)
            patch.setattr(reference, "route", recorded_route)
            reference.logits(self.config, tensors, tokens_L[None])
        return calls, routed

    def _row(self, calls, routed):
        config, weights, row = self.config, self.weights, {}
        prelude, coda, schedule = calls[0], calls[-1], config["schedule"]
        cores = [calls[1 + 2 * t : 3 + 2 * t] for t in range(len(schedule))]
        h_LxD = [prelude[1], *(after for _, after in routed), coda[2]]
        self.states_of_row = np.stack(h_LxD)
        row["update"] = [change(*prelude[1:]), *(change(core[0][1], core[-1][2]) for core in cores), change(*coda[1:])]
        maps_TxCxH = [[attention_of(config, of, x_NxD) for of, x_NxD, _ in core] for core in cores]
        both = np.array([
            [[statistics_of(map_NxN, entry["chunk"]) for map_NxN in maps] for maps in maps_CxH]
            for entry, maps_CxH in zip(schedule, maps_TxCxH, strict=True)
        ])  # fmt: skip
        row["entropy"], row["local_mass"] = both[..., 0], both[..., 1]
        for k, (state_LxD, _) in enumerate(routed):
            for side in ("write", "read"):
                w_LxS = reference.softmax(reference.linear(weights / "memory" / k / side, state_LxD))
                row[f"{side}.{k - 1 if k else 'entry'}"] = w_LxS.mean(axis=0)
        for t, entry in enumerate(schedule):
            g, w = entry["chunk"], entry["offset"]
            if g > 1:
                step, before_LxD = weights / "steps" / t, h_LxD[t + 1]
                chunks = [[i for i in range(LENGTH) if (i + w) // g == j] for j in range((LENGTH + w) // g)]
                full = [before_LxD[members] for members in chunks if len(members) == g]
                scores = [h_GxD @ step["scorer.weight"][0] for h_GxD in full]
                row[f"pooling.{t}"] = np.mean([reference.softmax(score_G) for score_G in scores], axis=0)
                logits_NxG = reference.linear(step / "allocator", cores[t][-1][2])
                row[f"allocation.{t}"] = reference.softmax(logits_NxG).mean(axis=0)
        return row


def source_of(config):
    """A text of just as many windows as samples, so that all of them are chosen."""
    ids = np.random.default_rng(1).integers(0, config.vocab_size, SAMPLES * LENGTH + 1)
    return TokensInMemory("tokens", ids)


@pytest.fixture(scope="module")
def found(random_model):
    """On a mesh that cuts batch, matrices and heads, with a last batch that is not full."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = place(SPIRAL, mesh, backend_for(mesh, SPIRAL))
    params = jax.device_put(random_model(SPIRAL)[2], placed.param_shardings)
    return measure(placed, params, source_of(SPIRAL), length=LENGTH, samples=SAMPLES, batch_size=4, seed=0)


@pytest.fixture(scope="module")
def expected(random_model):
    config, tensors, _ = random_model(SPIRAL)
    tokens_BxL = source_of(SPIRAL).tokens_N[:-1].reshape(SAMPLES, LENGTH)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Expected(config, tensors, tokens_BxL, monkeypatch)


def test_means_are_those_of_the_reference(found, expected):
    ours = {"update": found.update_R, **found.metrics, **found.weights}
    assert ours.keys() == expected.mean.keys()
    for name, value in expected.mean.items():
        assert ours[name] == pytest.approx(value, abs=2e-5), name
        assert np.ptp(value) > 1e-2  # what is compared differs from place to place


def test_states_are_those_of_the_reference(found, expected):
    """All tokens are chosen where there are fewer than 2,048."""
    assert found.states == ["h_emb", "h(0)", "h(1)", "h(2)", "h_out"]
    for ours, kernel in ((found.cka_rbf_SxS, rbf_kernel), (found.cka_linear_SxS, linear_kernel)):
        assert ours == pytest.approx(centred_alignment(expected.states, kernel), abs=1e-4)
    values_SxD = [np.linalg.svd(x_MxD, compute_uv=False) for x_MxD in expected.states]
    assert found.singular_values_SxR == pytest.approx(np.stack([v / v[0] for v in values_SxD]), abs=1e-5)


def test_batches(monkeypatch):
    """What is chosen depends on the seed alone, and is of all sequences, each token once."""
    monkeypatch.setattr("spiral_jax.probes.measure.TOKENS", 60)
    source = TokensInMemory("tokens", np.arange(20 * LENGTH + 1))  # a token says where it is

    def chosen(batch_size, seed, samples=SAMPLES):
        found = list(batches(source, LENGTH, samples, batch_size, seed))
        real = np.concatenate([batch.tokens_BxL[batch.real_B > 0] for batch in found])
        at = [np.take_along_axis(batch.tokens_BxL, batch.chosen_BxK, axis=1)[batch.is_chosen_BxK] for batch in found]
        assert len({batch.chosen_BxK.shape for batch in found}) == 1
        return real[:, 0] // LENGTH, np.concatenate(at)

    windows_N, tokens_M = chosen(1, seed=0)
    assert len(set(windows_N)) == SAMPLES and len(set(tokens_M)) == 60
    assert set(tokens_M // LENGTH) == set(windows_N)
    for batch_size in (2, 3, 7, 8):
        assert all(map(np.array_equal, chosen(batch_size, seed=0), (windows_N, tokens_M)))
    assert not np.array_equal(chosen(1, seed=1)[0], windows_N)
    every, tokens_M = chosen(3, seed=0, samples=20)
    assert np.array_equal(every, np.arange(20)) and len(tokens_M) == 60
    monkeypatch.setattr("spiral_jax.probes.measure.TOKENS", 2048)
    assert np.array_equal(chosen(3, seed=0, samples=20)[1], np.arange(20 * LENGTH))


def test_a_full_resolution_loop_of_cores_of_its_own(random_model, forward):
    """The pass is the model's own: the last state, normed and through the head, gives its logits."""
    _, tensors, params = random_model(LOOPED)
    tokens_BxL = np.random.default_rng(2).integers(0, LOOPED.vocab_size, (2, 9))
    every_BxK = jnp.tile(jnp.arange(9), (2, 1))
    sums, states_SxBxLxD = jax.jit(look, static_argnums=0)(
        SpiralFormer(LOOPED), params, tokens_BxL, jnp.array([1, 0]), every_BxK
    )
    assert sums.entropy_TxCxH.shape == sums.local_mass_TxCxH.shape == (2, 2, 4)
    assert sums.update_R[0] == 0  # a prelude of no layers
    normed_BxLxD = np.stack([
        reference.layer_norm(reference.Weights(tensors) / "spiralformer" / "final_layer_norm", x_LxD, 1e-5)
        for x_LxD in states_SxBxLxD[-1]
    ])  # fmt: skip
    assert normed_BxLxD @ tensors["embed_out.weight"].T == pytest.approx(forward(LOOPED, params, tokens_BxL), abs=1e-4)
    # h(t+1) = a e + (1 - a) h(t): the mean of the gates of the sequence that counts.
    weights = reference.Weights(tensors) / "spiralformer" / "steps"
    for t in range(2):
        gate_Lx1 = 1 / (1 + np.exp(-reference.linear(weights / t / "gate", states_SxBxLxD[1 + t][0])))
        assert sums.weights[f"gate.{t}"] == pytest.approx(gate_Lx1.mean(axis=0), abs=1e-5)
    assert sums.weights.keys() == {"gate.0", "gate.1"}


def test_no_map_is_there_whole():
    """300 queries by 300 keys: of no head at once, and of no layers."""
    config = dataclasses.replace(SPIRAL, chunks=(2, 1), vocab_size=10)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    placed = place(config, mesh, backend_for(mesh, config))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 300), (1,), (1, 4))]
    jaxpr = jax.make_jaxpr(lambda params, *given: look(placed.model, params, *given))(placed.abstract_params, *arrays)
    shapes = set(shapes_in(jaxpr.jaxpr))
    assert any(300 in shape and 128 in shape for shape in shapes)  # a block of queries is
    assert not {shape for shape in shapes if sorted(shape)[-2:-1] >= [300]}
