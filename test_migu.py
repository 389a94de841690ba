"""What the project claims, one test a claim.  pytest test_migu.py: offline, on a CPU.

Tests against transformers, safetensors, tokenizers and matplotlib skip where these are missing.
MIGU_DATA=.../CL_Benchmark lets one more use real files. Speed is no test, it is measured:
python test_migu.py --bench
"""

import argparse
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
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
from model import T5, Llama, UserError, load_model, read_safetensors, save_model, write_safetensors

HERE = Path(train.__file__).parent

# ---- helpers: small models and layers, a padded batch, peers, files

torch.set_num_threads(1)  # the models are small: threads would only wait for each other
T5_SIZES = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
T5_TABLE = dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
T5_OTHER = dict(layer_norm_epsilon=1e-6, dropout_rate=0.0, decoder_start_token_id=0)
LLAMA_SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
LLAMA_HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
LLAMA_OTHER = dict(hidden_act="silu", rms_norm_eps=1e-6)
SMALL = {T5: T5_SIZES | T5_TABLE | T5_OTHER, Llama: LLAMA_SIZES | LLAMA_HEADS | LLAMA_OTHER}
both = pytest.mark.parametrize("kind", [T5, Llama])


def small(kind=T5, **changes):
    torch.manual_seed(1)
    return kind(SMALL[kind] | changes)


def padded_batch(kind=T5, lengths=(13, 5, 1, 9), padding=0):
    """Labels of -100 stand at rows' ends, and inside rows, where they are ignored positions."""
    torch.manual_seed(2)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, 97, mask.shape) * mask
    labels = ids.masked_fill(mask == 0, -100)
    if kind is T5:
        labels = torch.randint(2, 97, (len(lengths), 6))
        labels[1, 3:] = labels[3, 3:] = -100
    labels[:, 1] = labels[0, 4] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: F.pad(t, (0, padding), value=min(0, t.min())) for name, t in batch.items()}


def linear(*rows):
    layer = nn.Linear(len(rows[0]), len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)
    return layer


def adapted(*rows, **options):
    """A model whose one layer, x.q, has an adapter."""
    model = nn.ModuleDict({"x": nn.ModuleDict({"q": linear(*rows)})})
    add_lora(model, **options)
    return model


def masked_step(kind, masker=MIGU, bf16=False, again=False, passes=1, padding=0, dropout=0.0):
    """What a step leaves in a small model's gradients, and the fraction kept."""
    model = small(kind, dropout_rate=dropout, attention_dropout=dropout).train()
    model.checkpointing = again
    masker = masker(model)
    torch.manual_seed(3)
    for _ in range(passes):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss(**padded_batch(kind, padding=padding))
        loss.backward()
    kept = masker.mask_gradients()
    return {"kept": kept} | {name: p.grad for name, p in model.named_parameters()}


def assert_close(one, two, tolerance):
    """Dicts of tensors; differences are measured by each tensor's largest number."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (two[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_of(header, content=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


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


def write_task(folder, train=("a b", "yes"), test=("c", "no")):
    """A task of one record a split."""
    for split, (sentence, label) in {"train": train, "test": test}.items():
        records = [{"sentence": sentence, "label": label}]
        models.write_text(folder / f"{split}.json", json.dumps(records))
    models.write_text(folder / "labels.json", '["yes", "no"]')
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two tasks, and a tiny T5 and a tiny Llama with tokenizers of their own."""
    root = tmp_path_factory.mktemp("world")
    texts = []
    for name in ("one", "two"):
        folder = root / "tasks" / name
        data.make_demo_task(folder, (24, 9), np.random.default_rng(len(texts)))
        texts += [text for example in data.load_task("", folder).train for text in example]
    t5 = small(vocab_size=300, d_model=16, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.1)
    t5.files["spiece.model"] = data.train_vocabulary(texts, 290)
    save_model(t5, root / "t5")
    file = io.BytesIO()  # as Llama's: unknown 0, start 1, end 2
    options = dict(vocab_size=290, hard_vocab_limit=False, num_threads=1, minloglevel=2)
    train = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=iter(texts), model_writer=file, **options)
    llama = small(Llama, vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    llama.files["tokenizer.model"] = file.getvalue()
    save_model(llama, root / "llama")
    return root


# ---- helpers: a local server that behaves like the hub and like GitHub


def blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def hub_entry(name, content):
    entry = {"type": "file", "path": name, "size": len(content), "oid": blob(content)}
    if len(content) >= 1000:  # a large file: git knows a pointer to it
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
        entry |= {"oid": blob(b"pointer"), "lfs": large}
    return entry


class HubServer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, content=b"", end=None, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[:end])

    def do_GET(self):
        hub, token = self.server.hub, self.headers.get("Authorization")
        hub.requests.append((self.path, self.headers.get("Range"), token, self.headers["Host"]))
        for part, answers in hub.first.items():
            if part in self.path and answers:
                status, headers = answers.pop(0)
                return self.reply(status, **headers)
        if "/api/models/" in self.path or "/git/trees/" in self.path:
            listing = hub.listing or [hub_entry(*item) for item in hub.files.items()] + hub.folders
            page, headers = listing, {}
            if isinstance(listing, list):
                end = int((self.path.split("cursor=") + ["0"])[1]) + hub.page
                page = json.dumps(listing[end - hub.page : end]).encode()
                if end < len(listing):
                    address = f"{hub.next_host}{self.path.split('?')[0]}?cursor={end}"
                    headers["Link"] = f'<{address}>; rel="next"'
            return self.reply(200, page, **headers)
        name = re.split(f"/resolve/main/|/cdn/|/{download.COMMIT}/", self.path)[1]
        content = hub.lies.get(name, hub.files[name])
        if "/resolve/" in self.path and len(content) >= 1000:
            return self.reply(302, Location=f"{hub.other_host}/cdn/{name}")
        start = int((self.headers["Range"] or "bytes=0-")[6:-1]) * hub.knows_ranges
        cut = hub.cuts.pop(0) if hub.cuts and len(content) >= 1000 else None
        self.reply(206 if start else 200, content[start:], cut)
        if cut:
            hub.go_on.wait(20)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server of `files` (name -> bytes), large ones from another host: its other name.

    first: part of an address -> answers (status, headers) before the right one; lies: name ->
    bytes in a file's place; cuts: bytes of each answer with weights, which ends after go_on.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubServer)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    url, other = (f"http://{name}:{server.server_port}" for name in ("127.0.0.1", "localhost"))
    hub = server.hub = SimpleNamespace(
        page=1000, next_host=url, other_host=other, knows_ranges=True, listing=None, folders=[],
        requests=[], first={}, lies={}, cuts=[], waited=[], go_on=threading.Event(),
        files={"model.safetensors": bytes(range(256)) * 9000, "spiece.model": b"pieces",
               "config.json": b'{"model_type": "t5"}'})  # fmt: skip
    hub.go_on.set()
    for name, value in (("HF_ENDPOINT", url), ("HF_TOKEN", "hf_SECRET"), ("no_proxy", "*")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(download, "GITHUB", url)
    monkeypatch.setattr(download, "RAW", url)
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=hub.waited.append))
    monkeypatch.chdir(tmp_path)
    yield hub
    server.shutdown()
    server.server_close()


def files_below(folder):
    found = {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}
    return {path for path in found if not path.endswith(".lock")}


def is_whole(hub, folder="models/own/er"):
    wanted = hub.files.keys() & {"model.safetensors", "config.json", "spiece.model"}
    found = {path: Path(folder, path).read_bytes() for path in files_below(folder)}
    return found == {path: hub.files[path] for path in wanted}


