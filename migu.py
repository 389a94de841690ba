"""MIGU: magnitude-based gradient updating (Du et al., EMNLP 2024 Findings, section 3).

A linear layer computes h = x W^T. Its output neuron i has the magnitude n_i = |h_i|, summed over
all tokens of the current batch. Which neurons are large differs from task to task, and MIGU updates
only those, so that tasks wear out each other's weights less; no old data, no task labels:

    M_i = 1 if n_i reaches the T-quantile of n, else 0      T = 0.7 keeps the top 30 % of the rows
    W  <-  W - lr * M * dL/dW                               row i of the gradient times M_i

Masked are the weights of linear layers, except the output head; not embeddings, norms or biases.
With SGD a masked row stays as it is. With AdamW it may still move, by momentum and weight decay.

    masker = MIGU(model)
    loss.backward()
    masker.mask_gradients()
    optimizer.step()
"""

import math
import re
from fractions import Fraction
from functools import partial

import torch
from torch import nn

NOT_THE_HEAD = r"^(?!lm_head$)"


# ---- the method


def rows_masked(rows, threshold):
    """How many of n rows lie below their T-quantile, which is at rank T (n - 1), counted from 0.

    str() and Fraction make 7/100 of 0.07, which as a float is a little more.
    """
    return math.ceil(Fraction(str(threshold)) * (rows - 1))


def keep_rows(scores, threshold):
    """(d_out,) -> bool (d_out,): the scores that reach their T-quantile, ties included."""
    lowest_kept = scores.kthvalue(rows_masked(len(scores), threshold) + 1).values
    return scores >= lowest_kept


def by_magnitude(layer, magnitude):
    """The method: how large the outputs were."""
    return magnitude


def by_chance(layer, magnitude):
    """A baseline: random rows, drawn anew in each step."""
    return torch.rand(layer.out_features, device=layer.weight.device)


def by_gradient(layer, magnitude):
    """Table 11: L1 norm of the gradient of each row."""
    return layer.weight.grad.abs().sum(1, dtype=torch.float32)


def by_weight(layer, magnitude):
    """Table 11: L1 norm of each row."""
    return layer.weight.abs().sum(1, dtype=torch.float32)


# Each maps a layer and its magnitude (d_out,) to the scores (d_out,) that rank its rows.
CRITERIA = {
    "magnitude": by_magnitude,
    "random": by_chance,
    "gradient": by_gradient,
    "weight": by_weight,
}


def layers_to_mask(model, pattern):
    """name -> trained linear layer; the pattern is searched for in the names."""
    trained = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            trained[name] = layer
    # An adapter goes by the name of the layer that it adapts.
    found = {n: x for n, x in trained.items() if re.search(pattern, n.partition(".lora_")[0])}
    if not found:
        some = ", ".join(list(trained)[:3])
        raise ValueError(f"{pattern!r} is found in none of the trained linear layers: {some}, ...")
    return found


class MIGU:
    """Zeroes the gradients of the rows that score lowest, between backward() and step()."""

    def __init__(self, model, threshold=0.7, criterion="magnitude", layers=NOT_THE_HEAD):
        if criterion not in CRITERIA or not 0 <= threshold <= 1:
            raise ValueError(f"MIGU takes one of {list(CRITERIA)}, and a threshold from 0 to 1")
        self.threshold = threshold
        self.score = CRITERIA[criterion]
        self.layers = layers_to_mask(model, layers)
        self.magnitude = {}  # name of a layer -> (d_out,) fp32, this step's sum so far
        self.masks = {}  # name of a layer -> bool (d_out,), True where a row is kept, once chosen
        self.hooks = []
        for name in self.layers:
            # LoRA's B is judged by the merged output (section 3.3), which its parent gives.
            observed = model.get_submodule(name.removesuffix(".lora_B"))
            self.hooks.append(observed.register_forward_hook(partial(self.observe, name)))

    def observe(self, name, layer, inputs, output):
        """Add a training pass's |h|, summed over its tokens. In fp32: a long sum of bf16 stalls.

        Several passes make one batch. A pass that is computed twice (gradient checkpointing)
        doubles every row's sum, which leaves their order as it is.
        """
        if layer.training and torch.is_grad_enabled():
            tokens = output.detach().reshape(-1, layer.out_features)
            size = tokens.abs().sum(0, dtype=torch.float32)
            self.magnitude[name] = self.magnitude.get(name, 0) + size

    def choose(self, name, layer):
        """bool (d_out,): the rows of a layer that keep their gradient."""
        scores = self.score(layer, self.magnitude.get(name))
        if scores is None:
            raise RuntimeError(f"{name} had no pass in training mode since the last step")
        return keep_rows(scores, self.threshold)

    @torch.no_grad()
    def mask_gradients(self):
        """Zero the masked rows of each gradient. Returns rows kept / rows, a tensor of shape ()."""
        for name, layer in self.layers.items():
            # RowSparseMIGU's masks are chosen already, and what they mask was not computed.
            if layer.weight.grad is not None and name not in self.masks:
                keep = self.masks[name] = self.choose(name, layer)
                layer.weight.grad.mul_(keep[:, None])
        if not self.masks:
            raise RuntimeError("no layer to mask has a gradient: call backward() first")
        kept = torch.cat(list(self.masks.values())).float().mean()
        self.magnitude.clear()
        self.masks.clear()
        return kept

    def remove(self):
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()


# ---- the same update in less time: gradients of masked rows are not even computed


