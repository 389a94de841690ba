"""What the project claims, one test a claim.  pytest test_migu.py: offline, on a CPU.

Tests against transformers, safetensors, tokenizers and matplotlib skip where these are missing.
MIGU_DATA=.../CL_Benchmark lets one more use real files. What plays a hub or a GPU, and the
measuring of speed, python test_migu.py --bench, stand at the end.
"""

import argparse
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import download
import eval as evaluation
import migu
import model as models
import train
from migu import CRITERIA, MIGU, RowSparseMIGU, add_lora, keep_rows, merge_lora
from model import T5, Llama, load_model, read_safetensors, save_model, write_safetensors

# ---- helpers: small models and layers, a padded batch, folders

torch.set_num_threads(1)  # the models are small: threads would only wait for each other
T5_SIZES = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
T5_TABLE = dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
T5_OTHER = dict(layer_norm_epsilon=1e-6, dropout_rate=0.0, decoder_start_token_id=0)
LLAMA_SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
LLAMA_HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
LLAMA_OTHER = dict(hidden_act="silu", rms_norm_eps=1e-6)
SMALL = {T5: T5_SIZES | T5_TABLE | T5_OTHER, Llama: LLAMA_SIZES | LLAMA_HEADS | LLAMA_OTHER}
both = pytest.mark.parametrize("kind", [T5, Llama])


def config_of(kind, **changes):
    return json.dumps({"model_type": kind.__name__.lower(), **SMALL[kind], **changes}).encode()


def small(kind=T5, **changes):
    torch.manual_seed(1)
    return kind(SMALL[kind] | changes)


def padded_batch(kind, padding=0):
    """Labels of -100 stand at rows' ends, and inside rows, where they are ignored positions."""
    torch.manual_seed(2)
    lengths = torch.tensor([13, 5, 1, 9, 8, 7, 6, 4])
    mask = (torch.arange(13) < lengths[:, None]).long()
    ids = torch.randint(2, 97, mask.shape) * mask
    labels = ids.masked_fill(mask == 0, -100)
    if kind is T5:
        labels = torch.randint(2, 97, (8, 6))
        labels[1, 3:] = labels[3, 3:] = -100
    labels[:, 1] = labels[0, 4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: F.pad(t, (0, padding), value=min(0, t.min())) for name, t in batch.items()}


def masked_step(kind, masker=MIGU, bf16=False, again=False, passes=1, padding=0, dropout=0.0):
    """What a step leaves in a small model's gradients, and the fraction kept."""
    options = {"dropout_rate": dropout, "attention_dropout": dropout, "attention_bias": True}
    model = small(kind, **options).train()
    model.checkpointing = again
    masker = masker(model)
    torch.manual_seed(3)
    for _ in range(passes):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model.loss(**padded_batch(kind, padding)).backward()
    kept = masker.mask_gradients()
    return {"kept": kept} | {name: p.grad for name, p in model.named_parameters()}


def assert_close(one, two, tolerance):
    """Dicts of tensors; differences are measured by each tensor's largest number."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def linear(*rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


def adapted(*rows, **options):
    """A model whose one layer, x.q, has an adapter."""
    model = nn.ModuleDict({"x": nn.ModuleDict({"q": linear(*rows)})})
    add_lora(model, **options)
    return model


def changed(folder, files, to):
    """A copy of a folder in which files are removed (None), rewritten (bytes) or changed (dict)."""
    shutil.copytree(folder, to)
    for file, change in files.items():
        path = to / file
        if change is None:
            path.unlink()
        elif isinstance(change, bytes):
            path.write_bytes(change)
        elif path.suffix == ".json":
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        else:
            tensors = {name: t.clone() for name, t in read_safetensors(path).items()} | change
            write_safetensors(path, {name: t for name, t in tensors.items() if t is not None})
    return to


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two tasks, and a tiny T5 and a tiny Llama with tokenizers of their own."""
    root = tmp_path_factory.mktemp("world")
    texts = []
    for name in ("one", "two"):
        data.make_demo_task(root / "tasks" / name, (24, 9), np.random.default_rng(len(texts)))
        task = data.load_task("", root / "tasks" / name)
        texts += [text for example in task.train for text in example]
    t5 = small(vocab_size=300, d_model=16, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.1)
    t5.files["spiece.model"] = data.train_vocabulary(texts, 290)
    save_model(t5, root / "t5")
    file = io.BytesIO()  # as Llama's: unknown 0, start 1, end 2
    how = dict(vocab_size=290, hard_vocab_limit=False, num_threads=1, minloglevel=2)
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(texts), model_writer=file, **how)
    llama = small(Llama, vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    llama.files["tokenizer.model"] = file.getvalue()
    save_model(llama, root / "llama")
    return root


# ---- MIGU

QUANTILES = [
    (range(1, 11), 0.7, [8, 9, 10]),  # the quantile is 7.3
    ([4, 1, 3, 2], 0.5, [4, 3]),  # 2.5
    ([2, 0, 1], 0.5, [2, 1]),  # 1, which reaches itself
    ([5, 1, 5, 5], 0.7, [5, 5, 5]),  # ties
    (range(8), 0.05, [*range(1, 8)]),  # 0.35: one is masked, where floor(0.05 * 8) masks none
    (range(101), 0.07, [*range(7, 101)]),  # 7, though 0.07 * 100 > 7 in floating point
    (range(4096), 0.4, [*range(1638, 4096)]),  # 1638, which fp32 misses
    (range(3), 0, [0, 1, 2]),
    (range(3), 1, [2]),
]
CHOSEN = [  # of a model with such layers, the parameters that are masked, and how many these are
    (T5, migu.NOT_THE_HEAD, r".*(\.[qkvo]|\.wi|\.wo)\.weight", 2 * 6 + 2 * 10),
    (Llama, migu.NOT_THE_HEAD, r".*_proj\.weight", 2 * 7),
    (T5, "lm_head", r"shared\.weight", 1),  # the head is tied to it
    (T5, r"encoder.*\.q$", r"encoder.*\.q\.weight", 2),
]


@pytest.mark.parametrize("scores, threshold, kept", QUANTILES)
def test_keep_rows_is_the_exact_quantile_with_linear_interpolation(scores, threshold, kept):
    scores = torch.tensor([*scores], dtype=torch.float32)
    assert scores[keep_rows(scores, threshold)].tolist() == kept


def test_the_mask_is_the_hand_computed_one_of_a_step_s_training_passes():
    layer = linear([1, 0], [0, 1], [-2, 0], [0, -3])
    masker = MIGU(layer, threshold=0.5)
    for token in ([1.0, 1.0], [3.0, -1.0]):  # two passes make one step
        layer.train()(torch.tensor([token])).sum().backward()
        with torch.no_grad():
            layer(torch.ones(1, 2))
        layer.eval()(torch.ones(1, 2))
    # |h| summed over the two tokens: 1 + 3, 1 + 1, 2 + 6, 3 + 3; their median is 5.
    assert masker.magnitude[""].tolist() == [4, 2, 8, 6]
    assert masker.mask_gradients() == 0.5
    assert layer.weight.grad.tolist() == [[0, 0], [0, 0], [4, 0], [4, 0]]
    with pytest.raises(RuntimeError, match="no pass in training mode since the last step"):
        masker.mask_gradients()


@both
def test_padding_does_not_change_the_mask(kind):
    assert_close(masked_step(kind), masked_step(kind, padding=7), 1e-5)


@pytest.mark.parametrize("masker", [MIGU, RowSparseMIGU])
def test_remove_leaves_no_trace_and_frozen_what_a_user_froze_in_between(masker):
    layer = linear([1])
    masker = masker(layer)
    layer.requires_grad_(False)
    masker.remove()
    assert str(vars(layer)) == str(vars(linear([1]).requires_grad_(False)))


@pytest.mark.parametrize("kind, layers, names, count", CHOSEN)
def test_all_linear_layers_but_the_head_or_a_pattern_s_are_masked(kind, layers, names, count):
    maskers = [partial(MIGU, threshold=threshold, layers=layers) for threshold in (0, 0.7)]
    plain, masked = (masked_step(kind, masker) for masker in maskers)
    changed = {name for name in plain if not torch.equal(plain[name], masked[name])} - {"kept"}
    assert changed == {n for n in plain if re.fullmatch(names, n)} and len(changed) == count


def test_frozen_layers_are_passed_over():
    model = nn.Sequential(linear([1]), linear([1], [2]), linear([1, 1], [2, 2], [3, 3], [4, 4]))
    model[0].requires_grad_(False)
    masker = MIGU(model)
    model[1].requires_grad_(False)  # later, too
    model(torch.ones(1, 1)).sum().backward()
    assert masker.mask_gradients() == 1 / 4


# L1 norms: weights 4, 5, 6, 3 and gradients 5, 6, 4, 3. L2 norms would make the 6 a 3.5.
@pytest.mark.parametrize("name, kept", [("weight", [1, 2]), ("gradient", [0, 1]), ("new", [2, 3])])
def test_weight_and_gradient_rank_by_l1_norm_and_a_new_entry_as_it_says(name, kept, monkeypatch):
    monkeypatch.setitem(CRITERIA, "new", lambda layer, magnitude: torch.arange(4))
    layer = linear([4, 0, 0], [5, 0, 0], [-2, 2, -2], [3, 0, 0])
    layer.weight.grad = torch.tensor([[5.0, 0, 0], [-2, 2, -2], [0, 4, 0], [0, 0, 3]])
    MIGU(layer, 0.5, name).mask_gradients()
    assert layer.weight.grad.any(1).nonzero().flatten().tolist() == kept


def test_a_random_mask_changes_every_step():
    layer, masks = linear(*[[1]] * 100), []
    masker = MIGU(layer, 0.7, "random")
    for _ in range(2):
        layer.weight.grad = torch.ones(100, 1)
        masker.mask_gradients()
        masks.append(layer.weight.grad)
    assert masks[0].sum() == masks[1].sum() == 30 and not masks[0].equal(masks[1])


# ---- the same update in less time


@both
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-6), (True, 1e-2)])
def test_row_sparse_gradients_are_those_of_the_explicit_step(kind, bf16, tolerance):
    explicit, sparse = (masked_step(kind, masker, bf16) for masker in (MIGU, RowSparseMIGU))
    assert explicit["kept"] == sparse["kept"] < 0.32
    assert_close(explicit, sparse, tolerance)


