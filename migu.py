"""MIGU: magnitude-based gradient updating (Du et al., EMNLP 2024 Findings, sections 3.2 and 3.3).

A linear layer computes h = x W^T. Over the tokens of the current batch, its output neuron i has the magnitude

    n_i = sum over tokens of |h_i|.

Which neurons are large differs from task to task. MIGU updates only those, so that tasks wear each other's weights out less:

    M_i = 1 if n_i >= the T-quantile of n, else 0        T = 0.7 keeps the top 30 % of the neurons
    W  <-  W - lr * M * dL/dW                            row i of the gradient is multiplied by M_i

(The paper divides n by its sum and by the number of tokens; a quantile does not see it.) No old data and no task label:

    masker = MIGU(model, threshold=0.7)
    loss.backward()
    masker.mask_gradients()
    optimizer.step()

Masked are the weights of linear layers: all but the output head, unless `layers` chooses others. Not masked: embeddings,
norms, biases, T5's position tables. With SGD a masked row stays as it is. With AdamW it may still move: its gradient is
zero, but the momentum of steps in which it was kept goes on, and weight decay shrinks every row.

LoRA writes W + (alpha / r) B A with W frozen. A is masked by its own output, B by the output of the whole layer.
"""
import re

import torch
from torch import nn

CRITERIA = ("magnitude", "random", "gradient", "weight")
NOT_THE_HEAD = r"^(?!lm_head$)"

def keep_rows(magnitude, threshold):
    """(..., d_out) -> bool (..., d_out): what reaches the threshold-quantile (linear interpolation; ties are all kept)."""
    return magnitude >= torch.quantile(magnitude.float(), threshold, dim=-1, keepdim=True)

def l1(matrix, dim):
    return torch.linalg.vector_norm(matrix, 1, dim, dtype=torch.float32)       # bf16 would stall

class MIGU:
    """Masks a model's weight gradients by rows. Criterion "magnitude" is the method; "random" rows and the rows of largest
    "gradient" or "weight" L1 norm are what the paper compares it with (table 11)."""

    def __init__(self, model, threshold=0.7, criterion="magnitude", layers=NOT_THE_HEAD):
        if criterion not in CRITERIA or not 0 <= threshold <= 1:
            raise ValueError(f"criterion {criterion!r} must be one of {CRITERIA}, and threshold {threshold} from 0 to 1")
        linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        trained = {name: layer for name, layer in linear.items() if layer.weight.requires_grad}
        self.layers = {name: layer for name, layer in trained.items() if re.search(layers, re.sub(r"\.lora_[AB]$", "", name))}
        if not self.layers:
            raise ValueError(f"{layers!r} selects none of the linear layers that are trained, such as {', '.join([*trained][:3])}")
        self.threshold, self.criterion = threshold, criterion
        self.measured = {name: linear[name.removesuffix(".lora_B")] for name in self.layers}      # B: by the whole layer
        self.magnitude = {}                                        # measured layer -> (d_out,) fp32, of this step so far
        self.hooks = []
        if criterion == "magnitude":
            self.hooks = [layer.register_forward_hook(self.add_magnitude) for layer in {*self.measured.values()}]

    def add_magnitude(self, layer, inputs, output):
        """Add a training pass's |output|, summed over its tokens; several passes make one step's batch."""
        if layer.training and torch.is_grad_enabled():
            magnitude = l1(output.detach().reshape(-1, layer.out_features), 0)
            self.magnitude[layer] = self.magnitude[layer] + magnitude if layer in self.magnitude else magnitude

    def score(self, name):
        """(d_out,): what a layer's rows are ranked by."""
        layer = self.layers[name]
        if self.criterion == "random":
            return torch.rand(layer.out_features, device=layer.weight.device)
        if self.criterion != "magnitude":
            return l1(layer.weight.grad if self.criterion == "gradient" else layer.weight, 1)
        if self.measured[name] not in self.magnitude:
            raise RuntimeError(f"{name} has a gradient, but no pass in training mode since the last step")
        return self.magnitude[self.measured[name]]

    @torch.no_grad()
    def mask_gradients(self):
        """Zero the masked rows' gradients, passing over layers that have none. Returns (): rows kept / rows."""
        widths, kept, rows = {}, 0, 0
        for name, layer in self.layers.items():
            if layer.weight.grad is not None:
                widths.setdefault(layer.out_features, []).append(name)
        for names in widths.values():                              # one quantile for all layers of a width
            keep = keep_rows(torch.stack([self.score(name) for name in names]), self.threshold)
            for name, its_keep in zip(names, keep):
                self.layers[name].weight.grad.masked_fill_(~its_keep[:, None], 0)
            kept, rows = kept + keep.sum(), rows + keep.numel()
        self.magnitude.clear()
        return torch.as_tensor(kept) / rows

    def remove(self):
        """Take the hooks off: the model is as it was."""
        for hook in self.hooks:
            hook.remove()
        self.magnitude.clear()

# ---- low-rank adapters: LoRA (Hu et al. 2022), IncLoRA (a new one for each task), O-LoRA (Wang et al. 2023)

class LoRALinear(nn.Linear):
    """x W^T + (alpha / r) dropout(x) A^T B^T, with W frozen and B zero at first: the layer starts as it was."""

    def __init__(self, layer, rank, alpha, dropout):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, alpha / rank
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False, device=layer.weight.device)          # A: (r, d_in)
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False, device=layer.weight.device)         # B: (d_out, r)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))

    @torch.no_grad()
    def folded(self):
        """(d_out, d_in): W + (alpha / r) B A."""
        return self.weight + self.scale * self.lora_B.weight @ self.lora_A.weight

def replace(model, name, layer):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)

def adapters(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}

def add_lora(model, rank=8, alpha=32, dropout=0.05):
    """Freeze the model and put an adapter on each q and v projection (T5: q, v; Llama: q_proj, v_proj)."""
    model.requires_grad_(False)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and re.search(r"\.[qv](_proj)?$", name):
            replace(model, name, LoRALinear(layer, rank, alpha, dropout))

def plain_weights(model):
    """name -> weight as a model without adapters has it, the adapters folded in."""
    weights = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    return weights | {f"{name}.weight": adapter.folded() for name, adapter in adapters(model).items()}

def merge_lora(model):
    """Fold the adapters into their layers: a plain model again, all of it trainable."""
    for name, adapter in adapters(model).items():
        layer = nn.Linear(adapter.in_features, adapter.out_features, adapter.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(adapter.folded()), adapter.bias
        replace(model, name, layer)
    model.requires_grad_(True)

def orthogonality_penalty(model, earlier, l1_weight=0.5, l2_weight=0.0):
    """O-LoRA's l1 * sum |A_old A_new^T| + l2 * (||A_new|| + ||B_new||); earlier: layer name -> (earlier ranks, d_in)."""
    penalty = 0.0
    for name, layer in adapters(model).items():
        penalty = penalty + l1_weight * (earlier[name] @ layer.lora_A.weight.T).abs().sum()
        if l2_weight:
            penalty = penalty + l2_weight * (layer.lora_A.weight.norm() + layer.lora_B.weight.norm())
    return penalty
