"""`train`, `describe`, `check` and `aot`: configurations and flags that are refused before anything is made."""

import pytest
from refusals import refused
from verbs import call

from spiral_jax import aot, check, describe, train
from spiral_jax.errors import SpiralError
from spiral_jax.run.claim import claim

FIELDS = {
    # (field, value): words of the line. What every verb with --config says.
    "unknown field": ("model.d_modle=3", ("config.model.d_modle", "d_model")),
    "unknown room": ("modle.d_model=3", "config.modle"),
    "room as a value": ("train=3", ("--config.train is '3'", "--config.train.FIELD=VALUE")),
    "field of a field": ("train.steps.x=3", "config.train.steps.x"),
    "word for a number": ("train.steps=many", ("--config.train.steps is 'many'", "integer")),
    "fraction for a count": ("train.steps=1.5", "--config.train.steps is '1.5'"),
    "nothing for a count": ("train.steps=", "--config.train.steps"),
    "word for a truth": ("model.unroll=perhaps", "config.model.unroll"),
    "word for a tuple": ("model.chunks=many", "model.chunks"),
    "texts in a tuple": ("model.chunks=('a','b')", "model.chunks"),
    "half a tuple": ("model.chunks=(4,2", ("--config.model.chunks is '(4,2'", "allowed: a tuple, as in ")),
    "fraction in a tuple": ("model.chunks=(4.5,2)", "model.chunks"),
    "parentheses": ("model.chunks=" + "(" * 10_000 + ")" * 10_000, "model.chunks"),
    "signs": ("model.chunks=" + "-" * 100_000 + "1", ("config", "allowed: ")),
    "0 steps": ("train.steps=0", "train.steps is 0"),
    "steps beyond int32": ("train.steps=3000000000", "train.steps is 3000000000"),
    "steps beyond everything": ("train.steps=1" + "0" * 400, "train.steps"),
    "0 in a batch": ("train.batch_size=0", "train.batch_size is 0"),
    "huge batch": ("train.batch_size=1000000000", "train.batch_size is 1000000000"),
    "length 0": ("train.sequence_length=0", "train.sequence_length is 0"),
    "huge length": ("train.sequence_length=10000000000", "train.sequence_length"),
    "accumulation 0": ("train.accumulation=0", "train.accumulation"),
    "loss block 0": ("train.loss_block=0", "train.loss_block"),
    "unknown attention": ("train.attention=flash", "train.attention is 'flash'"),
    "unknown gather": ("train.gather_core=never", "train.gather_core"),
    "seed below 0": ("seed=-1", "seed is -1"),
    "seed beyond uint32": ("seed=4294967296", "seed is 4294967296"),
    "no vocabulary": ("model.vocab_size=0", "model.vocab_size is 0"),
    "huge vocabulary": ("model.vocab_size=100000000000", "model.vocab_size is 100000000000"),
    "no width": ("model.d_model=0", "model.d_model is 0"),
    "huge width": ("model.d_model=1000000000", "model.d_model is 1000000000"),
    "no heads": ("model.num_heads=0", "model.num_heads is 0"),
    "heads that do not divide": ("model.num_heads=3", "model.num_heads is 3"),
    "layers below 0": ("model.prelude_layers=-1", "model.prelude_layers is -1"),
    "1e8 layers": ("model.core_layers=100000000", "model.core_layers is 100000000"),
    "10,000 layers twice": ("model.core_layers=9999", "the number of layers that are run is"),
    "chunk of 0": ("model.chunks=(0,)", "model.chunks is (0,)"),
    "chunk beyond the sequence": ("model.chunks=(32,1)", ("model.chunks[0] is 32", "sequence_length is 16")),
    "chunk beyond everything": ("model.chunks=(1000000000000,)", "model.chunks"),
    "shift beyond the sequence": ("model.shifts=(16,0)", ("model.shifts[0] is 16", "up to 15")),
    "shift that leaks": ("model.shifts=(0,0)", "model.shifts[0] is 0"),
    "shift too many": ("model.shifts=(1,0,0)", "model.shifts"),
    "offset beyond its chunk": ("model.offsets=(2,0)", "model.offsets[0] is 2"),
    "513 iterations": (f"model.chunks={(1,) * 513}".replace(" ", ""), "model.chunks has 513 iterations"),
    "1e5 iterations": (f"model.chunks=({'1,' * 100_001})", "100001 entries"),
    "unknown topology": ("model.topology=ring", "model.topology is 'ring'"),
    "unknown pooling": ("model.pooling=median", "model.pooling"),
    "unknown allocation": ("model.allocation=fair", "model.allocation"),
    "unknown scale": ("model.update_scale=cube", "model.update_scale"),
    "unknown dtype": ("model.dtype=float16", "model.dtype is 'float16'"),
    "unknown remat": ("model.remat=all", "model.remat"),
    "no slots": ("model.memory_slots=0", "model.memory_slots is 0"),
    "huge slots": ("model.memory_slots=1000000000", "model.memory_slots"),
    "rotary above 1": ("model.rotary_fraction=1.5", "model.rotary_fraction is 1.5"),
    "rotary nan": ("model.rotary_fraction=nan", "model.rotary_fraction is nan"),
    "rotary base inf": ("model.rotary_base=inf", "model.rotary_base is inf"),
    "epsilon nan": ("model.layer_norm_epsilon=nan", "model.layer_norm_epsilon is nan"),
    "rate inf": ("optimizer.peak_learning_rate=inf", "optimizer.peak_learning_rate is inf"),
    "rate nan": ("optimizer.peak_learning_rate=nan", "optimizer.peak_learning_rate is nan"),
    "rate 0": ("optimizer.peak_learning_rate=0", "optimizer.peak_learning_rate is 0.0"),
    "rate that overflows": ("optimizer.peak_learning_rate=1e400", "optimizer.peak_learning_rate is inf"),
    "beta 1": ("optimizer.beta1=1", "optimizer.beta1 is 1.0"),
    "clip below 0": ("optimizer.clip_norm=-1", "optimizer.clip_norm is -1.0"),
    "clip inf": ("optimizer.clip_norm=inf", "optimizer.clip_norm is inf"),
    "decay nan": ("optimizer.weight_decay=nan", "optimizer.weight_decay is nan"),
    "unknown schedule": ("optimizer.schedule=linear", "optimizer.schedule is 'linear'"),
    "unknown optimizer": ("optimizer.name=sgd", "optimizer.name is 'sgd'"),
    "warm-up beyond the run": ("optimizer.warmup_steps=9", "optimizer.warmup_steps is 9"),
    "logging inf": ("logging.seconds=inf", "logging.seconds is inf"),
    "flops nan": ("logging.peak_flops=nan", "logging.peak_flops is nan"),
    "temperature nan": ("summary.temperature=nan", "summary.temperature is nan"),
    "kept between": ("checkpoint.keep_every_steps=3", "checkpoint.keep_every_steps is 3"),
    "keep none": ("checkpoint.keep=0", "checkpoint.keep is 0"),
    "mesh of 0": ("mesh.fsdp=0", "mesh.fsdp is 0"),
    "patience inf": ("data.retry_seconds=inf", "data.retry_seconds is inf"),
    "all held out": ("data.validation_fraction=1.0", "data.validation_fraction is 1.0"),
    "unknown format": ("data.format=csv", "data.format is 'csv'"),
    "unknown policy": ("data.invalid=ignore", "data.invalid is 'ignore'"),
    "endless workers": ("data.workers=1000000000", "data.workers is 1000000000"),
    "no longest record": ("data.longest_record=0", "data.longest_record is 0"),
    "small bpe": ("data.bpe_vocab_size=2", "data.bpe_vocab_size is 2"),
    "validation store without stores": ("data.validation_store=/x", ("data.validation_store is '/x'", "data.stores")),
    "weights without stores": ("data.weights=((1.0,),)", "data.weights"),
    "stage without weights": ("data.stage_starts=(0,5)", "data.stage_starts"),
    "cache without a place": ("data.cache_gigabytes=1.0", "data.cache_gigabytes"),
    "separator of bytes": ("data.separator=x", "data.separator is 'x'"),
}
# Of `train` alone: arguments after --config and --workdir, {good} is the folder of the fixture.
TRAIN = {
    "no device for the mesh": (("--config.mesh.fsdp=3",), "mesh.fsdp 3"),
    "batch over the mesh": (("--config.train.batch_size=7",), "train.batch_size is 7"),
    "no layer at all": (
        ("--config.model.prelude_layers=0", "--config.model.core_layers=0"),
        "the number of layers that are stored is 0",
    ),
    "profile of one number": (("--profile=9",), "--profile is '9'"),
    "profile backwards": (("--profile=3:2",), "--profile is '3:2'"),
    "profile of other digits": (("--profile=²:³",), "--profile is "),
    "profile after the end": (("--profile=5:6",), ("--profile is '5:6'", "up to 4")),
    "float64 here": (("--config.model.dtype=float64",), "JAX_ENABLE_X64"),
    "no such text": (("--config.data.paths=/no/such/file.txt",), "/no/such/file.txt"),
    "empty text": (("--config.data.paths={good}/empty.txt",), "empty.txt"),
    "pattern of nothing": (("--config.data.paths={good}/*.none",), "*.none"),
    "text that is a device": (("--config.data.paths=/dev/null",), "/dev/null"),
    "no such store": (("--config.data.stores=/no/such/store",), "/no/such/store"),
    "text for a store": (("--config.data.stores={good}/text.txt",), "text.txt"),
    "no such validation": (
        ("--config.data.stores={good}/store", "--config.data.validation_store=/no/store"),
        "data.validation_store is '/no/store'",
    ),
    "no such tokenizer": (("--config.data.tokenizer=/no/tokenizer.json",), "/no/tokenizer.json"),
    "text for a tokenizer": (("--config.data.tokenizer={good}/text.txt",), "text.txt is damaged"),
    "store of another tokenizer": (
        ("--config.data.stores={good}/store", "--config.data.tokenizer={good}/hf/tokenizer.json"),
        "data.tokenizer has fingerprint",
    ),
    "ids beyond the model": (("--config.model.vocab_size=256",), "model.vocab_size is 256"),
    "bpe beyond the model": (("--config.data.tokenizer=bpe",), ("model.vocab_size is 288", "4096")),
    "text shorter than a window": (("--config.train.sequence_length=100000",), "train.sequence_length is 100000"),
    "weights of a store too many": (
        ("--config.data.stores={good}/store", "--config.data.weights=((0.5,0.5),)"),
        "data.weights is (0.5, 0.5)",
    ),
    "records without the field": (
        ("--config.data.paths={good}/records.jsonl", "--config.data.text_field=body"),
        'no field "body"',
    ),
    "source that is no run": (("--config.upcycle.source={good}",), "has no checkpoints"),
    "unknown flag": (("--batch=3",), ("--batch", "--help")),
    "stray word": (("words",), "'words'"),
    "workdir twice": (("--workdir={good}/other",), "--workdir is given 2 times"),
    "field twice": (("--config.seed=1", "--config.seed=2"), "--config.seed is given 2 times"),
    "switch twice": (("--config.model.unroll", "--config.model.unroll"), "--config.model.unroll is given 2 times"),
    "import of nothing": (("--import=/no/such.py",), "--import=/no/such.py"),
    "import of a text": (("--import={good}/text.txt",), "text.txt"),
    "process 3 of 2": (("--num_processes=2", "--process_id=3"), "--process_id is 3"),
    "address without a port": (("--coordinator_address=here",), "--coordinator_address is 'here'"),
    "no time to join": (("--initialization_timeout=0",), "--initialization_timeout is 0"),
}
CONFIGS = {
    "nothing": ((), "--config is missing"),
    "fields alone": (("--config.train.steps=3",), "--config is missing"),
    "field before the file": (("--config.seed=3", "--config={good}/tiny.py"), "--config.seed comes before --config"),
    "no such file": (("--config=nope.py",), "--config is 'nope.py'"),
    "a folder": (("--config={good}",), "--config is "),
    "not Python": (("--config={good}/text.txt",), "--config"),
    "no get_config": (("--config={good}/empty.txt",), "get_config"),
    "two files": (("--config={good}/tiny.py", "--config={good}/tiny.py"), "--config is given 2 times"),
    "no value": (("--config",), "--config"),
}
MODULES = {"describe": describe, "check": check, "aot": aot, "train": train}
AOT = {
    "no slice": ((), "--topology is missing"),
    "unknown slice": (("--topology=v9-8",), "--topology is 'v9-8'"),
    "slice without a size": (("--topology=v5e",), "--topology is 'v5e'"),
    "slice of nothing": (("--topology=v5e:0x0",), "--topology"),
    "slice beyond everything": (("--topology=v5p-99999999999",), "--topology"),
    "no slices": (("--topology=v5e:2x2", "--num_slices=0"), "--num_slices is '0'"),
    "no compilations": (("--topology=v5e:2x2", "--max_compilations=0"), "--max_compilations is '0'"),
    "report into a folder": (("--topology=v5e:2x2", "--output={good}"), "--output is "),
    "report nowhere": (("--topology=v5e:2x2", "--output=/no/such/file"), "--output is "),
}