def refusal(capsys, *names):
    """What download.py says when it exits with 2: one line, and never the token."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        download.main(names)
    lines = re.split("[\r\n]+", capsys.readouterr().err.strip())
    (line,) = [line for line in lines if "%|" not in line]  # without progress bars
    assert line.startswith("download.py: ") and "SECRET" not in line
    return line


# ---- MIGU

QUANTILES = [
    (range(1, 11), 0.7, [8, 9, 10]),  # the quantile is 7.3
    ([4, 1, 3, 2], 0.5, [4, 3]),  # 2.5
    ([2, 0, 1], 0.5, [2, 1]),  # 1, which reaches itself
    ([5, 1, 5, 5], 0.7, [5, 5, 5]),  # ties
    (range(8), 0.05, [*range(1, 8)]),  # 0.35: one is masked, where floor(0.05 * 8) masks none
    (range(101), 0.07, [*range(7, 101)]),  # 7, though 0.07 * 100 > 7 in floating point
    (range(101), 0.3, [*range(30, 101)]),  # 30, though 0.3 * 100 > 30 in fp32
    (range(4096), 0.4, [*range(1638, 4096)]),
    (range(3), 0, [0, 1, 2]),
    (range(3), 1, [2]),
]


@pytest.mark.parametrize("scores, threshold, kept", QUANTILES)
def test_keep_rows_is_the_exact_quantile_with_linear_interpolation(scores, threshold, kept):
    scores = torch.tensor([*scores], dtype=torch.float32)
    assert scores[keep_rows(scores, threshold)].tolist() == kept


def test_the_mask_is_the_hand_computed_one_and_the_next_step_starts_afresh():
    layer = linear([1, 0], [0, 1], [-2, 0], [0, -3])
    masker = MIGU(layer, threshold=0.5)
    for token in ([1.0, 1.0], [3.0, -1.0]):  # two passes make one step
        layer(torch.tensor([token])).sum().backward()
    # |h| summed over the two tokens: 1 + 3, 1 + 1, 2 + 6, 3 + 3; their median is 5.
    assert masker.magnitude[""].tolist() == [4, 2, 8, 6]
    assert masker.mask_gradients() == 0.5
    assert layer.weight.grad.tolist() == [[0, 0], [0, 0], [4, 0], [4, 0]]
    layer.zero_grad()
    layer(torch.tensor([[0.0, 1.0]])).sum().backward()  # |h| is 0, 1, 0, 3
    masker.mask_gradients()
    assert layer.weight.grad.tolist() == [[0, 0], [0, 1], [0, 0], [0, 1]]


@both
def test_padding_does_not_change_the_mask(kind):
    assert_close(masked_step(kind), masked_step(kind, padding=7), 1e-5)


def test_only_training_passes_count():
    layer = linear([1])
    masker = MIGU(layer)
    layer.eval()(torch.ones(1, 1)).sum().backward()
    with torch.no_grad():
        layer.train()(torch.ones(1, 1))
    with pytest.raises(RuntimeError, match="no pass in training mode"):
        masker.mask_gradients()


@pytest.mark.parametrize("masker", [MIGU, RowSparseMIGU])
def test_remove_leaves_no_trace_and_frozen_what_a_user_froze_in_between(masker):
    layer = linear([1])
    masker = masker(layer)
    layer.requires_grad_(False)
    masker.remove()
    assert str(vars(layer)) == str(vars(linear([1]).requires_grad_(False)))


CHOSEN = [
    (T5, migu.NOT_THE_HEAD, r".*(\.[qkvo]|\.wi|\.wo)\.weight", 2 * 6 + 2 * 10),
    (Llama, migu.NOT_THE_HEAD, r".*_proj\.weight", 2 * 7),
    (T5, "lm_head", r"shared\.weight", 1),  # the head is tied to it
    (T5, r"encoder.*\.q$", r"encoder.*\.q\.weight", 2),
]


@pytest.mark.parametrize("kind, layers, names, count", CHOSEN)
def test_all_linear_layers_but_the_head_or_a_pattern_s_are_masked(kind, layers, names, count):
    maskers = [partial(MIGU, threshold=threshold, layers=layers) for threshold in (0, 0.7)]
    plain, masked = (masked_step(kind, masker) for masker in maskers)
    changed = {name for name in plain if not torch.equal(plain[name], masked[name])} - {"kept"}
    assert changed == {n for n in plain if re.fullmatch(names, n)} and len(changed) == count


@pytest.mark.parametrize("optimizer, moves", [(torch.optim.SGD, False), (torch.optim.AdamW, True)])
def test_sgd_leaves_masked_rows_and_adamw_moves_them(optimizer, moves):
    layer = linear([1], [2])
    optimizer = optimizer(layer.parameters(), lr=0.1, weight_decay=0.0)
    masker = MIGU(layer, threshold=0.5)
    for scale in (1.0, 4.0):  # row 1 is kept first, then row 0
        layer.weight.data[0] *= scale
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        layer(torch.ones(1, 1)).sum().backward()
        masker.mask_gradients()
        optimizer.step()
    assert (layer.weight != before).flatten().tolist() == [True, moves]


# L1 norms: weights 4, 5, 6, 3 and gradients 5, 6, 4, 3. L2 norms would make the 6 a 3.5.
@pytest.mark.parametrize("criterion, kept", [("weight", [1, 2]), ("gradient", [0, 1])])
def test_gradient_and_weight_rank_rows_by_l1_norm(criterion, kept):
    layer = linear([4, 0, 0], [5, 0, 0], [-2, 2, -2], [3, 0, 0])
    layer.weight.grad = torch.tensor([[5.0, 0, 0], [-2, 2, -2], [0, 4, 0], [0, 0, 3]])
    MIGU(layer, 0.5, criterion).mask_gradients()
    assert layer.weight.grad.any(1).nonzero().flatten().tolist() == kept


# ---- the same update in less time


@both
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-6), (True, 1e-2)])
def test_row_sparse_gradients_are_those_of_the_explicit_step(kind, bf16, tolerance):
    explicit, sparse = (masked_step(kind, masker, bf16) for masker in (MIGU, RowSparseMIGU))
    assert explicit["kept"] == sparse["kept"] < 0.32
    assert_close(explicit, sparse, tolerance)


def test_row_sparse_keeps_ties_takes_any_shape_of_input_and_one_pass_a_step():
    layer = nn.Linear(2, 40)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    masker = RowSparseMIGU(layer)
    layer(torch.ones(3, 5, 2)).sum().backward()  # all 40 rows tie: more than the top 30 %
    with torch.no_grad():
        layer(torch.ones(2))  # a test in between does not count
    with pytest.raises(RuntimeError, match="one pass"):
        layer(torch.ones(3, 5, 2))
    assert masker.mask_gradients() == 1
    assert (layer.weight.grad == 15).all() and (layer.bias.grad == 15).all()


@both
@pytest.mark.parametrize("options", [{}, {"passes": 2}, {"masker": RowSparseMIGU}, {"bf16": True}])
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


# ---- the models, beside those of transformers

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 40  # of 8 frequencies, 1 is kept, 1 is in between
ROPE = LLAMA3 | {"rope_theta": 5e5}
ENDS = [*range(2, 97, 7)]
VARIANTS = [
    (T5, {}),
    (T5, dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    (T5, dict(feed_forward_proj="gated-gelu")),
    (T5, dict(d_kv=5, num_decoder_layers=3, tie_word_embeddings=False)),
    (T5, dict(initializer_factor=3.0, tie_word_embeddings=False, eos_token_id=ENDS)),
    (Llama, dict(num_key_value_heads=4)),
    (Llama, dict(tie_word_embeddings=True, eos_token_id=ENDS, pad_token_id=0)),
    (Llama, dict(num_key_value_heads=1, head_dim=16, attention_bias=True, mlp_bias=True)),
    (Llama, dict(rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    (Llama, dict(head_dim=16, rope_parameters=ROPE)),
    (Llama, dict(head_dim=16, rope_parameters=ROPE | {"factor": 32.0})),
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
    return theirs, load_model(folder), padded_batch(kind, (13, 5, 1, 9, 8, 7, 6, 4))


def test_logits_loss_and_gradients_equal_those_of_transformers(pair):
    theirs, ours, batch = pair
    expected = theirs(**batch)
    logits, loss = ours(**batch)
    real = batch["attention_mask"] > 0
    if isinstance(ours, T5):
        real = (batch["labels"] != -100).flip(1).cumsum(1).flip(1) > 0
    assert (logits - expected.logits)[real].abs().max() <= 1e-4 * expected.logits.abs().max()
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
    torch.manual_seed(4)
    q, k, v = (2 * torch.randn(3, 2, 4, 9, 8)).bfloat16().requires_grad_()
    bias = models.attention_bias(torch.ones(9, 9, dtype=torch.bool).tril(), v)
    both = [
        f(q, k, v, bias, 0.0, scale=0.3)
        for f in (models.attend, models.F.scaled_dot_product_attention)
    ]
    torch.testing.assert_close(*both, rtol=0.05, atol=0.05)  # scores are rounded
    assert both[0][:, :, 0].equal(v[:, :, 0])  # the first sees itself alone


# ---- safetensors and folders


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CROSS = "decoder.block.0.layer.1.EncDecAttention"


def index(place):
    return {WEIGHTS: None, INDEX: json.dumps({"weight_map": {"lm_head.weight": place}}).encode()}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2950735608\n"
ONE = torch.ones(1)
TWO_FAULTS = r'(?s)Unexpected key.*"a".*size mismatch for shared.weight: .*\[1\]'
FAULTS = [  # a folder, what becomes of its files, the fault
    ("t5", {WEIGHTS: b""}, "empty"),
    ("t5", {WEIGHTS: LFS}, f"{WEIGHTS}: .*Git LFS pointer: run git lfs pull"),
    ("t5", {WEIGHTS: file_of(b"[]")}, "object"),
    ("t5", {WEIGHTS: file_of(b'{"a":1,"a":1}')}, "twice"),
    ("t5", {WEIGHTS: file_of({"\ud83d": entry()}, bytes(8))}, "JSON.*surrogates"),
    ("t5", {WEIGHTS: file_of({"a": entry("F4", [4], [0, 2])}, bytes(2))}, "a: dtype F4"),
    ("t5", {WEIGHTS: file_of({"a": entry(shape=[3])}, bytes(8))}, "shape"),
    ("t5", {WEIGHTS: file_of({"a": entry(shape=[2**63, 2**63, 0], offsets=[0, 0])})}, "shape"),
    ("t5", {WEIGHTS: file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12))}, "overlap"),
    ("t5", {WEIGHTS: file_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20))}, "hole"),
    ("t5", {WEIGHTS: file_of({"a": entry()}, bytes(9))}, "end at byte"),
    ("t5", {WEIGHTS: file_of({"__metadata__": []})}, "__metadata__ is not text"),
    ("t5", {WEIGHTS: None, "pytorch_model.bin": b""}, "pytorch_model.bin is pickled and never"),
    ("t5", index("../0.safetensors"), "weight_map: lm_head.weight: '../0.safetensors' is no saf"),
    ("t5", {WEIGHTS: {"lm_head.weight": ONE}}, "lm_head.weight differs from shared.weight"),
    ("t5", {WEIGHTS: {f"{CROSS}.v.weight": None}}, f'(?s)Missing key.*"{CROSS}.v.weight"'),
    ("t5", {WEIGHTS: {"a": ONE, "shared.weight": ONE}}, TWO_FAULTS),
    ("t5", {"config.json": None}, "config.json"),
    ("t5", {"config.json": {"model_type": "gpt2"}}, "model_type gpt2 is not supported"),
    ("t5", {"config.json": {"d_model": "wide"}}, "config.json: d_model 'wide'"),
    ("llama", {"config.json": {"hidden_act": "gelu"}}, "hidden_act 'gelu' is not supported"),
    ("llama", {"config.json": {"rope_scaling": {"type": "linear"}}}, "rope scaling 'linear'"),
    ("t5", {"spiece.model": None}, "t5 has no spiece.model: copy spiece.model from the model"),
    ("t5", {"spiece.model": b"no"}, "spiece.model: not a sentencepiece model"),
    ("tasks/one", {"train.json": b"{}\n{}"}, "train.json: not JSON.*JSON Lines"),
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
        else:
            load_model(folder)
            data.load_tokenizer(folder)
    assert str(folder) in str(error.value)


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
def test_prompts_are_the_benchmark_s_to_the_letter(place, tmp_path):
    group, name = place.split("/")
    question = f"{QUESTIONS[place]} Choose one from the option.\nOption: yes, no \n"
    if group == "COPA":  # whose sentences ask for themselves
        question = ""
    text = f"Task:{group}\nDataset:{name}\n{question}a {{b}} % \\n\nAnswer:"
    task = data.load_task("", write_task(tmp_path / place, ("a {b} % \\n", "yes")))
    assert (task.name, task.train, task.labels) == (name, [(text, "yes")], ["yes", "no"])


def test_frozen_layers_are_passed_over():
    model = nn.Sequential(nn.Linear(1, 10), nn.Linear(10, 10), nn.Linear(10, 4))
    model[0].requires_grad_(False)
    masker = MIGU(model)
    model[1].requires_grad_(False)  # later, too
    model(torch.randn(5, 1)).sum().backward()
    assert masker.mask_gradients() == 1 / 4


def test_a_random_mask_masks_and_changes_every_step():
    torch.manual_seed(0)
    layer, masks = nn.Linear(3, 100), []
    masker = MIGU(layer, 0.7, "random")
    for _ in range(2):
        layer.weight.grad = torch.ones_like(layer.weight)
        masker.mask_gradients()
        masks.append(layer.weight.grad[:, 0].tolist())
    assert sum(masks[0]) == sum(masks[1]) == 30 and masks[0] != masks[1]


def test_a_new_criterion_is_one_function_and_one_entry(monkeypatch):
    monkeypatch.setitem(migu.CRITERIA, "first", lambda layer, magnitude: torch.tensor([3, 2, 1]))
    layer = linear([1], [2], [3])
    layer.weight.grad = torch.ones(3, 1)
    MIGU(layer, 1, "first").mask_gradients()
    assert layer.weight.grad.tolist() == [[1], [0], [0]]


def test_the_orthogonality_penalty_is_the_hand_computed_one():
    model = adapted([1, 1], rank=2)
    A = model.x.q.lora_A.weight
    A.data = torch.tensor([[1.0, -2], [0, 4]])
    penalty = migu.orthogonality_penalty(model, {"x.q": torch.tensor([[1.0, 1], [2, 0], [0, -1]])})
    penalty.backward()
    # A_old A_new^T = [[-1, 4], [2, 0], [2, -4]]; the derivative is sign(A_new A_old^T) A_old.
    assert penalty == 13 and A.grad.tolist() == [[-1 + 2, -1 - 1], [1, 1 + 1]]


def test_a_saved_folder_opens_in_transformers(pair, tmp_path):
    theirs, ours, batch = pair
    save_model(ours, tmp_path)
    again = type(theirs).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, theirs(**batch).logits)


def test_every_dtype_comes_back_and_to_and_from_the_official_library(tmp_path):
    official = pytest.importorskip("safetensors.torch")
    tensors = {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4, dtype=torch.bfloat16)}
    for kind, dtype in models.DTYPES.items():
        tensors[kind] = torch.arange(48, dtype=torch.uint8).fmod(2).view(dtype).view(2, -1)
    write_safetensors(tmp_path / "ours", tensors)
    official.save_file(tensors, tmp_path / "official")
    raw = (tmp_path / "ours").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    (tmp_path / "odd").write_bytes(file_of(raw[8:end] + b" ", raw[end:]))  # nothing is aligned
    files = [read_safetensors(tmp_path / name) for name in ("ours", "odd", "official")]
    for back in (*files, official.load_file(tmp_path / "ours")):
        assert back.keys() == tensors.keys()
        for name, (one, two) in {name: (back[name], tensors[name]) for name in tensors}.items():
            assert one.dtype == two.dtype and one.shape == two.shape, name
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, two))), name


def test_shards_are_read(tmp_path):
    model = small()
    save_model(model, tmp_path)
    tensors = read_safetensors(tmp_path / WEIGHTS)
    places = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for place in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == place}
        write_safetensors(tmp_path / place, part)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    assert torch.equal(load_model(tmp_path).shared.weight, model.shared.weight)


def test_orders_are_the_papers():
    firsts, lasts = zip(*((tasks[0], tasks[-1]) for tasks in data.ORDERS.values()))
    assert firsts == ("dbpedia", "dbpedia", "yahoo", "MNLI", "MultiRC", "yelp")
    assert lasts == ("agnews", "yahoo", "dbpedia", "yahoo", "yahoo", "WiC")
    assert [len(set(tasks)) for tasks in data.ORDERS.values()] == [4, 4, 4, 15, 15, 15]


# ---- byte-level BPE

BYTE_LEVEL = {**data.BYTE_LEVEL, "trim_offsets": True}


def tokenizer_json(**changes):
    """All bytes, four merges, an end token; the change a__b=x sets parts["a"]["b"]."""
    vocab = {symbol: number for number, symbol in enumerate(data.SYMBOLS)}
    merges = ["l o", "lo w", "Ġ low", "e r"]
    for merge in merges:
        vocab[merge.replace(" ", "")] = len(vocab)
    end = {"id": len(vocab), "content": "<|end|>", "special": True}
    parts = {
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "added_tokens": [end],
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    for name, value in changes.items():
        *place, key = name.split("__")
        (parts[place[0]] if place else parts)[key] = value
    return parts


def bpe(tmp_path, **changes):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [260, 1]}')
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(**changes)))
    return data.load_tokenizer(tmp_path)


def llama_3(pattern=data.LLAMA_3_IN_FILES):
    split = {**data.SPLIT, "pattern": {"Regex": pattern}}
    steps = [split, {**BYTE_LEVEL, "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def test_pairs_are_merged_in_the_order_in_which_they_were_learned(tmp_path):
    tokenizer = bpe(tmp_path)
    symbols = {symbol: number for number, symbol in enumerate(data.SYMBOLS)}
    lower = [258, 259]  # "Ġlow" and "er"
    assert tokenizer.encode(" lower") == lower and tokenizer.encode("lower") == [257, 259]
    assert tokenizer.encode("low lower") == [257, *lower]
    assert tokenizer.encode("é") == [symbols["Ã"], symbols["©"]]  # two bytes
    assert tokenizer.encode(" lower<|end|>lo") == [*lower, 260, 256]
    assert tokenizer.decode([*lower, 260, 999, 256]) == " lowerlo"
    assert (tokenizer.start, tokenizer.eos_id, len(tokenizer)) == ([], 260, 261)
    pairs = [merge.split() for merge in tokenizer_json()["model"]["merges"]]
    assert bpe(tmp_path, model__merges=pairs).encode(" lower") == lower  # the file's other form


def test_the_start_token_is_what_the_file_says(tmp_path):
    text = {"Sequence": {"id": "A", "type_id": 0}}
    start = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
    tokens = {"<|end|>": {"id": "<|end|>", "ids": [260], "tokens": ["<|end|>"]}}
    step = {"type": "TemplateProcessing", "single": [start, text], "special_tokens": tokens}
    tokenizer = bpe(tmp_path, post_processor=step)
    assert data.encode_prompt(tokenizer, " lower", decoder_only=True) == [260, 258, 259]


@pytest.mark.parametrize("changes, fault", [
    (dict(model__type="Unigram"), "Unigram"), (dict(normalizer={"type": "NFC"}), "normalizer"),
    (dict(model__byte_fallback=True), "byte_fallback"), (dict(model__merges=["q q"]), "q q"),
    (dict(pre_tokenizer={"type": "Whitespace"}), "Whitespace"), (dict(decoder=None), "form of a"),
    (dict(pre_tokenizer=llama_3(r"\w+")), r"\\w\+"), (dict(model={}), "form of a"),
    (dict(post_processor={"type": "BertProcessing"}), "BertProcessing"),
    (dict(added_tokens=[{"content": "x", "id": 1, "lstrip": True}]), "lstrip"),
])  # fmt: skip
def test_what_the_byte_level_bpe_does_not_support_is_refused_by_name(changes, fault, tmp_path):
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{fault}"):
        bpe(tmp_path, **changes)


@pytest.mark.parametrize("steps", ["gpt-2", "smollm2", "llama-3"])
def test_ids_and_texts_equal_those_of_the_tokenizers_library(steps, tmp_path):
    library = pytest.importorskip("tokenizers")
    digits = {"type": "Sequence", "pretokenizers": [data.DIGITS, BYTE_LEVEL]}
    step = {"gpt-2": BYTE_LEVEL, "smollm2": digits, "llama-3": llama_3()}[steps]
    ours = bpe(tmp_path, pre_tokenizer=step, model__ignore_merges=steps == "llama-3")
    end = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    parts["added_tokens"][0] |= end
    parts["version"] = "1.0"
    theirs = library.Tokenizer.from_str(json.dumps(parts))
    rng = random.Random(1)
    some = [
        "low",
        " lower",
        "'ll",
        " 12",
        "<|end|>",
        "\r\n",
        "\t ",
        "\x1c",
        "\u3000",
        "é",
        "½",
        "日",
    ]
    for _ in range(1500):
        text = "".join(rng.choice([*some, chr(rng.randrange(0x3000))]) for _ in range(12))
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids), repr(text)


# ---- train.py and eval.py: a command line, and what a run leaves


class Lab(namedtuple("Lab", "world place patch capsys")):
    """Commands on two tiny tasks. Of an option given twice the last counts, so that of `more`."""

    def words(self, more="", out="runs", model="t5", tasks=("one", "two")):
        words = ["--tasks", *(str(self.world / "tasks" / task) for task in tasks)]
        words += ["--model", str(self.world / model), "--out", str(self.place / out)]
        return words + f"--device cpu --lr 1e-2 --batch-size 8 --epochs 2 {more}".split()

    def run(self, *args, **others):
        """The folder of one run."""
        (folder,) = train.train(train.parse_args(self.words(*args, **others)))
        return folder

    def refusal(self, arguments, main=train.main):
        """What a command that ends with exit code 2 says on stderr."""
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert stop.value.code == 2
        return self.capsys.readouterr().err

    def kill(self, n, *args):
        """A run dies just before its file n, counted from 0, gets its name."""
        replace, numbers = os.replace, itertools.count()

        def dying_replace(*paths):
            if next(numbers) == n:
                raise KeyboardInterrupt
            replace(*paths)

        with self.patch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", dying_replace)
            self.run(*args)


@pytest.fixture
def lab(world, tmp_path, monkeypatch, capsys):
    return Lab(world, tmp_path, monkeypatch, capsys)


def left(folder):
    """All files of a run, path -> bytes; of results.json, which has times, the accuracies."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {**files, "results.json": json.loads(files["results.json"])["matrix"]}


