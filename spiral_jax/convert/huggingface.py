"""Our parameters and Hugging Face tensors, one into the other (SPEC section 7). Pure functions of arrays.

Hugging Face Linear weights are [out, in], ours [in, out] with heads as axes of their own; layers are stacked on a
leading axis here and numbered there; sqrt(d) is folded into the exported embedding, in float64.
"""

from collections.abc import Mapping

import numpy as np

from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig

# Ours, within a layer, to GPT-NeoX's module names.
LAYER_MODULES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "mlp_up": "mlp.dense_h_to_4h",
    "mlp_down": "mlp.dense_4h_to_h",
}


def is_vanilla(config: ModelConfig) -> bool:
    """Whether the model is a plain GPT-NeoX, which `transformers` loads without any code of ours."""
    return not config.chunks and config.topology != "mesh"


def config_to_huggingface(config: ModelConfig, max_position_embeddings: int) -> dict:
    """`config.json` of the exported model."""
    common = {
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "rotary_pct": config.rotary_fraction,
        "rotary_emb_base": config.rotary_base,
        "layer_norm_eps": config.layer_norm_epsilon,
        "max_position_embeddings": max_position_embeddings,
    }
    if is_vanilla(config):
        return common | {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "num_hidden_layers": config.stored_layers,
            "use_parallel_residual": True,
            "attention_bias": True,
        }
    slots = {"memory_slots": config.num_slots} if config.topology == "mesh" else {}
    return (
        common
        | slots
        | {
            "model_type": "spiralformer",
            "architectures": ["SpiralFormerForCausalLM"],
            "prelude_layers": config.prelude_layers,
            "core_layers": config.core_layers,
            "coda_layers": config.coda_layers,
            "shared_core": config.shared_core,
            "topology": config.topology,
            "pooling": config.pooling,
            "allocation": config.allocation,
            "update_scale": config.update_scale,
            "schedule": [level._asdict() for level in config.schedule],
        }
    )


def config_from_huggingface(config: Mapping, dtype: str = "float32") -> ModelConfig:
    """The architecture an exported `config.json` describes.

    Raises:
      SpiralError: a model type or field that would change the function we compute.
    """
    if config.get("hidden_act") != "gelu":
        raise SpiralError(f"config.json: hidden_act is {config.get('hidden_act')!r}; allowed: 'gelu'")
    if config.get("tie_word_embeddings", False):
        raise SpiralError("config.json: tie_word_embeddings is true; the head must be untied")
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        raise SpiralError(
            f"config.json: intermediate_size is {config['intermediate_size']}; allowed: 4 x hidden_size, "
            f"{4 * config['hidden_size']}"
        )
    common = dict(
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        rotary_fraction=config["rotary_pct"],
        rotary_base=float(config["rotary_emb_base"]),
        layer_norm_epsilon=config["layer_norm_eps"],
        dtype=dtype,
    )
    if config["model_type"] == "gpt_neox":
        if not config.get("use_parallel_residual", True):
            raise SpiralError("config.json: use_parallel_residual is false; only the parallel residual is supported")
        layers = dict(prelude_layers=config["num_hidden_layers"], core_layers=0, coda_layers=0)
        return ModelConfig(**common, **layers, chunks=(), topology="base")
    if config["model_type"] != "spiralformer":
        raise SpiralError(f"config.json: model_type is {config['model_type']!r}; allowed: 'spiralformer', 'gpt_neox'")
    schedule = config["schedule"]
    return ModelConfig(
        **common,
        prelude_layers=config["prelude_layers"],
        core_layers=config["core_layers"],
        coda_layers=config["coda_layers"],
        chunks=tuple(level["chunk"] for level in schedule),
        offsets=tuple(level["offset"] for level in schedule),
        shifts=tuple(level["shift"] for level in schedule),
        shared_core=config.get("shared_core", True),
        topology=config["topology"],
        memory_slots=config["memory_slots"] if config["topology"] == "mesh" else None,
        pooling=config["pooling"],
        allocation=config["allocation"],
        update_scale=config["update_scale"],
    )


