"""T5 and Llama in plain PyTorch, and the Hugging Face folders they are loaded from and saved to.

Parameters have the names they have in those folders, and logits are those of transformers.

A batch is kept packed: a linear layer sees (tokens, d), the real tokens of all rows one after
another; only attention lays them out as (B, H, S, D). So no work is spent on padding, and MIGU's
magnitudes are plain sums over what a layer saw.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# cuDNN's attention can give NaN in its backward pass with a mask (torch issue 196678).
torch.backends.cuda.enable_cudnn_sdp(False)


# torchrun starts several processes of a program; RANK 0 alone writes files and shows progress.
TORCHRUN = os.environ if "LOCAL_RANK" in os.environ else {}
RANK = int(TORCHRUN.get("RANK", 0))
PROCESSES = int(TORCHRUN.get("WORLD_SIZE", 1))


# ---- what a user does wrong


class UserError(ValueError):
    """Something for the user to mend."""


def check(good, fault):
    if not good:
        raise UserError(fault)


@contextmanager
def as_user_error(fault, *errors):
    """Errors of these kinds become a UserError that says the fault, and what the error says."""
    try:
        yield
    except errors as error:
        raise UserError(f"{fault}: {error}") from error


# What is raised where a file's values are missing, or of another kind or size than they should be.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


@contextmanager
def one_line_errors(command):
    """A user's error becomes one line on stderr and exit code 2; others keep their traceback."""
    sys.stdout.reconfigure(errors="replace")  # where "±" cannot be printed, "?" is
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads what is printed: let the flush at exit go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except (UserError, OSError) as error:
        if RANK > 0:
            time.sleep(5)  # The first process has the same to say, and torchrun then ends all.
        print(f"{command}:", *str(error).split(), file=sys.stderr)
        sys.exit(2)


# ---- what both models use


def to_device(tensor, device):
    """Copies from pinned memory, so that nobody waits for a GPU."""
    if tensor.is_cpu and device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Packing:
    """Where the real tokens of a batch lie, by its mask (B, S), bool.

    The mask stays on the CPU: looking for its ones must not wait for a GPU.
    """

    def __init__(self, mask, device):
        self.size = mask.shape
        self.index = to_device(mask.flatten().nonzero().squeeze(1), device)  # (tokens,)
        # (B,): each row's last token
        self.last = to_device((mask.sum(1).cumsum(0) - 1).clamp(min=0), device)

    def pack(self, x):  # (B, S, ...) -> (tokens, ...)
        return x.flatten(0, 1).index_select(0, self.index)

    def pad(self, x):  # (tokens, ...) -> (B, S, ...), zero at padding
        padded = x.new_zeros(self.size.numel(), *x.shape[1:])
        return padded.index_copy(0, self.index, x).unflatten(0, self.size)

    def split_heads(self, x, heads):  # (tokens, H * D) -> (B, H, S, D)
        return self.pad(x).unflatten(-1, (heads, -1)).transpose(1, 2)

    def join_heads(self, x):  # (B, H, S, D) -> (tokens, H * D)
        return self.pack(x.transpose(1, 2).flatten(2))


class KVCache(dict):
    """attention layer -> its keys and values (B, H, S, D) so far."""

    def append(self, layer, keys, values):
        past = self.get(layer, (keys[:, :, :0], values[:, :, :0]))
        self[layer] = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        return self[layer]


def causal_mask(queries, keys, device):
    """bool (queries, keys): the queries are the last of the keys, and see none after themselves."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attention_bias(allowed, bias):
    """What attention adds to its scores: the bias where allowed, the lowest number elsewhere.

    Its type is that of the queries: autocast's where it is on, else the bias's own.
    """
    dtype = bias.dtype
    if torch.is_autocast_enabled(bias.device.type):
        dtype = torch.get_autocast_dtype(bias.device.type)
    return torch.where(allowed, bias.to(dtype), torch.finfo(dtype).min)


def attend(q, k, v, bias, dropout, scale):
    """softmax(q k^T * scale + bias) v, of heads (B, H, S, D); bias: (B, H, S, keys), or alike."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # Several times as fast there as the fused kernel, though scores are rounded to bf16.
        scores = q @ k.transpose(2, 3) * scale + bias
        return F.dropout(scores.softmax(-1), dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)


