"""MIGU: magnitude-based gradient updating (Du et al., EMNLP 2024 Findings, sections 3.2 and 3.3).

A linear layer computes h = x W^T. Its output neuron i has the magnitude n_i: |h_i|, summed over the tokens of the current batch
(the paper divides by constants that a quantile does not see). Which neurons are large differs from task to task, and MIGU
updates those alone, so that tasks wear each other's weights out less, without old data or task labels:

    M_i = 1 if n_i >= the T-quantile of n, else 0        T = 0.7 keeps the top 30 % of the neurons
    W  <-  W - lr * M * dL/dW                            row i of the gradient is multiplied by M_i

Masked are the weights of linear layers, all but the output head unless `layers` chooses others; not embeddings, norms, biases,
T5's position tables. With SGD a masked row stays as it is. With AdamW it may still move: its momentum goes on, and weight decay
shrinks every row. In use: masker = MIGU(model), and masker.mask_gradients() between loss.backward() and optimizer.step().
"""
import math, re
import torch
from torch import nn

CRITERIA = ("magnitude", "random", "gradient", "weight")
NOT_THE_HEAD = r"^(?!lm_head$)"

def keep_rows(magnitude, threshold):
    """(..., d_out) -> bool (..., d_out): what reaches the threshold-quantile (linear interpolation; ties are all kept)."""
    return magnitude >= torch.quantile(magnitude.float(), threshold, dim=-1, keepdim=True)
def l1(matrix, dim):                                               # in fp32, as sums of bf16 stall; on each device the faster way
    return matrix.abs().sum(dim, dtype=torch.float32) if matrix.is_cpu else torch.linalg.vector_norm(matrix, 1, dim, dtype=torch.float32)

