"""What a finished run shows a person: a sampled continuation and its loss curve."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.data.store import TokenStore
from spiral_jax.data.tokenizers import Tokenizer
from spiral_jax.decoding.decoder import Decoder, Request, text_before_stop
from spiral_jax.decoding.sampling import SamplingSettings
from spiral_jax.errors import SpiralError, require
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run.metrics import read_rows, rows_of, validation_measure


@dataclasses.dataclass(frozen=True)
class SummaryConfig:
    """The end of a run.

    Attributes:
      sample_tokens: tokens to sample from the trained model; 0 for none. The parameters must fit one device.
      prompt_tokens: tokens of the validation text that are continued.
      temperature: of the sample; 0 is greedy.
      plot: write loss_curve.png (extra `plot`).
    """

    sample_tokens: int = 0
    prompt_tokens: int = 64
    temperature: float = 0.8
    plot: bool = False

    def __post_init__(self):
        require(self.sample_tokens >= 0, "summary.sample_tokens", self.sample_tokens, "0 or more")
        require(self.prompt_tokens >= 1, "summary.prompt_tokens", self.prompt_tokens, "1 or more")
        require(self.temperature >= 0, "summary.temperature", self.temperature, "0 or more")


def check_extras(config: SummaryConfig) -> None:
    """Raises SpiralError if plotting is asked for and matplotlib is not installed."""
    if config.plot:
        _figure_class()


def sample_continuation(
    model: SpiralFormer, params: Any, config: SummaryConfig, text: TokenStore, tokenizer: Tokenizer, seed: int
) -> str:
    """The start of the validation text and what a model makes of it, as one readable block.

    Args:
      model: the model.
      params: its parameters, on the first device.
      config: tokens to read and to sample, and the temperature.
      text: the validation text.
      tokenizer: of its tokens.
      seed: of the sample.
    """
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()[:1])
    prompt_ids = text.read(0, min(config.prompt_tokens, text.num_tokens))
    decoder = Decoder(
        model,
        mesh,
        rows=1,
        capacity=len(prompt_ids) + config.sample_tokens,
        num_ids=tokenizer.vocab_size,
        stop_ids=[tokenizer.separator_id],
    )
    sampling = SamplingSettings(temperature=config.temperature, seed=seed % 2**32)
    new_ids = [token.id for token in decoder.run(params, [Request(prompt_ids, config.sample_tokens, sampling)])]
    return f"{tokenizer.decode(prompt_ids)}[...]{text_before_stop(tokenizer, new_ids)}"


def plot_loss(workdir: Path) -> Path:
    """Draws metrics.jsonl as WORKDIR/loss_curve.png: training loss, its running mean, validation loss.

    Raises:
      SpiralError: matplotlib is not installed.
    """
    figure = _figure_class()(figsize=(8, 5), layout="constrained")
    rows = read_rows(rows_of(workdir))
    steps = np.array([row["step"] for row in rows])
    loss = np.array([row["loss"] for row in rows], dtype=float)
    axes = figure.add_subplot()
    axes.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8, label="training, each step")
    window = max(1, len(loss) // 50)
    if window > 1:
        mean = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        axes.plot(steps[window - 1 :], mean, color="tab:blue", label=f"training, mean of {window} steps")
    evaluated = [row for row in rows if row.get("validation_loss") is not None]
    if evaluated:
        axes.plot(
            [row["step"] for row in evaluated],
            [row["validation_loss"] for row in evaluated],
            "o-",
            color="tab:orange",
            label=f"validation (last: {validation_measure(evaluated[-1])})",
        )
    axes.set(xlabel="step", ylabel="loss, nats per token", title=workdir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = workdir / "loss_curve.png"
    with atomic.written(path), path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    return path


def _figure_class():
    # The object-oriented interface: no pyplot, so no global state and no display.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SpiralError("summary.plot needs matplotlib: pip install 'spiral_jax[plot]'") from None
    return Figure
