"""Looped exports in the hands of `transformers`' own code: they take what its GPT-NeoX takes, and load anywhere."""

import copy
import shutil

import pytest
from exported import close, full, padded, random_tokens, spiral, torch, transformers

pytestmark = pytest.mark.usefixtures("trusted_code")

PLACES = ("out-1.4b.step10", "lr=1e-3,wd=0.1", "with space", "7b", "ünï", ".")


def load(folder, of=transformers.AutoModelForCausalLM, **how):
    return of.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **how)


@pytest.fixture(scope="module")
def models(exports):
    """`looped` and `vanilla`, as `transformers` loads them."""
    return {name: load(exports / name).eval() for name in ("looped", "vanilla")}


@pytest.fixture(scope="module")
def tokenizer(exports):
    return transformers.AutoTokenizer.from_pretrained(exports / "looped", trust_remote_code=True)


# Arguments

ROW = {"position_ids": torch.arange(6)[None]}
DETAILED = {"return_dict_in_generate": True}
TO_GENERATE = {
    "stop strings": {"stop_strings": ["q"], "tokenizer": True},
    "of beams": {"stop_strings": ["q"], "tokenizer": True, "num_beams": 2},
    "of looked up": {"stop_strings": ["q"], "tokenizer": True, "prompt_lookup_num_tokens": 2},
    "positions": ROW,
    "positions without a cache": ROW | {"use_cache": False},
    "attentions": DETAILED | {"output_attentions": True},
    "states": DETAILED | {"output_hidden_states": True},
    "scores": DETAILED | {"output_scores": True, "output_logits": True},
    "causal": {"is_causal": True},
    "a sequence index": {"seq_idx": torch.zeros(1, 6, dtype=torch.int32)},
    "healing": {"token_healing": False, "tokenizer": True},
    "penalties": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]},
    "prefilled in parts": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("how", TO_GENERATE)
def test_generate_takes_what_it_takes_of_gpt_neox(how, models, tokenizer):
    """Without complaint, for the same kind of result."""
    options = {"max_new_tokens": 4, "do_sample": False} | TO_GENERATE[how]
    if options.get("tokenizer"):
        options["tokenizer"] = tokenizer
    results = {}
    for name, model in models.items():
        results[name] = model.generate(random_tokens(model, 1, 6), **options)
    assert type(results["looped"]) is type(results["vanilla"])
    if isinstance(results["vanilla"], dict):
        assert results["looped"].keys() == results["vanilla"].keys()


def test_generate_still_refuses_what_does_not_exist(models):
    with pytest.raises(ValueError, match="temprature"):
        models["looped"].generate(random_tokens(models["looped"], 1, 6), temprature=0.5)


TO_CALL = {
    "types": {"token_type_ids": torch.zeros(2, 9, dtype=torch.long)},
    "positions": {"position_ids": torch.arange(9).expand(2, 9)},
    "positions of one row": {"position_ids": torch.arange(3, 12)[None]},
    "attentions": {"output_attentions": True},
    "items": {"num_items_in_batch": torch.tensor(7)},
    "flash": {"cu_seq_lens_q": torch.tensor([0, 9]), "max_length_q": 9},
    "cache": {"cache": None, "past_key_values": None},
    "places of each row": {"logits_to_keep": torch.tensor([[1, 2], [3, 8]])},
    "places where true": {"logits_to_keep": torch.arange(18).view(2, 9) % 3 == 0},
}


@pytest.mark.parametrize("what", TO_CALL)
def test_a_call_takes_what_gpt_neox_takes(what, models):
    for model in models.values():
        tokens = random_tokens(model, 2, 9)
        keep = TO_CALL[what].get("logits_to_keep")
        want = full(model, tokens)
        if keep is not None:
            want = want[keep] if keep.dtype == torch.bool else want[torch.tensor([[0], [1]]), keep]
        with torch.no_grad():
            close(model(tokens, **TO_CALL[what]).logits, want, 1e-4)


def test_positions_refused():
    """What would be computed otherwise than asked for; positions at padding do not count."""
    model = spiral([(4, 2, 3), (1, 0, 0)])
    tokens = random_tokens(model, 2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    positions = torch.tensor([[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]])
    close(model(tokens, attention_mask=mask, position_ids=positions).logits, model(tokens, attention_mask=mask).logits)
    for wrong in ([0, 0, 0, 1, 1, 2], [0, 0, 3, 2, 1, 0]):
        positions[0] = torch.tensor(wrong)
        with pytest.raises(ValueError, match="rise by one"):
            model(tokens, attention_mask=mask, position_ids=positions)
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match="rise by one"):
        model(tokens, position_ids=positions, past_key_values=cache)
    with pytest.raises(ValueError, match="is_causal"):
        model(tokens, is_causal=False)


def test_packed_rows_of_a_batch():
    """Texts of one token and more, in every row, hidden states too."""
    model = spiral([(4, 2, 3), (2, 0, 1), (1, 0, 0)]).train()
    tokens = random_tokens(model, 2, 11)
    cuts = [(0, 1, 6, 11), (0, 4, 8, 11)]
    positions = torch.cat([torch.arange(b - a) for row in cuts for a, b in zip(row, row[1:], strict=False)]).view(2, 11)
    packed = model(tokens, position_ids=positions, output_hidden_states=True)
    assert packed.past_key_values is None
    for b, row in enumerate(cuts):
        for first, end in zip(row, row[1:], strict=False):
            alone = model(tokens[b : b + 1, first:end], output_hidden_states=True)
            close(packed.logits[b, first:end], alone.logits[0])
            close(packed.hidden_states[2][b, first:end], alone.hidden_states[2][0])


