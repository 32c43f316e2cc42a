"""Which arrays does a step have in memory that it should not: all scores of a level, logits of all positions?"""

from spiral_jax.roofline.hlo import Array, Module
from spiral_jax.training.config import StepConfig


def unwanted(module: Module, config: StepConfig, num_devices: int) -> list[str]:
    """Names and shapes of the arrays in a compiled step that hold L x L scores or the logits of whole sequences.

    What exists only within a fusion is in no memory and is not looked at.

    Args:
      module: the program of one device.
      config: the run.
      num_devices: of its mesh.
    """
    data, fsdp, tensor = config.check_mesh(num_devices)
    model, train = config.model, config.train
    rows = train.batch_size // (data * fsdp * train.accumulation)
    heads, vocab = model.num_heads // tensor, model.vocab_size // tensor
    # Levels of a few chunks have few scores, and at 128 they would look like what a kernel keeps in 128 lanes.
    lengths = {n for _, n in model.executed_layers(train.sequence_length) if n > 128}
    # What a stack of layers keeps, where its width is as large as a level's length.
    widths = {model.d_model // tensor, model.d_ff // tensor, model.d_model, model.d_ff}
    stacks = {layers for layers, _ in model.executed_layers(train.sequence_length) if layers != heads}
    activations = {tuple(sorted((layers, rows, n, n))) for layers in stacks for n in lengths & widths}

    def is_unwanted(array: Array) -> bool:
        dims = array.dims
        scores = any(dims.count(n) >= 2 and array.size >= rows * heads * n * n for n in lengths)
        scores = scores and tuple(sorted(dims)) not in activations
        is_table = sorted(dims) == sorted((vocab, model.d_model))
        logits = vocab in dims and array.size >= rows * train.sequence_length * vocab
        return scores or (logits and not is_table)

    stored = (
        (instruction.name, array)
        for computation in module.computations.values()
        if computation not in module.fused
        for instruction in computation.instructions
        for array in instruction.arrays
    )
    return sorted({f"{array} {name}" for name, array in stored if is_unwanted(array)})