def test_row_sparse_keeps_ties_takes_any_shape_of_input_and_one_pass_a_step():
    layer = linear(*[[1, 1]] * 40)
    masker = RowSparseMIGU(layer)
    layer(torch.ones(3, 5, 2)).sum().backward()  # all 40 rows tie: more than the top 30 %
    with torch.no_grad():
        layer(torch.ones(2))  # a test in between does not count
    with pytest.raises(RuntimeError, match="one pass"):
        layer(torch.ones(3, 5, 2))
    assert masker.mask_gradients() == 1 and (layer.weight.grad == 15).all()


@both
@pytest.mark.parametrize("options", [{"passes": 2}, {"masker": RowSparseMIGU}, {"bf16": True}])
def test_checkpointing_changes_neither_gradient_nor_mask(kind, options):
    plain, again = (masked_step(kind, again=a, dropout=0.1, **options) for a in (False, True))
    assert_close(plain, again, 0)


# ---- LoRA


@both
def test_folded_adapters_give_the_unfolded_logits_and_leave_frozen_what_was(kind, tmp_path):
    batch, model = padded_batch(kind), small(kind).eval()
    frozen = models.EMBEDDING[kind]
    model.get_parameter(frozen).requires_grad_(False)
    add_lora(model)
    for layer in migu.lora_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    logits = model(**batch)[0]
    save_model(model, tmp_path, migu.plain_weights(model))  # a folder that anything opens
    merge_lora(model)
    assert_close({0: logits}, {0: model(**batch)[0]}, 1e-5)
    assert torch.equal(load_model(tmp_path)(**batch)[0], model(**batch)[0])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [frozen]


def test_a_is_masked_by_its_own_output_and_b_by_the_merged_one():
    model = adapted([1, 0], [0, 5], [3, 0], [0, 1], rank=2, alpha=4, dropout=0.0)
    A, B = model.x.q.lora_A.weight, model.x.q.lora_B.weight
    A.data = torch.tensor([[1.0, 0], [0, 3]])
    B.data = torch.tensor([[4.0, 0], [0, 0], [0, 0], [0, 1]])
    masker = MIGU(model, 0.5)
    model.x.q(torch.ones(1, 2)).sum().backward()
    A.grad, B.grad = torch.ones(2, 2), torch.ones(4, 2)
    # A's output is (1, 3), B's (4, 0, 0, 3), the merged one (1, 5, 3, 1) + 4/2 (4, 0, 0, 3).
    magnitude = {name: size.tolist() for name, size in masker.magnitude.items()}
    assert magnitude == {"x.q.lora_A": [1, 3], "x.q.lora_B": [9, 5, 3, 7]}  # W is frozen
    masker.mask_gradients()
    assert (A.grad[:, 0].tolist(), B.grad[:, 0].tolist()) == ([0, 1], [1, 0, 0, 1])


def test_the_orthogonality_penalty_is_the_hand_computed_one():
    model = adapted([1, 1], rank=2)
    A = model.x.q.lora_A.weight
    A.data = torch.tensor([[1.0, -2], [0, 4]])
    penalty = migu.orthogonality_penalty(model, {"x.q": torch.tensor([[1.0, 1], [2, 0], [0, -1]])})
    penalty.backward()
    # A_old A_new^T = [[-1, 4], [2, 0], [2, -4]]; the derivative is sign(A_new A_old^T) A_old.
    assert penalty == 13 and A.grad.tolist() == [[-1 + 2, -1 - 1], [1, 1 + 1]]


# ---- the models, beside those of transformers

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 40  # of 8 frequencies, 1 is kept, 1 is in between
OTHER_ROPE = {"rope_type": "default", "rope_theta": 500.0}
BIASES = dict(attention_bias=True, mlp_bias=True)
ENDS = [*range(2, 97, 7)]
VARIANTS = [
    (T5, {}),
    (T5, dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    (T5, dict(d_kv=5, num_decoder_layers=3)),
    (T5, dict(initializer_factor=3.0, tie_word_embeddings=False, eos_token_id=ENDS)),
    (Llama, dict(num_key_value_heads=4, rms_norm_eps=1e-3, rope_parameters=OTHER_ROPE)),
    (Llama, dict(tie_word_embeddings=True, eos_token_id=ENDS, pad_token_id=0)),
    (Llama, dict(num_key_value_heads=1, head_dim=16, **BIASES)),
    (Llama, dict(head_dim=16, rope_parameters=LLAMA3 | {"rope_theta": 5e5})),
]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """transformers' model, the same loaded here, a batch."""
    transformers = pytest.importorskip("transformers")
    kind, changes = request.param
    values = SMALL[kind] | changes
    torch.manual_seed(3)
    if kind is Llama:
        config = transformers.LlamaConfig(initializer_range=0.2, **values)
        theirs = transformers.LlamaForCausalLM(config)
    else:
        theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**values))
        if "tie_word_embeddings" in changes:  # which transformers does not heed
            theirs.lm_head.weight = nn.Parameter(torch.randn(97, 32) * 0.3)
            theirs.config.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp("theirs")
    theirs.eval().save_pretrained(folder)
    return theirs, load_model(folder), padded_batch(kind)


def test_logits_loss_and_gradients_equal_those_of_transformers_that_opens_our_folder(
    pair, tmp_path
):
    theirs, ours, batch = pair
    expected = theirs(**batch)
    logits, loss = ours(**batch)
    real = batch["attention_mask"] > 0
    if isinstance(ours, T5):
        real = (batch["labels"] != -100).flip(1).cumsum(1).flip(1) > 0
    assert_close({0: expected.logits[real]}, {0: logits[real]}, 1e-4)
    save_model(ours, tmp_path)
    assert torch.equal(type(theirs).from_pretrained(tmp_path)(**batch).logits, expected.logits)
    short = ours.loss(**batch)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-4) == short.item()
    short.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert_close({name: theirs.get_parameter(name).grad for name in gradients}, gradients, 1e-4)


def test_generation_equals_that_of_transformers_with_padding_on_either_side(pair):
    theirs, ours, batch = pair
    ids, mask = batch["input_ids"], batch["attention_mask"]
    left = torch.stack([row.roll(-int(m.sum())) for row, m in zip(ids, mask)])
    inputs = {"input_ids": left, "attention_mask": mask.flip(1), "max_new_tokens": 12}
    expected = theirs.generate(**inputs, do_sample=False, use_cache=False)
    expected = expected[:, 1:] if isinstance(ours, T5) else expected[:, ids.shape[1] :]
    assert torch.equal(ours.generate(**inputs), expected)
    assert torch.equal(ours.generate(ids, mask, 12), expected)
    lengths = {sum(token not in ENDS + [0] for token in row) for row in expected.tolist()}
    assert len(lengths) > 3 or ours.eos != ENDS  # rows end at their own time and stay padded


def test_bf16_attention_on_a_cpu_is_that_of_torch():
    q, k, v = (2 * torch.randn(3, 2, 4, 9, 8)).bfloat16()
    bias = models.attention_bias(torch.ones(9, 9, dtype=torch.bool).tril(), v.new_zeros(()))
    ours = models.attend(q, k, v, bias, 0.0, scale=0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, bias, scale=0.3)
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)  # scores are rounded
    assert ours[:, :, 0].equal(v[:, :, 0])  # the first sees itself alone


