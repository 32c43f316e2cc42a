"""Lists the verbs, `python -m spiral_jax`, or runs one: `python -m spiral_jax VERB [flags]`."""

import runpy
import sys

VERBS = {
    "prepare": "turn text of any size into token stores, or look into a store",
    "train": "train a model, or resume a run",
    "generate": "continue texts with a run or an exported model",
    "evaluate": "exact loss, perplexity and bits per byte of a run on a token store or a text file",
    "probe": "attention, states and routers of a looped model's core, as arrays, tables and figures",
    "export": "write a run's parameters as a folder for transformers and the Hugging Face hub",
    "import_hf": "make a run of such a folder, or of any GPT-NeoX",
    "describe": "parameters, FLOPs, schedule and memory of a configuration",
    "check": "causality, and scanned, sharded and cached against plain, for a configuration's operators",
    "aot": "compile a run for a TPU slice that is not there: memory, work, communication, predicted speed",
    "bench": "time training, decoding, the loader or the tokenizer on this machine",
    "reference": "the configuration reference, as in docs/config.md",
}


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in VERBS:
        del sys.argv[1]
        runpy.run_module(f"spiral_jax.{verb}", run_name="__main__", alter_sys=True)
        return
    if verb not in ("--help", "-h", "help"):
        print(f"error: the verb is {verb!r}; allowed: {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    print("usage: python -m spiral_jax.VERB [flags]\n")
    for verb, meaning in VERBS.items():
        print(f"  {verb:<10} {meaning}")
    print("\npython -m spiral_jax.VERB --help shows a verb's flags")


if __name__ == "__main__":
    main()
