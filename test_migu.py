"""What the project claims, one test a claim. `pytest test_migu.py`, offline, on a CPU.

Tests against transformers and safetensors skip where those are not installed. MIGU_DATA=.../CL_Benchmark and
MIGU_LLAMA=.../stories260K let two more tests use real files. Speed is no test: `python train.py --bench` measures it, at the end
of this file.
"""

import contextlib
import csv
import hashlib
import http.server
import itertools
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import download
import eval as evaluation
import model as models
import train
import migu
from migu import MIGU, add_lora, keep_rows, merge_lora, orthogonality_penalty
from model import T5, Llama, load_model, read_safetensors, save_model, write_safetensors

HERE = Path(__file__).parent
T5_SMALL = dict(
    vocab_size=97,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    dropout_rate=0.0,
    layer_norm_epsilon=1e-6,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    decoder_start_token_id=0,
)
LLAMA_SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act="silu",
    rms_norm_eps=1e-6,
)


def small(kind=T5, **changes):
    torch.manual_seed(1)
    return kind({**(T5_SMALL if kind is T5 else LLAMA_SMALL), **changes})


def padded_batch(vocab=97, lengths=(13, 5, 1, 9), causal=False):
    torch.manual_seed(2)
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, vocab, mask.shape) * mask
    if causal:
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        labels[0, 4] = -100
    else:
        labels = torch.randint(2, vocab, (len(lengths), 6))
        labels[1, 3:] = -100
        labels[2, 1] = -100  # inside a row: ignored, yet a position
        labels[3, 1:] = torch.tensor([-100, 4, -100, -100, -100])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# ---- MIGU


def test_keep_rows_is_the_quantile_with_linear_interpolation():
    magnitude = torch.arange(1.0, 11.0)  # 0.7-quantile: 1 + 0.7 * 9 = 7.3
    assert keep_rows(magnitude, 0.7).tolist() == [False] * 7 + [True] * 3
    assert keep_rows(magnitude.flip(0), 0.7).tolist() == [True] * 3 + [False] * 7
    assert keep_rows(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.5).tolist() == [
        False,
        False,
        True,
        True,
    ]  # at 2.5
    assert keep_rows(magnitude, 0.0).all()
    assert keep_rows(magnitude, 1.0).tolist() == [False] * 9 + [True]


def test_ties_at_the_threshold_are_all_kept():
    assert keep_rows(torch.tensor([5.0, 1.0, 5.0, 5.0]), 0.7).tolist() == [True, False, True, True]
    assert keep_rows(torch.ones(8), 0.7).all()


def test_mask_is_the_hand_computed_one():
    layer = nn.Linear(2, 4, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [0.0, -3.0]])
    masker = MIGU(layer, threshold=0.5)
    layer(torch.tensor([[1.0, 1.0], [3.0, -1.0]])).sum().backward()
    # |h| summed over the two tokens: 1 + 3, 1 + 1, 2 + 6, 3 + 3 = 4, 2, 8, 6; the median is 5
    assert masker.magnitude[layer].tolist() == [4.0, 2.0, 8.0, 6.0]
    assert masker.mask_gradients().item() == 0.5
    assert layer.weight.grad.tolist() == [[0.0, 0.0], [0.0, 0.0], [4.0, 0.0], [4.0, 0.0]]


def test_each_step_starts_afresh():
    layer = nn.Linear(1, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0], [2.0]])
    masker = MIGU(layer, threshold=0.5)
    layer(torch.tensor([[100.0]])).sum().backward()
    masker.mask_gradients()
    layer.weight.data = torch.tensor([[2.0], [1.0]])  # the first step's 100 and 200 must be gone
    layer.weight.grad = None
    layer(torch.tensor([[1.0]])).sum().backward()
    masker.mask_gradients()
    assert layer.weight.grad.tolist() == [[1.0], [0.0]]


def test_padding_does_not_change_the_mask():
    for kind in (T5, Llama):
        model = small(kind).train()
        batch = padded_batch(causal=kind is Llama)
        masker = MIGU(model)
        model.loss(**batch)
        packed = {layer: m.clone() for layer, m in masker.magnitude.items()}
        masker.magnitude.clear()
        for i in range(4):  # each row alone, without padding
            real = batch["attention_mask"][i].bool()
            labels = (
                batch["labels"][i][real]
                if kind is Llama
                else batch["labels"][i][: (batch["labels"][i] != -100).nonzero().max() + 1]
            )
            model.loss(
                batch["input_ids"][i][real][None], torch.ones(1, int(real.sum())), labels[None]
            )
        assert packed.keys() == set(masker.layers.values())
        for layer in packed:
            torch.testing.assert_close(packed[layer], masker.magnitude[layer], rtol=1e-5, atol=1e-4)


def test_linear_layers_see_real_tokens_only():
    for kind in (T5, Llama):
        model, seen = small(kind), Counter()
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(
                    lambda _, inputs, __, name=name: seen.update({name: len(inputs[0])})
                )
        model.loss(**padded_batch(causal=kind is Llama))
        if kind is Llama:
            assert seen["model.layers.1.mlp.gate_proj"] == 13 + 5 + 1 + 9
            assert (
                seen["lm_head"] == (11 + 3 + 0 + 7) - 1
            )  # labelled positions: two prompt tokens a row, one -100
        else:
            assert seen["encoder.block.1.layer.0.SelfAttention.q"] == 13 + 5 + 1 + 9
            assert seen["decoder.block.1.layer.1.EncDecAttention.k"] == 13 + 5 + 1 + 9
            assert (
                seen["decoder.block.1.layer.2.DenseReluDense.wi"] == 6 + 3 + 6 + 3
            )  # each row to its last label
            assert seen["lm_head"] == 6 + 3 + 5 + 2


def test_only_training_passes_count():
    model = small()
    masker = MIGU(model)
    batch = padded_batch()
    model.eval()
    model(**batch)
    model.train()
    with torch.no_grad():
        model(**batch)
    model.generate(batch["input_ids"], batch["attention_mask"], 3)
    assert not masker.magnitude
    model.eval()
    model.loss(**batch).backward()
    with pytest.raises(RuntimeError, match="no pass in training mode"):
        masker.mask_gradients()


def test_remove_leaves_the_model_as_it_was():
    model = small().train()
    names = set(model.state_dict())
    masker = MIGU(model)
    masker.remove()
    assert (
        not any(module._forward_hooks for module in model.modules())
        and set(model.state_dict()) == names
    )
    model.loss(**padded_batch())
    assert not masker.magnitude


def test_all_linear_layers_but_the_head_are_masked():
    names = set(MIGU(small()).layers)
    assert "lm_head" not in names and len(names) == 2 * 6 + 2 * 10
    assert set(MIGU(small(), layers=".").layers) == names | {"lm_head"}
    assert len(MIGU(small(Llama)).layers) == 2 * 7
    assert set(MIGU(small(), layers=r"encoder.*\.q$").layers) == {
        f"encoder.block.{i}.layer.0.SelfAttention.q" for i in (0, 1)
    }
    with pytest.raises(ValueError, match="encoder.block.0.layer.0.SelfAttention.q"):
        MIGU(small(), layers="query")


def test_norms_embeddings_and_position_tables_are_not_masked():
    model = small().train()
    masker = MIGU(model)
    model.loss(**padded_batch()).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    masker.mask_gradients()
    for name, p in model.named_parameters():
        rows = (
            (p.grad != before[name]).flatten(1).any(1) if p.dim() == 2 else (p.grad != before[name])
        )
        assert bool(rows.any()) == (name.removesuffix(".weight") in masker.layers), name


def test_a_tied_head_can_be_masked():
    model = small().train()
    assert model.lm_head.weight is model.shared.weight
    masker = MIGU(model, layers="lm_head")
    model.loss(**padded_batch()).backward()
    keep = keep_rows(masker.magnitude[model.lm_head], 0.7)
    masker.mask_gradients()
    assert (model.shared.weight.grad[~keep] == 0).all() and (
        model.shared.weight.grad[keep] != 0
    ).any(1).all()


def test_frozen_layers_are_passed_over():
    model = small().train()
    model.encoder.requires_grad_(False)
    masker = MIGU(model)
    model.loss(**padded_batch()).backward()
    kept = masker.mask_gradients()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert 0.3 <= kept.item() <= 0.35  # widths 32 and 48 keep 10 and 15 rows
    expected = sum(
        10 if layer.out_features == 32 else 15
        for name, layer in masker.layers.items()
        if "decoder" in name
    )
    rows = sum(layer.out_features for name, layer in masker.layers.items() if "decoder" in name)
    assert kept.item() == pytest.approx(expected / rows)


def test_magnitudes_are_fp32_under_autocast():
    model = small().train()
    masker = MIGU(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(**padded_batch())
    loss.backward()
    assert {m.dtype for m in masker.magnitude.values()} == {torch.float32}
    masker.mask_gradients()
    q = model.encoder.block[0].layer[0].SelfAttention.q.weight.grad
    assert q.dtype == torch.float32 and int((q == 0).all(1).sum()) == 22


def test_sgd_leaves_masked_rows_and_adamw_moves_them():
    for optimizer, moves in ((torch.optim.SGD, False), (torch.optim.AdamW, True)):
        layer = nn.Linear(1, 2, bias=False)
        layer.weight.data = torch.tensor([[1.0], [2.0]])
        step = optimizer(layer.parameters(), lr=0.1, weight_decay=0.0)
        masker = MIGU(layer, threshold=0.5)
        for scale in ([1.0, 1.0], [4.0, 1.0]):  # row 1 is kept first, then row 0
            layer.weight.data *= torch.tensor(scale)[:, None]
            before = layer.weight.detach().clone()
            layer(torch.tensor([[1.0]])).sum().backward()
            masker.mask_gradients()
            step.step()
            step.zero_grad()
        assert (layer.weight[1] != before[1]).item() == moves
        assert layer.weight[0] != before[0]


@pytest.mark.parametrize("criterion", ["gradient", "weight"])
def test_other_criteria_rank_rows_by_l1_norm(criterion):
    layer = nn.Linear(2, 4, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0], [5.0, 0.0], [0.0, 3.0], [1.0, 0.5]])
    masker = MIGU(layer, 0.5, criterion)
    layer.weight.grad = torch.tensor([[3.0, 3.0], [1.0, 0.0], [-9.0, 1.0], [1.0, 1.0]])
    masker.mask_gradients()
    kept = layer.weight.grad.abs().sum(1) > 0
    assert kept.tolist() == (
        [True, False, True, False] if criterion == "gradient" else [False, True, True, False]
    )