def write_run(folder, accuracy, mask="none", **changes):
    """What eval.py reads of a finished run."""
    config = {"order": 1, "seed": 42, "model_name": "t5", "method": f"full {mask}", "mask": mask}
    config |= {"threshold": 0.7, "layers": "", "mask_first": False, "lr": 1e-4, **changes}
    results = {"tasks": ["one"], "average_accuracy": accuracy, "backward_transfer": -20}
    models.write_text(folder / "config.json", json.dumps(config))
    models.write_text(folder / "results.json", json.dumps({**results, "forgetting": 20}))
    return folder


def rows_of(folders):
    """The words of the rows in the table of average accuracies."""
    return [line.split() for line in evaluation.compare(folders).split("\n\n")[0].splitlines()[1:]]


# ---- a model on a task

SAME = [("  very\tPOSITIVE.\n", "Very  positive"), ("Arts Law", "Arts & Law")]
SAME += [("caf\u00e9 fine 1!", "cafe\u0301 \ufb01ne \u2460\uff01")]
SAME += [(answer, prediction) for prediction, answer in SAME]
OTHER = [("the good", "good"), ("verygood", "very good"), ("-", "-"), ("", "-")]
LABEL_FAULTS = [
    (["x" * 50, "y"], "label 'x+' has 50 tokens: more than 49"),
    (["\u8336", "no"], "task own: label '\u8336' comes back .* as '\u2047': rename it"),
    (["Very good", "very good!"], "'very good!' counts as the same answer as 'Very good'"),
    (["yes", "!"], "label '!': nothing of it is left"),
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
    with pytest.raises(UserError, match=fault):
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
    for tokens in (1, 150, 16384):
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


def options(**changes):
    values = {"dtype": "float32", "micro_batch": 64, "clip": 1.0, "l1": 0.0, "optimizer": "adamw"}
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize("clip, step", [(1.0, (0.6, 0.8)), (6.0, (3.0, 4.0)), (0.0, (3.0, 4.0))])
def test_clipping_acts_on_the_masked_gradient_before_the_step(clip, step):
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    model.device = torch.device("cpu")
    model.loss = lambda **batch: model(torch.tensor([[3.0, 4.0]])).sum()  # 7 + 14
    optimizer, masker = torch.optim.SGD(model.parameters(), lr=1.0), MIGU(model, 0.5)
    log = train.train_step(model, optimizer, masker, [([5], [6])], options(clip=clip), {})
    expected = torch.tensor([[1.0, 1.0], [2.0 - step[0], 2.0 - step[1]]])
    torch.testing.assert_close(model.weight.data, expected)
    assert torch.stack(log).tolist() == [21.0, 0.5, 5.0]  # the norm is that before clipping


@pytest.mark.parametrize("kind, biased", [(T5, {}), (Llama, {"attention_bias": True})])
def test_weight_decay_reaches_neither_norms_nor_biases_nor_position_tables(kind, biased):
    model = small(kind, **biased)
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    train.make_optimizer(model, options(lr=0.1)).step()
    for name, p in model.named_parameters():
        spared = re.search(r"norm\.|relative_attention_bias|\.bias$", name)
        expected = 1.0 if spared else 1.0 - 0.1 * 0.01
        torch.testing.assert_close(p.data, torch.full_like(p, expected), rtol=0, atol=1e-7)


def test_a_mask_that_keeps_all_rows_is_plain_tuning_with_dropout_too(lab):
    one, two = (
        left(lab.run(f"--mask {m} --mask-first", m[:4])) for m in ("none", "weight --threshold 0")
    )
    assert one["model/model.safetensors"] == two["model/model.safetensors"]


def test_micro_batches_change_neither_gradient_nor_mask():
    rows = [([5 + i] * (3 + i), [9 + i] * (1 + i % 4)) for i in range(12)]
    steps, gradients = [], []
    still = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)
    for size in (12, 5):
        model, c = small().train(), options(micro_batch=size)
        steps.append(torch.stack(train.train_step(model, still, MIGU(model), rows, c, {})))
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*steps)
    for whole, parts in zip(*gradients):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-7)
        assert torch.equal(whole.any(-1), parts.any(-1))


