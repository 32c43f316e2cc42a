"""The models of docs/spec.md in plain NumPy float64, written from sections 1 to 3 alone: the tests' oracle.

One sequence at a time, looping over query tokens, chunks and slots as the formulas read; nothing is refused, so a
schedule with shift < chunk - 1 runs here and leaks. Weights and config are those of docs/spec.md section 7.
Shapes: B batch, L tokens, D width, H heads, K head width, M MLP hidden, V vocabulary, T iterations, G chunk size,
N length a layer runs at (L, or the number of chunks), S memory slots.
"""

import math

import numpy as np

ERF = np.vectorize(math.erf, otypes=[np.float64])


class Weights:
    """Tensors by name, float64, below a prefix that grows with `/`."""

    def __init__(self, tensors, prefix=""):
        self.tensors, self.prefix = tensors, prefix

    def __truediv__(self, part):
        return Weights(self.tensors, f"{self.prefix}{part}.")

    def __getitem__(self, name):
        return np.asarray(self.tensors[self.prefix + name], dtype=np.float64)


# Backbone, docs/spec.md section 1


def softmax(x):
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x):
    """Exact GELU (section 1)."""
    return 0.5 * x * (1.0 + ERF(x / math.sqrt(2.0)))


def linear(weights, x_NxI):
    """x W^T + b with W stored [out, in] (section 7)."""
    return x_NxI @ weights["weight"].T + weights["bias"]


def layer_norm(weights, x_NxD, eps):
    """LayerNorm with scale and bias, biased variance (section 1)."""
    centred_NxD = x_NxD - x_NxD.mean(axis=-1, keepdims=True)
    variance_Nx1 = (centred_NxD**2).mean(axis=-1, keepdims=True)
    return centred_NxD / np.sqrt(variance_Nx1 + eps) * weights["weight"] + weights["bias"]


