"""MIGU: magnitude-based gradient updating (Du et al., EMNLP 2024 Findings, sections 3.2 and 3.3).

A linear layer computes h = x W^T. Its output neuron i has, over the tokens of the current batch, the magnitude

    n_i = sum over tokens of |h_i|.

Neurons of large magnitude differ from task to task. So only these are updated, and tasks wear each other's weights
out less. With threshold T, t is the T-quantile of the layer's magnitudes and

    M_i = 1 if n_i >= t else 0                  the mask: T = 0.7 keeps the top 30 % of the neurons
    W  <-  W - lr * M * dL/dW                   row i of the gradient is multiplied by M_i

The paper divides n by its sum and by the number of tokens; a quantile does not see it. No task label and no old data is
needed: three lines in the training loop are the method.

    masker = MIGU(model, threshold=0.7)
    loss.backward()
    masker.mask_gradients()
    optimizer.step()

Masked: the weights of the linear layers, here all but the output head (`layers` chooses others). Not masked: embeddings,
norms, biases, T5's position tables. With SGD a masked row stays exactly as it is. With AdamW it may still move: its
gradient is zero, but the momentum of steps in which it was kept goes on, and weight decay shrinks every row.
"""
import re

import torch
from torch import nn

CRITERIA = ("magnitude", "random", "gradient", "weight")
NOT_THE_HEAD = r"^(?!lm_head$)"


def keep_rows(magnitude, threshold):
    """(..., d_out) -> bool (..., d_out): which rows reach the threshold-quantile (linear interpolation; ties all kept)."""
    return magnitude >= torch.quantile(magnitude.float(), threshold, dim=-1, keepdim=True)


def row_norms(matrix):
    """(d_out, d_in) -> (d_out,): the L1 norm of each row, fp32."""
    return torch.linalg.vector_norm(matrix, 1, dim=1, dtype=torch.float32)


class MIGU:
    """Masks a model's weight gradients, row by row. criterion "magnitude" is the method; "random" rows, and the rows of
    largest "gradient" or "weight" norm, are what the paper compares it with (table 11)."""

    def __init__(self, model, threshold=0.7, criterion="magnitude", layers=NOT_THE_HEAD):
        if criterion not in CRITERIA:
            raise ValueError(f"criterion {criterion!r} is none of {', '.join(CRITERIA)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold {threshold} is not a fraction from 0 to 1")
        linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        self.layers = {name: layer for name, layer in linear.items() if re.search(layers, name)}
        if not self.layers:
            raise ValueError(f"{layers!r} selects none of the linear layers, such as {', '.join([*linear][:3])}")
        self.threshold, self.criterion = threshold, criterion
        self.magnitude = {}                                        # layer -> (d_out,) fp32, of this step so far
        self.hooks = []
        if criterion == "magnitude":
            self.hooks = [layer.register_forward_hook(self.add_magnitude) for layer in self.layers.values()]

    def add_magnitude(self, layer, inputs, output):
        """Add a training pass's |output|, summed over all its tokens; several passes make one step's batch."""
        if layer.training and torch.is_grad_enabled():
            tokens = output.detach().reshape(-1, layer.out_features)
            magnitude = torch.linalg.vector_norm(tokens, 1, dim=0, dtype=torch.float32)
            self.magnitude[layer] = self.magnitude[layer] + magnitude if layer in self.magnitude else magnitude

    def score(self, name, layer):
        """(d_out,): what the layer's rows are ranked by."""
        if self.criterion == "random":
            return torch.rand(layer.out_features, device=layer.weight.device)
        if self.criterion == "gradient":
            return row_norms(layer.weight.grad)
        if self.criterion == "weight":
            return row_norms(layer.weight)
        if layer not in self.magnitude:
            raise RuntimeError(f"{name} has a gradient, but no pass in training mode since the last step")
        return self.magnitude[layer]

    @torch.no_grad()
    def mask_gradients(self):
        """Zero the gradient's masked rows; layers without a gradient are passed over. Returns () rows kept / rows."""
        with_gradient = [(name, layer) for name, layer in self.layers.items() if layer.weight.grad is not None]
        kept, rows = torch.zeros(()), 0
        for width in sorted({layer.out_features for _, layer in with_gradient}):      # one quantile for each width
            same = [(name, layer) for name, layer in with_gradient if layer.out_features == width]
            keep = keep_rows(torch.stack([self.score(name, layer) for name, layer in same]), self.threshold)
            for (_, layer), rows_kept in zip(same, keep):
                layer.weight.grad.masked_fill_(~rows_kept[:, None], 0)
            kept, rows = kept.to(keep.device) + keep.sum(), rows + keep.numel()
        self.magnitude.clear()
        return kept / rows

    def remove(self):
        """Take the hooks off: the model is as it was."""
        for hook in self.hooks:
            hook.remove()
        self.magnitude.clear()