def test_frozen_linear_weights_alone_take_the_type_of_the_arithmetic():
    model = small()
    add_lora(model)
    train.shrink_frozen(model, options(dtype="bfloat16"))
    for name, p in model.named_parameters():
        frozen = re.search(r"\.(k|o|wi|wo)\.weight", name)
        assert p.dtype == (torch.bfloat16 if frozen else torch.float32), name


# ---- a training step does not wait for its device

WAYS = [*CRITERIA, "row_sparse", "lora", "checkpointing", "micro_batch"]
STEPS = [*itertools.product(("T5", "Llama"), WAYS, ("float32", "bfloat16"))]
BACKEND = torch.utils.backend_registration
SEND = models.to_device
PLANTED = [  # what stands in a function's place (keep_rows: in the backward pass), what is said
    ("model.to_device", lambda x, to: x, "aten.embedding.default mixes devices"),
    ("model.to_device", lambda x, to: x.to(to, non_blocking=True), "aten._to_copy.default waits"),
    ("model.to_device", lambda x, to: x.pin_memory().to(to), "aten._to_copy.default waits"),
    ("model.to_device", lambda x, to: SEND(x, to).max().item(), "aten._local_scalar_dense.default"),
    ("migu.keep_rows", lambda n, _: n.cpu() > 0, "aten._to_copy.default waits"),
    ("migu.keep_rows", lambda n, _: n[n > 0] > 0, "aten.nonzero.default"),
    ("migu.keep_rows", lambda n, _: n[torch.arange(9)] > 0, "aten.index.Tensor mixes devices"),
]
CASES = [(step, "model.to_device", SEND, "") for step in STEPS]
CASES += [(("T5", "row_sparse", "float32"), *fault) for fault in PLANTED]