def run_block(block, checkpointing, *inputs):
    """block(*inputs); with checkpointing, the backward pass computes its inside a second time."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


SUPPORTED = {"feed_forward_proj": ["relu", "gated-gelu"], "hidden_act": ["silu"]}


def from_dict(kind, values):
    """A config dataclass, of those values that it knows. None stands for the default."""
    types = kind.__annotations__
    known = {name: values[name] for name in types if values.get(name) is not None}
    for name, value in known.items():
        check(isinstance(value, types[name]), f"{name} {value!r} is not {types[name]}")
        check(value in SUPPORTED.get(name, [value]), f"{name} {value!r} is not supported")
    return kind(**known)


class LanguageModel(nn.Module):
    """Loss and greedy decoding for both. A model defines how it begins and how it goes on:

    start(input_ids, attention_mask, labels) -> ids and mask (B, S) for decode(), the target of
        each id, and the memory that it may look at
    decode(ids, mask, memory, cache) -> (tokens, d) for the head, and their packing
    """

    def __init__(self, config, kind):
        super().__init__()
        self.config_json = config  # saved again with the weights, as are the tokenizer's files
        self.files = {}
        self.config = from_dict(kind, config)
        self.checkpointing = False
        eos, pad = self.config.eos_token_id, self.config.pad_token_id
        self.eos = eos if isinstance(eos, list) else [eos]
        self.pad = self.eos[0] if pad is None else pad

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, input_ids, attention_mask, labels=None):
        """(B, S) ids, mask and labels (-100: ignored) -> logits (B, S, V), mean loss or None."""
        ids, mask, targets, memory = self.start(input_ids, attention_mask.bool(), labels)
        hidden, packing = self.decode(ids, mask, memory)
        logits = self.lm_head(hidden)  # (tokens, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float(), targets[mask].to(self.device))
        return packing.pad(logits), loss

    def loss(self, input_ids, attention_mask, labels):
        """The same mean loss, for training: the head runs at labelled positions alone."""
        ids, mask, targets, memory = self.start(input_ids, attention_mask.bool(), labels)
        hidden, _ = self.decode(ids, mask, memory)
        targets = targets[mask]  # (tokens,)
        labelled = (targets != -100).nonzero().squeeze(1)
        logits = self.lm_head(hidden.index_select(0, to_device(labelled, self.device)))
        return F.cross_entropy(logits.float(), to_device(targets[labelled], self.device))

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_new_tokens):
        """Greedy: (B, S) -> new ids (B, new), each row as if alone, padded after its end."""
        ids, mask, _, memory = self.start(input_ids.cpu(), attention_mask.bool().cpu(), None)
        cache = KVCache()
        new = ids[:, :0]  # (B, 0)
        ended = torch.zeros(len(ids), 1, dtype=torch.bool)
        while new.shape[1] < max_new_tokens and not ended.all():
            hidden, packing = self.decode(ids, mask, memory, cache)
            logits = self.lm_head(hidden.index_select(0, packing.last))  # (B, V)
            # The one wait for the device in a step.
            ids = logits.argmax(-1, keepdim=True).cpu().masked_fill(ended, self.pad)  # (B, 1)
            new = torch.cat([new, ids], 1)
            ended |= torch.isin(ids, torch.tensor(self.eos))
            # To the layers, a row that has ended is padding: it takes part no more.
            mask = torch.cat([mask, ~ended], 1)
        return new.to(self.device)


# ---- T5 (Raffel et al. 2020): v1.0 with ReLU and a tied head, v1.1 and Flan with gated GELU


@dataclass
class T5Config:
    vocab_size: int
    d_model: int
    d_kv: int  # of one head; heads * d_kv need not be d_model
    d_ff: int
    num_layers: int  # of the encoder
    num_heads: int
    relative_attention_num_buckets: int
    layer_norm_epsilon: float | int
    num_decoder_layers: int = None  # as many as the encoder
    feed_forward_proj: str = "relu"
    relative_attention_max_distance: int = 128
    dropout_rate: float | int = 0.1
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = None  # as in v1.0: when the head is tied
    pad_token_id: int = 0
    eos_token_id: int | list = 1
    decoder_start_token_id: int = 0


# What attention looks at: x (tokens, d), its packing, a bias that broadcasts to (B, H, S, keys).
Source = namedtuple("Source", "x packing bias")


class T5Attention(nn.Module):
    """softmax(q k^T + bias) v, not divided by sqrt(D): what q starts from makes up for that."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.dropout = config.dropout_rate
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        nn.init.normal_(self.q.weight, std=(config.d_model * config.d_kv) ** -0.5)

    def forward(self, x, packing, source, cache=None):
        """x (tokens, d) looks at a source: at itself, or at the memory that the encoder left."""
        q = packing.split_heads(self.q(x), self.heads)  # (B, H, S, D)
        if cache is not None and self in cache and source.x is not x:
            k, v = cache[self]  # the memory's stay the same
        else:
            k = source.packing.split_heads(self.k(source.x), self.heads)
            v = source.packing.split_heads(self.v(source.x), self.heads)
            if cache is not None:
                k, v = cache.append(self, k, v)
        h = attend(q, k, v, source.bias, self.dropout * self.training, 1.0)
        return self.o(packing.join_heads(h))