def test_a_random_mask_really_masks_and_changes_every_step():
    torch.manual_seed(0)
    layer = nn.Linear(3, 100, bias=False)
    masker = MIGU(layer, 0.7, "random")
    masks = []
    for _ in range(2):
        layer.weight.grad = torch.ones_like(layer.weight)
        assert masker.mask_gradients().item() == pytest.approx(0.3)
        masks.append(layer.weight.grad[:, 0].clone())
    assert masks[0].sum() == 30 and not torch.equal(*masks)
    with pytest.raises(ValueError, match="criterion"):
        MIGU(layer, criterion="largest")


# ---- MIGU, fast


class Operations(TorchDispatchMode):
    """Counts what is computed, views aside."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


def masked_gradients(
    kind=T5, dtype=torch.float32, checkpointing=False, passes=1, changes=None, **options
):
    """Gradients of a small model after mask_gradients(), the fraction kept, and the magnitudes of its layers."""
    model = small(kind, **(changes or {})).train()
    model.c.checkpointing = checkpointing
    masker = MIGU(model, **options)
    torch.manual_seed(3)
    for _ in range(passes):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model.loss(**padded_batch(causal=kind is Llama))
        loss.backward()
    magnitudes = [m.clone() for m in masker.magnitude.values()]
    kept = masker.mask_gradients().item()
    masker.remove()
    return {name: p.grad for name, p in model.named_parameters()}, kept, magnitudes


@pytest.mark.parametrize("criterion", ["magnitude", "random", "weight"])
@pytest.mark.parametrize("kind", [T5, Llama])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_row_sparse_gradients_are_those_of_the_explicit_step(kind, dtype, tolerance, criterion):
    explicit, kept, _ = masked_gradients(kind, dtype, criterion=criterion)
    sparse, kept_too, _ = masked_gradients(kind, dtype, criterion=criterion, row_sparse=True)
    assert kept == kept_too and explicit.keys() == sparse.keys()
    for name, gradient in explicit.items():
        assert (sparse[name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name
        assert (
            torch.equal((sparse[name] == 0).flatten(1).all(1), (gradient == 0).flatten(1).all(1))
            if gradient.dim() > 1
            else True
        ), name


def test_row_sparse_keeps_ties_and_any_shape_of_input_and_counts_passes():
    layer = nn.Linear(2, 40)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    masker = MIGU(layer, row_sparse=True)
    layer(torch.ones(3, 5, 2)).sum().backward()  # all 40 rows tie: many more than the top 30 %
    assert (
        masker.mask_gradients() == 1
        and (layer.weight.grad == 15).all()
        and (layer.bias.grad == 15).all()
    )
    with torch.no_grad():
        layer(torch.ones(3, 2))  # a test in between does not count
    layer(torch.ones(3, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="one pass"):
        layer(torch.ones(3, 2))
    masker.remove()
    assert layer.weight.requires_grad and not layer._forward_hooks and not layer._forward_pre_hooks
    with pytest.raises(RuntimeError, match="has a gradient"):
        MIGU(nn.Linear(2, 4)).mask_gradients()
    masker, layer = MIGU(layer, row_sparse=True), layer.eval()
    with pytest.raises(RuntimeError, match="no pass in training mode"):
        layer(torch.ones(3, 2)).sum().backward()


def test_row_sparse_says_where_it_cannot_be():
    adapted = small()
    add_lora(adapted)
    for model, options in (
        (small(), {"layers": "lm_head"}),
        (small(), {"criterion": "gradient"}),
        (adapted, {}),
    ):
        with pytest.raises(ValueError, match="row_sparse goes neither"):
            MIGU(model, row_sparse=True, **options)


@pytest.mark.parametrize("width", [1, 8, 40, 97, 320, 1024, 4096])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.4, 0.7, 0.9, 1.0])
def test_row_sparse_has_room_for_all_kept_rows_without_counting_them(width, threshold):
    layer = nn.Linear(1, width, bias=False)
    masker = MIGU(layer, threshold, row_sparse=True)
    magnitude = torch.randperm(width).float()
    masker.magnitude[layer] = magnitude
    masked, ids, surplus = masker.choose()[layer]
    assert torch.equal(~masked[:, 0], keep_rows(magnitude, threshold))
    assert ids[~surplus[:, 0]].tolist() == (~masked[:, 0]).nonzero()[:, 0].tolist()
    assert len(ids) == min(width, len(ids) + -len(ids) % 16) and len(ids) <= (~masked).sum() + 17


@pytest.mark.parametrize("kind", [T5, Llama])
@pytest.mark.parametrize(
    "options", [{}, {"passes": 2}, {"row_sparse": True}, {"dtype": torch.bfloat16}]
)
def test_checkpointing_changes_neither_gradient_nor_mask(kind, options):
    changes = {"dropout_rate": 0.1} if kind is T5 else {"attention_dropout": 0.1}
    kept, again = (
        masked_gradients(kind, checkpointing=again, changes=changes, **options)
        for again in (False, True)
    )
    assert (
        kept[1] == again[1]
        and all(map(torch.equal, kept[2], again[2]))
        and len(kept[2]) == len(again[2])
    )
    assert all(torch.equal(kept[0][name], again[0][name]) for name in kept[0])


def test_checkpointing_holds_less():
    held = {}
    for again in (False, True):
        model, sizes = small(num_layers=6).train(), []
        model.c.checkpointing = again
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.nbytes) or t, lambda t: t
        ):
            model.loss(**padded_batch(lengths=(64,) * 4))
        held[again] = sum(sizes)
    assert held[True] < 0.5 * held[False]


def test_masking_costs_at_most_four_operations_a_layer():
    counts = {}
    for layers in (2, 6):
        model = small(num_layers=layers).train()
        for row in ("plain", *migu.CRITERIA):
            masker = MIGU(model, criterion=row) if row != "plain" else None
            with Operations() as operations:
                model.loss(**padded_batch()).backward()
                if masker:
                    masker.mask_gradients()
            counts[row, layers] = operations.count
            model.zero_grad()
            if masker:
                masker.remove()
    more = 4 * 6 + 4 * 10  # 4 encoder layers of 6 linear ones, 4 decoder layers of 10
    for row in migu.CRITERIA:  # what each further layer costs, beyond its own work
        cost = (counts[row, 6] - counts[row, 2]) - (counts["plain", 6] - counts["plain", 2])
        assert 0 < cost <= 4 * more, (row, cost / more)


# ---- adapters


def trained_adapters(kind=T5, **changes):
    """A model whose adapters are not zero any more."""
    model = small(kind, **changes)
    add_lora(model, dropout=0.0)
    for adapter in migu.adapted(model).values():
        nn.init.normal_(adapter.lora_B.weight, std=0.1)
    return model


@pytest.mark.parametrize("kind", [T5, Llama])
def test_lora_starts_as_the_base_and_trains_q_and_v_alone(kind):
    batch, model = padded_batch(causal=kind is Llama), small(kind).eval()
    before, weights = model(**batch)[0], sum(p.numel() for p in model.parameters())
    add_lora(model)
    assert (model.eval()(**batch)[0] - before).abs().max() <= 1e-6 * before.abs().max()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in trained}
    assert names == ({"q", "v"} if kind is T5 else {"q_proj", "v_proj"})
    assert len(trained) == 2 * 2 * (6 if kind is T5 else 2) and all(
        8 in p.shape for p in trained.values()
    )
    assert sum(p.numel() for p in model.parameters()) == weights + sum(
        p.numel() for p in trained.values()
    )


@pytest.mark.parametrize("kind", [T5, Llama])
def test_a_folded_adapter_gives_the_unfolded_one_s_logits(kind, tmp_path):
    batch, model = padded_batch(causal=kind is Llama), trained_adapters(kind).eval()
    logits = model(**batch)[0]
    save_model(model, tmp_path, tensors=migu.plain_weights(model))  # a folder that anything opens
    merge_lora(model)
    assert not migu.adapted(model) and all(p.requires_grad for p in model.parameters())
    assert (model(**batch)[0] - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert torch.equal(load_model(tmp_path)(**batch)[0], model(**batch)[0])


def test_a_is_masked_by_its_own_output_and_b_by_the_merged_one():
    model = nn.ModuleDict({"x": nn.ModuleDict({"q": nn.Linear(2, 4, bias=False)})})
    model.x.q.weight.data = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, 0.0], [0.0, 1.0]])
    add_lora(model, rank=2, alpha=4, dropout=0.0)
    layer = model.x.q
    layer.lora_A.weight.data = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    layer.lora_B.weight.data = torch.tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    masker = MIGU(model, 0.5)
    assert set(masker.layers) == {"x.q.lora_A", "x.q.lora_B"}  # W is frozen
    layer(torch.tensor([[1.0, 1.0]])).sum().backward()
    # A's output is (1, 3). Merged: (1, 5, 3, 1) + 4/2 * (4, 0, 0, 3) = (9, 5, 3, 7), of which B's own would be (4, 0, 0, 3)
    assert masker.magnitude[layer.lora_A].tolist() == [1.0, 3.0] and masker.magnitude[
        layer
    ].tolist() == [9.0, 5.0, 3.0, 7.0]
    layer.lora_A.weight.grad, layer.lora_B.weight.grad = torch.ones(2, 2), torch.ones(4, 2)
    masker.mask_gradients()
    assert layer.lora_A.weight.grad[:, 0].tolist() == [0.0, 1.0] and layer.lora_B.weight.grad[
        :, 0
    ].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_the_orthogonality_penalty_is_the_hand_computed_one():
    model = nn.ModuleDict({"x": nn.ModuleDict({"q": nn.Linear(2, 1, bias=False)})})
    add_lora(model, rank=2, alpha=4)
    layer = model.x.q
    layer.lora_A.weight.data = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    layer.lora_B.weight.data = torch.tensor([[3.0, 4.0]])
    earlier = {"x.q": torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.0, -1.0]])}
    # A_old A_new^T = [[-1, 4], [2, 0], [2, -4]]: the absolute values add up to 13; ||A|| = sqrt(21), ||B|| = 5
    assert orthogonality_penalty(model, earlier).item() == 6.5
    assert orthogonality_penalty(model, earlier, 1.0, 2.0).item() == pytest.approx(
        13 + 2 * (math.sqrt(21) + 5)
    )
    assert orthogonality_penalty(model, {}, 1.0, 2.0).item() == pytest.approx(
        2 * (math.sqrt(21) + 5)
    )  # the first task
    orthogonality_penalty(model, earlier, 1.0).backward()
    # the derivative by A_new: sign(A_new A_old^T) A_old
    assert (
        layer.lora_A.weight.grad.tolist() == [[-1 + 2, -1 - 1], [1, 1 + 1]]
        and layer.lora_B.weight.grad is None
    )


# ---- the models


def peer(kind, **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    if kind is T5:
        tie = changes.pop("tie_word_embeddings", True)
        model = transformers.T5ForConditionalGeneration(
            transformers.T5Config(**{**T5_SMALL, **changes}, tie_word_embeddings=tie)
        )
        if not tie:
            model.lm_head.weight = nn.Parameter(torch.randn(97, 32) * 0.3)
            model.config.tie_word_embeddings = False
        return model.eval()
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**LLAMA_SMALL, "initializer_range": 0.2, **changes})
    ).eval()


VARIANTS = [
    (T5, {}),
    (T5, dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    (T5, dict(feed_forward_proj="gated-gelu")),
    (T5, dict(d_kv=5, num_decoder_layers=3, tie_word_embeddings=False)),
    (Llama, dict(num_key_value_heads=4)),
    (Llama, dict(tie_word_embeddings=True)),
    (Llama, dict(num_key_value_heads=1, head_dim=16, attention_bias=True, mlp_bias=True)),
    (Llama, dict(rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
]


@pytest.mark.parametrize("kind, changes", VARIANTS)
def test_logits_loss_and_generation_equal_those_of_transformers(kind, changes, tmp_path):
    theirs = peer(kind, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    batch = padded_batch(causal=kind is Llama)
    labels, mask = batch["labels"], batch["attention_mask"]
    with torch.no_grad():
        expected = theirs(**batch)
        logits, loss = ours(**batch)
        short = ours.loss(**batch)
    real = mask.bool() if kind is Llama else (labels != -100).flip(1).cumsum(1).flip(1) > 0
    assert (logits - expected.logits)[real].abs().max() <= 1e-4 * expected.logits.abs().max()
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-4) == short.item()

    ids = batch["input_ids"]
    if kind is Llama:  # transformers wants the padding on the left
        ids = torch.stack([row.roll(int((m == 0).sum())) for row, m in zip(ids, mask)])
        mask = mask.flip(1)
    theirs_new = theirs.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=False
    )
    new = ours.generate(ids, mask, 12)
    assert torch.equal(new, theirs_new[:, ids.shape[1] :] if kind is Llama else theirs_new[:, 1:])
    assert torch.equal(
        new, ours.generate(batch["input_ids"], batch["attention_mask"], 12)
    )  # padding on either side
    for row, i, m in zip(new, ids, mask):  # each row as if it stood alone
        alone = ours.generate(i[m.bool()][None], m[m.bool()][None], 12)[0]
        assert torch.equal(row[: len(alone)], alone)

    save_model(ours, tmp_path / "ours")
    with torch.no_grad():
        again = type(theirs).from_pretrained(tmp_path / "ours").eval()(**batch)
    assert torch.equal(again.logits, expected.logits)


@pytest.mark.parametrize("kind", [T5, Llama])
def test_rows_end_at_their_own_time_and_stay_padded(kind, tmp_path):
    theirs = peer(
        kind, **(dict(tie_word_embeddings=False, initializer_factor=3.0) if kind is T5 else {})
    )
    ends = list(range(2, 97, 7))  # many end tokens, so that rows end at many places
    theirs.config.eos_token_id = theirs.generation_config.eos_token_id = ends
    theirs.config.pad_token_id = theirs.generation_config.pad_token_id = 0
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(1, 97).view(16, 6)
    expected = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    new = load_model(tmp_path).generate(ids, torch.ones_like(ids), 12)
    assert torch.equal(new, expected[:, 6:] if kind is Llama else expected[:, 1:])
    lengths = {
        next((n for n, token in enumerate(row) if token in ends), 12) for row in new.tolist()
    }
    assert len(lengths) > 4


def test_training_gradients_equal_those_of_transformers():
    for kind in (T5, Llama):
        theirs = peer(kind)
        ours = kind(T5_SMALL if kind is T5 else LLAMA_SMALL).train()
        ours.load_state_dict(theirs.state_dict(), strict=False)
        batch = padded_batch(causal=kind is Llama)
        theirs(**batch).loss.backward()
        ours.loss(**batch).backward()
        for name, p in ours.named_parameters():
            expected = theirs.get_parameter(name).grad
            assert (p.grad - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name


def test_dropout_acts_in_training_only():
    model = small(dropout_rate=0.5)
    batch = padded_batch()
    assert model.train().loss(**batch) != model.loss(**batch)
    assert model.eval().loss(**batch) == model.loss(**batch)


def test_llama_continues_a_story():
    folder = os.environ.get("MIGU_LLAMA")
    if not folder:
        pytest.skip("MIGU_LLAMA is not set")
    model, tokenizer = load_model(folder), data.load_tokenizer(folder)
    ids = torch.tensor([tokenizer.source("Once upon a time")])
    text = tokenizer.decode(model.generate(ids, torch.ones_like(ids), 60)[0].tolist())
    assert text.startswith(
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    )


# ---- safetensors and folders


def file_of(header, content=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"", "empty"),
        (b"1234567", "length"),
        (file_of({}, length=100), "length"),
        (file_of({}, length=2**63), "length"),
        (file_of(b"[]"), "object"),
        (file_of(b"{"), "JSON"),
        (file_of(b'{"a":NaN}'), "entry"),
        (file_of(b"{\xff}"), "JSON"),
        (file_of(b'{"a":' * 3000), "JSON"),
        (file_of({"a": entry("F7")}, bytes(8)), "dtype"),
        (file_of({"a": entry("F4", [4], [0, 2])}, bytes(2)), "dtype F4"),
        (file_of({"a": entry(shape=[3])}, bytes(8)), "shape"),
        (file_of({"a": entry(shape=[2.0])}, bytes(8)), "sizes"),
        (file_of({"a": entry(shape=[2**63, 2**63, 0], offsets=[0, 0])}), "shape"),
        (file_of({"a": None}), "entry"),
        (file_of({"a": entry(offsets=[-8, 0])}, bytes(8)), "sizes"),
        (file_of({"a": entry(offsets=[8, 0])}, bytes(8)), "shape"),
        (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlap"),
        (file_of({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "hole"),
        (file_of({"a": entry()}, bytes(7)), "end"),
        (file_of({"a": entry()}, bytes(9)), "end"),
        (file_of({}, b"x"), "end"),
        (file_of(b'{"a":1,"a":1}'), "twice"),
        (file_of({"__metadata__": {"a": 1}}), "metadata"),
        (file_of({"__metadata__": []}), "metadata"),
    ],
)
def test_malformed_safetensors_are_refused_by_name(content, fault, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken.safetensors: .*{fault}"):
        read_safetensors(path)


def test_what_the_official_library_refuses_is_refused():
    official = pytest.importorskip("safetensors")
    rng = random.Random(0)
    base = file_of(
        {"a": entry(), "b": entry("BF16", [2, 3], [8, 20]), "__metadata__": {"format": "pt"}},
        bytes(20),
    )
    refused = 0
    for _ in range(3000):
        content = bytearray(base)
        for _ in range(rng.choice((1, 1, 2))):
            i = rng.randrange(len(content))
            content[i : i + rng.choice((0, 1))] = bytes(
                [rng.choice(b'0123456789{}[],:"-. eFB\\\xff\x1f')]
            )
        content[:8] = struct.pack("<Q", content.rfind(b"}") - 7)
        try:
            official.deserialize(bytes(content))
        except Exception:
            refused += 1
            with pytest.raises(ValueError):
                models.read_header(bytes(content))
    assert refused > 1000


def test_every_dtype_comes_back(tmp_path):
    torch.manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 100, (3, 8), dtype=torch.uint8).view(dtype)
        for dtype in models.DTYPES.values()
        if dtype != torch.bool
    }
    tensors |= {
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4, dtype=torch.bfloat16),
    }
    write_safetensors(tmp_path / "all.safetensors", tensors)
    back = read_safetensors(tmp_path / "all.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert torch.equal(
            back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name
    torch_file = pytest.importorskip("safetensors.torch")
    plain = {name: t for name, t in tensors.items() if "e8m0" not in name}
    torch_file.save_file(plain, tmp_path / "official.safetensors")
    for name, tensor in read_safetensors(tmp_path / "official.safetensors").items():
        assert torch.equal(
            tensor.reshape(-1).view(torch.uint8), plain[name].reshape(-1).view(torch.uint8)
        ), name
    write_safetensors(tmp_path / "plain.safetensors", plain)
    assert torch_file.load_file(tmp_path / "plain.safetensors").keys() == plain.keys()


def test_a_header_of_odd_length_is_read(tmp_path):
    header = json.dumps({"a": entry()}).encode()
    header += b" " * (1 - len(header) % 2)
    (tmp_path / "odd.safetensors").write_bytes(file_of(header, struct.pack("<2f", 1.5, -2.0)))
    assert len(header) % 2 and read_safetensors(tmp_path / "odd.safetensors")["a"].tolist() == [
        1.5,
        -2.0,
    ]


def shard(folder, parts=2):
    """Cut a saved folder's weights into shards with an index."""
    tensors = read_safetensors(folder / "model.safetensors")
    names = sorted(tensors)
    places = {name: f"model-{i % parts}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        write_safetensors(
            folder / file, {name: tensors[name] for name in names if places[name] == file}
        )
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def test_shards_load_and_an_index_stays_in_its_folder(tmp_path):
    model = small(Llama).eval()
    save_model(model, tmp_path / "m")
    places = shard(tmp_path / "m")
    batch = padded_batch(causal=True)
    assert torch.equal(load_model(tmp_path / "m")(**batch)[0], model(**batch)[0])
    for escape in ("../m/model-0.safetensors", "/etc/model.safetensors", 3):
        changed = {**places, "lm_head.weight": escape}
        (tmp_path / "m" / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": changed})
        )
        with pytest.raises(ValueError, match="index.json: weight_map"):
            load_model(tmp_path / "m")