def step_on(device, kind, way, dtype):
    """A step of a small model that is made on the device, to be called."""
    c = options(lr=1e-3, l1=0.5, dtype=dtype, threshold=0.7, layers=migu.NOT_THE_HEAD)
    c.mask, c.row_sparse = way if way in CRITERIA else "magnitude", way == "row_sparse"
    c.micro_batch = 1 if way == "micro_batch" else 64
    with torch.device(device):
        model = small(getattr(models, kind), num_layers=1, dropout_rate=0.1).train()
    if way == "lora":
        add_lora(model)
        train.shrink_frozen(model, c)
    model.checkpointing = way == "checkpointing"
    earlier = {n: x.lora_A.weight.detach().clone() for n, x in migu.lora_layers(model).items()}
    optimizer, masker = train.make_optimizer(model, c), train.make_masker(model, c)
    rows = [([3, 4, 5, 6], [-100, 7, -100, 8]), ([9, 10], [-100, 11])]
    return partial(train.train_step, model, optimizer, masker, rows, c, earlier)


def try_cases():
    """Prints what is said of each, on a "gpu" of fake tensors: to ask for their numbers fails."""
    aten, tree, fake = torch.ops.aten, torch.utils._pytree, torch._subclasses.FakeTensorMode()
    pinned, said = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args, kwargs):
            copies = op in (aten._to_copy.default, aten.copy_.default)
            tensors = [x for x in tree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            on = {x.device.type for x in tensors if copies or x.dim() or not x.is_cpu}
            on |= {kwargs["device"].type} if kwargs.get("device") else set()
            fine = copies and (kwargs.get("non_blocking") or True in args[2:])
            if len(on) > 1 and not (fine and any(x is tensors[-1] for x in pinned)):
                raise RuntimeError(f"{op} {'waits' if copies else 'mixes devices'}")
            if "gpu" not in on:
                return op(*args, **kwargs)
            args = tree.tree_map_only(lambda x: type(x) is torch.Tensor, fake.from_tensor, args)
            with fake:
                return op(*args, **kwargs)

    BACKEND._DummyBackendModule.get_amp_supported_dtype = lambda self: [torch.bfloat16]
    BACKEND._setup_privateuseone_for_python_backend("gpu")
    torch.Tensor.pin_memory = lambda x: pinned.append(x.clone()) or pinned[-1]
    torch.utils.swap_tensors = lambda one, two: setattr(one, "data", two.data)  # in Module.to()
    other, rules = (torch.library.Library(n, "IMPL", "AutocastPrivateUse1") for n in ("_", "aten"))
    other.fallback(torch.library.fallthrough_kernel)
    plain = torch.autocast("gpu", enabled=False)
    for op in (aten.linear.default, aten.matmul.default):
        rules.impl(op, plain(lambda *args, op=op: op(*(x.bfloat16() for x in args))))
    for step, where, what, _ in CASES:
        with Watch(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, what)
            try:
                said.append([*step, step_on("gpu", *step)() and ""])
            except Exception as error:
                said.append([*step, str(error).partition("\n")[0]])
    print(json.dumps(said), flush=True)
    os._exit(0)  # at the usual end, autograd's thread for the device may abort


@pytest.mark.skipif(not hasattr(BACKEND, "_DummyBackendModule"), reason="torch makes no device")
def test_a_step_neither_mixes_devices_nor_waits_for_one_and_planted_faults_are_found():
    command = [sys.executable, "-c", f"import {__name__} as tests; tests.try_cases()"]
    no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    said = json.loads(subprocess.check_output(command, cwd=HERE, env=no_gpu))
    assert said == [[*step, expected] for step, *_, expected in CASES]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_does_not_wait_for_a_gpu(request):
    request.addfinalizer(partial(torch.cuda.set_sync_debug_mode, "default"))
    for case in STEPS:
        torch.cuda.set_sync_debug_mode("default")
        step = step_on("cuda", *case)
        step()  # the first waits for libraries
        torch.cuda.set_sync_debug_mode("error")
        step()


# ---- settings

SPARSE = ["--mask migu", "--micro-batch 99", "--layers q$"]
EXPLICIT = ["--mask weight", "--micro-batch 3", "--layers .", "--tune lora", "--mask none"]
TYPED = [("t5", ".", "../tasks/one"), ("", "t5/", "tasks/one/"), ("tasks/one", "~/t5", ".")]
MISTAKES = {
    "say what to do": ["", "--order 1 --demo", "--order 1 --tasks a b"],
    "invalid choice": ["--order 7", "--order 1 --tune prefix"],
    "unrecognized arguments": ["--order 1 --thresh 0.5"],
    "must be from 0 to 1": ["--order 1 --threshold 1.5", "--order 1 --replay nan"],
    "must be above 0": ["--order 1 --lr 0", "--order 1 --micro-batch 0", "--order 1 --limit 8 0"],
    "a number for train, and one for test": ["--order 1 --limit 8 4 2"],
    "must not be below 0": ["--order 1 --clip -1", "--order 1 --l1 inf", "--order 1 --seed -1"],
    "name nothing twice": ["--order 1 --seed 1 2 1", "--order 1 2 1"],
    "--layers (: no regular expression": ["--order 1 --layers ("],
    "use --device cpu": ["--order 1 --device abacus"],
    "two tasks have the same name: x, x": ["--tasks a/x b/x/"],
    "the first of the tasks is not masked: add --mask-first": ["--tasks a", "--order 1 --joint"],
    "labels.json": ["--tasks no/such --mask none"],
}


@pytest.mark.parametrize("tune, threshold", [("full", 0.7), ("lora", 0.7), ("olora", 0.05)])
def test_defaults_are_the_paper_s(tune, threshold):
    args = train.parse_args(["--order", "1", "--tune", tune])
    c = train.settings(args, 1, 42)
    assert (c.threshold, c.lr) == (threshold, 1e-4 if tune == "full" else 1e-3)
    assert (c.batch_size, c.clip, c.l1, c.optimizer, c.mask) == (64, 1.0, 0.5, "adamw", "migu")
    assert train.run_folder(c, "runs") == Path("runs", f"order1-t5-large-{tune}-migu-s42")
    args.replay = 0.02
    assert train.settings(args, 1, 42).threshold == 0.4


@pytest.mark.parametrize("more", SPARSE + EXPLICIT)
def test_config_json_says_whether_the_run_is_row_sparse(more, lab):
    c = train.settings(train.parse_args(lab.words(more)), None, 42)
    assert c.row_sparse is (more in SPARSE)
    if more in SPARSE + EXPLICIT[:3]:
        masker = train.make_masker(load_model(lab.world / "t5"), c)
        assert isinstance(masker, RowSparseMIGU) is c.row_sparse


@pytest.mark.parametrize("place, model, task", TYPED)
def test_a_run_is_named_by_what_its_folders_are_called(place, model, task, lab):
    lab.patch.chdir(lab.world / place)
    for home in ("HOME", "USERPROFILE"):
        lab.patch.setenv(home, str(lab.world))
    args = train.parse_args(["--tasks", task, "--model", model, "--mask", "none"])
    c = train.settings(args, None, 42)
    assert (c.model, c.tasks) == (str(lab.world / "t5"), [str(lab.world / "tasks" / "one")])
    assert train.run_folder(c, "runs") == Path("runs", "one-t5-full-none-s42")


@pytest.mark.parametrize("fault, mistake", [(f, m) for f, some in MISTAKES.items() for m in some])
def test_a_mistake_is_one_line_found_before_a_model_is_fetched(fault, mistake, lab):
    lab.patch.chdir(lab.place)
    lab.patch.setattr(download, "fetch_model", None)
    message = lab.refusal(["--model", "no/such", *mistake.split()])
    assert message.startswith("train.py: ") and fault in message and message.count("\n") == 1
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
    return Lab(world, tmp_path_factory.mktemp("finished"), None, None).run(LEARN, model="llama")


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


@pytest.mark.parametrize("more, masked", [("", "two"), ("--mask-first", "one two")])
def test_the_log_has_a_line_a_step_and_the_first_task_is_masked_on_request(more, masked, lab):
    lines = left(lab.run(more))["log.csv"].decode().splitlines()
    header, *log = [line.split(",") for line in lines]
    assert header == ["task", "step", "loss", "kept", "norm"]
    steps = [(task, str(step)) for task in ("one", "two") for step in range(1, 7)]
    assert [(task, step) for task, step, *_ in log] == steps
    for task, _, loss, kept, norm in log:
        assert float(kept) == (5 / 16 if task in masked else 1.0)  # of 16 rows 11 are masked
        assert 1 < float(loss) < 10 and 0 < float(norm) < 10


def test_replay_adds_a_seeded_part_of_a_past_task_that_is_not_what_it_trained_first(world):
    one, two = (data.load_task("", world / "tasks" / name) for name in ("one", "two"))
    c = SimpleNamespace(joint=False, replay=0.3, seed=42)
    examples = train.stage_examples(c, [one, two], 1)
    replayed = set(examples[24:])
    assert examples[:24] == two.train and len(examples) == 24 + 7  # int(0.3 * 24)
    assert len(replayed) == 7 and replayed < set(one.train)
    assert train.stage_examples(c, [one, two], 1) == examples
    (first,) = data.batches(one.train, 24, train.seeded(42, 0))
    assert replayed != set(first[:7])
    c.seed = 7
    assert set(train.stage_examples(c, [one, two], 1)[24:]) != replayed


def test_joint_training_mixes_all_tasks_and_tests_each(lab):
    files = left(lab.run("--joint --mask none --limit 12 4"))
    assert files["log.csv"].count(b"\none+two,") == 6  # 24 records, twice
    first, second = files["results.json"]
    assert first == [None, None] and None not in second
    assert files["predictions/2-two/one.jsonl"].count(b"\n") == 4


@pytest.mark.parametrize("more", ["--mask migu", "--mask none --dtype bfloat16"])
@pytest.mark.parametrize("tune", ["lora", "inclora", "olora"])
def test_adapters_change_q_and_v_alone_and_resume_bitwise(tune, more, lab):
    more += f" --tune {tune} --replay 0.25 --eval all --threshold 0.5 --epochs 1"
    whole = left(lab.run(more, "whole"))
    lab.kill(12, more, "cut")  # in the second task
    cut = lab.run(f"{more} --resume", "cut")
    assert left(cut) == whole
    assert ("adapters/2.safetensors" in whole) == (tune != "inclora")
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
    ("results.json", b"{", "--resume", "results.json: not JSON"),
    ("model/model.safetensors", b"no", "--resume", "model.safetensors: not a safetensors file"),
    ("model/model.safetensors", b"\2" + bytes(7) + b"{}", "--resume", "not written by a run"),
]