class T5FeedForward(nn.Module):
    """wo(relu(wi(x))), or gated: wo(gelu(wi_0(x)) * wi_1(x))."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x):
        if self.gated:
            h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        else:
            h = F.relu(self.wi(x))
        return self.wo(self.dropout(h))


class T5Block(nn.Module):
    """Self-attention, in a decoder cross-attention, feed-forward: each x + dropout(f(norm(x)))."""

    def __init__(self, config, is_decoder):
        super().__init__()
        self.layer = nn.ModuleList([nn.ModuleDict({"SelfAttention": T5Attention(config)})])
        if is_decoder:
            self.layer.append(nn.ModuleDict({"EncDecAttention": T5Attention(config)}))
        self.layer.append(nn.ModuleDict({"DenseReluDense": T5FeedForward(config)}))
        for layer in self.layer:
            layer.layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x, packing, bias, cache=None, memory=None):  # x (tokens, d)
        first, last = self.layer[0], self.layer[-1]
        h = first.layer_norm(x)
        x = x + self.dropout(first.SelfAttention(h, packing, Source(h, packing, bias), cache))
        if memory is not None:
            h = self.layer[1].layer_norm(x)
            x = x + self.dropout(self.layer[1].EncDecAttention(h, packing, memory, cache))
        return x + self.dropout(last.DenseReluDense(last.layer_norm(x)))


class T5Stack(nn.Module):
    """Encoder or decoder. The first block holds the table of position biases; all blocks use it."""

    def __init__(self, config, is_decoder, layers):
        super().__init__()
        self.is_decoder = is_decoder
        self.max_distance = config.relative_attention_max_distance
        self.block = nn.ModuleList(T5Block(config, is_decoder) for _ in range(layers))
        table = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.block[0].layer[0].SelfAttention.relative_attention_bias = table
        self.final_layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def position_bias(self, queries, keys):
        """(1, H, queries, keys), a learned number a bucket of distances; queries: the last keys.

        What it says of keys that follow a decoder's query does not count: they are not allowed.
        """
        table = self.block[0].layer[0].SelfAttention.relative_attention_bias
        position = torch.arange(keys, device=table.weight.device)
        distance = position[None, :] - position[keys - queries :, None]
        buckets, first = table.num_embeddings, 0
        if not self.is_decoder:  # it looks both ways: half of the buckets are for what follows
            buckets = buckets // 2
            first = (distance > 0) * buckets
        distance = distance.abs()
        # Near: a bucket a distance. Far: buckets grow with its logarithm, up to max_distance.
        exact = buckets // 2
        scale = (buckets - exact) / math.log(self.max_distance / exact)
        far = exact + (torch.log(distance.clamp(min=1) / exact) * scale).long()
        bucket = torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
        return table(first + bucket).permute(2, 0, 1)[None]

    def forward(self, x, packing, allowed, checkpointing, cache=None, memory=None):
        """allowed: bool, of a shape that broadcasts to (B, H, S, keys)."""
        bias = attention_bias(allowed, self.position_bias(packing.size[1], allowed.shape[-1]))
        x = self.dropout(x)
        for block in self.block:
            x = run_block(block, checkpointing, x, packing, bias, cache, memory)
        return self.dropout(self.final_layer_norm(x))


class T5(LanguageModel):
    decoder_only = False

    def __init__(self, config):
        super().__init__({"model_type": "t5", **config}, T5Config)
        c = self.config
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = T5Stack(c, False, c.num_layers)
        self.decoder = T5Stack(c, True, c.num_decoder_layers or c.num_layers)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        tied, scaled = c.tie_word_embeddings, c.scale_decoder_outputs
        if tied:
            self.lm_head.weight = self.shared.weight
        if scaled is None:
            scaled = tied
        self.head_scale = c.d_model**-0.5 if scaled else 1.0

    def encode(self, input_ids, attention_mask):
        packing = Packing(attention_mask, self.device)
        allowed = to_device(attention_mask, self.device)[:, None, None, :]  # (B, 1, 1, S)
        x = self.shared(packing.pack(to_device(input_ids, self.device)))  # (tokens, d)
        x = self.encoder(x, packing, allowed, self.checkpointing)
        return Source(x, packing, attention_bias(allowed, x.new_zeros(())))

    def start(self, input_ids, attention_mask, labels):
        """The start token and the labels shifted right; each row is real up to its last label."""
        if labels is None:
            labels = input_ids.new_full((len(input_ids), 1), -100)
        mask = (labels != -100).flip(1).cumsum(1).flip(1) > 0
        ids = labels.masked_fill(labels == -100, self.pad).roll(1, 1)
        ids[:, 0] = self.config.decoder_start_token_id
        mask[:, 0] = True
        return ids, mask, labels, self.encode(input_ids, attention_mask)

    def decode(self, ids, mask, memory, cache=None):
        """ids (B, S) are the last that mask (B, keys) speaks of."""
        packing = Packing(mask[:, -ids.shape[1] :], self.device)
        # Padding stands at a row's end: what is causal does not see it.
        causal = causal_mask(ids.shape[1], mask.shape[1], self.device)
        x = self.shared(packing.pack(to_device(ids, self.device)))  # (tokens, d)
        x = self.decoder(x, packing, causal, self.checkpointing, cache, memory)
        return x * self.head_scale, packing


# ---- Llama (Touvron et al. 2023): 1, 2, 3, TinyLlama, SmolLM2, any of the family


@dataclass
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the feed-forward part
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    rms_norm_eps: float | int
    num_key_value_heads: int = None  # as many as query heads
    head_dim: int = None  # hidden_size / heads
    rope_theta: float | int = 1e4
    rope_scaling: dict = None
    rope_parameters: dict = None  # where recent files have both of these
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    tie_word_embeddings: bool = False
    pad_token_id: int = None  # the end token
    eos_token_id: int | list = 2


def rotary_frequencies(config, device):
    """(D / 2,) radians a position; Llama 3.1 and later slow those down that do not turn often."""
    rope = {**(config.rope_scaling or {}), **(config.rope_parameters or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    check(kind in ("default", "llama3"), f"rope scaling {kind!r} is not supported")
    exponents = torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
    frequencies = rope.get("rope_theta", config.rope_theta) ** -exponents
    if kind == "default":
        return frequencies
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return fast * frequencies + (1 - fast) * frequencies / rope["factor"]


def rotate(x, cos, sin):
    """Rotary positions in the rotate-half form: x (B, H, S, D), cos and sin (B, 1, S, D)."""
    left, right = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-right, left], -1) * sin.to(x.dtype)


class LlamaAttention(nn.Module):
    """With fewer key heads than query heads, each serves a group of consecutive queries."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.dropout = config.attention_dropout
        self.scale = config.head_dim**-0.5
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, self.heads * config.head_dim, bias)
        self.k_proj = nn.Linear(width, self.kv_heads * config.head_dim, bias)
        self.v_proj = nn.Linear(width, self.kv_heads * config.head_dim, bias)
        self.o_proj = nn.Linear(self.heads * config.head_dim, width, bias)

    def forward(self, x, packing, bias, cos, sin, cache=None):
        q = rotate(packing.split_heads(self.q_proj(x), self.heads), cos, sin)  # (B, H, S, D)
        k = rotate(packing.split_heads(self.k_proj(x), self.kv_heads), cos, sin)
        v = packing.split_heads(self.v_proj(x), self.kv_heads)
        if cache is not None:
            k, v = cache.append(self, k, v)
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        h = attend(q, k, v, bias, self.dropout * self.training, self.scale)
        return self.o_proj(packing.join_heads(h))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, *attention_inputs):  # x (tokens, d)
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(LanguageModel):
    decoder_only = True

    def __init__(self, config):
        super().__init__({"model_type": "llama", **config}, LlamaConfig)
        c = self.config
        c.head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
        c.num_key_value_heads = c.num_key_value_heads or c.num_attention_heads
        rotary_frequencies(c, "meta")  # refuses a scaling that it does not know
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(LlamaBlock(c) for _ in range(c.num_hidden_layers))
        self.model.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def start(self, input_ids, attention_mask, labels):
        """The ids themselves; the target of each is the next label. There is no memory."""
        targets = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=-100)
        return input_ids, attention_mask, targets, None

    def decode(self, ids, mask, memory, cache=None):
        """ids (B, S), padded on either side, are the last that mask (B, keys) speaks of."""
        packing = Packing(mask[:, -ids.shape[1] :], self.device)
        mask = to_device(mask, self.device)
        allowed = causal_mask(ids.shape[1], mask.shape[1], self.device) & mask[:, None, None, :]
        x = self.model.embed_tokens(packing.pack(to_device(ids, self.device)))  # (tokens, d)
        bias = attention_bias(allowed, x.new_zeros(()))  # (B, 1, S, keys)

        # Positions are counted from a row's first real token.
        positions = mask.cumsum(1)[:, -ids.shape[1] :] - 1  # (B, S)
        frequencies = rotary_frequencies(self.config, self.device).repeat(2)  # (D,)
        angles = positions[:, None, :, None] * frequencies  # (B, 1, S, D)

        inputs = (packing, bias, angles.cos(), angles.sin(), cache)
        for block in self.model.layers:
            x = run_block(block, self.checkpointing, x, *inputs)
        return self.model.norm(x), packing


