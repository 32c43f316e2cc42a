"""Prints the predictions of tpu/predictions as the table of its README.md: `python tpu/table.py`."""

import json
from pathlib import Path

COLUMNS = (
    "point", "remat, core", "GiB of usable", "FLOP executed / model", "gathered, summed GiB", "seconds", "limit", "MFU",
    "tokens/s/chip",
)  # fmt: skip


def row(name: str, found: dict) -> tuple[str, ...]:
    step, held, sent, guess = (found[key] for key in ("step", "memory", "communication_per_device", "prediction"))
    return (
        name,
        f"{step['remat']}, {step['gather_core']}",
        f"{held['peak_bytes'] / 2**30:.1f} of {held['usable_bytes'] / 2**30:.2f}",
        f"{found['flops']['dense_executed_over_model']:.3f}",
        f"{sent['gathered_bytes'] / 2**30:.2f}, {sent['summed_bytes'] / 2**30:.2f}",
        f"{guess['step_seconds']:.3f}",
        guess["bound"],
        f"{guess['mfu']:.1%} ({guess['mfu_full_attention']:.1%})",
        f"{guess['tokens_per_second_per_chip']:,.0f}",
    )


def main() -> None:
    paths = sorted(Path(__file__).parent.glob("predictions/*.json"))
    lines = [
        COLUMNS,
        ("---",) * len(COLUMNS),
        *(row(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths),
    ]
    print("\n".join("| " + " | ".join(cells) + " |" for cells in lines))


if __name__ == "__main__":
    main()