def test_a_run_killed_at_any_write_resumes_to_the_very_same_files(lab):
    more = "--eval all --limit 8 1 --epochs 1"
    expected = left(lab.run(more, "whole"))
    for n in range(17):  # files are written
        lab.kill(n, more, str(n))
        assert left(lab.run(f"{more} --resume", str(n))) == expected


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_sigkilled_process_resumes_to_the_very_same_files(lab):
    more = "--eval all --epochs 6"
    process = subprocess.Popen([sys.executable, HERE / "train.py", *lab.words(more)])
    while not list(lab.place.rglob("model.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)  # in the second task
    assert process.wait() == -signal.SIGKILL
    assert left(lab.run(f"{more} --resume")) == left(lab.run(more, "whole"))


def test_a_finished_run_has_nothing_left_to_do(lab, finished):
    before, more = left(finished), f"{LEARN} --resume --checkpointing"  # which changes no number
    lab.run(more, finished.parent, "llama")
    assert "nothing left to do" in lab.capsys.readouterr().out and left(finished) == before


@pytest.mark.parametrize("file, content, more, fault", STOPPED)
def test_a_run_that_cannot_go_on_says_why(file, content, more, fault, lab, finished):
    folder = shutil.copytree(finished, lab.place / finished.name)
    (folder / file).write_bytes(content)
    assert fault in lab.refusal(lab.words(f"{LEARN} {more}", "", "llama"))


@pytest.mark.parametrize("tune", ["full", "olora"])
def test_a_pattern_that_selects_nothing_stops_before_training_and_leaves_no_file(tune, lab):
    lab.patch.setattr(train, "train_task", None)
    message = lab.refusal(lab.words(f"--layers query --tune {tune}"))
    assert "--layers: 'query' is found in none of the trained linear layers" in message
    assert files_below(lab.place) == set()


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_finished_task(lab):
    loss, more = T5.loss, "--epochs 4"  # 12 steps a task
    factors = itertools.chain([1] * 12, itertools.repeat(math.inf))
    with lab.patch.context() as patched:
        patched.setattr(T5, "loss", lambda self, **batch: next(factors) * loss(self, **batch))
        message = lab.refusal(lab.words(more))
    assert re.search("norm is (nan|inf) at step 10 of two: lower --lr", message)
    assert left(lab.run(f"{more} --resume")) == left(lab.run(more, "whole"))


def test_a_step_that_destroys_the_weights_is_not_kept(lab):
    loss, more = T5.loss, "--lr 3e38 --clip 0 --optimizer sgd --limit 8 --epochs 1"
    lab.patch.setattr(T5, "loss", lambda self, **batch: 100 * loss(self, **batch))
    assert "weights not finite at step 1 of one: lower --lr" in lab.refusal(lab.words(more))
    assert not list(lab.place.rglob("model.safetensors"))


# ---- several processes

# Commands, one after another, in each of the processes that torchrun starts: all with one process
# group. A run into the folder "cut" dies in its second task, and goes on.
WORKER = """
import functools, json, sys
sys.path.insert(0, sys.argv[1])
import train
train.add_lora = functools.partial(train.add_lora, dropout=0.0)
train.dist.init_process_group("gloo")
train.dist.init_process_group = train.dist.destroy_process_group = lambda *_, **others: None
train_stage, seen = train.train_stage, [None, None]
def checking_stage(model, tokenizer, c, tasks, stage, earlier):
    trained = train_stage(model, tokenizer, c, tasks, stage, earlier)
    train.dist.all_gather_object(seen, [p.sum().item() for p in model.parameters()])
    assert seen[0] == seen[1]
    return sys.exit("dies") if dies and stage else trained
train.train_stage = checking_stage
for words in json.loads(sys.argv[2]):
    dies = words[-1].endswith("cut")
    try:
        train.main(words)
    except SystemExit as stop:
        assert dies and str(stop) == "dies"
"""
SPLIT = "--optimizer sgd --lr 0.3 --mask-first --batch-size 8 --epochs 1 --eval all --limit"
SPLITS = {  # of 9 records the last batch holds one: then the second process has nothing to do
    "migu": "9",
    "random": "12 --mask random",
    "gradient": "9 --mask gradient --micro-batch 3",
    "weight": "9 --mask weight --layers wi",
    "none": "9 --mask none",
    "lora": "9 --tune lora",
    "inclora": "9 --tune inclora --mask random",
    "olora": "12 --tune olora --replay 0.5 --threshold 0.5",
}


def torchrun(script, *words):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*start, script, *words], capture_output=True, text=True)


def test_two_processes_make_the_masks_of_one_and_its_weights_to_rounding(lab):
    changed(lab.world / "t5", {"config.json": {"dropout_rate": 0.0}}, lab.place / "still")
    commands = [lab.words(f"{SPLIT} {more}", n, lab.place / "still") for n, more in SPLITS.items()]
    for more in ("whole", "cut", "cut --resume"):  # with dropout
        commands.append(lab.words(f"--mask random --out {lab.place / more}"))
    (lab.place / "worker.py").write_text(WORKER)
    done = torchrun(lab.place / "worker.py", str(HERE), json.dumps(commands))
    assert done.returncode == 0, done.stderr
    assert left(*(lab.place / "whole").iterdir()) == left(*(lab.place / "cut").iterdir())

    lab.patch.setattr(train, "add_lora", partial(add_lora, dropout=0.0))
    start = load_model(lab.place / "still").state_dict()
    for n, more in SPLITS.items():
        alone = lab.run(f"{SPLIT} {more}", "alone" + n, lab.place / "still")
        (split,) = (lab.place / n).iterdir()
        one, two = left(alone), left(split)
        assert one.keys() == two.keys() and one["results.json"] == two["results.json"], more
        logs = [np.genfromtxt(io.BytesIO(f["log.csv"]), delimiter=",")[1:, 2:] for f in (one, two)]
        np.testing.assert_allclose(*logs, rtol=1e-4)  # losses, rows kept, norms
        models = [load_model(folder / "model").state_dict() for folder in (alone, split)]
        assert_close(*models, 1e-4)
        for name, weight in start.items():
            same = [(model[name] == weight).all(-1) for model in models]
            assert torch.equal(*same), f"{more}: {name}"


def test_a_mistake_is_one_line_in_several_processes_too(lab):
    stopped = torchrun(HERE / "train.py", *lab.words("--demo"))
    assert stopped.returncode == 1 and stopped.stderr.count("train.py: ") == 1


# ---- tables and pictures over runs

