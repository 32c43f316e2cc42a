"""What a run says when it is finished."""

import shlex

from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.data.prepared import PreparedData
from spiral_jax.parallel.processes import Processes
from spiral_jax.run import metrics, own_code, summary
from spiral_jax.run.config import RunConfig
from spiral_jax.run.directory import load


def finish(config: RunConfig, workdir: Path, data: PreparedData, processes: Processes) -> None:
    """Says how the run ended and where everything is."""
    rows = metrics.read_rows(metrics.rows_of(workdir))
    print(f"\nfinished: {config.train.steps} steps, {config.train.steps * config.train.tokens_per_step:,} tokens")
    skipped = [row["step"] for row in rows if row.get("skipped")]
    if skipped:
        print(f"skipped updates: {len(skipped)}, the last one of step {skipped[-1]}")
    evaluated = [row for row in rows if row.get("validation_loss") is not None]
    if evaluated:
        last = evaluated[-1]
        print(f"validation after step {last['step']}: {metrics.validation_measure(last)}, "
              f"{last['validation_loss']:.4f} nats per token")  # fmt: skip
    if config.summary.sample_tokens and processes.several:
        print("no sample: the parameters may not fit one process; python -m spiral_jax.generate makes texts")
    elif config.summary.sample_tokens and data.validation is not None:
        model, params = load(workdir)
        text = summary.sample_continuation(model, params, config.summary, data.validation, data.tokenizer, config.seed)
        atomic.write_text(workdir / "sample.txt", text)
        print(f"\nthe validation text, and after [...] the model's continuation:\n{'-' * 80}\n{text}\n{'-' * 80}")
    if config.summary.plot:
        print(f"loss curve   {summary.plot_loss(workdir)}")
    print(f"metrics      {metrics.rows_of(workdir)}\ncheckpoints  {workdir / 'checkpoints'}")
    files = dict.fromkeys(code["file"] for code in own_code.own_code(config.to_dict()).values())
    flags = [f"--workdir={workdir}", *(f"--import={file}" for file in files)]
    flags += [] if data.validation is not None or data.examples is not None else ["--input=FILE"]
    print(f"evaluate it  python -m spiral_jax.evaluate {shlex.join(flags)}", flush=True)
