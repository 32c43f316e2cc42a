"""A child of the runner that trains nothing: what it does is in the name of its arm.

Rows are appended step by step, and a start goes on behind the last of them, as a real run does from its checkpoint.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS, TOKENS = 10, 256  # of tiny.py, whose configuration takes seconds to import
flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
workdir = Path(flags["workdir"])


def train():
    name = flags["config"].rpartition(",")[2]
    seed, rate = int(flags["config.seed"]), float(flags["config.optimizer.peak_learning_rate"])
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "metrics.jsonl"
    rows = file.read_text().splitlines() if file.exists() else []
    if name == "failing":
        print("some words\nerror: model.d_model is 7; allowed: another\nlast words", file=sys.stderr)
        sys.exit(2)
    with file.open("a") as out:
        for step in range(len(rows) + 1, STEPS + 1):
            if name == "diverging" and rate > 0.003 and step == 3:
                print("diverged: no number any more", file=sys.stderr)
                sys.exit(44)
            if name == "killed" and step == 3 and not rows:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "waiting" and step == 3:
                (workdir / f"waits-{os.getpid()}").touch()
                while not (workdir.parent.parent / "go").exists():
                    time.sleep(0.05)
            loss = 5 + len(name) / 100 + seed / 1000 + abs(rate - 0.004) - step / 10
            row = {"step": step, "tokens": step * TOKENS, "loss": loss, "step_time": 0.5}
            out.write(json.dumps(row) + "\n")
            out.flush()


def evaluate():
    if "tasks" in flags:
        shots = int(flags["num_fewshot"])
        results = {"piqa": {"acc_norm,none": 0.5 + shots / 100, "acc_norm_stderr,none": 0.1, "alias": "piqa"}}
        results |= {"wikitext": {"word_perplexity,none": 30.0}} if "wikitext" in flags["tasks"] else {}
        Path(flags["output"]).write_text(json.dumps({"results": results}))
        return
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    is_too_large = workdir.parent.name == "infinite-lr0.004"
    documents = {"nats": [None if is_too_large else last * 10, last * 30 + 1], "tokens": [10, 30]}
    Path(flags["documents"]).write_text(json.dumps(documents))


if __name__ == "__main__":
    evaluate() if "documents" in flags or "tasks" in flags else train()