GAIN = [{}, {"threshold": 0.5, "mask_first": True, "layers": "q"}]
NO_GAIN = [{"seed": 7}, {"lr": 1e-3}, {"replay": 0.02}, {"order": 2}]
NO_GAIN += [{"mask": "none", "threshold": 0.5}]


def test_a_table_has_means_and_gains_over_orders_and_seeds(tmp_path):
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("changes", GAIN + NO_GAIN)
def test_a_gain_is_over_the_same_run_without_a_mask_alone(changes, tmp_path):
    run = write_run(tmp_path / "run", 74, **{"mask": "migu", **changes})
    words = sum(rows_of([run, write_run(tmp_path / "none", 70)]), [])
    assert [word for word in words if re.match(r"[+-]\d", word)] == ["+4.0"] * (changes in GAIN)


def test_rows_of_one_name_say_in_what_they_differ(tmp_path):
    folders = [write_run(tmp_path / str(lr), 70, lr=lr, clip=1.0) for lr in (1e-4, 1e-3)]
    assert [row[3:5] for row in rows_of(folders)] == [["lr", "0.0001"], ["lr", "0.001"]]


def test_unfinished_and_repeated_runs_are_named_and_not_counted(tmp_path):
    runs = [("a", 60, 1), ("b", 80, 2), ("c", None, 3), ("d", 99, 1)]
    folders = [write_run(tmp_path / name, x, seed=s) for name, x, s in runs]
    models.write_text(tmp_path / "e" / "config.json", "{}")
    models.write_text(tmp_path / "e" / "results.json", "{}")
    text = evaluation.compare([*folders, tmp_path / "e"])
    assert f"not counted, as it is no run of this project: {tmp_path / 'e'}" in text
    assert "70.0 ± 14.1 (2 seeds)" in text
    assert f"not counted, as it is not finished: {tmp_path / 'c'}" in text
    assert f"not counted, as it repeats another: {tmp_path / 'd'}" in text


def test_eval_py_passes_other_folders_over_and_draws(lab, finished):
    pytest.importorskip("matplotlib")
    task = str(lab.world / "tasks" / "one")
    overlap = ["--overlap", str(lab.world / "t5"), "--tasks", task, task]
    for words in ([str(lab.place), str(finished)], overlap):
        evaluation.main([*words, "--plot", str(lab.place / "runs.png")])
        assert (lab.place / "runs.png").read_bytes().startswith(b"\x89PNG")
        (lab.place / "runs.png").unlink()
    assert "llama full migu" in lab.capsys.readouterr().out
    assert "eval.py: no results in these" in lab.refusal([lab.place], evaluation.main)


def test_rows_in_common_are_the_hand_computed_ones():
    one = {"a": torch.tensor([4.0, 3, 2, 1]), "b": torch.tensor([1.0, 2, 3, 4])}
    other = {"a": torch.tensor([4.0, 1, 2, 3]), "b": torch.tensor([1.0, 2, 4, 3])}
    assert evaluation.common_rows(one, other, 0.5) == 0.75  # rows 0, 1 and 0, 3; 2, 3 and 2, 3


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_overlap_is_a_table_over_tasks_and_leaves_the_model_as_it_was(kind, lab):
    names = [str(lab.world / "tasks" / name) for name in ("one", "two")]
    evaluation.main(["--overlap", str(lab.world / kind), "--tasks", *names])
    header, *lines = [line.split() for line in lab.capsys.readouterr().out.splitlines()]
    assert header[-2:] == [line[0] for line in lines] == ["one", "two"]
    shares = np.array([line[1:] for line in lines], float)
    assert (shares > 0.3).all() and shares.trace() > shares[::-1].trace()

    model, tokenizer = load_model(lab.world / kind), data.load_tokenizer(lab.world / kind)
    examples = data.load_task("", names[0]).train
    found = evaluation.magnitudes(model, tokenizer, examples)
    masker, before = MIGU(model.train()), set(vars(model))
    torch.manual_seed(0)
    for part in (examples[:16], examples[16:]):  # 16 at once are in memory
        encoded = [data.encode_example(tokenizer, e, kind == "llama") for e in part]
        model.loss(**data.collate(*zip(*encoded))).backward()
    assert_close(found, masker.magnitude, 0)
    assert set(vars(model)) == before and all(p.grad is not None for p in model.parameters())


def test_overlap_wants_a_model_and_tasks(lab):
    for words in ([], ["--overlap", lab.world / "t5"], ["runs", "--tasks", "one"]):
        assert "--overlap MODEL with --tasks" in lab.refusal(words, evaluation.main)
    one = write_task(lab.place / "single")  # has one record
    for model, fault in (
        (lab.world / "t5", "single: two batches need"),
        ("no", "no is no model's folder"),
    ):
        task = one if fault[0] == "s" else lab.world / "tasks" / "one"
        assert fault in lab.refusal(["--overlap", model, "--tasks", task], evaluation.main)


def test_a_table_is_printed_where_only_ascii_can_be(tmp_path):
    runs = [write_run(tmp_path / str(seed), 40 + 20 * seed, seed=seed) for seed in (1, 2)]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    printed = subprocess.check_output([sys.executable, HERE / "eval.py", *runs], env=ascii_only)
    assert b"70.0 ? 14.1 (2 seeds)" in printed


# ---- the demo, and real data


@pytest.mark.skipif("MIGU_DATA" not in os.environ, reason="MIGU_DATA is not set")
def test_real_benchmark_files_load():
    tasks = {name: data.load_task(os.environ["MIGU_DATA"], name) for name in data.GROUP_OF}
    assert len(tasks) == 15 and all(task.train and task.test for task in tasks.values())
    assert sum(example.answer == "-" for example in tasks["MNLI"].test) == 131


# ---- downloading


def test_only_what_the_project_reads_is_fetched_verified_and_not_fetched_twice(hub):
    junk = ["pytorch_model.bin", "README.md", "model.fp16.safetensors", "tokenizer.py"]
    hub.files |= {name: b"junk" for name in [*junk, "model.safetensors.index.json"]}
    for name in ("tokenizer", "onnx", "tokenizer.json"):
        hub.folders.append({"type": "directory", "path": name, "size": 0, "oid": "a" * 40})
    download.main(["t5-large"])
    assert is_whole(hub, "models/t5-large")
    assert hub.requests[0][0] == "/api/models/google-t5/t5-large/tree/main"
    assert hub.requests[-1][0].endswith("/resolve/main/config.json")  # now the folder is whole
    count = len(hub.requests)
    download.main(["t5-large"])
    assert len(hub.requests) == count + 2  # the listing, and what kind of model it is
    Path("models/t5-large/spiece.model").write_bytes(b"damage")
    download.main(["t5-large"])
    assert is_whole(hub, "models/t5-large") and len(hub.requests) == count + 5


def test_of_several_sets_of_weights_the_shards_of_the_index_are_fetched(hub):
    del hub.files["model.safetensors"]
    index = {"weight_map": {"x": "a-1.safetensors", "y": "a-2.safetensors", "z": "a-1.safetensors"}}
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.files |= {f"{name}.safetensors": name.encode() for name in ("a-1", "a-2", "b")}
    download.main(["own/er"])
    assert files_below("models/own/er") == hub.files.keys() - {"b.safetensors"}


def test_all_pages_are_read_and_the_token_goes_to_no_other_host(hub):
    hub.page = 1
    for host in ("", hub.other_host):  # an address without a host; another host
        hub.next_host = host
        download.main(["own/er"])
        assert is_whole(hub)
    for path, _, token, host in hub.requests:
        assert token == (None if "localhost" in host else "Bearer hf_SECRET"), path
    assert sum("cursor=" in path and "localhost" in host for path, *_, host in hub.requests) == 2