def test_every_linear_is_called_as_a_module(models):
    """So that what hooks, wraps or replaces Linears (offloading, LoRA) works on all of them, also on a resized head."""
    model = copy.deepcopy(models["looped"])
    model.resize_token_embeddings(280)
    linears, called = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears[name] = module.register_forward_hook(lambda *_, name=name: called.add(name))
    narrow = model.bfloat16()
    assert narrow(random_tokens(model, 1, 9)).logits.dtype == torch.float32
    assert called == linears.keys()


# Loading


@pytest.mark.parametrize("place", PLACES)
def test_code_is_loaded_from_a_folder_of_any_name(place, exports, models, tmp_path, monkeypatch):
    folder = tmp_path / ("here" if place == "." else place)
    shutil.copytree(exports / "looped", folder)
    monkeypatch.chdir(folder if place == "." else tmp_path)
    model = load(place if place == "." else folder)
    tokens = random_tokens(model, 1, 9)
    assert torch.equal(full(model, tokens), full(models["looped"], tokens))
    tokenizer = transformers.AutoTokenizer.from_pretrained(place if place == "." else folder, trust_remote_code=True)
    assert tokenizer("a")["input_ids"] == [97]


def test_the_base_model_is_loaded(exports, models):
    base, info = transformers.AutoModel.from_pretrained(
        exports / "looped", trust_remote_code=True, output_loading_info=True
    )
    assert type(base).__name__ == "SpiralFormerModel" and not info["missing_keys"] and not info["mismatched_keys"]
    tokens = random_tokens(base, 2, 9)
    want = models["looped"](tokens, output_hidden_states=True).hidden_states[-1]
    close(base(tokens).last_hidden_state, want, 1e-6)
    assert isinstance(base(tokens, return_dict=False), tuple)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_other_heads(head, exports):
    """Those of GPT-NeoX, of the same shapes; a row of padding and text gives what the text gives."""
    shapes = {}
    for name in ("looped", "vanilla"):
        of = getattr(transformers, f"AutoModelFor{head}")
        model = load(exports / name, of, num_labels=3, pad_token_id=256).eval()
        tokens, mask = padded([random_tokens(model, 9), random_tokens(model, 5, seed=1)])
        tokens = tokens.masked_fill(mask == 0, 256)
        rows = model(tokens, attention_mask=mask)
        alone = model(tokens[1:, 4:])
        labels = {"SequenceClassification": (2,), "TokenClassification": (2, 9)}.get(head)
        if labels:
            loss = model(tokens, attention_mask=mask, labels=torch.ones(labels, dtype=torch.long)).loss
        else:
            ones = torch.ones(2, dtype=torch.long)
            loss = model(tokens, attention_mask=mask, start_positions=ones * 4, end_positions=ones * 5).loss
        loss.backward()
        got, want = rows[0][1], alone[0][0]
        close(got[-len(want) :], want, 1e-4)
        shapes[name] = rows[0].shape
    assert shapes["looped"] == shapes["vanilla"]


def test_resized_saved_and_loaded_again(exports, tmp_path):
    model = load(exports / "looped")
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    tokens = random_tokens(model, 2, 9)
    assert torch.equal(full(load(tmp_path), tokens), full(model, tokens))
    assert type(load(tmp_path, transformers.AutoModel)).__name__ == "SpiralFormerModel"


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "disk"])
def test_device_maps(device_map, exports, models, tmp_path):
    """On disk: all but the embedding is read when its turn comes."""
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    if device_map == "disk":
        parts = [name for name, _ in models["looped"].spiralformer.named_children()]
        device_map = {f"spiralformer.{name}": "cpu" if name == "embed_in" else "disk" for name in parts}
        device_map["embed_out"] = "disk"
    model = load(exports / "looped", device_map=device_map, offload_folder=tmp_path)
    tokens = random_tokens(model, 2, 9)
    close(full(model, tokens), full(models["looped"], tokens), 1e-6)
    generated = [m.generate(tokens, max_new_tokens=4, do_sample=False) for m in (model, models["looped"])]
    assert torch.equal(*generated)


def test_a_pipeline(exports):
    """Prompts of unequal length, sampled."""
    pipe = transformers.pipeline("text-generation", str(exports / "looped"), trust_remote_code=True, device="cpu")
    said = pipe(["ab", "abcdef"], max_new_tokens=4, batch_size=2, do_sample=True, return_full_text=False)
    assert len(said) == 2 and all(isinstance(one["generated_text"], str) for [one] in said)


# torch.export


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_torch_export(masked, models):
    """One program for all batches, and for lengths of more than one chunk at every level; with padding in front.

    A single chunk is another program: torch makes a case of its own of every size of 1.
    """
    model, sizes = models["looped"], {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    tokens = random_tokens(model, 2, 9)
    batch = {"input_ids": tokens} | ({"attention_mask": torch.ones_like(tokens)} if masked else {})
    program = torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, sizes), strict=False).module()
    for shape in ((2, 9), (3, 18), (1, 5)):
        batch["input_ids"] = random_tokens(model, *shape, seed=1)
        want = full(model, batch["input_ids"])
        if masked:
            batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
        close(program(**batch).logits, want, 1e-5)
    if masked:
        batch["input_ids"], batch["attention_mask"] = tokens.roll(3, 1), torch.ones_like(tokens)
        batch["attention_mask"][:, :3] = 0
        close(program(**batch).logits[:, 3:], full(model, tokens[:, :-3]), 1e-5)