class RowSparseMIGU(MIGU):
    """MIGU by magnitude whose backward pass multiplies for the kept rows alone.

    It needs the mask before the backward pass: one pass makes a step, and each weight is used once.
    """

    def __init__(self, model, threshold=0.7, layers=NOT_THE_HEAD):
        uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
        for name, layer in layers_to_mask(model, layers).items():
            if uses.count(id(layer.weight)) > 1 or name.endswith((".lora_A", ".lora_B")):
                raise ValueError(f"{name}: tied weights and adapters need MIGU, not RowSparseMIGU")
        super().__init__(model, threshold, "magnitude", layers)

    def observe(self, name, layer, inputs, output):
        """Puts in the output's place one whose backward pass computes the kept rows alone."""
        if layer.training and torch.is_grad_enabled():
            if name in self.masks:
                raise RuntimeError("RowSparseMIGU needs all of a step in one pass")
            super().observe(name, layer, inputs, output)
            rows = partial(self.rows_to_compute, name, layer)
            return RowGradient.apply(output.detach(), *inputs, layer.weight, layer.bias, rows)

    def rows_to_compute(self, name, layer):
        """(k,) rows whose gradient is computed, and bool (k, 1): those of them that are kept.

        k comes from the width, so that no GPU has to count and be waited for; it is a multiple of
        16, which matrix units like. A CPU counts, so that ties are all kept there; on a GPU, rows
        that tie beyond k go without a gradient.
        """
        keep = self.masks[name] = self.choose(name, layer)
        count = len(keep) - rows_masked(len(keep), self.threshold)
        if keep.is_cpu:
            count = int(keep.sum())
        count = min(len(keep), math.ceil(count / 16) * 16)
        rows = self.magnitude[name].topk(count).indices
        return rows, keep[rows, None]


class RowGradient(torch.autograd.Function):
    """h = x W^T + b (..., d_out), computed before; backward: dL/dW = (dL/dh)^T x in chosen rows."""

    @staticmethod
    def forward(ctx, h, x, weight, bias, rows_to_compute):
        ctx.save_for_backward(x, weight)
        ctx.rows_to_compute = rows_to_compute
        return h.view_as(h)

    @staticmethod
    def backward(ctx, dh):
        x, weight = ctx.saved_tensors
        rows, keep = ctx.rows_to_compute()
        d_out, d_in = weight.shape
        dx = dh @ weight.to(dh.dtype)  # (..., d_in)
        dh = dh.reshape(-1, d_out)  # (tokens, d_out)
        db = dh.sum(0) if ctx.needs_input_grad[3] else None
        part = dh.index_select(1, rows).T @ x.reshape(-1, d_in).to(dh.dtype)  # (k, d_in)
        part = part.mul_(keep).to(weight.dtype)
        dW = torch.zeros_like(weight).index_copy_(0, rows, part)  # (d_out, d_in)
        return None, dx, dW, db, None


# ---- LoRA (Hu et al. 2022), and what IncLoRA and O-LoRA (Wang et al. 2023) need of it


class LoRALinear(nn.Linear):
    """h = x W^T + (alpha / r) x A^T B^T, with W frozen, A (r, d_in), B (d_out, r) zero at first."""

    def __init__(self, linear, rank, alpha, dropout):
        d_out, d_in = linear.weight.shape
        like = {"bias": False, "device": linear.weight.device, "dtype": linear.weight.dtype}
        super().__init__(d_in, d_out, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        self.lora_A = nn.Linear(d_in, rank, **like)
        self.lora_B = nn.Linear(rank, d_out, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.lora_dropout = nn.Dropout(dropout)
        self.train(linear.training)

    def forward(self, x):
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(self.lora_dropout(x)))

    @torch.no_grad()
    def merged_weight(self):
        """(d_out, d_in): W + (alpha / r) B A."""
        return self.weight + self.scale * self.lora_B.weight @ self.lora_A.weight


def lora_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def add_lora(model, rank=8, alpha=32, dropout=0.05):
    """Freeze the model and put an adapter on each q and v projection."""
    if lora_layers(model):
        raise ValueError("the model has adapters already: merge_lora() folds them in")
    model.frozen_by_lora = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and re.search(r"\.[qv](_proj)?$", name):
            model.set_submodule(name, LoRALinear(layer, rank, alpha, dropout))
    if not lora_layers(model):
        raise ValueError("the model has no q and v projections to adapt")


def merge_lora(model):
    """Fold the adapters into their layers: a plain model again, trainable where it was."""
    for name, adapted in lora_layers(model).items():
        plain = nn.Linear(adapted.in_features, adapted.out_features, device="meta")
        plain.weight = adapted.weight
        plain.weight.data = adapted.merged_weight()
        plain.bias = adapted.bias
        model.set_submodule(name, plain.train(adapted.training))
    for parameter in model.__dict__.pop("frozen_by_lora", ()):
        parameter.requires_grad_(True)


def plain_weights(model):
    """name -> weight, as merge_lora() would leave them; the model stays as it is."""
    weights = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    adapted = {f"{name}.weight": x.merged_weight() for name, x in lora_layers(model).items()}
    return weights | adapted


def orthogonality_penalty(model, earlier):
    """O-LoRA's sum of |A_old A_new^T|; earlier: name of a layer -> A_old (earlier ranks, d_in)."""
    A_new = {name: layer.lora_A.weight for name, layer in lora_layers(model).items()}
    return sum((A_old @ A_new[name].T).abs().sum() for name, A_old in earlier.items())