@pytest.mark.parametrize("space", ["\n", " \r\n", "\t"])
def test_space_around_the_token_is_dropped_and_inside_it_refused(hub, space, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", f"{space}hf_SECRET{space}")
    download.main(["own/er"])
    assert hub.requests[0][2] == "Bearer hf_SECRET"
    for inside in (space, " ", "\x1b"):
        monkeypatch.setenv("HF_TOKEN", f"hf_SECRET{inside}hf_SECRET")
        assert "HF_TOKEN holds what" in refusal(capsys, "own/er")


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_transfer_cut_often_goes_on_each_time_where_it_stopped(hub, knows_ranges):
    hub.cuts = [1000, 2000, 3000, 4000, 5000, 2000000]
    hub.knows_ranges = knows_ranges  # if not, each answer begins at the beginning
    starts = [1000, 3000, 6000, 10000, 15000, 2015000] if knows_ranges else list(hub.cuts)
    download.main(["own/er"])
    ranges = [asked for path, asked, *_ in hub.requests if path.startswith("/cdn/")]
    assert ranges == [None, *(f"bytes={start}-" for start in starts)] and is_whole(hub)
    assert hub.waited == [1] * 6


@pytest.mark.parametrize("asked, waits", [(None, [1, 2]), ("7", [7, 7]), ("3600", [60, 60])])
def test_a_busy_server_is_asked_again_a_little_later(hub, asked, waits):
    headers = {"Retry_After": asked} if asked else {}
    for status, part in ((429, "/api/"), (502, "config"), (503, "/cdn/model"), (504, "spiece")):
        hub.first[part] = [(status, headers)] * 2
    download.main(["own/er"])
    assert hub.waited == waits * 4 and is_whole(hub)


@pytest.mark.parametrize("status, said", [(401, "set HF_TOKEN"), (403, "licence"), (500, "later"),
                                          (404, "check the name"), (429, "later")])  # fmt: skip
def test_a_refusal_says_what_to_do(hub, status, said, capsys):
    hub.first = {"/api/": [(status, {})] * 5}
    fault = refusal(capsys, "own/er")
    assert f"/api/models/own/er/tree/main: {status} " in fault and said in fault
    assert hub.waited == ([1, 2, 4, 8] if said == "later" else [])


NO_JSON, NO_WEIGHTS = "the answer is not the expected JSON", {"model.safetensors": None}
INDEX, LLAMA = "model.safetensors.index.json", {"config.json": b'{"model_type": "llama"}'}


@pytest.mark.parametrize("changes, said", [
    ({**NO_WEIGHTS, "pytorch_model.bin": b"pickle"}, "no safetensors of a whole model"),
    ({**NO_WEIGHTS, "adapter_model.safetensors": b""}, "adapters are never opened"),
    ({"config.json": None}, "has no config.json"),
    ({"config.json": b"<html>"}, NO_JSON), ({"config.json": b"[]"}, NO_JSON),
    ({"config.json": b'{"model_type": "mistral"}'}, "model_type mistral is not supported"),
    ({"config.json": b'{"model_type": "t5", "quantization_config": {}}'}, "is quantized"),
    ({"spiece.model": None, "tokenizer.json": b"{}"}, "copy spiece.model from the model it was"),
    (LLAMA, "own/er has no tokenizer.model: copy tokenizer.model from"),
    ({**LLAMA, "tokenizer.json": b'{"decoder": "Fuse"}'}, "is not a byte-level BPE: copy"),
    ({**NO_WEIGHTS, INDEX: b"{}"}, "has no weight_map"),
    *[({**NO_WEIGHTS, INDEX: b'{"weight_map": {"x": %b}}' % place}, "er: model.safetensors.index")
      for place in (b'"gone.safetensors"', b'"../a.safetensors"', b'"config.json"', b"7", b"[]")],
])  # fmt: skip
def test_a_model_that_could_not_be_loaded_is_refused_before_weights(hub, changes, said, capsys):
    hub.files = {name: body for name, body in {**hub.files, **changes}.items() if body is not None}
    assert said in refusal(capsys, "own/er") and not files_below(".")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_redirect_is_followed_on_python_3_10_too(hub, status):
    hub.first = {"/old/": [(status, {"Location": "/api/models/own/er/tree/main"})]}
    download.main(["old/er"])
    assert is_whole(hub, "models/old/er") and hub.requests[1][2] == "Bearer hf_SECRET"


def test_a_wrong_hash_leaves_no_file(hub, capsys):
    hub.lies = {"model.safetensors": bytes(len(hub.files["model.safetensors"]))}
    assert "another hash than its listing: run again" in refusal(capsys, "own/er")
    assert files_below("models") == {"own/er/spiece.model"}
    Path("models/own/er/model.safetensors.part").write_bytes(bytes(9999999))  # of another file
    assert "another hash than its listing: run again" in refusal(capsys, "own/er")
    hub.lies = {}
    download.main(["own/er"])
    assert is_whole(hub)


@pytest.mark.parametrize("killed, resumed_at", [(False, 2000000), (True, 1 << 20)])
def test_of_two_downloads_at_once_the_second_waits(hub, killed, resumed_at, monkeypatch, capsys):
    hub.cuts = [2000000]
    hub.go_on.clear()  # the first has a part of the weights, and waits for the rest
    first = subprocess.Popen([sys.executable, HERE / "download.py", "own/er"], stderr=-3)
    part = Path("models/own/er/model.safetensors.part")
    while not part.exists() or part.stat().st_size < 1 << 20:  # in blocks of this size
        time.sleep(0.01)

    def let_the_first_end(_):
        if killed:
            first.kill()
        hub.go_on.set()
        assert first.wait(60) == (-9 if killed else 0)

    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=let_the_first_end))
    download.main(["own/er"])
    assert is_whole(hub) and "another process fetches it, waiting" in capsys.readouterr().err
    ranges = [asked for path, asked, *_ in hub.requests if path.startswith("/cdn/")]
    assert ranges == [None, f"bytes={resumed_at}-"]  # nothing came twice, and no lock was left


def test_the_benchmark_is_fetched_without_what_nobody_reads(hub, capsys):
    names = [f"G/task{i}/{part}.json" for i in range(15) for part in ("train", "test", "labels")]
    hub.files = {f"CL_Benchmark/{name}": name.encode() for name in names}
    tree = [{"path": "CL_Benchmark/G", "sha": "a" * 40, "type": "tree"}]
    for name, body in {**hub.files, "CL_Benchmark/G/t/dev.json": b"", "README.md": b""}.items():
        tree.append({"path": name, "size": len(body), "sha": blob(body), "type": "blob"})
    hub.listing = json.dumps({"tree": tree}).encode()
    download.main(["data"])
    assert files_below("data") == set(names)
    assert all(Path("data", name).read_text() == name for name in names)
    hub.listing = json.dumps({"tree": tree[:9]}).encode()
    assert "8 files, not 45 of 15 tasks" in refusal(capsys, "data")


# ---- how fast: python test_migu.py --bench [--model t5-base] [--batch-size 8] [--peer] ...

SHAPES = {  # a model's class and sizes, in the order of SMALL
    "t5-small": (T5, (32128, 512, 64, 2048, 6, 8, 32, 128, 1e-6, 0.1)),
    "t5-base": (T5, (32128, 768, 64, 3072, 12, 12, 32, 128, 1e-6, 0.1)),
    "t5-large": (T5, (32128, 1024, 64, 4096, 24, 16, 32, 128, 1e-6, 0.1)),
    "llama-2-7b": (Llama, (32000, 4096, 11008, 32, 32, 32)),
    "smollm2-135m": (Llama, (49152, 576, 1536, 30, 9, 3)),
}
ANSWER = 4  # tokens


def peer_model(kind, config, device):
    """transformers' own, with a loss() as ours have."""
    import transformers

    auto = transformers.AutoModelForSeq2SeqLM if kind is T5 else transformers.AutoModelForCausalLM
    config = {**config, "decoder_start_token_id": 0}
    config = transformers.AutoConfig.for_model(kind.__name__.lower(), **config)
    with device:
        peer = auto.from_config(config, attn_implementation="sdpa")
    peer.loss = lambda **batch: peer(**{name: x.to(device) for name, x in batch.items()}).loss
    return peer


def bench_args(argv):
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=bench.__doc__)
    add = parser.add_argument
    add("--bench", action="store_true", required=True)
    add("--model", choices=SHAPES, default="t5-base")
    add("--batch-size", type=int, default=8)
    add("--device", type=torch.device, default="cuda" if cuda else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    add("--repeats", type=int, default=5)
    add("--peer", action="store_true", help="transformers' model too, on a padded batch")
    return parser.parse_args(argv)


def bench(argv):
    """Times all kinds of step, and a test, by turns; 64 to 256 random ids a prompt, 4 an answer."""
    args = bench_args(argv)
    kind, sizes = SHAPES[args.model]
    config = SMALL[kind] | dict(zip(SMALL[kind], sizes))
    config["tie_word_embeddings"] = args.model != "llama-2-7b"
    rng = np.random.default_rng(42)
    lengths = rng.integers(64, 257, args.batch_size)
    sources = [rng.integers(3, config["vocab_size"], length).tolist() for length in lengths]
    rows = [(ids, ids[:ANSWER]) for ids in sources]
    if kind is Llama:
        rows = [(ids + answer, [-100] * len(ids) + answer) for ids, answer in rows]
    c = options(micro_batch=args.batch_size, dtype=args.dtype, lr=1e-4)
    dtype = getattr(torch, args.dtype)

    def step(model, optimizer, make_masker=None):
        masker = make_masker and make_masker(model)
        train.train_step(model.train(), optimizer, masker, rows, c, {})
        if masker:
            masker.remove()

    def test(model, batch, **others):
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            model.eval().generate(**batch, max_new_tokens=ANSWER, **others)

    with args.device:
        model = kind(config)
    model.eos = []  # no answer ends early
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
        whole = {"min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
        calls["transformers' test"] = partial(test, peer, batch, **whole)
    seconds = {name: [] for name in calls}
    for _, name in tqdm([*itertools.product(range(args.repeats + 1), calls)], desc="bench"):
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


@pytest.mark.parametrize("kind", [T5, Llama])
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