def tensors_from_params(config: ModelConfig, params: Mapping) -> dict[str, np.ndarray]:
    """The exported tensors of a parameter tree (leaves NumPy or JAX arrays), in the parameters' dtype."""
    root = "gpt_neox" if is_vanilla(config) else "spiralformer"
    embedding_VxD = np.asarray(params["embed"]["embedding"])
    folded_VxD = embedding_VxD.astype(np.float64) * config.d_model**0.5
    tensors = {
        f"{root}.embed_in.weight": folded_VxD.astype(embedding_VxD.dtype),
        f"{root}.final_layer_norm.weight": np.asarray(params["final_norm"]["scale"]),
        f"{root}.final_layer_norm.bias": np.asarray(params["final_norm"]["bias"]),
        "embed_out.weight": np.asarray(params["head"]["kernel"]).T,
    }
    for stack, prefixes in _stacks(config).items():
        for module, name in LAYER_MODULES.items():
            for field, array in params[stack]["layers"][module].items():
                for prefix, layer in zip(prefixes, np.asarray(array), strict=True):
                    tensors[f"{prefix}.{name}.{_suffix(field)}"] = _to_rows(config, module, field, layer)
    for name, (group, index) in _iteration_linears(config).items():
        linear = params[group]
        tensors[f"{name}.weight"] = np.asarray(linear["kernel"])[index].T
        if "bias" in linear:
            tensors[f"{name}.bias"] = np.asarray(linear["bias"])[index]
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def params_from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict:
    """The parameter tree of exported tensors, in the tensors' dtype (sqrt(d) is divided out in float64).

    Raises:
      SpiralError: tensors missing, left over or of another shape, all of them named.
    """
    root = "gpt_neox" if is_vanilla(config) else "spiralformer"
    D, used, problems = config.d_model, set(), []

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        used.add(name)
        if name not in tensors:
            problems.append(f"{name} {list(shape)} is missing")
        elif tensors[name].shape != shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
        else:
            return np.asarray(tensors[name])
        return np.zeros(shape, np.float32)

    embed_in_VxD = take(f"{root}.embed_in.weight", (config.vocab_size, D))
    params = {
        "embed": {"embedding": (embed_in_VxD.astype(np.float64) / D**0.5).astype(embed_in_VxD.dtype)},
        "final_norm": {
            "scale": take(f"{root}.final_layer_norm.weight", (D,)),
            "bias": take(f"{root}.final_layer_norm.bias", (D,)),
        },
        "head": {"kernel": take("embed_out.weight", (config.vocab_size, D)).T},
    }
    outputs = {"qkv": 3 * D, "out": D, "mlp_up": config.d_ff, "mlp_down": D}
    inputs = {"qkv": D, "out": D, "mlp_up": D, "mlp_down": config.d_ff}
    for stack, prefixes in _stacks(config).items():
        layers = {}
        for module, name in LAYER_MODULES.items():
            if module.endswith("_norm"):
                shapes = {"scale": (D,), "bias": (D,)}
            else:
                shapes = {"kernel": (outputs[module], inputs[module]), "bias": (outputs[module],)}
            layers[module] = {
                field: np.stack(
                    [
                        _from_rows(config, module, field, take(f"{prefix}.{name}.{_suffix(field)}", shape))
                        for prefix in prefixes
                    ]
                )
                for field, shape in shapes.items()
            }
        params[stack] = {"layers": layers}
    for name, (group, _) in _iteration_linears(config).items():
        linear = params.setdefault(group, {"kernel": []})
        features = _features(config, name, group)
        linear["kernel"].append(take(f"{name}.weight", (features, D)).T)
        if not name.endswith(".scorer"):
            linear.setdefault("bias", []).append(take(f"{name}.bias", (features,)))
    for group in {group for group, _ in _iteration_linears(config).values()}:
        params[group] = {field: np.stack(arrays) for field, arrays in params[group].items()}
    extra = sorted(set(tensors) - used)
    problems += [f"{name} {list(tensors[name].shape)} is not a tensor of this model" for name in extra]
    if problems:
        raise SpiralError("model.safetensors: " + "; ".join(problems))
    return params


def _stacks(config: ModelConfig) -> dict[str, list[str]]:
    """Our stacks of layers, each with the exported prefixes of its layers in order; empty stacks have no parameters."""
    if is_vanilla(config):
        count = {"prelude": config.prelude_layers, "coda": config.coda_layers}
        first = {"prelude": 0, "coda": config.prelude_layers}
        named = {part: [f"gpt_neox.layers.{first[part] + i}" for i in range(count[part])] for part in count}
        return {part: prefixes for part, prefixes in named.items() if prefixes}
    named = {"prelude": [f"spiralformer.prelude.{i}" for i in range(config.prelude_layers)]}
    core = range(config.core_layers)
    if config.shared_core:
        named["core"] = [f"spiralformer.core.{i}" for i in core] if config.chunks else []
    else:
        for t in range(config.num_iterations):
            named[f"cores_{t}"] = [f"spiralformer.core.{t * config.core_layers + i}" for i in core]
    named["coda"] = [f"spiralformer.coda.{i}" for i in range(config.coda_layers)]
    return {stack: prefixes for stack, prefixes in named.items() if prefixes}


def _iteration_linears(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Exported name of each iteration's Linear: our group and the index into its leading axis."""
    named = {}
    if config.topology == "mesh":
        for k in range(config.num_iterations + 1):
            for side in ("write", "read"):
                named[f"spiralformer.memory.{k}.{side}"] = (f"{side}_routers", k)
    t = 0
    for run, (level, count) in enumerate(config.runs):
        for i in range(count):
            if level.chunk > 1 and config.pooling == "self_aggregation":
                named[f"spiralformer.steps.{t + i}.scorer"] = (f"scorers_{run}", i)
            if level.chunk > 1 and config.allocation == "learned":
                named[f"spiralformer.steps.{t + i}.allocator"] = (f"allocators_{run}", i)
        t += count
    return named


def _features(config: ModelConfig, name: str, group: str) -> int:
    if group.endswith("_routers"):
        return config.num_slots
    return 1 if name.endswith(".scorer") else config.chunks[int(name.split(".")[2])]


def _suffix(field: str) -> str:
    return "bias" if field == "bias" else "weight"


def _to_rows(config: ModelConfig, module: str, field: str, array: np.ndarray) -> np.ndarray:
    """One layer's array as exported: kernels [in..., out...] to [out, in], biases flat."""
    if field != "kernel":
        return array.reshape(-1)
    return array.reshape(config.d_ff if module == "mlp_down" else config.d_model, -1).T


def _from_rows(config: ModelConfig, module: str, field: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `_to_rows` for one module."""
    H, K, D = config.num_heads, config.head_width, config.d_model
    if field == "kernel":
        array = array.T
    shapes = {("qkv", "kernel"): (D, H, 3, K), ("qkv", "bias"): (H, 3, K), ("out", "kernel"): (H, K, D)}
    return array.reshape(shapes.get((module, field), array.shape))
