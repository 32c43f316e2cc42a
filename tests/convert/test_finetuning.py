"""Exports where people fine-tune them: `transformers`' Trainer does with looped ones what it does with its own.

Vanilla exports are transformers' own GPT-NeoX, which is what looped ones are compared with.
"""

import json

import jax
import numpy as np
import pytest
from cases import slow
from exported import torch, transformers
from safetensors.numpy import load_file
from verbs import call

import spiral_jax
from spiral_jax import import_hf, train
from spiral_jax.convert.tensors import tensors_from_params

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
pytestmark = pytest.mark.usefixtures("trusted_code")

BOTH = pytest.mark.parametrize("name", ["looped", "vanilla"])
LOOPED_FIRST = pytest.mark.parametrize("name", ["looped", slow("vanilla")])
END = "<|im_end|>"
CHAT = {"2+2=": "4", "hello=": "bye", "what is a spiral? ": "a loop", "name? ": "zoe"}
CONFIG = """
from spiral_jax.run.config import default_config

def get_config(argument=""):
    config = default_config()
    config.model.update({model})
    config.train.update(dict(steps=3, batch_size=8, sequence_length=16))
    config.optimizer.update(dict(warmup_steps=0, schedule="constant", peak_learning_rate=1e-2))
    config.data.paths = ("{text}",)
    config.evaluation.every_steps = 0
    return config
"""


class Rows(torch.utils.data.Dataset):
    """Eight texts of unequal length; all tokens are labels, the first only if told so: nothing real is before it."""

    def __init__(self, first=False):
        self.first = first
        random = np.random.default_rng(0)
        self.rows = [random.integers(0, 256, 3 + 4 * i).tolist() for i in range(8)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return {
            "input_ids": row,
            "labels": [row[0] if self.first else -100, *row[1:]],
            "attention_mask": [1] * len(row),
        }


def load(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **how)


def read_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def trainer(model, tokenizer, tmp_path, train_rows=None, **fields):
    """A Trainer that pads labels with -100, in as many steps as it is told, without reports."""
    arguments = dict(report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1, logging_steps=1, save_strategy="no")
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path / "trainer"), **arguments | fields),
        train_dataset=Rows() if train_rows is None else train_rows,
        eval_dataset=Rows(),
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )


def logged(trainer, field):
    return [row[field] for row in trainer.state.log_history if field in row]


@LOOPED_FIRST
def test_evaluation(name, exports, tmp_path):
    """Alone, between steps and as predictions: the mean over all labels of what each text gives by itself."""
    model = load(exports / name).eval()
    with torch.no_grad():
        losses = [model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in Rows().rows]
    labels = [len(row) - 1 for row in Rows().rows]
    fields = dict(per_device_eval_batch_size=8, eval_strategy="steps", eval_steps=1, learning_rate=0)
    run = trainer(model, read_tokenizer(exports / name), tmp_path, **fields)
    want = np.average(losses, weights=labels)
    assert run.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-5)
    run.train()
    assert logged(run, "eval_loss")[-1] == pytest.approx(want, rel=1e-5)
    predicted = run.predict(Rows())
    assert predicted.predictions.shape == (8, 31, 272) and predicted.label_ids.shape == (8, 31)


@LOOPED_FIRST
def test_the_loss_is_that_of_the_batch_however_it_is_cut(name, exports, tmp_path):
    """Rows of unequal length: the mean over the labels of all of them, and the same gradient."""
    losses, norms = [], []
    for size in (8, 2, 1):
        run = trainer(
            load(exports / name), read_tokenizer(exports / name), tmp_path,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        )  # fmt: skip
        run.train()
        losses += logged(run, "loss")
        norms += logged(run, "grad_norm")
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-4)