# ---- safetensors and folders

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def file_of(header=(), size=0, **tensors):
    """A safetensors file: its header (bytes), or dtype, shape, offsets by name; so many bytes."""
    keys = ("dtype", "shape", "data_offsets")
    text = header or json.dumps({name: dict(zip(keys, x)) for name, x in tensors.items()}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2950735608\n"
ELSEWHERE = b'{"weight_map": {"lm_head.weight": "../0.safetensors"}}'
VALUES = "decoder.block.0.layer.1.EncDecAttention.v.weight"
ONE = torch.ones(1)
PAIR = ("F32", [2], [0, 8])
TWO_FAULTS = r'(?s)Unexpected key.*"a".*size mismatch for shared.weight: .*\[1\]'
FAULTS = [  # a folder, what becomes of its files, the fault
    ("t5", {WEIGHTS: b""}, "empty"),
    ("t5", {WEIGHTS: b"\xff" * 8}, "length does not fit"),
    ("t5", {WEIGHTS: LFS}, f"{WEIGHTS}: .*Git LFS pointer: run git lfs pull"),
    ("t5", {WEIGHTS: file_of(b"[]")}, "object"),
    ("t5", {WEIGHTS: file_of(b'{"a":1,"a":1}')}, "twice"),
    ("t5", {WEIGHTS: file_of(**{"\ud83d": PAIR}, size=8)}, "JSON.*surrogates"),
    ("t5", {WEIGHTS: file_of(a=("F4", [4], [0, 2]), size=2)}, "a: no dtype.*F4"),
    ("t5", {WEIGHTS: file_of(a=("F32", [3], [0, 8]), size=8)}, "shape"),
    ("t5", {WEIGHTS: file_of(a=("F32", [2**63, 2**63, 0], [0, 0]))}, "shape"),
    ("t5", {WEIGHTS: file_of(a=PAIR, b=("F32", [2], [4, 12]), size=12)}, "overlap"),
    ("t5", {WEIGHTS: file_of(a=PAIR, b=("F32", [2], [12, 20]), size=20)}, "hole"),
    ("t5", {WEIGHTS: file_of(a=PAIR, size=9)}, "end at byte"),
    ("t5", {WEIGHTS: file_of(b'{"__metadata__": []}')}, "__metadata__ is not text"),
    ("t5", {WEIGHTS: None, "pytorch_model.bin": b""}, "pytorch_model.bin is pickled and never"),
    ("t5", {WEIGHTS: None, INDEX: ELSEWHERE}, "lm_head.weight: '../0.safetensors' is no saf"),
    ("t5", {WEIGHTS: {"lm_head.weight": ONE}}, "lm_head.weight differs from shared.weight"),
    ("t5", {WEIGHTS: {VALUES: None}}, f'(?s)Missing key.*"{VALUES}"'),
    ("t5", {WEIGHTS: {"a": ONE, "shared.weight": ONE}}, TWO_FAULTS),
    ("t5", {"config.json": None}, "config.json"),
    ("t5", {"config.json": {"model_type": "gpt2"}}, "model_type gpt2 is not supported"),
    ("t5", {"config.json": {"d_model": "wide"}}, "config.json: d_model 'wide'"),
    ("llama", {"config.json": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported"),
    ("llama", {"config.json": {"rope_scaling": {"type": "linear"}}}, "rope scaling 'linear'"),
    ("t5", {"spiece.model": None}, "t5 has no spiece.model or .*: copy spiece.model or"),
    ("t5", {"spiece.model": b"no"}, "spiece.model: .* not in the form of a supported tokenizer"),
    ("tasks/one", {"train.json": b"{}\n{}"}, "train.json: not a JSON list: Extra data"),
    ("tasks/one", {"train.json": b"{}"}, "train.json: not a JSON list"),
    ("tasks/one", {"test.json": b"[]"}, "test.json: no record"),
    ("tasks/one", {"test.json": b'[{"sentence": "\\ud83d"}]'}, 'needs a text "sentence"'),
    ("tasks/one", {"test.json": b'[{"sentence": "a"}]'}, 'record 1 needs a text "label"'),
    ("tasks/one", {"test.json": b'[{"sentence": "a", "label": "-"}]'}, "label '-' is not in"),
    ("tasks/one", {"labels.json": b'["a", "a"]'}, "labels.json: labels are texts"),
]


@pytest.mark.parametrize("place, files, fault", FAULTS)
def test_a_bad_folder_is_refused_by_name(place, files, fault, world, tmp_path):
    folder = changed(world / place, files, tmp_path / place)
    with pytest.raises((ValueError, OSError), match=fault) as error:
        if place == "tasks/one":
            data.load_task("", folder)
        load_model(folder)
        data.load_tokenizer(folder)
    assert str(folder) in str(error.value)


def test_every_dtype_comes_back_and_to_and_from_the_official_library(tmp_path):
    official = pytest.importorskip("safetensors.torch")
    tensors = {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4, dtype=torch.bfloat16)}
    for kind, dtype in models.DTYPES.items():
        tensors[kind] = torch.arange(48, dtype=torch.uint8).fmod(2).view(dtype).view(2, -1)
    write_safetensors(tmp_path / "ours", tensors)
    official.save_file(tensors, tmp_path / "official")
    raw = (tmp_path / "ours").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    (tmp_path / "odd").write_bytes(file_of(raw[8:end] + b" ") + raw[end:])  # nothing is aligned
    files = [read_safetensors(tmp_path / name) for name in ("ours", "odd", "official")]
    for found in (*files, official.load_file(tmp_path / "ours")):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_shards_are_read(world, tmp_path):
    tensors = read_safetensors(world / "t5" / WEIGHTS)
    places = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
    index = json.dumps({"weight_map": places}).encode()
    folder = changed(world / "t5", {WEIGHTS: None, INDEX: index}, tmp_path / "t5")
    for place in ("0.safetensors", "1.safetensors"):
        write_safetensors(folder / place, {n: t for n, t in tensors.items() if places[n] == place})
    assert_close(tensors, dict(load_model(folder).named_parameters()), 0)


# ---- data

QUESTIONS = {
    "SC/yelp": "What is the sentiment of the following paragraph?",
    "TC/agnews": "What is the topic of the following paragraph?",
    "NLI/CB": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP/QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "BoolQA/BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC/MultiRC": "According to the following passage and question, is the candidate answer "
    "true or false?",
    "WiC/WiC": "Given a word and two sentences, whether the word is used with the same sense in "
    "both sentence?",
    "COPA/COPA": "",
    "mine/own": "Which label fits the following text?",  # any other group
}


@pytest.mark.parametrize("place", QUESTIONS)
def test_prompts_are_the_benchmark_s_to_the_letter(place, world, tmp_path):
    records = json.dumps([{"sentence": "a {b} % \\n", "label": "yes"}]).encode()
    files = {"train.json": records, "test.json": records, "labels.json": b'["yes", "no"]'}
    task = data.load_task("", changed(world / "tasks" / "one", files, tmp_path / place))
    group, name = place.split("/")
    question = f"{QUESTIONS[place]} Choose one from the option.\nOption: yes, no \n"
    if group == "COPA":  # whose sentences ask for themselves
        question = ""
    text = f"Task:{group}\nDataset:{name}\n{question}a {{b}} % \\n\nAnswer:"
    assert (task.name, task.train, task.labels) == (name, [(text, "yes")], ["yes", "no"])


def test_orders_are_the_papers():
    shortened = [" ".join(name[:2] for name in tasks) for tasks in data.ORDERS.values()]
    assert shortened[:3] == ["db am ya ag", "db am ag ya", "ya am ag db"]
    assert shortened[3] == "MN CB Wi CO QQ Bo RT IM ye am SS db ag Mu ya"
    assert shortened[4] == "Mu Bo Wi MN CB CO QQ RT IM SS db ag ye am ya"
    assert shortened[5] == "ye am MN CB CO QQ RT IM SS db ag ya Mu Bo Wi"


@pytest.mark.skipif("MIGU_DATA" not in os.environ, reason="MIGU_DATA is not set")
def test_real_benchmark_files_load():
    tasks = {name: data.load_task(os.environ["MIGU_DATA"], name) for name in data.GROUP_OF}
    assert len(tasks) == 15 and all(task.train and task.test for task in tasks.values())
    assert sum(example.answer == "-" for example in tasks["MNLI"].test) == 131


# ---- byte-level BPE

BYTE_LEVEL = {**data.BYTE_LEVEL, "trim_offsets": True}
DIGITS = {"type": "Sequence", "pretokenizers": [data.DIGITS, BYTE_LEVEL]}
SPLIT_BY = {**data.SPLIT, "pattern": {"Regex": data.LLAMA_3_IN_FILES}}
LLAMA_3 = {"type": "Sequence", "pretokenizers": [SPLIT_BY, {**BYTE_LEVEL, "use_regex": False}]}
OTHER_SPLIT = {"type": "Sequence", "pretokenizers": [{**SPLIT_BY, "pattern": {"Regex": "x+"}}]}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
END = {"id": 262, "content": "<|end|>", "special": True, **FLAGS}
NOT_SUPPORTED = [
    ({"model": {"type": "Unigram"}}, "Unigram"),
    ({"model": {"byte_fallback": True}}, "byte_fallback"),
    ({"model": {"merges": ["q q"]}}, "q q"),
    ({"model": {"vocab": None}}, "form of a"),
    ({"decoder": None}, "form of a"),
    ({"normalizer": {"type": "NFC"}}, "normalizer"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ({"pre_tokenizer": OTHER_SPLIT}, r"x\+"),
    ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
    ({"added_tokens": [END | {"lstrip": True}]}, "lstrip"),
]


def bpe(folder, model=None, **changes):
    """A tokenizer of all bytes, six merges and an end token, but for changes in its file."""
    vocab = {symbol: number for number, symbol in enumerate(data.SYMBOLS)}
    merges = ["l o", "lo w", "Ġ low", "e r", "w e", "Ĝ Ĝ"]  # "Ĝ" is b"\x1c", no white space
    vocab |= {merge.replace(" ", ""): 256 + n for n, merge in enumerate(merges)}
    parts = {"version": "1.0", "normalizer": None, "post_processor": None, "added_tokens": [END]}
    parts |= {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, **changes}
    parts["model"] = {"type": "BPE", "vocab": vocab, "merges": merges} | (model or {})
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": [262, 1]}')
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    return data.load_tokenizer(folder)


def test_pairs_are_merged_in_the_order_in_which_they_were_learned(tmp_path):
    tokenizer = bpe(tmp_path)
    lower = [258, 259]  # "Ġlow" and "er"
    assert tokenizer.encode(" lower") == lower and tokenizer.encode("lower") == [257, 259]
    assert tokenizer.encode("low lower") == [257, *lower]
    assert tokenizer.encode("é") == [data.SYMBOLS.index(byte) for byte in "Ã©"]
    assert tokenizer.encode(" lower<|end|>lo") == [*lower, 262, 256]
    assert tokenizer.decode([*lower, 262, 999, 256]) == " lowerlo"
    assert (tokenizer.start, tokenizer.eos_id, len(tokenizer)) == ([], 262, 263)
    pairs = [["l", "o"], ["lo", "w"], ["Ġ", "low"], ["e", "r"]]  # the file's other form
    assert bpe(tmp_path, {"merges": pairs}).encode(" lower") == lower


def test_a_llama_s_prompt_starts_as_the_file_says_and_a_t5_s_ends(tmp_path):
    step = {"type": "TemplateProcessing", "special_tokens": {"<|end|>": {"ids": [262]}}}
    step["single"] = [{"SpecialToken": {"id": "<|end|>"}}, {"Sequence": {"id": "A"}}]
    tokenizer = bpe(tmp_path, post_processor=step)
    assert data.encode_prompt(tokenizer, " lower", decoder_only=True) == [262, 258, 259]
    assert data.encode_prompt(tokenizer, " lower", decoder_only=False) == [258, 259, 262]


@pytest.mark.parametrize("changes, fault", NOT_SUPPORTED)
def test_what_the_byte_level_bpe_does_not_support_is_refused_by_name(changes, fault, tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{fault}"):
        bpe(tmp_path, **changes)


@pytest.mark.parametrize("steps", [BYTE_LEVEL, DIGITS, LLAMA_3])
def test_ids_and_texts_equal_those_of_the_tokenizers_library(steps, tmp_path):
    library = pytest.importorskip("tokenizers")
    ours = bpe(tmp_path, {"ignore_merges": steps is LLAMA_3}, pre_tokenizer=steps)
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    some = ["low", " lower", "'ll", " 12", "<|end|>", "\r\n", "\t ", "\x1c\x1c", "\u3000", *"é½日"]
    rng = np.random.default_rng(1)
    for _ in range(1500):
        text = "".join(rng.choice([*some, *map(chr, rng.integers(0x3000, size=3))], 12))
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids), repr(text)


# ---- a model on a task

SAME = [("  very\tPOSITIVE.\n", "Very  positive"), ("Arts Law", "Arts & Law")]
SAME += [("caf\u00e9 fine 1!", "cafe\u0301 \ufb01ne \u2460\uff01")]
SAME += [(answer, prediction) for prediction, answer in SAME]
OTHER = [("the good", "good"), ("verygood", "very good"), ("-", "-"), ("", "-")]
LABEL_FAULTS = [
    (["x" * 50, "y"], "label 'x{50}', in up to 49 tokens, is read back as 'x{49}'"),
    (["\u8336", "no"], "task own: label '\u8336', .* is read back as '\u2047', .*: rename it"),
    (["Very good", "very good!"], r"counts as \['Very good', 'very good!'\]"),
    (["yes", "!"], r"label '!', .* counts as \[\]"),
]
NAN = math.nan
MEASURES = [  # average accuracy, backward transfer, forgetting
    ([[90, NAN, NAN], [70, 80, NAN], [75, 60, 96]], [77.0, -17.5, 17.5]),
    ([[50, NAN, NAN], [70, 80, NAN], [60, 84, 96]], [80.0, 7.0, 3.0]),  # the best in between
    ([[NAN] * 3, [NAN] * 3, [60, 70, 80]], [70.0, None, None]),  # tested at the end alone
    ([[50, NAN], [NAN, NAN]], [None, None, None]),  # not finished
    ([[50]], [50.0, None, None]),
]


@pytest.mark.parametrize("prediction, answer", SAME + OTHER)
def test_answers_are_equal_in_nfkc_lower_case_without_punctuation(prediction, answer):
    assert evaluation.is_correct(prediction, answer) is ((prediction, answer) in SAME)


@pytest.mark.parametrize("labels, fault", LABEL_FAULTS)
def test_labels_can_be_written_read_back_and_told_apart(labels, fault):
    letters = SimpleNamespace(encode=lambda text: re.sub("\u8336", "\u2047", text), decode="".join)
    evaluation.check_task(data.Task("own", [], [], ["x" * 49, "y"]), letters)
    with pytest.raises(ValueError, match=fault):
        evaluation.check_task(data.Task("own", [], [], labels), letters)


@pytest.mark.parametrize("matrix, values", MEASURES)
def test_measures_are_the_hand_computed_ones(matrix, values):
    assert list(evaluation.measures(np.array(matrix, float)).values()) == values


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_answers_keep_their_order_and_do_not_depend_on_batches(kind, world):
    model, tokenizer = load_model(world / kind), data.load_tokenizer(world / kind)
    torch.manual_seed(5)
    for p in model.parameters():
        nn.init.normal_(p)  # as it is, it says the same to all
    sources = [[*range(5, 150)][13 * i : 20 * i + 7] for i in range(9)]
    alone = [evaluation.evaluate(model, tokenizer, [source])[0] for source in sources]
    assert len(set(alone)) > 4
    for tokens in (40, 16384):  # the longest has 63
        assert evaluation.evaluate(model, tokenizer, sources, tokens=tokens) == alone


def test_only_real_tokens_are_processed_in_a_test(world):
    model, seen, steps = load_model(world / "t5"), [], itertools.count(1)
    for stack in (model.encoder, model.decoder):
        stack.register_forward_hook(lambda stack, inputs, x: seen.append(len(x)))
    answers = torch.tensor([1, 5, 2, 3])  # tokens in each, its end included

    def say(layer, inputs, logits):
        return F.one_hot(torch.where(answers == next(steps), 1, 9), 300).float()

    model.lm_head.register_forward_hook(say)
    evaluation.evaluate(model, data.load_tokenizer(world / "t5"), [[5] * n for n in (3, 7, 1, 9)])
    assert seen == [3 + 7 + 1 + 9, 4, 3, 2, 1, 1]


# ---- a step


def settings(more=""):
    return train.settings(train.parse_args(f"--order 1 --device cpu {more}".split()), 1, 42)


@pytest.mark.parametrize("clip, step", [(1, [0.6, 0.8]), (6, [3.0, 4.0]), (0, [3.0, 4.0])])
def test_clipping_acts_on_the_masked_gradient_before_the_step(clip, step):
    model, c = linear([1, 1], [2, 2]), settings(f"--clip {clip}")
    model.device = torch.device("cpu")
    model.loss = lambda **batch: model(torch.tensor([[3.0, 4.0]])).sum()  # 7 + 14
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    log = train.train_step(model, optimizer, MIGU(model, 0.5), [([5], [6])], c, {})
    moved = torch.tensor([[1, 1], [2, 2]]) - model.weight
    torch.testing.assert_close(moved, torch.tensor([[0, 0], step]))  # SGD leaves a masked row
    assert torch.stack(log).tolist() == [21.0, 0.5, 5.0]  # the norm is that before clipping


@both
def test_weight_decay_reaches_neither_norms_nor_biases_nor_position_tables(kind):
    model = small(kind, attention_bias=True)
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    train.make_optimizer(model, settings("--lr 0.1")).step()
    for name, p in model.named_parameters():
        spared = re.search(r"norm\.|relative_attention_bias|\.bias$", name)
        expected = torch.full_like(p, 1.0 if spared else 1.0 - 0.1 * 0.01)
        torch.testing.assert_close(p.data, expected, rtol=0, atol=1e-7)


def test_micro_batches_change_neither_gradient_nor_mask():
    rows = [([5 + i] * (3 + i), [9 + i] * (1 + i % 4)) for i in range(12)]
    still = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    found = []
    for size in (12, 5):
        model, c = small().train(), settings(f"--micro-batch {size}")
        step = train.train_step(model, still, MIGU(model), rows, c, {})
        found.append(dict(enumerate([*step, *(p.grad for p in model.parameters())])))
    assert_close(*found, 1e-4)


def test_frozen_linear_weights_alone_take_the_type_of_the_arithmetic():
    model = small()
    train.add_adapters(model, settings("--dtype bfloat16"))
    for name, p in model.named_parameters():
        frozen = re.search(r"\.(k|o|wi|wo)\.weight", name)
        assert p.dtype == (torch.bfloat16 if frozen else torch.float32), name


# ---- a step does not wait for its device

WAYS = ["", *(f"--mask {m}" for m in CRITERIA if m != "magnitude"), "--micro-batch 1"]  # "": sparse
WAYS += ["--tune lora", "--checkpointing"]
SEND = models.to_device
PLANTED = [  # what stands in a function's place (keep_rows: in the backward pass), what is said
    ("model.to_device", lambda x, to: x, "aten.embedding.default mixes devices"),
    ("model.to_device", lambda x, to: x.to(to, non_blocking=True), "aten._to_copy.default waits"),
    ("model.to_device", lambda x, to: x.pin_memory().to(to), "aten._to_copy.default waits"),
    ("model.to_device", lambda x, to: SEND(x, to).max().item(), "item() cannot be called"),
    ("migu.keep_rows", lambda n, _: n.cpu() > 0, "aten._to_copy.default waits"),
    ("migu.keep_rows", lambda n, _: n[n > 0] > 0, "torch.nonzero()"),
    ("migu.keep_rows", lambda n, _: n[torch.arange(9)] > 0, "aten.index.Tensor mixes devices"),
]


def step_on(device, kind=T5, way=""):
    """A step of a small model that is made on the device, to be called."""
    c = settings(way)
    with torch.device(device):
        model = small(kind, num_layers=1, dropout_rate=0.1).train()
    if c.tune == "lora":
        train.add_adapters(model, c)
    model.checkpointing = c.checkpointing
    earlier = {n: x.lora_A.weight.detach().clone() for n, x in migu.lora_layers(model).items()}
    optimizer, masker = train.make_optimizer(model, c), train.make_masker(model, c)
    rows = [([3, 4, 5, 6], [-100, 7, -100, 8]), ([9, 10], [-100, 11])]
    return partial(train.train_step, model, optimizer, masker, rows, c, earlier)


@pytest.mark.parametrize("kind, way", [*((T5, way) for way in WAYS), (Llama, "")])
def test_a_step_neither_mixes_devices_nor_waits_for_one(kind, way, pretended_gpu):
    step_on(pretended_gpu, kind, way)()


@pytest.mark.parametrize("place, planted, fault", PLANTED)
def test_a_planted_mix_or_wait_is_found(place, planted, fault, pretended_gpu, monkeypatch):
    monkeypatch.setattr(place, planted)
    with pytest.raises(RuntimeError, match=re.escape(fault)):
        step_on(pretended_gpu)()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_does_not_wait_for_a_gpu(request):
    request.addfinalizer(partial(torch.cuda.set_sync_debug_mode, "default"))
    for kind, way, dtype in itertools.product((T5, Llama), WAYS, ("float32", "bfloat16")):
        torch.cuda.set_sync_debug_mode("default")
        step = step_on("cuda", kind, f"{way} --dtype {dtype}")
        step()  # the first waits for libraries
        torch.cuda.set_sync_debug_mode("error")
        step()


# ---- commands: what they are given, what they leave


class Lab(namedtuple("Lab", "world place patch")):
    """Commands on two tiny tasks. Of an option given twice the last counts, so that of `more`."""

    def words(self, more="", out="runs", model="t5"):
        words = ["--tasks", self.world / "tasks" / "one", self.world / "tasks" / "two"]
        words += ["--model", self.world / model, "--out", self.place / out]
        words += f"--device cpu --lr 1e-2 --batch-size 8 --epochs 2 {more}".split()
        return [str(word) for word in words]

    def run(self, *args, **others):
        """The folder of one run."""
        (folder,) = train.train(train.parse_args(self.words(*args, **others)))
        return folder

    def interrupted(self, more, kills=slice(None)):
        """A whole run, and runs that were killed before a file got its name, and then resumed."""
        replace, numbers = os.replace, itertools.count()

        def copying_replace(*paths):
            shutil.copytree(self.place / "runs", self.place / str(next(numbers)))
            replace(*paths)

        with self.patch.context() as patched:
            patched.setattr(os, "replace", copying_replace)
            whole = self.run(more)
        return whole, [self.run(f"{more} --resume", str(n)) for n in range(next(numbers))[kills]]


@pytest.fixture
def lab(world, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_ANSWER", 8)  # else most of the time goes into answers
    return Lab(world, tmp_path, monkeypatch)


def refusal(capsys, main, *words):
    """What a command says that ends with exit code 2: one line, and never the token."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        main([str(word) for word in words])
    lines = re.split("[\r\n]+", capsys.readouterr().err)
    (line,) = [line for line in lines if line.strip() and "%|" not in line]  # but bars
    assert re.match(r"(train|eval|download)\.py: ", line) and "SECRET" not in line
    return line


def contents(folder):
    """All files in a folder, path -> bytes, but for locks."""
    paths = [p for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def left(folder):
    """What a run left; of results.json, which has times, the accuracies."""
    files = contents(folder)
    return {**files, "results.json": json.loads(files["results.json"])["matrix"]}


# ---- settings

PAPER = dict(lr=1e-4, threshold=0.7, batch_size=64, clip=1.0, l1=0.5, optimizer="adamw")
SETTINGS = {  # arguments, and what they mean
    "": dict(mask="migu", dtype="float32", folder="order1-t5-large-full-migu-s42", **PAPER),
    "--tune lora": dict(lr=1e-3, threshold=0.7, row_sparse=False),
    "--tune olora": dict(lr=1e-3, threshold=0.05, folder="order1-t5-large-olora-migu-s42"),
    "--replay 0.02": dict(threshold=0.4),
    "--micro-batch 99": dict(micro_batch=64, row_sparse=True),
    "--micro-batch 3": dict(micro_batch=3, row_sparse=False),
    "--layers q$": dict(row_sparse=True),
    "--layers .": dict(row_sparse=False),  # so with the head
    "--mask weight": dict(row_sparse=False),
    "--mask none": dict(row_sparse=False),
}
TYPED = [("t5", ".", "../tasks/one"), ("", "t5/", "tasks/one/"), ("tasks/one", "~/t5", ".")]
MISTAKES = {
    "one of the arguments --demo --order --tasks is required": [""],
    "not allowed with argument": ["--order 1 --demo", "--order 1 --tasks a b"],
    "invalid choice": ["--order 7", "--order 1 --tune prefix", "--order 1 --device abacus"],
    "unrecognized arguments": ["--order 1 --thresh 0.5"],
    "must be from 0 to 1": ["--order 1 --threshold 1.5", "--order 1 --replay nan"],
    "must be above 0": ["--order 1 --lr 0", "--order 1 --micro-batch 0", "--order 1 --limit 8 0"],
    "a number for train, and one for test": ["--order 1 --limit 8 4 2"],
    "must not be below 0": ["--order 1 --clip -1", "--order 1 --l1 inf", "--order 1 --seed -1"],
    "--layers (: no regular expression": ["--order 1 --layers ("],
    "two tasks have the same name: x, x": ["--tasks a/x b/x/"],
    "the first of the tasks is not masked: add --mask-first": ["--tasks a", "--order 1 --joint"],
    "labels.json": ["--tasks no/such --mask none"],
    "all tasks at once: leave out --replay": ["--order 1 --joint --replay 0.1 --mask none"],
}


@pytest.mark.parametrize("more, meant", SETTINGS.items())
def test_defaults_are_the_paper_s_and_config_json_says_what_is_row_sparse(more, meant):
    c = settings(more)
    assert {**vars(c), "folder": train.run_folder(c, "runs").name}.items() >= meant.items()
    assert not c.row_sparse or isinstance(train.make_masker(small(), c), RowSparseMIGU)


@pytest.mark.parametrize("place, model, task", TYPED)
def test_a_run_is_named_by_what_its_folders_are_called(place, model, task, lab):
    lab.patch.chdir(lab.world / place)
    for home in ("HOME", "USERPROFILE"):
        lab.patch.setenv(home, str(lab.world))
    args = train.parse_args(["--tasks", task, "--model", model, "--mask", "none"])
    c = train.settings(args, None, 42)
    assert (c.model, c.tasks) == (str(lab.world / "t5"), [str(lab.world / "tasks" / "one")])
    assert train.run_folder(c, "runs") == Path("runs", "one-t5-full-none-s42")


def test_a_link_to_a_folder_keeps_its_own_name_and_group(lab):
    place = lab.place / "TC" / "news"
    place.parent.mkdir()
    place.symlink_to(lab.world / "tasks" / "one")
    (lab.place / "t5-mine").symlink_to(lab.world / "t5")
    args = train.parse_args(["--tasks", f"{place}", "--model", f"{lab.place}/t5-mine"])
    args.mask = "none"
    c = train.settings(args, None, 42)
    assert (c.tasks, c.model_name) == ([str(place)], "t5-mine")
    asked = data.load_task("", c.tasks[0]).test[0].prompt
    assert asked.startswith("Task:TC\nDataset:news\nWhat is the topic of")


@pytest.mark.parametrize("fault, mistake", [(f, m) for f, some in MISTAKES.items() for m in some])
def test_a_mistake_is_one_line_found_before_a_model_is_fetched(fault, mistake, lab, capsys):
    lab.patch.chdir(lab.place)
    lab.patch.setattr(download, "fetch_model", None)
    assert fault in refusal(capsys, train.main, "--model", "no/such", *mistake.split())
    assert not list(lab.place.iterdir())


# ---- runs

LEARN = "--eval all --lr 3e-2 --epochs 10"
FILES = (
    "config.json log.csv matrix.csv model/config.json model/model.safetensors "
    "model/tokenizer.model predictions/1-one/one.jsonl predictions/2-two/one.jsonl "
    "predictions/2-two/two.jsonl results.json"
).split()


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """A run of a Llama that learned something."""
    return Lab(world, tmp_path_factory.mktemp("finished"), None).run(LEARN, model="llama")


def test_a_run_leaves_what_it_promises(finished, world):
    files = left(finished)
    assert sorted(files) == FILES
    config = json.loads(files["config.json"])
    resolved = {"lr": 0.03, "threshold": 0.7, "dtype": "float32", "micro_batch": 8, "seed": 42}
    assert config.items() >= resolved.items() and config["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in files["predictions/2-two/one.jsonl"].splitlines()]
    tests = data.load_task("", world / "tasks" / "one").test
    assert [(line["prompt"], line["answer"]) for line in lines] == tests
    correct = [evaluation.is_correct(line["prediction"], line["answer"]) for line in lines]
    (first, none), (old, new) = files["results.json"]
    assert none is None and old == 100 * sum(correct) / 9 and first != old != new
    assert files["matrix.csv"].decode() == f",one,two\none,{first},\ntwo,{old},{new}\n"
    results = json.loads((finished / "results.json").read_text())
    assert (results["average_accuracy"], results["forgetting"]) == ((old + new) / 2, first - old)


@pytest.mark.parametrize("more, first", [("", 1), ("--mask-first", 5 / 16)])
def test_the_log_has_a_line_a_step_and_the_first_task_is_masked_on_request(more, first, lab):
    text = left(lab.run(more))["log.csv"].decode()
    log = np.genfromtxt(io.StringIO(text), None, delimiter=",", names=True, encoding=None)
    assert log.dtype.names == ("task", "step", "loss", "kept", "norm")
    assert log["task"].tolist() == ["one"] * 6 + ["two"] * 6
    assert log["step"].tolist() == [*range(1, 7)] * 2
    assert log["kept"].tolist() == [first] * 6 + [5 / 16] * 6  # of 16 rows 11 are masked
    assert 1 < log["loss"].min() < log["loss"].max() < 10 and 0 < log["norm"].min()


def test_a_mask_that_keeps_all_rows_is_plain_tuning_with_dropout_too(lab):
    more = "--limit 16 1 --mask-first --threshold 0 --mask"
    one, two = (left(lab.run(f"{more} {mask}")) for mask in ("none", "weight"))
    assert one["model/model.safetensors"] == two["model/model.safetensors"]


def test_replay_adds_a_seeded_part_of_a_past_task_that_is_not_what_it_trained_first(world):
    tasks = [data.load_task("", world / "tasks" / name) for name in ("one", "two")]
    c = settings("--replay 0.3")
    examples = train.stage_examples(c, tasks, 1)
    (first,) = data.batches(tasks[0].train, 24, train.seeded(42, 0))
    assert examples[:24] == tasks[1].train and first != tasks[0].train  # but shuffled
    assert len(set(examples[24:])) == len(examples[24:]) == 7  # int(0.3 * 24)
    assert set(first[:7]) != set(examples[24:]) < set(tasks[0].train)
    assert train.stage_examples(c, tasks, 1) == examples
    c.seed = 7
    assert train.stage_examples(c, tasks, 1) != examples


def test_replay_of_less_than_one_record_is_refused(lab, capsys):
    line = refusal(capsys, train.main, *lab.words("--replay 0.04"))
    assert "--replay 0.04 of one's 24 records is none: raise it" in line


def test_joint_training_mixes_all_tasks_and_tests_each(lab):
    files = left(lab.run("--joint --mask none --limit 12 4"))
    assert files["log.csv"].count(b"\none+two,") == 6  # 24 records, twice
    first, second = files["results.json"]
    assert first == [None, None] and None not in second
    assert files["predictions/2-two/one.jsonl"].count(b"\n") == 4


@pytest.mark.parametrize("tune", ["lora --dtype bfloat16", "inclora --dtype bfloat16", "olora"])
def test_adapters_change_q_and_v_alone_and_resume_bitwise(tune, lab):
    more = f"--replay 0.25 --eval all --threshold 0.5 --epochs 1 --tune {tune}"
    whole, (cut,) = lab.interrupted(more, slice(12, 13))  # in the second task
    assert left(cut) == left(whole)
    assert (cut / "adapters" / "2.safetensors").exists() == ("inclora" not in tune)
    if tune == "olora":  # two tasks' A, of rank 8 each
        earlier = read_safetensors(cut / "adapters" / "2.safetensors")
        assert {tuple(A.shape) for A in earlier.values()} == {(16, 16)}
    start, end = (load_model(path).state_dict() for path in (lab.world / "t5", cut / "model"))
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if re.search(r"\.[qv]\.weight", name)}


# ---- runs that stop, and go on

STOPPED = [  # a file and what it holds, more arguments, the fault
    ("log.csv", b"", "", "is in use: add --resume to go on with it, or choose another --out"),
    ("log.csv", b"", "--resume --threshold 0.5 --clip 0", "threshold 0.7, not 0.5; clip 1.0, not"),
    ("config.json", b"[]", "--resume", "config.json: not a JSON object"),
    ("results.json", b"{", "--resume", "results.json: not a JSON object: "),
    ("model/model.safetensors", b"no", "--resume", "model.safetensors: not a safetensors file"),
    ("model/model.safetensors", file_of(b"{}"), "--resume", "not written by a run"),
]


def test_a_run_killed_at_any_write_resumes_to_the_very_same_files(lab):
    whole, resumed = lab.interrupted("--eval all --limit 8 1 --epochs 1")
    assert len(resumed) == 17
    for n, folder in enumerate(resumed):
        assert left(folder) == left(whole), f"killed at write {n}"


def test_a_finished_run_has_nothing_left_to_do(lab, finished, capsys):
    before, more = left(finished), f"{LEARN} --resume --checkpointing"  # which changes no number
    lab.run(more, finished.parent, "llama")
    assert "nothing left to do" in capsys.readouterr().out and left(finished) == before


@pytest.mark.parametrize("file, content, more, fault", STOPPED)
def test_a_run_that_cannot_go_on_says_why(file, content, more, fault, lab, finished, capsys):
    folder = shutil.copytree(finished, lab.place / finished.name)
    (folder / file).write_bytes(content)
    assert fault in refusal(capsys, train.main, *lab.words(f"{LEARN} {more}", "", "llama"))


@pytest.mark.parametrize("tune", ["full", "olora"])
def test_a_pattern_that_selects_nothing_stops_before_training(tune, lab, capsys):
    lab.patch.setattr(train, "train_task", None)
    fault = refusal(capsys, train.main, *lab.words(f"--layers query --tune {tune}"))
    assert "--layers: 'query' is found in none of the trained linear layers" in fault
    assert not contents(lab.place)


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_finished_task(lab, capsys):
    loss, more = T5.loss, "--epochs 4"  # 12 steps a task
    factors = itertools.chain([1] * 12, itertools.repeat(math.inf))
    with lab.patch.context() as patched:
        patched.setattr(T5, "loss", lambda self, **batch: next(factors) * loss(self, **batch))
        fault = refusal(capsys, train.main, *lab.words(more))
    assert re.search("norm is (nan|inf) at step 10 of two: lower --lr", fault)
    assert left(lab.run(f"{more} --resume")) == left(lab.run(more, "whole"))


def test_a_step_that_destroys_the_weights_is_not_kept(lab, capsys):
    loss, more = T5.loss, "--lr 3e38 --clip 0 --optimizer sgd --limit 8 --epochs 1"
    lab.patch.setattr(T5, "loss", lambda self, **batch: 100 * loss(self, **batch))
    fault = refusal(capsys, train.main, *lab.words(more))
    assert "weights not finite at step 1 of one: lower --lr" in fault
    assert not list(lab.place.rglob("model.safetensors"))


# ---- several processes

# Commands, one after another, in each of the processes that torchrun starts: all with one process
# group. A run into the folder "cut" dies in its second task.
WORKER = """
import functools, json, sys
sys.path.insert(0, sys.argv[1])
import train
train.data.LONGEST_ANSWER = 8
train.add_lora = functools.partial(train.add_lora, dropout=0.0)
train.dist.init_process_group("gloo")
train.dist.init_process_group = train.dist.destroy_process_group = lambda *_, **others: None
train_task = train.train_task
def die(*_):
    train.dist.barrier()  # else one would go on while the other still saves
    sys.exit()
for words in json.loads(sys.argv[2]):
    stages = iter([train_task, die if words[-1].endswith("cut") else train_task])
    train.train_task = lambda *args: next(stages)(*args)
    try:
        train.main(words)
    except SystemExit as stop:
        if stop.code:
            raise
"""
SPLIT = "--optimizer sgd --lr 0.3 --mask-first --batch-size 8 --epochs 1 --eval all --limit"
SPLITS = {  # of 9 records the last batch holds one: then the second process has nothing to do
    "migu": "9",
    "gradient": "9 --mask gradient --micro-batch 3",
    "lora": "9 --tune lora --mask none",
    "inclora": "9 --tune inclora --mask random",
    "olora": "12 --tune olora --replay 0.5 --threshold 0.5",
}


@pytest.fixture(scope="module")
def processes(world, tmp_path_factory):
    """What torchrun's two processes leave and say; the last of their commands is a mistake."""
    lab = Lab(world, tmp_path_factory.mktemp("processes"), None)
    torch.manual_seed(5)  # as they are, the weights give one answer to all
    tensors = read_safetensors(world / "t5" / WEIGHTS)
    weights = {name: 0.7 * torch.randn(tensor.shape) for name, tensor in tensors.items()}
    files = {"config.json": {"dropout_rate": 0.0}, WEIGHTS: weights}
    still = changed(world / "t5", files, lab.place / "still")
    commands = [lab.words(f"{SPLIT} {more}", name, still) for name, more in SPLITS.items()]
    for more in ("whole", "cut", "cut --resume"):  # with dropout
        commands.append(lab.words(f"--mask random --limit 12 2 --out {lab.place / more}"))
    commands.append(lab.words("--demo"))
    (lab.place / "worker.py").write_text(WORKER)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [lab.place / "worker.py", Path(train.__file__).parent, json.dumps(commands)]
    done = subprocess.run([*start, *words], capture_output=True, text=True)
    print(done.stderr)
    return lab.place, done.stderr


@pytest.mark.parametrize("name", SPLITS)
def test_two_processes_make_the_masks_of_one_and_its_weights_to_rounding(name, processes, lab):
    lab.patch.setattr(train, "add_lora", partial(add_lora, dropout=0.0))
    place = processes[0]
    alone = lab.run(f"{SPLIT} {SPLITS[name]}", "alone", place / "still")
    (split,) = (place / name).iterdir()
    one, two = left(alone), left(split)
    assert one.keys() == two.keys() and one["results.json"] == two["results.json"]
    assert all(one[path] == two[path] for path in one if "predictions" in path)
    logs = [np.genfromtxt(io.BytesIO(f["log.csv"]), delimiter=",")[1:, 2:] for f in (one, two)]
    np.testing.assert_allclose(*logs, rtol=1e-4)  # losses, rows kept, norms
    ends = [load_model(folder / "model").state_dict() for folder in (alone, split)]
    assert_close(*ends, 1e-4)
    for name, weight in load_model(place / "still").state_dict().items():
        assert torch.equal(*[(end[name] == weight).all(-1) for end in ends]), name


def test_two_processes_that_died_resume_to_the_very_same_files(processes):
    whole, cut = (left(*(processes[0] / name).iterdir()) for name in ("whole", "cut"))
    assert whole == cut


def test_a_mistake_is_one_line_in_several_processes_too(processes):
    assert processes[1].count("train.py: ") == 1


# ---- tables and pictures over runs

GAIN = [{}, {"threshold": 0.5, "mask_first": True, "layers": "q"}]
NO_GAIN = [{"seed": 7}, {"lr": 1e-3}, {"replay": 0.02}, {"order": 2}]
NO_GAIN += [{"mask": "none", "threshold": 0.5}, {"data": "other"}]


def write_run(folder, accuracy, mask="none", **changes):
    """What eval.py reads of a finished run."""
    config = {"order": 1, "seed": 42, "model_name": "t5", "method": f"full {mask}", "mask": mask}
    config |= {"threshold": 0.7, "layers": "", "mask_first": False, "lr": 1e-4}
    config |= {"data": "data", "tasks": ["one"], **changes}
    results = {"tasks": ["one"], "average_accuracy": accuracy, "backward_transfer": -20}
    models.write_text(folder / "config.json", json.dumps(config))
    models.write_text(folder / "results.json", json.dumps({**results, "forgetting": 20}))
    return folder


def rows_of(folders):
    """The words of the rows in the table of average accuracies."""
    return [line.split() for line in evaluation.compare(folders).split("\n\n")[0].splitlines()[1:]]


def test_a_table_has_means_gains_and_in_what_rows_of_one_name_differ(tmp_path):
    grid = ((1, "none", 70), (1, "migu", 74), (2, "none", 71), (2, "migu", 73), (1, "random", 72))
    folders = [write_run(tmp_path / f"{o}{mask}", x, mask, order=o) for o, mask, x in grid]
    assert rows_of(folders) == [
        "t5 full migu 74.0 73.0 73.5 +3.0".split(),
        "t5 full none 70.0 71.0 70.5".split(),
        "t5 full random 72.0 - -".split(),  # a gain over both is not known
    ]
    grid = ((1, 60, "cpu"), (2, 80, "cuda"), (3, 100, "cpu"))
    folders = [write_run(tmp_path / str(s), x, seed=s, device=d) for s, x, d in grid]
    assert rows_of(folders) == ["t5 full none 80.0 ± 20.0 (3 seeds) 80.0".split()]
    folders = [write_run(tmp_path / str(lr), 70, lr=lr) for lr in (1e-4, 1e-3)]
    assert [row[3:5] for row in rows_of(folders)] == [["lr", "0.0001"], ["lr", "0.001"]]


def test_runs_on_other_data_are_in_other_columns_or_rows(tmp_path):
    grid = ((60, "/a/one", 1), (80, "/b/one", 1), (90, "/b/one", 2))
    folders = [
        write_run(tmp_path / str(x), x, seed=seed, tasks=[task], order=None)
        for x, task, seed in grid
    ]
    header, row = evaluation.compare(folders).split("\n\n")[0].splitlines()
    assert header.split()[2:5] == ["/b/one", "one", "mean"]
    assert row.split()[3:] == "85.0 ± 7.1 (2 seeds) 60.0 72.5".split()
    folders = [write_run(tmp_path / x, 70, seed=int(x), data=x) for x in "12"]
    assert [row[3:6] for row in rows_of(folders)] == [["data", x, "70.0"] for x in "12"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", GAIN + NO_GAIN)
def test_a_gain_is_over_the_same_run_without_a_mask_alone(changes, tmp_path):
    run = write_run(tmp_path / "run", 74, **{"mask": "migu", **changes})
    words = sum(rows_of([run, write_run(tmp_path / "none", 70)]), [])
    assert [word for word in words if re.match(r"[+-]\d", word)] == ["+4.0"] * (changes in GAIN)


def test_other_runs_are_named_and_not_counted_and_ascii_suffices(tmp_path, monkeypatch):
    runs = [("a", 60, 1), ("b", 80, 2), ("unfinished", None, 3), ("again", 99, 1)]
    folders = [write_run(tmp_path / name, x, seed=s) for name, x, s in runs]
    for file in ("foreign/config.json", "foreign/results.json", "half/results.json"):
        models.write_text(tmp_path / file, "{}")
    folders += [tmp_path / "foreign", tmp_path / "half"]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    evaluation.main([str(folder) for folder in folders])
    said = sys.stdout.buffer.getvalue().decode()
    assert "70.0 ? 14.1 (2 seeds)" in said  # for ±
    assert f"not counted, as it is no finished run: {tmp_path / 'foreign'}" in said
    assert f"not counted, as it is no finished run: {tmp_path / 'unfinished'}" in said
    assert f"not counted, as it repeats another: {tmp_path / 'again'}" in said


def test_eval_py_passes_other_folders_over_and_draws(lab, finished, capsys):
    pytest.importorskip("matplotlib")
    task = lab.world / "tasks" / "one"
    overlap = ["--overlap", lab.world / "t5", "--tasks", task, task]
    for words in ([lab.place, finished], overlap):
        evaluation.main([*map(str, words), "--plot", str(lab.place / "runs.png")])
        assert (lab.place / "runs.png").read_bytes().startswith(b"\x89PNG")
        (lab.place / "runs.png").unlink()
    assert "llama full migu" in capsys.readouterr().out


def test_rows_in_common_are_the_hand_computed_ones():
    one = {"a": torch.tensor([4.0, 3, 2, 1]), "b": torch.tensor([1.0, 2, 3, 4])}
    other = {"a": torch.tensor([4.0, 1, 2, 3]), "b": torch.tensor([1.0, 2, 4, 3])}
    assert evaluation.common_rows(one, other, 0.5) == 0.75  # rows 0, 1 and 0, 3; 2, 3 and 2, 3


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_overlap_is_a_table_over_tasks_and_leaves_the_model_as_it_was(kind, lab, capsys):
    names = [str(lab.world / "tasks" / name) for name in ("one", "two")]
    evaluation.main(["--overlap", str(lab.world / kind), "--tasks", *names])
    header, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header[-2:] == [line[0] for line in lines] == ["one", "two"]
    shares = np.array([line[1:] for line in lines], float)
    assert (shares > 0.3).all() and shares.trace() > shares[::-1].trace()

    model, tokenizer = load_model(lab.world / kind), data.load_tokenizer(lab.world / kind)
    examples = data.load_task("", names[0]).train
    found = evaluation.magnitudes(model, tokenizer, examples)
    masker, before = MIGU(model.train()), set(vars(model))
    torch.manual_seed(0)
    for example in examples:  # one at once is in memory
        inputs, labels = data.encode_example(tokenizer, example, kind == "llama")
        model.loss(**data.collate([inputs], [labels])).backward()
    assert_close(found, masker.magnitude, 0)
    assert set(vars(model)) == before and all(p.grad is not None for p in model.parameters())


def test_eval_py_wants_runs_or_a_model_and_tasks_of_two_records(lab, capsys):
    t5, task = lab.world / "t5", lab.world / "tasks" / "one"
    first = json.dumps(json.loads((task / "train.json").read_text())[:1]).encode()
    single = changed(task, {"train.json": first}, lab.place / "single")
    for words in ([], ["--overlap", t5], ["runs", "--tasks", task]):
        assert "--overlap MODEL with --tasks" in refusal(capsys, evaluation.main, *words)
    for words, fault in (
        (["--overlap", "no", "--tasks", task], "no is no model's folder"),
        (["--overlap", t5, "--tasks", single], "single: two batches need"),
        ([lab.place], "no results in these"),
    ):
        assert fault in refusal(capsys, evaluation.main, *words)


WRONG_TOKENIZER = [
    ({"vocab_size": 97}, "more tokens than the model's 97"),
    ({"vocab_size": 300, "eos_token_id": 5}, "eos_token_id [5] is not the tokenizer's, 1"),
]


@pytest.mark.parametrize("changes, fault", WRONG_TOKENIZER)
def test_a_tokenizer_of_another_model_is_refused(changes, fault, lab, capsys):
    model = small(**changes)
    model.files = load_model(lab.world / "t5").files
    save_model(model, lab.place / "t5")
    words = ["--overlap", lab.place / "t5", "--tasks", lab.world / "tasks" / "one"]
    assert fault in refusal(capsys, evaluation.main, *words)
    words = lab.words(f"--model {lab.place / 't5'}")
    assert fault in refusal(capsys, train.main, *words)


# ---- downloading

REFUSALS = {401: "set HF_TOKEN", 403: "licence", 404: "the name", 429: "later", 500: "later"}
NO_JSON, NO_WEIGHTS = "the answer is not the expected JSON", {WEIGHTS: None}
LLAMA = {"config.json": config_of(Llama)}
NOT_LOADED = [  # what becomes of the repository's files, the fault
    ({**NO_WEIGHTS, "pytorch_model.bin": b"pickle"}, "no safetensors of a whole model"),
    ({**NO_WEIGHTS, "adapter_model.safetensors": b""}, "adapters are never opened"),
    ({"config.json": None}, "has no config.json"),
    ({"config.json": b"<html>"}, NO_JSON),
    ({"config.json": b"[]"}, NO_JSON),
    ({"config.json": b'{"model_type": "mistral"}'}, "model_type mistral is not supported"),
    ({"config.json": config_of(T5, quantization_config={})}, "is quantized"),
    (
        {"config.json": config_of(T5, feed_forward_proj="gated-silu")},
        "'gated-silu' is not supported",
    ),
    ({"spiece.model": None, "tokenizer.json": b"{}"}, "copy spiece.model from the model it was"),
    (LLAMA, "own/er has no tokenizer.model: copy tokenizer.model from"),
    ({**LLAMA, "tokenizer.json": b'{"decoder": "Fuse"}'}, "has no tokenizer.model: copy"),
    ({**NO_WEIGHTS, INDEX: b"{}"}, "has no weight_map"),
]
for place in (b'"gone.safetensors"', b'"../a.safetensors"', b'"config.json"', b"7", b"[]"):
    index = b'{"weight_map": {"x": %b}}' % place
    NOT_LOADED.append(({**NO_WEIGHTS, INDEX: index}, "own/er: model.safetensors.index.json"))


def fetch(hub, name="own/er"):
    """Runs download.py, which leaves what belongs to the model and nothing else."""
    download.main([name])
    names = hub.files.keys() & {WEIGHTS, "config.json", "spiece.model"}
    assert contents(Path("models", name)) == {name: hub.files[name] for name in names}


def test_only_what_the_project_reads_is_fetched_verified_and_not_fetched_twice(hub):
    junk = ["pytorch_model.bin", "README.md", "model.fp16.safetensors", "tokenizer.py", INDEX]
    hub.files |= dict.fromkeys(junk, b"junk")
    hub.folders = ["tokenizer", "onnx", "tokenizer.json"]
    fetch(hub, "t5-large")
    assert hub.requests[0][0] == "/api/models/google-t5/t5-large/tree/main"
    assert hub.requests[-1][0].endswith("/resolve/main/config.json")  # now the folder is whole
    count = len(hub.requests)
    fetch(hub, "t5-large")
    assert len(hub.requests) == count + 2  # the listing, and what kind of model it is
    Path("models/t5-large/spiece.model").write_bytes(b"damage")
    fetch(hub, "t5-large")
    assert len(hub.requests) == count + 5


def test_of_several_sets_of_weights_the_shards_of_the_index_are_fetched(hub):
    del hub.files[WEIGHTS]
    places = {"x": "a-1.safetensors", "y": "a-2.safetensors", "z": "a-1.safetensors"}
    hub.files[INDEX] = json.dumps({"weight_map": places}).encode()
    hub.files |= dict.fromkeys([*places.values(), "b.safetensors"], b"weights")
    download.main(["own/er"])
    assert contents("models/own/er").keys() == hub.files.keys() - {"b.safetensors"}


def test_all_pages_are_read_and_the_token_goes_to_no_other_host(hub):
    hub.page = 1
    for host in ("", hub.other_host):  # an address without a host; another host
        hub.next_host = host
        fetch(hub)
    for path, _, token, host in hub.requests:
        assert token == (None if "localhost" in host else "Bearer hf_SECRET"), path
    assert sum("cursor=" in path and "localhost" in host for path, *_, host in hub.requests) == 2


def test_space_around_the_token_is_dropped_and_inside_it_refused(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "\t hf_SECRET \r\n")
    fetch(hub)
    assert hub.requests[0][2] == "Bearer hf_SECRET"
    for inside in ("\n", " ", "\x1b"):
        monkeypatch.setenv("HF_TOKEN", f"hf_SECRET{inside}hf_SECRET")
        assert "HF_TOKEN holds what" in refusal(capsys, download.main, "own/er")


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_transfer_cut_often_goes_on_each_time_where_it_stopped(hub, knows_ranges):
    hub.cuts = [1000, 2000, 3000, 4000, 5000, 2000000]
    hub.knows_ranges = knows_ranges  # if not, each answer begins at the beginning
    starts = [1000, 3000, 6000, 10000, 15000, 2015000] if knows_ranges else list(hub.cuts)
    fetch(hub)
    assert hub.ranges() == [None, *(f"bytes={start}-" for start in starts)]
    assert hub.waited == [1] * 6


@pytest.mark.parametrize("asked, waits", [(None, [1, 2]), ("7", [7, 7]), ("3600", [60, 60])])
def test_a_busy_server_is_asked_again_a_little_later(hub, asked, waits):
    headers = {"Retry_After": asked} if asked else {}
    for status, part in ((429, "/api/"), (502, "config"), (503, "/cdn/model"), (504, "spiece")):
        hub.first[part] = [(status, headers)] * 2
    fetch(hub)
    assert hub.waited == waits * 4


@pytest.mark.parametrize("status, said", REFUSALS.items())
def test_a_refusal_says_what_to_do(hub, status, said, capsys):
    hub.first = {"/api/": [(status, {})] * 5}
    fault = refusal(capsys, download.main, "own/er")
    assert f"/api/models/own/er/tree/main: {status} " in fault and said in fault
    assert hub.waited == ([1, 2, 4, 8] if said == "later" else [])


@pytest.mark.parametrize("changes, said", NOT_LOADED)
def test_a_model_that_could_not_be_loaded_is_refused_before_weights(hub, changes, said, capsys):
    hub.files = {name: body for name, body in {**hub.files, **changes}.items() if body is not None}
    assert said in refusal(capsys, download.main, "own/er") and not contents(".")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_redirect_is_followed_on_python_3_10_too(hub, status):
    hub.first = {"/old/": [(status, {"Location": "/api/models/own/er/tree/main"})]}
    fetch(hub, "old/er")
    assert hub.requests[1][2] == "Bearer hf_SECRET"


def test_a_wrong_hash_leaves_no_file(hub, capsys):
    hub.lies = {WEIGHTS: bytes(len(hub.files[WEIGHTS]))}
    assert "another hash than its listing: run again" in refusal(capsys, download.main, "own/er")
    assert contents("models").keys() == {"own/er/spiece.model"}
    Path("models/own/er/model.safetensors.part").write_bytes(bytes(9999999))  # of another file
    assert "another hash than its listing: run again" in refusal(capsys, download.main, "own/er")
    hub.lies = {}
    fetch(hub)


def test_a_second_download_waits_and_goes_on_where_the_first_stopped(hub, monkeypatch, capsys):
    part = Path("models/own/er/model.safetensors.part")
    models.write_file(part, [hub.files[WEIGHTS][:1000]])
    first = models.lock(part.parent / ".lock")
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=lambda _: first.close()))
    fetch(hub)
    assert "another process fetches it, waiting" in capsys.readouterr().err
    assert hub.ranges() == ["bytes=1000-"]  # nothing came twice


def test_the_benchmark_is_fetched_without_what_nobody_reads(hub, capsys):
    names = [f"G/task{i}/{part}.json" for i in range(15) for part in data.PARTS]
    hub.files = {f"CL_Benchmark/{name}": name.encode() for name in names}
    hub.files |= {"CL_Benchmark/G/t/dev.json": b"", "README.md": b""}
    hub.folders = ["CL_Benchmark/G"]
    download.main(["data"])
    assert contents("data") == {name: name.encode() for name in names}

    Path("data", names[0]).write_bytes(b"my own")
    Path("data", names[1]).unlink()
    download.fetch_data("data", keep=True)
    assert contents("data") == {name: name.encode() for name in names} | {names[0]: b"my own"}
    download.main(["data"])
    assert contents("data")[names[0]] == names[0].encode()
    del hub.files[f"CL_Benchmark/{names[0]}"]
    assert "44 files, not 45 of 15 tasks" in refusal(capsys, download.main, "data")


# ---- helpers: a local server that behaves like the hub and like GitHub


class HubServer(http.server.BaseHTTPRequestHandler):
    """What its answers depend on is set in the fixture `hub`: that is self.server."""

    def log_message(self, *_):
        pass

    def reply(self, status, content=b"", end=None, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[:end])

    def do_GET(self):
        hub, asked = self.server, self.headers["Range"]
        hub.requests.append((self.path, asked, self.headers["Authorization"], self.headers["Host"]))
        for part, answers in hub.first.items():
            if part in self.path and answers:
                status, headers = answers.pop(0)
                return self.reply(status, **headers)
        if "/git/trees/" in self.path:
            return self.reply(200, json.dumps({"tree": self.entries("tree", "blob")}).encode())
        if "/api/models/" in self.path:
            entries = self.entries("directory", "file")
            end = int(self.path.partition("cursor=")[2] or 0) + hub.page
            following = f"{hub.next_host}{self.path.partition('?')[0]}?cursor={end}"
            headers = {"Link": f'<{following}>; rel="next"'} if end < len(entries) else {}
            return self.reply(200, json.dumps(entries[end - hub.page : end]).encode(), **headers)
        name = re.split(f"/resolve/main/|/cdn/|/{download.COMMIT}/", self.path)[1]
        content = hub.lies.get(name, hub.files[name])
        if "/resolve/" in self.path and len(content) >= 1000:
            return self.reply(302, Location=f"{hub.other_host}/cdn/{name}")
        start = int((asked or "bytes=0-")[6:-1]) * hub.knows_ranges
        cut = hub.cuts.pop(0) if hub.cuts and len(content) >= 1000 else None
        self.reply(206 if start else 200, content[start:], cut)

    def entries(self, folder, file):
        """What a listing says; of large files the hub's git has a pointer alone."""
        entries = [{"path": path, "type": folder} for path in self.server.folders]
        for path, content in self.server.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"path": path, "type": file, "size": len(content)}
            if file == "blob":
                entry["sha"] = git
            elif len(content) < 1000:
                entry["oid"] = git
            else:
                entry |= {"oid": "0", "lfs": {"oid": hashlib.sha256(content).hexdigest()}}
            entries.append(entry)
        return entries


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server of `files` (name -> bytes), large ones from another host: its other name.

    first: part of an address -> answers (status, headers) before the right one; lies: name ->
    bytes in a file's place; cuts: how many bytes of the weights the next answers have.
    """
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubServer)
    threading.Thread(target=hub.serve_forever, args=[0.01], daemon=True).start()
    hub.next_host = url = f"http://127.0.0.1:{hub.server_port}"
    hub.other_host = f"http://localhost:{hub.server_port}"
    hub.files = {WEIGHTS: bytes(range(256)) * 9000, "spiece.model": b"pieces"}
    hub.files["config.json"] = config_of(T5)
    hub.folders, hub.requests, hub.cuts, hub.waited = [], [], [], []
    hub.first, hub.lies, hub.page, hub.knows_ranges = {}, {}, 1000, True
    hub.ranges = lambda: [asked for path, asked, *_ in hub.requests if path.startswith("/cdn/")]
    for name, value in (("HF_ENDPOINT", url), ("HF_TOKEN", "hf_SECRET"), ("no_proxy", "*")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(download, "GITHUB", url)
    monkeypatch.setattr(download, "RAW", url)
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=hub.waited.append))
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.shutdown()
    hub.server_close()


# ---- helpers: the device "meta", whose tensors have shapes and no numbers, plays a GPU


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Each operation has all it needs on one device, or is a copy that nobody waits for."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        copies = op is torch.ops.aten._to_copy.default
        devices = {x.device.type for x in tensors if copies or x.dim() or not x.is_cpu}
        if copies and kwargs.get("device"):
            devices.add(kwargs["device"].type)
        free = copies and kwargs.get("non_blocking") and hasattr(tensors[0], "pinned")
        if len(devices) > 1 and not free:
            raise RuntimeError(f"{op} {'waits' if copies else 'mixes devices'}")
        return op(*args, **kwargs)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """To ask "meta" for a number fails, as it has none. It knows no autocast."""

    def pin(tensor):
        tensor = tensor.clone()
        tensor.pinned = True
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: torch.enable_grad())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    with Watch():
        yield "meta"


# ---- how fast: python test_migu.py --bench [--model t5-base] [--batch-size 8] [--peer] ...

SHAPES = {  # a model's class and sizes, in the order of SMALL
    "t5-small": (T5, (32128, 512, 64, 2048, 6, 8, 32, 128, 1e-6, 0.1)),
    "t5-base": (T5, (32128, 768, 64, 3072, 12, 12, 32, 128, 1e-6, 0.1)),
    "t5-large": (T5, (32128, 1024, 64, 4096, 24, 16, 32, 128, 1e-6, 0.1)),
    "llama-2-7b": (Llama, (32000, 4096, 11008, 32, 32, 32)),
    "smollm2-135m": (Llama, (49152, 576, 1536, 30, 9, 3)),
}
ANSWER = 4  # tokens


def bench(argv):
    """Times all kinds of step, and a test, by turns; 64 to 256 random ids a prompt, 4 an answer."""
    parser = argparse.ArgumentParser(description=bench.__doc__)
    add = parser.add_argument
    add("--bench", action="store_true", required=True)
    add("--model", choices=SHAPES, default="t5-base")
    add("--batch-size", type=int, default=8)
    add("--device", type=torch.device, default=train.DEVICES[-1])
    add("--dtype", default="bfloat16" if train.DEVICES[-1] == "cuda" else "float32")
    add("--repeats", type=int, default=5)
    add("--peer", action="store_true", help="transformers' model too, on a padded batch")
    args = parser.parse_args(argv)
    kind, sizes = SHAPES[args.model]
    config = SMALL[kind] | dict(zip(SMALL[kind], sizes))
    config |= {"tie_word_embeddings": args.model != "llama-2-7b", "eos_token_id": -1}
    rng = np.random.default_rng(42)
    lengths = rng.integers(64, 257, args.batch_size)
    sources = [rng.integers(3, config["vocab_size"], length).tolist() for length in lengths]
    rows = [(ids, ids[:ANSWER]) for ids in sources]
    if kind is Llama:
        rows = [(ids + answer, [-100] * len(ids) + answer) for ids, answer in rows]
    c = settings(f"--batch-size {args.batch_size} --dtype {args.dtype}")

    def step(model, optimizer, make_masker=None):
        masker = make_masker and make_masker(model)
        train.train_step(model.train(), optimizer, masker, rows, c, {})
        if masker:
            masker.remove()

    def test(model, batch, **others):
        with evaluation.autocast(model, args.dtype):
            model.eval().generate(**batch, max_new_tokens=ANSWER, **others)

    with args.device:
        model = kind(config)
    ours = partial(step, model, train.make_optimizer(model, c))
    calls = {"plain step": ours}
    for criterion in CRITERIA:
        calls[f"MIGU, {criterion}"] = partial(ours, partial(MIGU, criterion=criterion))
    calls["MIGU, row-sparse"] = partial(ours, RowSparseMIGU)
    calls["test"] = partial(test, model, data.collate(sources))
    if args.peer:
        peer = peer_model(kind, config, args.device)
        calls["transformers' step"] = partial(step, peer, train.make_optimizer(peer, c))
        batch = data.collate([ids[::-1] for ids in sources])  # it wants padding on the left
        batch = {name: x.flip(1).to(args.device) for name, x in batch.items()}
        calls["transformers' test"] = partial(test, peer, batch, do_sample=False)
    seconds = {name: [] for name in calls}
    for name in tqdm([*calls] * (args.repeats + 1), desc="bench"):
        started = time.perf_counter()
        calls[name]()
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        seconds[name].append(time.perf_counter() - started)

    title = f"{args.model}, batch {args.batch_size}, {args.dtype}, {args.device}"
    table = [[title, "seconds", "least", "most", "of plain", "examples/s", "tokens/s"]]
    plain = np.median(seconds["plain step"][1:])
    for name, (_, *times) in seconds.items():  # the first turn warms up
        median = np.median(times)
        cells = [f"{x:.4g}" for x in (median, min(times), max(times))]
        speeds = [f"{n / median:.4g}" for n in (len(rows), sum(lengths + ANSWER))]
        table.append([name, *cells, f"{median / plain:.2f}", *speeds])
    print(evaluation.table(table))


def peer_model(kind, config, device):
    """transformers' own, with a loss() as ours have."""
    import transformers

    auto = transformers.AutoModelForSeq2SeqLM if kind is T5 else transformers.AutoModelForCausalLM
    config = {**config, "decoder_start_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind.__name__.lower(), **config)
    with device:
        peer = auto.from_config(config, attn_implementation="sdpa")
    peer.loss = lambda **batch: peer(**{name: x.to(device) for name, x in batch.items()}).loss
    return peer


@both
def test_the_bench_measures_every_kind_of_step_and_a_test(kind, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(SHAPES, "tiny", (kind, (500,)))
    bench("--bench --model tiny --batch-size 2 --repeats 1 --device cpu --peer".split())
    rows = [re.split("  +", row) for row in capsys.readouterr().out.splitlines()[1:]]
    steps = ["plain step", *(f"MIGU, {name}" for name in (*CRITERIA, "row-sparse"))]
    peer = ["transformers' step", "transformers' test"]
    assert [row[0] for row in rows] == [*steps, "test", *peer] and rows[0][4] == "1.00"


if __name__ == "__main__":
    bench(sys.argv[1:])