def test_loading_is_strict_and_names_every_fault(tmp_path):
    save_model(small(), tmp_path)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    tensors = {name: t.clone() for name, t in tensors.items()}
    norm = "encoder.final_layer_norm.weight"
    del tensors["decoder.block.1.layer.1.EncDecAttention.v.weight"]
    tensors |= {"extra.weight": torch.zeros(2), norm: torch.zeros(31)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    for part in (
        "decoder.block.1.layer.1.EncDecAttention.v.weight: missing",
        "extra.weight: [2] in the file, unexpected",
        f"{norm}: [31] in the file, [32] by config.json",
    ):
        assert part in str(error.value)


def test_harmless_keys_and_equal_copies_load_and_unequal_ones_do_not(tmp_path):
    model = small()
    save_model(model, tmp_path)
    tensors = {
        name: t.clone() for name, t in read_safetensors(tmp_path / "model.safetensors").items()
    }
    extra = {
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(8, 4),
        "encoder.embed_tokens.weight": tensors["shared.weight"],
        "lm_head.weight": tensors["shared.weight"],
    }
    write_safetensors(tmp_path / "model.safetensors", tensors | extra)
    assert torch.equal(load_model(tmp_path).shared.weight, model.shared.weight)
    for name in ("decoder.embed_tokens.weight", "lm_head.weight"):
        write_safetensors(
            tmp_path / "model.safetensors", tensors | {name: tensors["shared.weight"] + 1}
        )
        with pytest.raises(ValueError, match=f"{name} differs from shared.weight"):
            load_model(tmp_path)
    llama = small(Llama)
    save_model(llama, tmp_path / "llama")
    tensors = read_safetensors(tmp_path / "llama" / "model.safetensors")
    write_safetensors(
        tmp_path / "llama" / "model.safetensors",
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    )
    load_model(tmp_path / "llama")


@pytest.mark.parametrize(
    "changes, fault",
    [
        (dict(model_type="gpt2"), "model_type gpt2"),
        (dict(model_type=None), "model_type None"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope scaling 'linear'"),
        (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), "rope scaling 'llama3'"),
        (dict(hidden_act="gelu"), "hidden_act .gelu."),
        (dict(hidden_size="wide"), "config.json"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, fault, tmp_path):
    save_model(small(Llama), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=fault):
        load_model(tmp_path)


def test_missing_pickled_and_broken_folders_are_refused(tmp_path):
    with pytest.raises(OSError, match="config.json"):
        load_model(tmp_path)
    save_model(small(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="pytorch_model.bin is pickled and never opened"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        load_model(tmp_path)


def test_the_type_stored_is_the_type_written_in_the_config(tmp_path):
    save_model(small(dtype="float16", torch_dtype="float16").to(torch.bfloat16), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config
    assert load_model(tmp_path).shared.weight.dtype == torch.float32
    assert load_model(tmp_path, torch.bfloat16).shared.weight.dtype == torch.bfloat16


# ---- data


def write_task(
    folder, train=(("a b", "yes"), ("c", "no")), test=(("d", "no"),), labels=("yes", "no")
):
    folder.mkdir(parents=True)
    for file, records in (("train", train), ("test", test)):
        (folder / f"{file}.json").write_text(
            json.dumps([{"sentence": s, "label": a} for s, a in records])
        )
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


PROMPTS = {
    "SC/yelp": "Task:SC\nDataset:yelp\nWhat is the sentiment of the following paragraph? Choose one from the option.\n",
    "TC/agnews": "Task:TC\nDataset:agnews\nWhat is the topic of the following paragraph? Choose one from the option.\n",
    "NLI/CB": 'Task:NLI\nDataset:CB\nWhat is the logical relationship between the "sentence 1" and the "sentence 2"? '
    "Choose one from the option.\n",
    "QQP/QQP": 'Task:QQP\nDataset:QQP\nWhether the "first sentence" and the "second sentence" have the same meaning? '
    "Choose one from the option.\n",
    "BoolQA/BoolQA": "Task:BoolQA\nDataset:BoolQA\nAccording to the following passage, is the question true or false? "
    "Choose one from the option.\n",
    "MultiRC/MultiRC": "Task:MultiRC\nDataset:MultiRC\nAccording to the following passage and question, is the candidate answer "
    "true or false? Choose one from the option.\n",
    "WiC/WiC": "Task:WiC\nDataset:WiC\nGiven a word and two sentences, whether the word is used with the same sense in both "
    "sentence? Choose one from the option.\n",
}


@pytest.mark.parametrize("place", PROMPTS)
def test_prompts_are_the_benchmark_s_to_the_letter(place, tmp_path):
    write_task(tmp_path / place, train=[("a {b} % \\n", "yes")])
    task = data.load_task(tmp_path, place.split("/")[1])
    assert task.train == [
        data.Example(PROMPTS[place] + "Option: yes, no \na {b} % \\n\nAnswer:", "yes")
    ]
    assert (task.name, task.labels, task.test[0].answer) == (
        place.split("/")[1],
        ["yes", "no"],
        "no",
    )


def test_copa_has_neither_instruction_nor_options(tmp_path):
    write_task(tmp_path / "COPA" / "COPA")
    assert (
        data.load_task(tmp_path, "COPA").train[0].prompt == "Task:COPA\nDataset:COPA\na b\nAnswer:"
    )


def test_own_tasks_take_their_group_from_the_parent_folder(tmp_path, monkeypatch):
    write_task(tmp_path / "mine" / "news")
    write_task(tmp_path / "SC" / "films")
    assert (
        data.load_task("", tmp_path / "SC" / "films")
        .train[0]
        .prompt.startswith("Task:SC\nDataset:films\nWhat is the sentiment")
    )
    monkeypatch.chdir(tmp_path / "mine" / "news")
    task = data.load_task("", ".")
    assert task.name == "news" and task.train[0].prompt.startswith(
        "Task:mine\nDataset:news\n"
        + data.GENERAL
        + " Choose one from the option.\nOption: yes, no \n"
    )


def test_orders_are_the_papers():
    assert (
        data.ORDERS[1] == ("dbpedia", "amazon", "yahoo", "agnews") and data.ORDERS[3][0] == "yahoo"
    )
    assert [len(data.ORDERS[i]) for i in range(1, 7)] == [4, 4, 4, 15, 15, 15]
    assert set(data.ORDERS[4]) == set(data.ORDERS[5]) == set(data.ORDERS[6]) == set(data.GROUP_OF)
    firsts = [data.ORDERS[i][0] for i in (4, 5, 6)], [data.ORDERS[i][-1] for i in (4, 5, 6)]
    assert firsts == (["MNLI", "MultiRC", "yelp"], ["yahoo", "yahoo", "WiC"])


@pytest.mark.parametrize(
    "file, content, fault",
    [
        ("train", "{", "train.json: not JSON"),
        ("train", "[]", "train.json: not a list, or empty"),
        ("test", "{}", "test.json: not a list"),
        (
            "train",
            '[{"sentence": "a", "label": "yes"}, {"sentence": "b"}]',
            "train.json: record 2 needs",
        ),
        ("test", '[{"sentence": 1, "label": "yes"}]', "test.json: record 1 needs"),
        ("test", '["a"]', "test.json: record 1 needs"),
        (
            "train",
            '[{"sentence": "a", "label": "maybe"}]',
            "record 1: label 'maybe' is not in labels.json",
        ),
        ("train", '[{"sentence": "a", "label": "-"}]', "record 1: label '-'"),
        ("labels", '["yes", "yes"]', "labels.json: labels are texts"),
        ("labels", "[1]", "labels.json: labels are texts"),
    ],
)
def test_bad_records_are_named(file, content, fault, tmp_path):
    folder = write_task(tmp_path / "own" / "task")
    (folder / f"{file}.json").write_text(content)
    with pytest.raises(ValueError, match=fault):
        data.load_task("", folder)


def test_an_unpublished_test_label_is_known_and_never_correct(tmp_path):
    write_task(tmp_path / "NLI" / "MNLI", test=[("a", "-"), ("b", "no")])
    assert [e.answer for e in data.load_task(tmp_path, "MNLI").test] == ["-", "no"]
    assert not evaluation.is_correct("-", "-") and not evaluation.is_correct("", "-")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two tasks, a tiny T5 and a tiny Llama with tokenizers of their own."""
    root = tmp_path_factory.mktemp("world")
    tasks = [root / "tasks" / "one", root / "tasks" / "two"]
    data.make_demo(tasks, sizes=(24, 9), seed=0)
    texts = [text for task in tasks for e in data.load_task("", task).train for text in e]
    t5 = small(vocab_size=300, d_model=16, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.1)
    t5.files["spiece.model"] = data.train_vocabulary(texts, 290)
    save_model(t5, root / "t5")
    import io
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        vocab_size=290,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
    )
    llama = small(Llama, vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    llama.files["tokenizer.model"] = file.getvalue()
    save_model(llama, root / "llama")
    return root


def test_t5_and_llama_rows_end_in_the_end_token_and_prompts_are_cut(world):
    example = data.Example("music " * 600, "sport")
    t5, llama = data.load_tokenizer(world / "t5"), data.load_tokenizer(world / "llama")
    source, target = t5.training_row(example)
    prompt, answer = t5.encode(example.prompt), t5.encode("sport")
    assert (source, target) == (prompt[:511] + [1], answer + [1])
    ids, labels = llama.training_row(example)
    prompt, answer = llama.encode(example.prompt), llama.encode("sport")
    assert ids == [1] + prompt[:511] + answer + [2]
    assert labels == [-100] * 512 + answer + [2]
    assert llama.source("music") == [1] + llama.encode("music")
    assert t5.decode(t5.encode("sport food") + [1, 299, 10**6]) == "sport food"


def test_other_tokenizers_are_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(OSError, match="tokenizer.json is not supported"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_text("no")
    with pytest.raises(ValueError, match="spiece.model: not a sentencepiece model"):
        data.load_tokenizer(tmp_path)


def test_a_batch_order_comes_from_its_seed_and_takes_every_row_once():
    rows = list(range(10))
    first, again, other = (
        [*data.batches(rows, 4, np.random.default_rng(seed))] for seed in (1, 1, 2)
    )
    assert first == again != other and [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(sum(first, [])) == rows


def test_demo_tasks_hold_out_their_test_texts(tmp_path):
    data.make_demo([tmp_path / "a" / "x", tmp_path / "a" / "y"], sizes=(50, 20), seed=3)
    for name in "xy":
        task = data.load_task("", tmp_path / "a" / name)
        assert (len(task.train), len(task.test)) == (50, 20)
        assert not {e.prompt for e in task.train} & {e.prompt for e in task.test}
        assert all(
            f"Option: {', '.join(task.labels)}" in e.prompt and e.answer in task.labels
            for e in task.train + task.test
        )


# ---- metrics and tables


def test_normalize():
    assert evaluation.normalize("  The  Good,\tBAD!\n") == "the good bad"
    assert evaluation.normalize("Society & Culture") == "society culture"
    assert evaluation.is_correct("very positive.", "Very  Positive") and not evaluation.is_correct(
        "positive", "very positive"
    )


def test_metrics_are_the_hand_computed_ones():
    nan = float("nan")
    matrix = np.array([[90, nan, nan], [70, 80, nan], [75, 60, 96.0]])
    assert evaluation.average_accuracy(matrix) == 77.0
    assert evaluation.backward_transfer(matrix) == ((75 - 90) + (60 - 80)) / 2
    assert evaluation.forgetting(matrix) == ((90 - 75) + (80 - 60)) / 2
    rising = np.array([[50, nan, nan], [70, 80, nan], [60, 85, 96.0]])  # the best was not the first
    assert evaluation.forgetting(rising) == ((70 - 60) + (80 - 85)) / 2
    assert evaluation.backward_transfer(rising) == ((60 - 50) + (85 - 80)) / 2
    last = np.full((3, 3), nan)
    last[2] = 60, 70, 80
    assert evaluation.average_accuracy(last) == 70.0
    assert math.isnan(evaluation.backward_transfer(last)) and math.isnan(
        evaluation.forgetting(last)
    )
    assert (
        math.isnan(evaluation.forgetting(np.array([[50.0]])))
        and evaluation.average_accuracy(np.array([[50.0]])) == 50.0
    )


def test_only_real_tokens_are_processed_in_training_and_in_testing(world):
    model, tokenizer = load_model(world / "t5"), data.load_tokenizer(world / "t5")
    task, seen = data.load_task("", world / "tasks" / "one"), Counter()
    for part, layer in (
        ("encoder", model.encoder.block[0].layer[1].DenseReluDense.wi),
        ("decoder", model.decoder.block[0].layer[2].DenseReluDense.wi),
    ):
        layer.register_forward_hook(
            lambda layer, inputs, output, part=part: seen.update({part: len(output)})
        )
    rows = [tokenizer.training_row(example) for example in task.train]
    model.loss(**data.collate(*zip(*rows)))
    assert seen == {
        "encoder": sum(len(ids) for ids, _ in rows),
        "decoder": sum(len(labels) for _, labels in rows),
    }
    seen.clear()
    sources = [tokenizer.source(example.prompt) for example in task.test]
    lengths = iter([1, 5, 2, 5, 3] * len(sources))
    stops = {}  # row -> how many tokens its answer has, the end included

    def head(layer, inputs, logits):  # each row says token 9 until its answer ends
        if not stops or seen["step"] == 0:
            stops.update(enumerate(itertools.islice(lengths, len(logits))))
            seen["rows"] = 0
        going = [row for row in stops if stops[row] > seen["step"]]
        seen["step"] += 1
        out = torch.zeros_like(logits)
        for i, row in enumerate(going):
            out[i, 1 if stops[row] == seen["step"] else 9] = 1
        return out

    model.lm_head.register_forward_hook(head)
    new = model.generate(**data.collate(sources), max_new_tokens=10)
    answers = [1 + row.tolist().index(1) for row in new]  # the end token is 1
    assert answers == [stops[row] for row in range(len(sources))] and new.shape[1] == 5
    assert seen["encoder"] == sum(map(len, sources)) and seen["decoder"] == sum(answers)
    assert all((row[n:] == model.pad).all() for row, n in zip(new, answers))


def test_test_batches_are_nearly_all_real_tokens(world, monkeypatch):
    model, tokenizer = load_model(world / "t5"), data.load_tokenizer(world / "t5")
    rng = np.random.default_rng(0)
    texts = [" ".join(["word"] * int(n)) for n in rng.integers(10, 120, 600)]
    batches = []
    monkeypatch.setattr(
        model,
        "generate",
        lambda input_ids, attention_mask, max_new_tokens: (
            batches.append(attention_mask) or input_ids[:, :1]
        ),
    )
    evaluation.evaluate(model, tokenizer, [data.Example(text, "") for text in texts], tokens=4096)
    real, laid_out = (
        sum(f(mask) for mask in batches)
        for f in (lambda mask: int(mask.sum()), lambda mask: mask.numel())
    )
    assert sum(len(mask) for mask in batches) == 600 and real / laid_out >= 0.95, real / laid_out


def test_evaluation_keeps_the_order_and_does_not_depend_on_batches(world):
    task = data.load_task("", world / "tasks" / "one")
    for kind in ("t5", "llama"):
        model, tokenizer = load_model(world / kind), data.load_tokenizer(world / kind)
        accuracy, predictions, _ = evaluation.evaluate(model, tokenizer, task.test)
        alone = [
            evaluation.evaluate(model, tokenizer, [example], tokens=1)[1][0]
            for example in task.test
        ]
        assert (
            predictions == alone
            and len(set(predictions)) > 1
            or kind == "t5"
            and predictions == alone
        )
        correct = sum(evaluation.is_correct(p, e.answer) for p, e in zip(predictions, task.test))
        assert accuracy == 100 * correct / len(task.test)


# ---- the command line


def command(world, out, *more, model="t5", tasks=("one", "two")):
    return [
        "--tasks",
        *(str(world / "tasks" / task) for task in tasks),
        "--model",
        str(world / model),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--lr",
        "1e-2",
        "--batch-size",
        "8",
        "--epochs",
        "2",
        *more,
    ]


def run_folder(out, kind="t5", mask="migu", seed=42):
    return out / f"one+two-{kind}-full-{mask}-s{seed}"


def state(folder):
    """What must be equal after a resume: weights, matrix, predictions, log."""
    weights = read_safetensors(folder / "model" / "model.safetensors")
    files = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".csv", ".jsonl")
    }
    return (
        {name: t.clone() for name, t in weights.items()},
        json.loads((folder / "results.json").read_text())["matrix"],
        files,
    )


def assert_same(one, two):
    assert one[1:] == two[1:] and one[0].keys() == two[0].keys()
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])


def test_a_run_leaves_what_it_promises(world, tmp_path, capsys):
    train.main(command(world, tmp_path, "--eval", "all"))
    folder = run_folder(tmp_path)
    results, config = (
        json.loads((folder / name).read_text()) for name in ("results.json", "config.json")
    )
    assert results["tasks"] == ["one", "two"] and results["matrix"][0][1] is None
    matrix = np.array(results["matrix"], float)
    assert results["average_accuracy"] == pytest.approx(matrix[1].mean())
    assert results["backward_transfer"] == pytest.approx(matrix[1, 0] - matrix[0, 0])
    assert (
        config["lr"] == 1e-2
        and config["threshold"] == 0.7
        and config["device"] == "cpu"
        and config["dtype"] == "float32"
    )
    assert config["versions"]["torch"] == torch.__version__
    lines = [
        json.loads(line)
        for line in (folder / "predictions" / "2-two" / "one.jsonl").read_text().splitlines()
    ]
    task = data.load_task("", world / "tasks" / "one")
    assert [(line["prompt"], line["answer"]) for line in lines] == task.test
    correct = [evaluation.is_correct(line["prediction"], line["answer"]) for line in lines]
    assert 100 * np.mean(correct) == pytest.approx(matrix[1, 0])
    log = (folder / "log.csv").read_text().splitlines()
    assert log[0] == "task,step,loss,kept" and len(log) == 1 + 2 * 2 * 3
    kept = [float(line.split(",")[3]) for line in log[1:]]
    assert kept[:6] == [1.0] * 6 and all(
        0.3 <= k < 0.4 for k in kept[6:]
    )  # the first task is not masked
    assert (
        load_model(folder / "model").c.d_model == 16
        and (folder / "model" / "spiece.model").exists()
    )
    assert "after \\ on" in capsys.readouterr().out
    assert not [p for p in folder.rglob("*") if p.suffix in (".tmp", ".part")]


def test_the_run_says_whether_it_was_row_sparse(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "MIGU", lambda *options: asked.append(options[4:]) or MIGU(*options))
    for i, (more, sparse) in enumerate(
        (
            (["--mask", "migu"], True),
            (["--mask", "weight"], True),
            (["--mask", "random"], True),
            (["--mask", "gradient"], False),
            (["--mask", "none"], False),
            (["--tune", "lora"], False),
            (["--micro-batch", "3"], False),
            (["--layers", "."], False),
            (["--layers", "q$"], True),
        )
    ):
        asked.clear()
        ((folder, _),) = train.main(command(world, tmp_path / str(i), "--limit", "8", *more))
        assert json.loads((folder / "config.json").read_text())["row_sparse"] is sparse
        assert asked[1:] == (
            [] if "none" in more else [(sparse,)]
        )  # the first is the check of --layers


def test_a_row_sparse_run_ends_with_the_weights_of_the_explicit_one(world):
    tokenizer = data.load_tokenizer(world / "t5")
    rows, ends = (
        [tokenizer.training_row(e) for e in data.load_task("", world / "tasks" / "one").train],
        [],
    )
    for row_sparse in (False, True):
        c = types.SimpleNamespace(
            tune="full",
            dtype="float32",
            optimizer="adamw",
            lr=1e-3,
            criterion="magnitude",
            batch_size=8,
            micro_batch=8,
            threshold=0.7,
            layers=migu.NOT_THE_HEAD,
            row_sparse=row_sparse,
        )
        model = load_model(world / "t5")
        log = train.train_task(model, rows, c, True, train.seeded(0, 0), "one", 2, {})
        ends.append((log, [p.detach() for p in model.parameters()]))
    assert ends[0][0] == ends[1][0]
    for explicit, sparse in zip(ends[0][1], ends[1][1]):
        torch.testing.assert_close(explicit, sparse, rtol=1e-5, atol=1e-6)


def test_mask_first_masks_the_first_task_too(world, tmp_path):
    train.main(command(world, tmp_path, "--mask-first", "--limit", "9"))
    log = (run_folder(tmp_path) / "log.csv").read_text().splitlines()
    assert len(log) == 1 + 2 * 2 * 2 and all(
        0.3 <= float(line.split(",")[3]) < 0.4 for line in log[1:]
    )
    results = json.loads((run_folder(tmp_path) / "results.json").read_text())
    assert (
        results["matrix"][0] == [None, None] and results["backward_transfer"] is None
    )  # --eval last


def test_micro_batches_change_neither_gradient_nor_mask(world):
    tokenizer = data.load_tokenizer(world / "t5")
    rows = [tokenizer.training_row(e) for e in data.load_task("", world / "tasks" / "one").train]
    rows = [
        (source, target * (1 + i % 3)) for i, (source, target) in enumerate(rows)
    ]  # answers of unlike length
    results = []
    for micro in (24, 5):
        model = load_model(world / "t5")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        config = types.SimpleNamespace(
            seed=0,
            tune="full",
            dtype="float32",
            optimizer="sgd",
            lr=0.1,
            criterion="magnitude",
            batch_size=24,
            micro_batch=micro,
            threshold=0.7,
            layers=".",
            row_sparse=False,
        )
        log = train.train_task(model, rows, config, True, train.seeded(0, 0), "one", 1, {})
        results.append((model, log))
    (one, log), (two, log_two) = results
    assert log[0][1] == pytest.approx(log_two[0][1], rel=1e-6) and log[0][2] == log_two[0][2]
    start = load_model(world / "t5")
    for name, p in one.named_parameters():
        other, before = two.get_parameter(name), start.get_parameter(name)
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-7)
        assert torch.equal((p != before), (other != before)) or name.endswith("bias.weight"), name


@pytest.mark.parametrize("tune", ["lora", "inclora", "olora"])
@pytest.mark.parametrize("mask", ["migu", "none"])
def test_adapters_train_and_resume_bitwise(world, tmp_path, tune, mask, monkeypatch):
    arguments = [
        "--tune",
        tune,
        "--mask",
        mask,
        "--replay",
        "0.25",
        "--eval",
        "all",
        "--threshold",
        "0.5",
    ]
    train.main(command(world, tmp_path / "whole", *arguments))
    save, calls = train.save_model, []

    def dying_save(*args):
        if len(calls) == 1:
            raise Killed
        calls.append(save(*args))

    monkeypatch.setattr(train, "save_model", dying_save)
    with pytest.raises(Killed):
        train.main(command(world, tmp_path / "cut", *arguments))
    monkeypatch.undo()
    train.main(command(world, tmp_path / "cut", *arguments, "--resume"))
    name = f"one+two-t5-{tune}-{mask}-replay0.25-s42"
    assert_same(state(tmp_path / "whole" / name), state(tmp_path / "cut" / name))
    start, end = load_model(world / "t5"), load_model(tmp_path / "cut" / name / "model")
    moved = {
        key for key, p in start.named_parameters() if not torch.equal(p, end.get_parameter(key))
    }
    assert moved and all(re.search(r"\.[qv]\.weight$", key) for key in moved)
    kept = tmp_path / "cut" / name / "adapters" / "2.safetensors"
    assert kept.exists() == (tune != "inclora")
    if tune == "olora":
        assert {tuple(t.shape) for t in read_safetensors(kept).values()} == {
            (16, 16)
        }  # two tasks' A, of rank 8 each


def test_replay_brings_back_the_same_seeded_records(world, tmp_path, monkeypatch):
    seen = []
    train_task = train.train_task
    monkeypatch.setattr(
        train,
        "train_task",
        lambda model, rows, *rest: seen.append(rows) or train_task(model, rows, *rest),
    )
    train.main(command(world, tmp_path / "a", "--replay", "0.3"))
    train.main(command(world, tmp_path / "b", "--replay", "0.3"))
    train.main(command(world, tmp_path / "c", "--replay", "0.3", "--seed", "7"))
    first, second = seen[0], seen[1]
    assert len(first) == 24 and len(second) == 24 + 7  # int(24 * 0.3)
    assert all(row in first for row in second[24:]) and seen[3] == second and seen[5] != second
    assert (
        json.loads(
            (tmp_path / "a" / "one+two-t5-full-migu-replay0.3-s42" / "config.json").read_text()
        )["threshold"]
        == 0.4
    )


def test_joint_training_mixes_all_tasks_and_tests_each(world, tmp_path):
    train.main(command(world, tmp_path, "--joint", "--mask", "none"))
    folder = tmp_path / "one+two-t5-full-none-joint-s42"
    results = json.loads((folder / "results.json").read_text())
    assert results["matrix"][0] == [None, None] and None not in results["matrix"][1]
    assert (
        len((folder / "log.csv").read_text().splitlines()) == 1 + 2 * 6
    )  # 48 records in batches of 8, twice


@pytest.mark.parametrize(
    "tune, threshold, lr",
    [("full", 0.7, 1e-4), ("lora", 0.7, 1e-3), ("inclora", 0.7, 1e-3), ("olora", 0.05, 1e-3)],
)
def test_defaults_are_the_paper_s(tune, threshold, lr, tmp_path):
    arguments = ["--order", "1", "--tune", tune, "--out", str(tmp_path)]
    ((folder, config),) = train.plan(train.parse_args(arguments))
    assert (config["threshold"], config["lr"], config["batch_size"]) == (threshold, lr, 64)
    assert folder.name == f"order1-t5-large-{tune}-migu-s42"
    assert train.plan(train.parse_args([*arguments, "--replay", "0.02"]))[0][1]["threshold"] == 0.4
    with pytest.raises(SystemExit):
        train.parse_args([*arguments, "--tune", "prefix"])


def test_frozen_weights_are_kept_in_bf16_and_folding_stays_in_fp32(world, tmp_path):
    c = types.SimpleNamespace(
        tune="inclora",
        device="cpu",
        dtype="bfloat16",
        mask="migu",
        criterion="magnitude",
        seed=0,
        threshold=0.7,
        layers=".",
        checkpointing=False,
    )
    model, _ = train.prepare(tmp_path, world / "t5", c, 0)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert {kinds[name] for name in kinds if re.search(r"\.[qv]\.weight", name)} == {torch.float32}
    assert {kinds[name] for name in kinds if not re.search(r"\.[qv]\.weight", name)} == {
        torch.bfloat16
    }
    train.main(command(world, tmp_path, "--tune", "olora", "--dtype", "bfloat16"))
    folder = tmp_path / "one+two-t5-olora-migu-s42"
    assert json.loads((folder / "model" / "config.json").read_text())["torch_dtype"] == "float32"
    assert all(
        math.isfinite(float(line.split(",")[2]))
        for line in (folder / "log.csv").read_text().splitlines()[1:]
    )


class Killed(BaseException):
    pass


def test_a_run_killed_at_any_write_resumes_to_the_very_same_numbers(world, tmp_path, monkeypatch):
    train.main(command(world, tmp_path / "whole", "--eval", "all"))
    expected = state(run_folder(tmp_path / "whole"))
    write_file = models.write_file
    moment = 0
    while True:
        out, count = tmp_path / str(moment), 0

        def dying_write(path, chunks):
            nonlocal count
            count += 1
            if count == moment // 2 + 1:
                if moment % 2:  # just after the rename, or just before
                    write_file(path, chunks)
                raise Killed
            write_file(path, chunks)

        with monkeypatch.context() as patched:
            patched.setattr(models, "write_file", dying_write)
            patched.setattr(train, "write_file", dying_write)
            try:
                train.main(command(world, out, "--eval", "all"))
                break
            except Killed:
                pass
        train.main(command(world, out, "--eval", "all", "--resume"))
        assert_same(state(run_folder(out)), expected)
        moment += 3  # both kinds of moment, at every third write
    assert moment > 20


def test_a_sigkilled_process_resumes_to_the_very_same_numbers(world, tmp_path):
    arguments = command(world, tmp_path / "a", "--eval", "all", "--epochs", "30")
    process = subprocess.Popen(
        [sys.executable, HERE / "train.py", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    weights = run_folder(tmp_path / "a") / "model" / "model.safetensors"
    while not weights.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)  # somewhere in the second task
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train.main([*arguments, "--resume"])
    train.main(command(world, tmp_path / "b", "--eval", "all", "--epochs", "30"))
    assert_same(state(run_folder(tmp_path / "a")), state(run_folder(tmp_path / "b")))


def test_a_folder_in_use_is_refused_and_so_is_a_resume_with_other_arguments(
    world, tmp_path, capsys
):
    train.main(command(world, tmp_path))
    before = state(run_folder(tmp_path))
    for more, message in (
        ([], "is in use: add --resume"),
        (["--resume", "--threshold", "0.5"], "other arguments: threshold 0.7, not 0.5"),
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(command(world, tmp_path, *more))
        assert stop.value.code == 2 and message in capsys.readouterr().err
    train.main(command(world, tmp_path, "--resume"))
    assert "nothing left to do" in capsys.readouterr().out
    assert_same(state(run_folder(tmp_path)), before)


def test_seeds_and_llama_and_sgd_in_one_table(world, tmp_path, capsys):
    train.main(
        command(
            world,
            tmp_path,
            "--seed",
            "1",
            "2",
            "--optimizer",
            "sgd",
            "--mask",
            "random",
            model="llama",
        )
    )
    assert "(2 seeds)" in capsys.readouterr().out
    one, two = (
        json.loads((run_folder(tmp_path, "llama", "random", s) / "results.json").read_text())[
            "average_accuracy"
        ]
        for s in (1, 2)
    )
    text = evaluation.compare([run_folder(tmp_path, "llama", "random", s) for s in (1, 2)])
    assert f"{np.mean([one, two]):.1f} ± {np.std([one, two], ddof=1):.1f} (2 seeds)" in text


def test_the_grid_has_means_gains_and_the_paper_s_numbers(tmp_path):
    for order, mask, accuracy in (
        (1, "none", 70.0),
        (1, "migu", 74.0),
        (2, "none", 71.0),
        (2, "migu", 73.0),
    ):
        folder = tmp_path / f"{order}{mask}"
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps(dict(order=order, model_name="t5-large", method=f"full {mask}"))
        )
        (folder / "results.json").write_text(
            json.dumps(
                dict(tasks=[], average_accuracy=accuracy, backward_transfer=None, forgetting=None)
            )
        )
    rows = [
        line.split() for line in evaluation.compare(sorted(tmp_path.iterdir())).splitlines()[1:5]
    ]
    assert rows == [
        ["t5-large", "full", "migu", "74.0", "73.0", "73.5", "+3.0"],
        ["in", "the", "paper", "78.3", "79.8", "79.0", "+4.3"],
        ["t5-large", "full", "none", "70.0", "71.0", "70.5"],
        ["in", "the", "paper", "74.4", "75.0", "74.7"],
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "say what to do"),
        (["--order", "7"], "invalid choice"),
        (["--order", "1", "--threshold", "1.5"], "--threshold"),
        (["--order", "1", "--lr", "0"], "--lr"),
        (["--order", "1", "--layers", "("], "unterminated"),
        (["--order", "1", "--device", "abacus"], "abacus"),
        (["--order", "1", "--tasks", "a"], "say what to do"),
        (["--tasks", "a/x", "b/x"], "same name"),
        (["--tasks", "no/such"], "labels.json"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and message in err
        and err.count("\n") == 1
        and not list(tmp_path.iterdir())
    )


def test_broken_runs_and_models_are_one_line_too(world, tmp_path, capsys):
    def message(*arguments):
        with pytest.raises(SystemExit) as stop:
            train.main([*arguments])
        return (
            (capsys.readouterr().err.splitlines() or [""])[-1]
            if stop.value.code == 2
            else "another exit code"
        )

    train.main(command(world, tmp_path / "a"))
    weights = run_folder(tmp_path / "a") / "model" / "model.safetensors"
    save_model(load_model(weights.parent), weights.parent)
    assert "was not written by a run" in message(*command(world, tmp_path / "a", "--resume"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors: not a safetensors file" in message(
        *command(world, tmp_path / "a", "--resume")
    )
    (tmp_path / "mixed").mkdir()
    for file in (world / "t5").iterdir():
        (tmp_path / "mixed" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "mixed" / "spiece.model").rename(tmp_path / "mixed" / "tokenizer.model")
    own = ["--tasks", str(world / "tasks" / "one"), "--device", "cpu", "--out", str(tmp_path / "b")]
    assert "tokenizer does not fit" in message(*own, "--model", str(tmp_path / "mixed"))
    assert "holds neither spiece.model" in message(*own, "--model", str(tmp_path / "no" / "model"))
    (tmp_path / "file").write_text("")
    assert "file" in message("--demo", "--out", str(tmp_path / "file"))


def test_an_update_that_destroys_the_weights_is_not_kept(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(
            command(
                world,
                tmp_path,
                "--lr",
                "1e38",
                "--optimizer",
                "sgd",
                "--limit",
                "8",
                "--epochs",
                "1",
            )
        )
    assert stop.value.code == 2 and "weights not finite at step 1 of one" in capsys.readouterr().err
    assert not (run_folder(tmp_path) / "model").exists()


def test_data_is_checked_before_any_model_is_loaded(world, tmp_path, capsys, monkeypatch):
    folder = write_task(tmp_path / "own" / "bad", train=[("a", "maybe")])
    monkeypatch.setattr(train, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit):
        train.main(["--tasks", str(folder), "--model", str(world / "t5"), "--out", str(tmp_path)])
    assert "record 1: label 'maybe'" in capsys.readouterr().err


def test_a_pattern_that_selects_nothing_stops_before_training(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(command(world, tmp_path, "--layers", "query"))
    assert stop.value.code == 2 and "selects none" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_keeps_the_finished_task(
    world, tmp_path, capsys, monkeypatch
):
    loss = T5.loss
    calls = Counter()

    def diverging(self, **batch):
        calls["all"] += 1
        return loss(self, **batch) * (
            1 if calls["all"] <= 6 else math.inf
        )  # each task has six steps

    monkeypatch.setattr(T5, "loss", diverging)
    with pytest.raises(SystemExit) as stop:
        train.main(command(world, tmp_path))
    err = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "at step 6 of two" in err and "--lr" in err
    monkeypatch.undo()
    train.main(command(world, tmp_path, "--resume"))
    train.main(command(world, tmp_path / "whole"))
    assert_same(state(run_folder(tmp_path)), state(run_folder(tmp_path / "whole")))


def test_programming_errors_keep_their_traceback(world, tmp_path, monkeypatch):
    monkeypatch.setattr(T5, "loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(command(world, tmp_path))


def test_eval_py_passes_other_folders_over_and_plots(world, tmp_path, capsys, monkeypatch):
    train.main(command(world, tmp_path, "--eval", "all"))
    capsys.readouterr()
    (tmp_path / "notes").mkdir()
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, tmp_path.iterdir())])
    evaluation.main()
    assert "t5 full migu" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "notes")])
    with pytest.raises(SystemExit) as stop:
        evaluation.main()
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        sys, "argv", ["eval.py", str(run_folder(tmp_path)), "--plot", str(tmp_path / "p.png")]
    )
    evaluation.main()
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_real_benchmark_files_load(world):
    root = os.environ.get("MIGU_DATA")
    if not root:
        pytest.skip("MIGU_DATA is not set")
    tasks = {name: data.load_task(root, name) for name in data.GROUP_OF}
    assert len(tasks) == 15 and sum(e.answer == "-" for e in tasks["MNLI"].test) == 131


# ---- downloading, from a local server that behaves like the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """files: path -> bytes; the listing gives their hashes. Weights are redirected to another host name (the same server)."""

    files, lies, cuts, requests, status, listing = {}, {}, {}, [], {}, None

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        Hub.requests.append(
            (
                self.path,
                self.headers.get("Range"),
                self.headers.get("Authorization"),
                self.headers["Host"],
            )
        )
        port = self.server.server_address[1]
        if status := next((s for part, s in Hub.status.items() if part in self.path), None):
            return self.reply(status)
        if "/api/models/" in self.path or "/git/trees/" in self.path:
            return self.reply(200, Hub.listing)
        if "/resolve/" in self.path:
            name = self.path.split("/main/")[1]
            host = "localhost" if name.endswith(".safetensors") else "127.0.0.1"
            return self.reply(302, Location=f"http://{host}:{port}/cdn/{name}")
        name = self.path.split("/cdn/")[-1].split(f"{download.COMMIT}/")[-1]
        body = Hub.lies.get(name, Hub.files.get(name))
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if cut := Hub.cuts.get(name):
            Hub.cuts[name] = cut[1:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start : start + cut[0]])
            return self.wfile.flush() or self.connection.close()
        self.reply(206 if start else 200, body[start:])


def blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in (("HF_ENDPOINT", url), ("HF_TOKEN", "secret")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(download, "GITHUB", url)
    monkeypatch.setattr(download, "RAW", url)
    monkeypatch.chdir(tmp_path)
    Hub.files = {
        "model.safetensors": bytes(range(256)) * 20000,
        "config.json": b"{}",
        "spiece.model": b"pieces",
        "pytorch_model.bin": b"pickle",
        "README.md": b"read",
    }
    Hub.lies, Hub.cuts, Hub.requests, Hub.status = {}, {}, [], {}
    Hub.listing = json.dumps(
        [
            {
                "type": "file",
                "path": name,
                "size": len(body),
                "oid": blob(body) if len(body) < 1000 else blob(b"pointer"),
                **(
                    {"lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body)}}
                    if len(body) >= 1000
                    else {}
                ),
            }
            for name, body in Hub.files.items()
        ]
    ).encode()
    yield Hub
    server.shutdown()


def files_below(folder):
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}


def test_only_wanted_files_are_fetched_verified_and_not_fetched_twice(hub, tmp_path):
    download.main(["t5-large"])
    folder = tmp_path / "models" / "t5-large"
    assert files_below(folder) == {"model.safetensors", "config.json", "spiece.model"}
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert "/api/models/google-t5/t5-large/tree/main" in hub.requests[0][0]
    assert [path for path, *_ in hub.requests if "/cdn/" in path][
        -1
    ] == "/cdn/config.json"  # last: the folder is whole
    count = len(hub.requests)
    download.main(["t5-large"])
    assert len(hub.requests) == count + 1  # the listing alone
    (folder / "spiece.model").write_bytes(b"damage")
    download.main(["t5-large"])
    assert (folder / "spiece.model").read_bytes() == b"pieces" and len(hub.requests) == count + 4


def test_the_token_stays_with_its_host(hub):
    download.main(["google-t5/t5-large"])
    for path, _, token, host in hub.requests:
        assert token == (None if host.startswith("localhost") else "Bearer secret"), path
    assert any(host.startswith("localhost") for *_, host in hub.requests)


def test_a_cut_transfer_goes_on_where_it_stopped(hub, tmp_path, capsys):
    hub.cuts = {"model.safetensors": [1000, 2000000]}
    download.main(["t5-large"])
    ranges = [r for path, r, *_ in hub.requests if path.startswith("/cdn/model")]
    assert ranges == [None, "bytes=1000-", "bytes=2001000-"]
    assert (tmp_path / "models" / "t5-large" / "model.safetensors").read_bytes() == hub.files[
        "model.safetensors"
    ]
    (tmp_path / "models" / "t5-large" / "model.safetensors").unlink()
    hub.cuts = {"model.safetensors": [500] + [0] * 9}  # no progress any more: stop, keep what came
    with pytest.raises(SystemExit, match="2"):
        download.main(["t5-large"])
    assert "cut off at byte 500 of 5120000: run again" in capsys.readouterr().err
    assert "model.safetensors" not in files_below(
        "models/t5-large"
    ) and "model.safetensors.part" in files_below("models/t5-large")
    hub.cuts = {}
    download.main(["t5-large"])
    assert files_below("models/t5-large") == {"model.safetensors", "config.json", "spiece.model"}


def test_a_wrong_hash_leaves_no_file(hub, capsys):
    hub.lies = {"model.safetensors": bytes(5120000)}
    with pytest.raises(SystemExit, match="2"):
        download.main(["t5-large"])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("download.py")]
    assert len(err) == 1 and "another hash" in err[0]
    assert not {
        name
        for name in files_below("models")
        if "model.safetensors" in name or "config.json" in name
    }


@pytest.mark.parametrize(
    "status, message",
    [(401, "set HF_TOKEN"), (403, "licence"), (404, "check the name"), (500, "try again")],
)
def test_refusals_say_what_to_do(hub, status, message, capsys):
    hub.status = {"/api/": status}
    with pytest.raises(SystemExit, match="2"):
        download.main(["someone/something"])
    err = capsys.readouterr().err
    assert message in err and str(status) in err and err.count("\n") == 1


def test_no_safetensors_no_network_and_a_full_disk_are_one_line_each(hub, capsys, monkeypatch):
    hub.listing = json.dumps(
        [{"type": "file", "path": "pytorch_model.bin", "size": 6, "oid": blob(b"pickle")}]
    ).encode()
    with pytest.raises(SystemExit, match="2"):
        download.main(["a/b"])
    assert "no safetensors" in capsys.readouterr().err
    hub.listing = b"<html>log in</html>"
    with pytest.raises(SystemExit, match="2"):
        download.main(["a/b"])
    assert "not a listing" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="2"):
        download.main(["a/b"])
    err = capsys.readouterr().err
    assert "check the network" in err and err.count("\n") == 1


def test_a_full_disk_is_one_line(hub, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit, match="2"):
        download.main(["t5-large"])
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert "model.safetensors" not in files_below("models")


def test_train_fetches_what_is_missing(hub, world, tmp_path, capsys):
    hub.files = {
        f"CL_Benchmark/{group}/{name}/{part}.json": (
            world / "tasks" / "one" / f"{part}.json"
        ).read_bytes()
        for group, names in data.GROUPS.items()
        for name in names
        for part in ("train", "test", "labels")
    }
    hub.files["CL_Benchmark/TC/dbpedia/dev.json"] = b"[]"
    hub.listing = json.dumps(
        {
            "tree": [
                {"path": name, "size": len(body), "sha": blob(body), "type": "blob"}
                for name, body in hub.files.items()
            ]
        }
    ).encode()
    train.main(
        [
            "--order",
            "1",
            "--model",
            str(world / "t5"),
            "--limit",
            "4",
            "--device",
            "cpu",
            "--batch-size",
            "4",
        ]
    )
    assert len(files_below("data")) == 45 and "data/TC/dbpedia/dev.json" not in files_below("data")
    results = json.loads(Path("runs/order1-t5-full-migu-s42/results.json").read_text())
    assert results["tasks"] == ["dbpedia", "amazon", "yahoo", "agnews"]
    count = len(hub.requests)
    train.main(
        [
            "--order",
            "2",
            "--model",
            str(world / "t5"),
            "--limit",
            "4",
            "--device",
            "cpu",
            "--batch-size",
            "4",
        ]
    )
    assert len(hub.requests) == count  # all there: no network needed


# ---- how fast: python train.py --bench [--model t5-large --tune lora --batch-size 64 --device cuda ...]

SHAPES = {  # with random weights: speed does not depend on them
    "t5-small": (T5, dict(d_model=512, d_ff=2048, num_layers=6, num_heads=8)),
    "t5-base": (T5, dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12)),
    "t5-large": (T5, dict(d_model=1024, d_ff=4096, num_layers=24, num_heads=16)),
    "llama-2-7b": (
        Llama,
        dict(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
    ),
    "smollm2-135m": (
        Llama,
        dict(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
    ),
}
SHARED = {
    T5: dict(
        vocab_size=32128,
        d_kv=64,
        dropout_rate=0.1,
        layer_norm_epsilon=1e-6,
        relative_attention_num_buckets=32,
    ),
    Llama: dict(rms_norm_eps=1e-5, hidden_act="silu"),
}


def bench(args, repeats=5):
    """Time every kind of step, a test and a checkpoint, by turns: random ids, 64 to 256 tokens a prompt, 4 an answer."""
    args.tasks, args.mask, args.seed = ["bench"], "migu", args.seed[:1]
    with train.explained(ValueError, OSError):
        ((folder, config),) = train.plan(args)
        c, device, rng = (
            types.SimpleNamespace(**config),
            torch.device(args.device),
            train.seeded(args.seed[0], 0),
        )
        models.check(
            args.model in SHAPES or Path(args.model, "config.json").exists(),
            f"--bench knows the shapes {', '.join(SHAPES)}, or takes a model's folder, and {args.model} is neither",
        )
        kind, shape = SHAPES.get(args.model, (None, None))
        with (
            device if c.tune == "full" else torch.device("cpu")
        ):  # a model with adapters gets smaller before it moves
            model = kind({**SHARED[kind], **shape}) if kind else load_model(args.model)
        folder.parent.mkdir(parents=True, exist_ok=True)
    gpu, dtype = device.type == "cuda", getattr(torch, c.dtype)
    if c.tune != "full":
        add_lora(model, dtype=dtype)
    model = model.to(device)
    model.c.checkpointing, model.eos = c.checkpointing, []  # no answer ends early
    optimizer = train.make_optimizer(model, c)
    sources = [
        rng.integers(3, model.c.vocab_size, length).tolist()
        for length in rng.integers(64, 257, c.batch_size)
    ]
    rows = [
        (ids, ids[:4]) if isinstance(model, T5) else (ids + ids[:4], [-100] * len(ids) + ids[:4])
        for ids in sources
    ]
    size = 8192 if gpu else 2048
    factors = torch.randn(2, size, size, device=device, dtype=dtype)

    def step(masker):
        train.train_step(model.train(), optimizer, masker, rows, c, {})

    def test(_):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model.eval().generate(**data.collate(sources), max_new_tokens=4)

    def checkpoint(_):
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            save_model(model, place, tensors=migu.plain_weights(model))

    kinds = {"plain step": (step, None)}  # name -> what runs, and its mask
    kinds |= {f"{name}, explicit": (step, (name, c.layers)) for name in migu.CRITERIA}
    kinds |= {
        f"{name}, row-sparse": (step, (name, c.layers, True))
        for name in migu.CRITERIA
        if c.row_sparse and name != "gradient"
    }
    kinds |= {
        "test": (test, None),
        "checkpoint": (checkpoint, None),
        "matrix product": (lambda _: torch.mm(*factors), None),
    }
    counts, seconds = {}, {name: [] for name in kinds}
    step(None)  # the optimizer takes its memory
    for turn, name in tqdm([*itertools.product(range(repeats + 1), kinds)], desc="bench"):
        run, mask = kinds[name]
        masker = MIGU(model, c.threshold, *mask) if mask else None
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        with contextlib.ExitStack() as counting:
            if turn == 0:  # the first turn counts, the others are timed
                operations, flops = (
                    counting.enter_context(Operations()),
                    counting.enter_context(FlopCounterMode(display=False)),
                )
            started = time.perf_counter()
            run(masker)
            if gpu:
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - started)
        if turn == 0:
            counts[name] = operations.count, flops.get_total_flops(), train.peak_memory(args.device)
        if masker:
            masker.remove()
    times = {name: np.array(seconds[name][1:]) for name in kinds}
    medians = {name: np.median(times[name]) for name in kinds}
    peak = counts.pop("matrix product")[1] / medians["matrix product"]
    tokens = sum(len(ids) + 4 for ids in sources)
    table = [
        [
            f"{args.model}, {args.tune}, batch {c.batch_size}, {c.dtype}",
            "seconds",
            "least",
            "most",
            "of plain",
            "examples/s",
            "tokens/s",
            f"of {peak / 1e12:.3g} TFLOP/s",
            "operations",
            "GB",
        ]
    ]
    for name, (operations, flops, memory) in counts.items():
        t, speeds = medians[name], ["", "", ""]
        if name != "checkpoint":
            speeds = [f"{len(rows) / t:.4g}", f"{tokens / t:.4g}", f"{flops / t / peak:.1%}"]
        table.append(
            [
                name,
                *(f"{x:.4g}" for x in (t, times[name].min(), times[name].max())),
                f"{t / medians['plain step']:.2f}",
                *speeds,
                str(operations),
                f"{memory:.3g}" if gpu else "",
            ]
        )
    train.write_csv(f"{folder}-batch{c.batch_size}-{c.dtype}-{device.type}.csv", table)
    print(evaluation.table(table))


def test_the_bench_measures_every_kind_of_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", (T5, dict(d_model=32, d_ff=48, num_layers=1, num_heads=2)))
    monkeypatch.setattr(bench, "__defaults__", (1,))  # one timed turn
    train.main(
        [
            "--bench",
            "--model",
            "tiny",
            "--batch-size",
            "2",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ]
    )
    header, *rows = csv.reader(
        (tmp_path / "bench-tiny-full-migu-s42-batch2-float32-cpu.csv").read_text().splitlines()
    )
    by_name = {row[0]: dict(zip(header[1:], row[1:])) for row in rows}
    assert [*by_name] == [
        "plain step",
        *(f"{name}, explicit" for name in migu.CRITERIA),
        *(f"{name}, row-sparse" for name in ("magnitude", "random", "weight")),
        "test",
        "checkpoint",
    ]
    assert by_name["plain step"]["of plain"] == "1.00" and "plain step" in capsys.readouterr().out
    for row in by_name.values():
        assert 0 < float(row["least"]) <= float(row["seconds"]) <= float(row["most"])
    assert int(by_name["plain step"]["operations"]) < int(
        by_name["magnitude, explicit"]["operations"]
    )
    for more, sparse in (
        (["--tune", "lora"], False),
        (["--micro-batch", "1"], False),
        (["--checkpointing"], True),
    ):
        train.main(
            [
                "--bench",
                "--model",
                "tiny",
                "--batch-size",
                "2",
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
                *more,
            ]
        )
        assert ("row-sparse" in capsys.readouterr().out) == sparse
    with pytest.raises(SystemExit):
        train.main(["--bench", "--model", "no/such", "--device", "cpu", "--out", str(tmp_path)])
    assert "knows the shapes" in capsys.readouterr().err
    monkeypatch.setattr(train, "train_step", lambda *_: [].remove(1))
    with pytest.raises(ValueError):  # a programming error keeps its traceback
        train.main(
            [
                "--bench",
                "--model",
                "tiny",
                "--batch-size",
                "2",
                "--device",
                "cpu",
                "--out",
                str(tmp_path),
            ]
        )