@pytest.mark.parametrize("override, words", FIELDS.values(), ids=FIELDS.keys())
def test_fields(good, override, words):
    arguments = f"--config={good}/tiny.py", f"--workdir={good}/new", f"--config.{override}"
    refused(train, arguments, words, good)


@pytest.mark.parametrize("arguments, words", TRAIN.values(), ids=TRAIN.keys())
def test_train(good, compilations, arguments, words):
    arguments = [argument.format(good=good) for argument in arguments]
    refused(train, (f"--config={good}/tiny.py", f"--workdir={good}/new/run", *arguments), words, good)
    assert not compilations


def test_workdirs(good):
    for flags, words in (
        ((), "--workdir is missing"),
        (("--workdir=",), "--workdir is missing"),
        ((f"--workdir={good}/text.txt",), "text.txt"),
        ((f"--workdir={good}/text.txt/run",), "text.txt/run"),
        (("--workdir=/proc/run",), "/proc/run"),
        (("--workdir=s3://bucket/run",), "--workdir is 's3://bucket/run'"),
        ((f"--workdir={good}/run",), "model."),  # another model is there
    ):
        refused(train, (f"--config={good}/tiny.py", *flags), words, good)


@pytest.mark.parametrize("verb", ["describe", "check", "train", "aot"])
@pytest.mark.parametrize("arguments, words", CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations(good, verb, arguments, words):
    refused(MODULES[verb], [argument.format(good=good) for argument in arguments], words, good)


@pytest.mark.parametrize("verb", ["describe", "check"])
@pytest.mark.parametrize("name", ["unknown field", "word for a number", "1e8 layers", "rate nan", "chunk of 0"])
def test_fields_of_other_verbs(good, verb, name):
    override, words = FIELDS[name]
    refused(MODULES[verb], (f"--config={good}/tiny.py", f"--config.{override}"), words, good)


def test_describe(good):
    for flag, words in (("--devices=0", "--devices is 0"), ("--devices=x", "--devices is 'x'"),
                        ("--devices=3", "train.batch_size"), ("--json=x", "--json"), ("--jsn", "--json")):  # fmt: skip
        refused(describe, (f"--config={good}/tiny.py", flag), words, good)


@pytest.mark.parametrize("arguments, words", AOT.values(), ids=AOT.keys())
def test_aot(good, arguments, words):
    arguments = [argument.format(good=good) for argument in arguments]
    refused(aot, (f"--config={good}/tiny.py", *arguments), words, good)


def test_a_refused_start_removes_nothing_of_others(good, tmp_path):
    run, arguments = tmp_path / "run", (f"--config={good}/tiny.py", f"--workdir={tmp_path}/run")
    run.mkdir()
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    refused(train, (*arguments, "--config.data.paths=/no/text"), "/no/text", tmp_path)
    with claim(run):  # another one has begun, and has no checkpoint yet
        (run / "cache").mkdir()
        refused(train, arguments, "another process is training there", tmp_path)


def test_a_preparation_that_the_machine_stopped_is_kept(good, tmp_path, monkeypatch):
    def fail(*arguments):
        raise SpiralError("the disk cannot be written")

    monkeypatch.setattr("spiral_jax.corpus.prepare._merge", fail)
    status, errors = call(train, f"--config={good}/tiny.py", f"--workdir={tmp_path}/run")
    assert (status, errors) == (2, "error: the disk cannot be written\n")
    (partial,) = (tmp_path / "run/cache").iterdir()
    assert partial.name.endswith(".partial") and list((partial / "parts").glob("*.json"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"]