# ---- files: whole or not at all


def write_file(path, chunks):
    """Write chunks of bytes to path, by a temporary file, fsync and rename."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_file(path, [text.encode()])


def parse_json(source, content, kind=dict, **hooks):
    """The JSON object (or list) in some bytes. UserError names their source and the fault."""
    fault = f"{source}: not a JSON {'object' if kind is dict else 'list'}"
    with as_user_error(fault, ValueError, RecursionError):
        value = json.loads(content.decode("utf-8-sig"), **hooks)
    check(isinstance(value, kind), fault)
    return value


def read_json(path, kind=dict):
    return parse_json(path, Path(path).read_bytes(), kind)


def lock(path):
    """An open file that holds the lock of `path`; None where another process holds it.

    The lock ends when the file is closed, or with the process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    with suppress(BlockingIOError, PermissionError):
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file


# ---- safetensors: 8 bytes of header length, a JSON header, the tensors' bytes

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES = {**FLOATS, **INTEGERS, "U8": torch.uint8, "BOOL": torch.bool}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
# What the header says of a tensor, its keys in the order of the alphabet.
SIZES, KIND = r"\[[\d, ]*\]", "|".join(DTYPES)
ENTRY = rf'\{{"data_offsets": {SIZES}, "dtype": "({KIND})", "shape": {SIZES}\}}'