@LOOPED_FIRST
def test_first_tokens_behind_padding_are_no_labels(name, exports, tmp_path):
    """Which Trainer counts: all rows padded in one batch, or one by one without, are the same; nearly so in vanilla."""
    losses = []
    for size in (8, 1):
        fields = dict(per_device_train_batch_size=size, gradient_accumulation_steps=8 // size)
        run = trainer(load(exports / name), read_tokenizer(exports / name), tmp_path, Rows(first=True), **fields)
        run.train()
        losses += logged(run, "loss")
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if name == "looped" else 1e-2)


def test_padding_teaches_nothing(exports):
    """Padding in front of a row, whose next token is a label, and behind it: the same loss and gradient as without."""
    row = torch.tensor(Rows().rows[3])
    gradients = []
    for before, behind in ((0, 0), (4, 0), (2, 3)):
        model = load(exports / "looped").train()
        pad = torch.nn.functional.pad
        mask = pad(torch.ones_like(row), (before, behind))[None]
        labels = pad(pad(row, (before, 0), value=-100), (0, behind), value=-100)[None]
        tokens = pad(row, (before, behind), value=256)[None]
        counted = (labels[:, 1:] != -100).sum()  # as Trainer counts them
        assert counted == len(row) - (before == 0)
        out = model(tokens, attention_mask=mask, labels=labels, num_items_in_batch=counted)
        gradients.append((out.loss, *torch.autograd.grad(out.loss, [*model.parameters()])))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-5)


@LOOPED_FIRST
def test_smoothed_labels_are_those_of_the_next_token(name, exports, tmp_path):
    run = trainer(load(exports / name), read_tokenizer(exports / name), tmp_path, label_smoothing_factor=0.1)
    tokens = torch.tensor([Rows().rows[-1]])
    with torch.no_grad():
        loss = run.compute_loss(run.model, {"input_ids": tokens, "labels": tokens})
        scores = run.model(tokens).logits[0, :-1].log_softmax(-1)
    likely = scores.gather(1, tokens[0, 1:, None]).mean()
    assert loss.item() == pytest.approx(-(0.9 * likely + 0.1 * scores.mean()).item(), rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, exports):
    """The same gradients, of layers that are computed again on the way back, and nothing kept of them before."""
    tokens = torch.tensor([Rows().rows[-1]] * 2)
    gradients, calls = [], []
    for on in (False, True):
        model = load(exports / "looped").train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        hooks = [
            layer.register_forward_pre_hook(lambda *_: calls.append(on))  # noqa: B023
            for layer in [model.spiralformer.core[0].mlp, model.spiralformer.coda[0].mlp]
        ]
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert len(hooks) == 2
    iterations = len(model.config.schedule)
    assert calls.count(False) == iterations + 1 and calls.count(True) == 2 * (iterations + 1)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_and_caches(exports):
    model = load(exports / "looped").train()
    tokens = torch.tensor([Rows().rows[2]])
    cache = model(tokens, use_cache=True).past_key_values
    model.gradient_checkpointing_enable()
    assert model(tokens, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(tokens, past_key_values=cache)
    with torch.no_grad():  # as generate does between steps
        assert model(tokens, past_key_values=cache).past_key_values.get_seq_length() == 2 * tokens.shape[1]


def test_packed_texts_do_not_see_each_other(exports):
    """As DataCollatorWithFlattening packs them: logits and loss of each by itself, as GPT-NeoX in training."""
    rows = [torch.tensor(row) for row in Rows().rows[1:5]]
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    batch = {key: torch.as_tensor(value) for key, value in batch.items()}
    for name in ("looped", "vanilla"):
        model = load(exports / name).train()
        packed = model(**batch, use_cache=False)  # as Trainer sets it
        alone = [model(row[None], labels=row[None]) for row in rows]
        torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in alone], 1), rtol=1e-4, atol=1e-5)
        want = np.average([out.loss.item() for out in alone], weights=[len(row) - 1 for row in rows])
        assert packed.loss.item() == pytest.approx(want, rel=1e-5)


# A token of one's own, and the way back to JAX


