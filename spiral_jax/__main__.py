"""Lists the verbs: `python -m spiral_jax`."""

VERBS = {
    "train": "train a model, or resume a run",
    "evaluate": "exact loss, perplexity and bits per byte of a run on a token store or a text file",
    "describe": "parameters, FLOPs, schedule and memory of a configuration",
    "reference": "the configuration reference, as in docs/config.md",
}


def main() -> None:
    print("usage: python -m spiral_jax.VERB [flags]\n")
    for verb, meaning in VERBS.items():
        print(f"  {verb:<10} {meaning}")
    print("\npython -m spiral_jax.VERB --help shows a verb's flags")


if __name__ == "__main__":
    main()