class MIGU:
    """Masks gradients by rows: largest "magnitude" (the method), "gradient" or "weight" norm (table 11), or "random" rows.
    row_sparse: masked rows' gradients are not even computed; for one pass a step, no adapters, and weights used in one place."""
    def __init__(self, model, threshold=0.7, criterion="magnitude", layers=NOT_THE_HEAD, row_sparse=False):
        if criterion not in CRITERIA or not 0 <= threshold <= 1:
            raise ValueError(f"criterion {criterion!r} must be one of {CRITERIA}, and threshold {threshold} from 0 to 1")
        trained = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer.weight.requires_grad}
        self.layers = {name: layer for name, layer in trained.items() if re.search(layers, re.sub(r"\.lora_[AB]$", "", name))}
        if not self.layers:
            raise ValueError(f"{layers!r} selects none of the linear layers that are trained, such as {', '.join([*trained][:3])}")
        self.threshold, self.criterion, self.row_sparse = threshold, criterion, row_sparse
        self.measured = {name: model.get_submodule(name.removesuffix(".lora_B")) for name in self.layers}
        self.magnitude, self.masks = {}, {}                        # of this step so far: measured layer -> (d_out,) fp32; see choose()
        hooked = {*self.measured.values()} if criterion == "magnitude" or row_sparse else ()
        self.hooks = [layer.register_forward_hook(self.observe) for layer in hooked]
        if row_sparse:
            uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
            if criterion == "gradient" or adapted(model) or any(uses.count(id(layer.weight)) > 1 for layer in hooked):
                raise ValueError("row_sparse goes neither with the criterion gradient, nor with adapters, nor with tied weights")
            hide = lambda layer, inputs: setattr(layer.weight, "requires_grad", False)     # until observe(): no dense gradient
            self.hooks += [layer.register_forward_pre_hook(hide) for layer in hooked]
    def observe(self, layer, inputs, output):
        """Add a training pass's |output|, summed over its tokens; several passes make one step's batch. See also RowGradient."""
        again = torch._C._current_graph_task_id() >= 0             # --checkpointing repeats passes during backward
        counts = layer.training and torch.is_grad_enabled() and not again
        if counts and self.masks:
            raise RuntimeError("row_sparse needs all of a step in one pass")
        if counts and self.criterion == "magnitude":
            self.magnitude[layer] = self.magnitude.get(layer, 0) + l1(output.detach().reshape(-1, layer.out_features), 0)
        if self.row_sparse:
            return RowGradient.apply(output, inputs[0], layer.weight.requires_grad_(), layer, self)
    def score(self, name):
        """(d_out,): what a layer's rows are ranked by."""
        layer = self.layers[name]
        if self.criterion == "random":
            return torch.rand(layer.out_features, device=layer.weight.device)
        if self.criterion != "magnitude":
            return l1(layer.weight.grad if self.criterion == "gradient" else layer.weight, 1)
        if self.measured[name] not in self.magnitude:
            raise RuntimeError(f"{name} is to be masked, but had no pass in training mode since the last step")
        return self.magnitude[self.measured[name]]
    def choose(self):
        """layer -> (d_out, 1), (k,), (k, 1): which rows are masked; ids of the kept ones and some others; which of these are masked.
        k comes from width and threshold, rounded up to 16: no GPU must count. There, row_sparse gives ties beyond k no gradient."""
        widths = {}
        for name, layer in self.layers.items():
            if self.row_sparse or layer.weight.grad is not None:
                widths.setdefault(layer.out_features, []).append(name)
        for width, names in widths.items():                        # one quantile for all layers of a width
            masked = ~keep_rows(torch.stack([self.score(name) for name in names]), self.threshold)
            most = math.ceil((1 - self.threshold) * (width - 1)) + 1              # without ties; a CPU can count them
            most = max(most, int((~masked).sum(1).max())) if masked.device.type == "cpu" else most
            ids = masked.int().sort(dim=1, stable=True).indices[:, :-(-most // 16) * 16]
            self.masks |= zip(map(self.layers.get, names), zip(masked[:, :, None], ids, masked.gather(1, ids)[:, :, None]))
        return self.masks
    @torch.no_grad()
    def mask_gradients(self):
        """Zero the masked rows' gradients (row_sparse: they are), where there are gradients. Returns (): rows kept / rows."""
        masks = self.masks or self.choose()
        if not masks:
            raise RuntimeError("none of the layers to mask has a gradient")
        for layer, (masked, *_) in () if self.row_sparse else masks.items():
            layer.weight.grad.masked_fill_(masked, 0)
        self.magnitude, self.masks = {}, {}
        return 1 - torch.cat([masked for masked, *_ in masks.values()]).float().mean()
    def remove(self):
        """Take the hooks off: the model is as it was."""
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers.values():
            layer.weight.requires_grad_()                          # in case a pass broke off while it was hidden
        self.magnitude.clear()

class RowGradient(torch.autograd.Function):
    """The identity on a layer's output; its backward pass computes the layer's weight gradient in the kept rows alone."""
    @staticmethod
    def forward(ctx, output, x, weight, layer, masker):
        ctx.save_for_backward(x)
        ctx.layer, ctx.masker = layer, masker
        return output.view_as(output)
    @staticmethod
    def backward(ctx, gradient):
        (x,), weight = ctx.saved_tensors, ctx.layer.weight
        _, ids, masked = (ctx.masker.masks or ctx.masker.choose())[ctx.layer]
        columns = gradient.reshape(-1, len(weight)).index_select(1, ids)       # (tokens, k)
        part = columns.T @ x.reshape(len(columns), -1).to(gradient.dtype)      # (k, d_in)
        return gradient, None, torch.zeros_like(weight).index_copy_(0, ids, part.masked_fill_(masked, 0).to(weight.dtype)), None, None

# ---- LoRA (Hu et al. 2022), IncLoRA, O-LoRA (Wang et al. 2023). MIGU masks A by its own output, B by W's and the adapter's (section 3.3)
def add_adapter(layer, inputs, output):
    return output + layer.scale * layer.lora_B(layer.lora_A(layer.lora_dropout(inputs[0])))
def adapted(model):
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
def folded(layer):
    """(d_out, d_in): W + (alpha / r) B A, with A (r, d_in) and B (d_out, r)."""
    return (layer.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight).detach()

def add_lora(model, rank=8, alpha=32, dropout=0.05, dtype=None):
    """Freeze the model, adapt each q and v, with B = 0. dtype: of the others; adapted ones stay fp32: folding must not drift."""
    model.requires_grad_(False)
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and re.search(r"\.[qv](_proj)?$", name):
            layer.lora_A = nn.Linear(layer.in_features, rank, bias=False, device=layer.weight.device)
            layer.lora_B = nn.Linear(rank, layer.out_features, bias=False, device=layer.weight.device)
            nn.init.zeros_(layer.lora_B.weight)
            layer.lora_dropout, layer.scale, layer.adapter = nn.Dropout(dropout), alpha / rank, layer.register_forward_hook(add_adapter)
        elif dtype and not [*layer.children()]:
            layer.to(dtype)

def plain_weights(model):
    """name -> weight as a model without adapters has it, the adapters folded in."""
    plain = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    return plain | {f"{name}.weight": folded(layer) for name, layer in adapted(model).items()}
def merge_lora(model):
    """Fold the adapters into their layers: a plain model again, all of it trainable."""
    for layer in adapted(model).values():
        layer.weight.data = folded(layer)
        layer.adapter.remove()
        del layer.lora_A, layer.lora_B, layer.lora_dropout
    model.requires_grad_(True)

def orthogonality_penalty(model, earlier, l1_weight=0.5, l2_weight=0.0):
    """O-LoRA's l1 * sum |A_old A_new^T| + l2 * (||A_new|| + ||B_new||); earlier: layer name -> (earlier ranks, d_in)."""
    penalty = 0.0
    for name, layer in adapted(model).items():
        penalty = penalty + l1_weight * (earlier.get(name, layer.lora_A.weight[:0]) @ layer.lora_A.weight.T).abs().sum()
        if l2_weight:
            penalty = penalty + l2_weight * (layer.lora_A.weight.norm() + layer.lora_B.weight.norm())
    return penalty