@pytest.fixture(scope="module")
def tuned(exports, tmp_path_factory):
    """Name of a kind to a folder that 50 steps on a chat with a token of its own were saved in.

    `resized`: with a vocabulary of 300, by one step alone.
    """
    folders = {}

    def fine_tuned(kind):
        if kind in folders:
            return folders[kind]
        name, _, resized = kind.partition(" ")
        folder = tmp_path_factory.mktemp("tuned")
        model, tokenizer = load(exports / name), read_tokenizer(exports / name)
        assert tokenizer.add_tokens([END], special_tokens=True) == 1
        if resized:
            model.resize_token_embeddings(300)
        rows = [dict(tokenizer(question + answer + END)) for question, answer in CHAT.items()]
        rows = [row | {"labels": row["input_ids"]} for row in rows]
        fields = dict(max_steps=1 if resized else 50, learning_rate=1e-2, per_device_train_batch_size=4)
        run = trainer(model, tokenizer, folder, rows, **fields)
        run.train()
        folders[kind] = folder / "saved"
        run.save_model(str(folders[kind]))
        return folders[kind]

    return fine_tuned


@BOTH
def test_a_token_that_a_fine_tune_adds_is_read_and_generated(name, tuned):
    """In a row of the vocabulary that stood for nothing; also after saving and loading, in a pipeline."""
    folder = tuned(name)
    model, tokenizer = load(folder), read_tokenizer(folder)
    end = tokenizer.convert_tokens_to_ids(END)
    assert end == 257 < model.config.vocab_size
    assert tokenizer("a" + END)["input_ids"] == [97, end]
    prompts = tokenizer(list(CHAT), padding=True, return_tensors="pt")
    answers = model.generate(**prompts, max_new_tokens=9, do_sample=False, eos_token_id=end)
    answers = tokenizer.batch_decode(answers[:, prompts["input_ids"].shape[1] :])
    assert [answer.partition(END)[:2] for answer in answers] == [(answer, END) for answer in CHAT.values()]
    pipe = transformers.pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    said = pipe("2+2=", max_new_tokens=9, do_sample=False, stop_strings=[END], tokenizer=tokenizer)
    assert said[0]["generated_text"] in ("2+2=4", "2+2=4" + END)


@pytest.mark.parametrize("kind", ["looped", "looped resized", "vanilla", slow("vanilla resized")])
def test_what_the_trainer_saved_is_read_in_jax(kind, tuned, tmp_path):
    """By `load` and `import_hf`, tensor by tensor, with the rows that were added."""
    folder = tuned(kind)
    model, params = spiral_jax.load(folder)
    assert model.config.vocab_size == (300 if "resized" in kind else 272)
    theirs, ours = load_file(folder / "model.safetensors"), tensors_from_params(model.config, params)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_max_ulp(tensor, theirs[name], maxulp=int(name.endswith("embed_in.weight")))
    assert call(import_hf, f"--input={folder}", f"--workdir={tmp_path}/run") == (0, "")
    again, imported = spiral_jax.load(tmp_path / "run")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, imported, params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["looped", "looped resized", "vanilla resized"])
def test_training_goes_on_in_jax(kind, tuned, forward, tmp_path):
    """From the same logits."""
    folder, tokens_BxL = tuned(kind), np.array([Rows().rows[-1]] * 2, np.int32)
    with torch.no_grad():
        want = load(folder)(torch.tensor(tokens_BxL, dtype=torch.long)).logits.numpy()
    model, params = spiral_jax.load(folder)
    np.testing.assert_allclose(forward(model.config, params, tokens_BxL), want, rtol=0, atol=2e-4)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{question}{answer}\n" for question, answer in CHAT.items()) * 90, encoding="utf-8")
    fields = {field: getattr(model.config, field) for field in model.config.__dataclass_fields__}
    (tmp_path / "config.py").write_text(CONFIG.format(model=repr(fields), text=text), encoding="utf-8")
    arguments = f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"
    assert call(import_hf, f"--input={folder}", *arguments) == (0, "")
    assert call(train, *arguments) == (0, "")
    rows = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert len(losses) == 3 and losses[-1] < losses[0]