def rotate(x_HxK, position, rot, base):
    """Rotary embedding of one token: pairs (j, j + rot/2) of the first rot elements of each head (section 1)."""
    out_HxK = x_HxK.copy()
    for j in range(rot // 2):
        angle = position * base ** (-2.0 * j / rot)
        a_H, b_H = x_HxK[:, j], x_HxK[:, j + rot // 2]
        out_HxK[:, j] = a_H * math.cos(angle) - b_H * math.sin(angle)
        out_HxK[:, j + rot // 2] = b_H * math.cos(angle) + a_H * math.sin(angle)
    return out_HxK


def attention(config, weights, x_NxD):
    """Causal softmax attention, one query token at a time; QKV rows per head [q | k | v] (sections 1 and 7)."""
    N, D = x_NxD.shape
    H = config["num_attention_heads"]
    K = D // H
    rot, base = int(K * config["rotary_pct"]), config["rotary_emb_base"]
    assert rot % 2 == 0, "an odd number of rotary dimensions is not defined"
    qkv_NxHx3xK = linear(weights / "query_key_value", x_NxD).reshape(N, H, 3, K)
    q_NxHxK, k_NxHxK, v_NxHxK = np.zeros((N, H, K)), np.zeros((N, H, K)), qkv_NxHx3xK[:, :, 2]
    for i in range(N):
        q_NxHxK[i] = rotate(qkv_NxHx3xK[i, :, 0], i, rot, base)
        k_NxHxK[i] = rotate(qkv_NxHx3xK[i, :, 1], i, rot, base)
    mixed_NxD = np.zeros((N, D))
    for i in range(N):
        scores_HxJ = np.einsum("hk,jhk->hj", q_NxHxK[i], k_NxHxK[: i + 1]) / math.sqrt(K)
        mixed_NxD[i] = np.einsum("hj,jhk->hk", softmax(scores_HxJ), v_NxHxK[: i + 1]).reshape(D)
    return linear(weights / "dense", mixed_NxD)


def layer(config, weights, x_NxD):
    """x + Attn(LN1(x)) + MLP(LN2(x)) (section 1)."""
    eps = config["layer_norm_eps"]
    attn_NxD = attention(config, weights / "attention", layer_norm(weights / "input_layernorm", x_NxD, eps))
    hidden_NxM = linear(weights / "mlp" / "dense_h_to_4h", layer_norm(weights / "post_attention_layernorm", x_NxD, eps))
    return x_NxD + attn_NxD + linear(weights / "mlp" / "dense_4h_to_h", gelu(hidden_NxM))


def layers(config, weights, indices, x_NxD):
    """The layers with these indices below the prefix, in order; none is the identity."""
    for i in indices:
        x_NxD = layer(config, weights / i, x_NxD)
    return x_NxD


# Multi-resolution iteration, docs/spec.md section 3


def down_scale(config, step, entry, h_LxD):
    """Step 1: one vector per complete chunk."""
    L, D = h_LxD.shape
    g, w = entry["chunk"], entry["offset"]
    n = (L + w) // g
    z_NxD = np.zeros((n, D))
    for j in range(n):
        members = [i for i in range(L) if (i + w) // g == j]
        if g == 1:
            z_NxD[j] = h_LxD[members[0]]
        elif config["pooling"] == "self_aggregation":
            a = softmax(np.array([h_LxD[i] @ step["scorer.weight"][0] for i in members]))
            for a_i, i in zip(a, members, strict=True):
                z_NxD[j] += a_i * h_LxD[i]
        elif config["pooling"] == "mean":
            for i in members:
                z_NxD[j] += h_LxD[i] / g
        else:
            raise ValueError(config["pooling"])
    return z_NxD


def up_scale(config, step, entry, zhat_NxD, L):
    """Step 3: chunks back to tokens; positions of the dropped chunk get 0."""
    n, D = zhat_NxD.shape
    g, w = entry["chunk"], entry["offset"]
    scale = {"sqrt": math.sqrt(g), "linear": float(g), "none": 1.0}[config["update_scale"]]
    beta_NxG = np.zeros((n, g))
    for j in range(n):
        if g == 1:
            beta_NxG[j] = 1.0
        elif config["allocation"] == "learned":
            beta_NxG[j] = softmax(linear(step / "allocator", zhat_NxD[j]))
        elif config["allocation"] == "uniform":
            beta_NxG[j] = 1.0 / g
        else:
            raise ValueError(config["allocation"])
    u_LxD = np.zeros((L, D))
    for i in range(L):
        chunk, place = (i + w) // g, (i + w) % g
        if chunk < n:
            u_LxD[i] = scale * beta_NxG[chunk, place] * zhat_NxD[chunk]
    return u_LxD


def right_shift(entry, u_LxD):
    """Step 4: e_i = u_{i-s}, zeros in front."""
    s = entry["shift"]
    e_LxD = np.zeros_like(u_LxD)
    for i in range(len(u_LxD)):
        if i >= s:
            e_LxD[i] = u_LxD[i - s]
    return e_LxD


def update(config, weights, t, h_LxD):
    """Token-level update e(t) of iteration t: steps 1 to 4."""
    entry, step = config["schedule"][t], weights / "steps" / t
    first = 0 if config.get("shared_core", True) else t * config["core_layers"]
    z_NxD = down_scale(config, step, entry, h_LxD)
    zhat_NxD = layers(config, weights / "core", range(first, first + config["core_layers"]), z_NxD)
    return right_shift(entry, up_scale(config, step, entry, zhat_NxD, len(h_LxD)))


# Recurrence, docs/spec.md section 2


def route(weights, k, memory_SxLxD, state_LxD, new_LxD):
    """MeSH: write `new` into the memory in place, then read, both routed by `state`."""
    write_LxS = softmax(linear(weights / "memory" / k / "write", state_LxD))
    read_LxS = softmax(linear(weights / "memory" / k / "read", state_LxD))
    L, S = write_LxS.shape
    read_LxD = np.zeros_like(new_LxD)
    for i in range(L):
        for b in range(S):
            memory_SxLxD[b, i] += write_LxS[i, b] * new_LxD[i]
        for b in range(S):
            read_LxD[i] += read_LxS[i, b] * memory_SxLxD[b, i]
    return read_LxD


def looped(config, weights, emb_LxD):
    """Prelude, T iterations of the core, coda (section 2)."""
    topology, T = config["topology"], len(config["schedule"])
    start_LxD = layers(config, weights / "prelude", range(config["prelude_layers"]), emb_LxD)
    if topology == "mesh":
        memory_SxLxD = np.zeros((config.get("memory_slots", T + 3), *emb_LxD.shape))
        memory_SxLxD[0] = emb_LxD
        start_LxD = route(weights, 0, memory_SxLxD, start_LxD, start_LxD)
    h_LxD = start_LxD
    for t in range(T):
        step = weights / "steps" / t
        into_LxD = h_LxD
        if topology == "injection":
            into_LxD = linear(step / "inject", np.concatenate([h_LxD, emb_LxD], axis=-1))
        e_LxD = update(config, weights, t, into_LxD)
        if topology == "base":
            h_LxD = e_LxD
        elif topology == "residual":
            h_LxD = e_LxD + h_LxD
        elif topology == "anchor":
            h_LxD = e_LxD + start_LxD
        elif topology == "anchor_star":
            h_LxD = e_LxD + emb_LxD
        elif topology == "gated":
            a_Lx1 = 1.0 / (1.0 + np.exp(-linear(step / "gate", h_LxD)))
            h_LxD = a_Lx1 * e_LxD + (1.0 - a_Lx1) * h_LxD
        elif topology == "injection":
            h_LxD = e_LxD
        elif topology == "mesh":
            h_LxD = route(weights, t + 1, memory_SxLxD, h_LxD, e_LxD)
        else:
            raise ValueError(topology)
    return layers(config, weights / "coda", range(config["coda_layers"]), h_LxD)


def logits(config: dict, tensors: dict[str, np.ndarray], tokens_BxL: np.ndarray) -> np.ndarray:
    """Logits [B, L, V] in float64 of a model in the exported format (section 7); sqrt(D) is in embed_in already."""
    weights = Weights(tensors) / config["model_type"]
    rows = []
    for tokens_L in np.asarray(tokens_BxL):
        emb_LxD = weights["embed_in.weight"][tokens_L]
        if config["model_type"] == "gpt_neox":
            out_LxD = layers(config, weights / "layers", range(config["num_hidden_layers"]), emb_LxD)
        else:
            out_LxD = looped(config, weights, emb_LxD)
        out_LxD = layer_norm(weights / "final_layer_norm", out_LxD, config["layer_norm_eps"])
        rows.append(out_LxD @ Weights(tensors)["embed_out.weight"].T)
    return np.stack(rows)


# Weights, docs/spec.md section 7


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of the exported model."""
    D, M, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    root, shapes = config["model_type"], {}

    def affine(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name):
        affine(f"{name}.input_layernorm", D)
        affine(f"{name}.post_attention_layernorm", D)
        affine(f"{name}.attention.query_key_value", 3 * D, D)
        affine(f"{name}.attention.dense", D, D)
        affine(f"{name}.mlp.dense_h_to_4h", M, D)
        affine(f"{name}.mlp.dense_4h_to_h", D, M)

    shapes[f"{root}.embed_in.weight"] = (V, D)
    if root == "gpt_neox":
        for i in range(config["num_hidden_layers"]):
            block(f"{root}.layers.{i}")
    else:
        schedule = config["schedule"]
        T = len(schedule)
        core = config["core_layers"] * (min(T, 1) if config.get("shared_core", True) else T)
        for part, count in (("prelude", config["prelude_layers"]), ("core", core), ("coda", config["coda_layers"])):
            for i in range(count):
                block(f"{root}.{part}.{i}")
        for t, entry in enumerate(schedule):
            if entry["chunk"] > 1 and config["pooling"] == "self_aggregation":
                shapes[f"{root}.steps.{t}.scorer.weight"] = (1, D)
            if entry["chunk"] > 1 and config["allocation"] == "learned":
                affine(f"{root}.steps.{t}.allocator", entry["chunk"], D)
            if config["topology"] == "gated":
                affine(f"{root}.steps.{t}.gate", 1, D)
            if config["topology"] == "injection":
                affine(f"{root}.steps.{t}.inject", D, 2 * D)
        if config["topology"] == "mesh":
            for k in range(T + 1):
                for side in ("write", "read"):
                    affine(f"{root}.memory.{k}.{side}", config.get("memory_slots", T + 3), D)
    affine(f"{root}.final_layer_norm", D)
    shapes["embed_out.weight"] = (V, D)
    return shapes


def random_tensors(config: dict, rng: np.random.Generator, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Random float64 weights of unit scale with nothing at zero, so that an error anywhere shows in the logits."""
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = rng.standard_normal(shape)
        if name.endswith(".bias"):
            tensors[name] = 0.3 * noise
        elif len(shape) == 1:  # LayerNorm scales
            tensors[name] = 1.0 + 0.3 * noise
        elif "embed_in" in name:
            tensors[name] = noise
        elif ".memory." in name or ".steps." in name:  # routers, scorers, allocators, gates, injections
            tensors[name] = 2.0 / math.sqrt(shape[1]) * noise
        else:
            tensors[name] = scale / math.sqrt(shape[1]) * noise
    return tensors