def write_safetensors(path, tensors, metadata=None):
    """Write a dict of tensors; metadata: text -> text."""
    header = {"__metadata__": {"format": "pt", **(metadata or {})}}
    # The widest numbers first, so that all stay aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    end = 0
    for name, t in ordered:
        start, end = end, end + t.nbytes
        header[name] = {"dtype": KINDS[t.dtype], "shape": [*t.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # One after another, so that a GPU's tensors need no second place in memory.
    data = (t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() for _, t in ordered)
    write_file(path, chain([len(text).to_bytes(8, "little"), text], data))


def unique(pairs):
    """A JSON object, no key of which stands twice."""
    check(len(dict(pairs)) == len(pairs), "a key stands twice")
    json.dumps(pairs, ensure_ascii=False).encode()  # ValueError: half of a surrogate pair
    return dict(pairs)


def find_tensors(data):
    """(name -> tensor, metadata) in a file's bytes; checks all but the numbers."""
    check(bytes(data[:7]) != b"version", "a Git LFS pointer: run git lfs pull, or download.py")
    first = 8 + int.from_bytes(data[:8], "little")
    check(first <= min(len(data), 100_000_000), "the header's length does not fit the file")
    header = parse_json("the header", bytes(data[8:first]), object_pairs_hook=unique)
    metadata = header.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(x, str) for x in metadata.values())
    check(texts, "__metadata__ is not text")
    for name, entry in header.items():
        good = re.fullmatch(ENTRY, json.dumps(entry, sort_keys=True))
        check(good, f"{name}: no dtype of torch, or sizes that are none: {entry}")
    # The tensors fill the rest of the file, one after another.
    tensors, end = {}, first
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        fits = entry["data_offsets"] == [start - first, end - first] and end <= len(data)
        possible = math.prod(filter(None, shape)) < 2**63
        check(fits and possible, f"{name}: too long, an overlap, a hole, or another shape: {entry}")
        raw = torch.from_numpy(data[start:end])
        if start % dtype.itemsize:  # a header of odd length
            raw = raw.clone()
        tensors[name] = raw.view(dtype).reshape(shape)
    check(end == len(data), f"the tensors end at byte {end}, the file at byte {len(data)}")
    return tensors, metadata


def open_safetensors(path):
    """name -> tensor, memory-mapped, and the metadata."""
    with as_user_error(f"{path}: not a safetensors file", ValueError):
        return find_tensors(np.memmap(path, np.uint8, "c"))


def read_safetensors(path):
    """name -> tensor, memory-mapped. UserError (a ValueError) or OSError names file and fault."""
    tensors, _ = open_safetensors(path)
    return tensors


# ---- folders in Hugging Face form

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights that are cut into shards
ARCHITECTURES = {"t5": T5, "llama": Llama}  # by model_type
EMBEDDING = {T5: "shared.weight", Llama: "model.embed_tokens.weight"}
# Some files repeat the embedding under these names.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
# Old files have these, and no model needs them.
UNUSED = r".*\.rotary_emb\.inv_freq|decoder\..*\.EncDecAttention\.relative_attention_bias\.weight"
TOKENIZER_FILES = (
    "spiece.model tokenizer.model tokenizer.json tokenizer_config.json "
    "special_tokens_map.json added_tokens.json"
).split()


def read_weights(path):
    """All tensors of a folder: model.safetensors, or the shards that its index names."""
    if (path / WEIGHTS).exists():
        return read_safetensors(path / WEIGHTS)
    place = path / INDEX
    check(place.exists(), f"{path} holds no {WEIGHTS}; pytorch_model.bin is pickled and never read")
    index = read_json(place)
    shards = {shard: read_safetensors(path / shard) for shard in shard_names(place, index)}
    with as_user_error(f"{place}: a tensor is not where it says", LookupError):
        return {name: shards[shard][name] for name, shard in index["weight_map"].items()}


def shard_names(source, index):
    """The files that an index names; they lie beside it, not elsewhere."""
    places = index.get("weight_map")
    check(isinstance(places, dict), f"{source} has no weight_map")
    for name, place in places.items():
        beside = isinstance(place, str) and re.fullmatch(r"[\w.-]+\.safetensors", place)
        check(beside, f"{source}: weight_map: {name}: {place!r} is no safetensors file beside it")
    return sorted(set(places.values()))


def empty_model(source, config):
    """A T5 or Llama without memory for its weights. UserError: it is not supported."""
    kind = str(config.get("model_type"))
    check(kind in ARCHITECTURES, f"{source}: model_type {kind} is not supported: only t5 and llama")
    with as_user_error(f"{source}: config.json", *MALFORMED), torch.device("meta"):
        return ARCHITECTURES[kind](config)


def load_model(path, dtype=torch.float32):
    """A T5 or Llama from a Hugging Face folder. UserError (a ValueError) or OSError: the fault."""
    path = Path(path)
    config = read_json(path / "config.json")
    tensors = {name: t for name, t in read_weights(path).items() if not re.fullmatch(UNUSED, name)}
    # Recent files always say that the head is tied; whether they hold one tells the truth.
    if config.get("scale_decoder_outputs") is False and "lm_head.weight" in tensors:
        config["tie_word_embeddings"] = False
    model = empty_model(path, config)
    embedding, tied = EMBEDDING[type(model)], model.config.tie_word_embeddings
    for copy in COPIES:
        if copy in tensors and (tied or copy != "lm_head.weight"):
            tensor = tensors.pop(copy)
            same = torch.equal(tensor, tensors.setdefault(embedding, tensor))
            check(same, f"{path}: {copy} differs from {embedding}, to which it is tied")

    weights = {name: nn.Parameter(tensor.to(dtype, copy=True)) for name, tensor in tensors.items()}
    if tied and embedding in weights:
        weights["lm_head.weight"] = weights[embedding]  # one parameter, two names
    # The error names each tensor that is missing, unexpected or misshapen.
    with as_user_error(f"{path}: the weights do not fit config.json", RuntimeError):
        model.load_state_dict(weights, assign=True)
    model.files = {n: (path / n).read_bytes() for n in TOKENIZER_FILES if (path / n).is_file()}
    return model.eval()


def save_model(model, path, weights=None, metadata=None):
    """Write a folder that from_pretrained opens; weights: if not the model's own parameters."""
    weights = weights or dict(model.named_parameters())
    # transformers loads all weights as the type that it finds under either name.
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    config = model.config_json | {"dtype": dtype, "torch_dtype": dtype}
    write_text(Path(path, "config.json"), json.dumps(config, indent=2))
    for name, content in model.files.items():
        write_file(Path(path, name), [content])
    write_safetensors(Path(path, WEIGHTS), weights, metadata)
