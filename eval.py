"""How good a model is on a task, and how much a sequence of tasks was forgotten.

    python eval.py runs/*            # a row a method, a column an order: mean and std over seeds, beside the paper's
    python eval.py runs/* --plot     # and a picture of the accuracies

matrix[i, j] is the accuracy on task j after training on task i, in percent, NaN where it was not measured.
"""
import argparse
import json
import string
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model as models

# Table 8 of the paper, t5-large: average accuracy of orders 1 to 6.
PAPER = {
    "t5-large full none": (74.4, 75.0, 77.5, 70.6, 69.7, 65.6),
    "t5-large full migu": (78.3, 79.8, 78.3, 77.1, 73.6, 70.7),
}


def normalize(text):
    """What is compared: lower case, no punctuation, single spaces. Articles stay."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def is_correct(prediction, answer):
    return answer != data.UNKNOWN and normalize(prediction) == normalize(answer)


def average_accuracy(matrix):
    """A_T = 1/T sum_t a(T, t): the macro mean after the last task."""
    return float(np.mean(matrix[-1]))


def backward_transfer(matrix):
    """1/(T-1) sum_{t<T} a(T, t) - a(t, t) (Lopez-Paz & Ranzato 2017); NaN for a single task."""
    matrix = np.asarray(matrix, float)
    changes = matrix[-1, :-1] - matrix.diagonal()[:-1]
    return float(changes.mean()) if len(changes) else float("nan")


def forgetting(matrix):
    """1/(T-1) sum_{t<T} max_{k<T} a(k, t) - a(T, t) (Chaudhry et al. 2018); NaN for a single task."""
    matrix = np.asarray(matrix, float)
    best = np.where(np.isnan(matrix[:-1]), -np.inf, matrix[:-1]).max(0, initial=-np.inf)[:-1]
    losses = np.where(np.isinf(best), np.nan, best) - matrix[-1, :-1]
    return float(losses.mean()) if len(losses) else float("nan")


@torch.no_grad()
def evaluate(model, tokenizer, examples, dtype=torch.float32, tokens=16384, name=""):
    """Greedy answers to examples: (accuracy in percent, predictions in their order, seconds). Sorted by length,
    batches of at most `tokens` tokens with padding."""
    started = time.perf_counter()
    model.eval()
    device = model.lm_head.weight.device
    sources = [tokenizer.source(example.prompt) for example in examples]
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    predictions = [""] * len(examples)
    with tqdm(total=len(examples), desc=f"test {name}", leave=False, file=sys.stderr) as bar:
        start = 0
        while start < len(order):
            size = max(1, tokens // len(sources[order[start]]))    # the longest comes first
            chosen = order[start:start + size]
            batch = data.collate([sources[i] for i in chosen])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                new = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=50)
            for i, ids in zip(chosen, new.tolist()):
                end = next((n for n, token in enumerate(ids) if token in model.eos), len(ids))
                predictions[i] = tokenizer.decode(ids[:end])
            bar.update(len(chosen))
            start += size
    correct = sum(is_correct(p, example.answer) for p, example in zip(predictions, examples))
    return 100 * correct / len(examples), predictions, time.perf_counter() - started


# ---- tables

def table(header, rows):
    """Rows of text in columns, the first to the left, the others to the right."""
    rows = [header] + rows
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def number(value, form="{:.1f}"):
    return "-" if value is None or np.isnan(value) else form.format(value)


def matrix_table(tasks, matrix):
    return table(["after \\ on", *tasks], [[task, *map(number, row)] for task, row in zip(tasks, matrix)
                                          if not np.isnan(row).all()])


def load_runs(folders):
    """(config, results) of each run folder; ValueError or OSError names the file."""
    return [tuple(models.read_json(Path(folder) / name) for name in ("config.json", "results.json")) for folder in folders]


SETTINGS = ("threshold", "lr", "optimizer", "layers", "mask_first", "epochs", "batch_size", "limit")


def compare(runs):
    """A table over runs: mean and std over seeds for each method and order, beside the paper's average accuracy."""
    methods, orders = defaultdict(list), {}
    for config, results in runs:
        orders[f"order {config['order']}" if config["order"] else " ".join(results["tasks"])] = config["order"]
        methods[f"{config['model_name']} {config['method']}"].append((config, results))
    columns, rows = sorted(orders), []
    for method, its_runs in sorted(methods.items()):
        differ = [key for key in SETTINGS if len({config[key] for config, _ in its_runs}) > 1]
        cells = defaultdict(list)                                  # (settings, measure, column) -> values over seeds
        for config, results in its_runs:
            column = f"order {config['order']}" if config["order"] else " ".join(results["tasks"])
            label = " ".join([method, *(f"{key}={config[key]}" for key in differ)])
            for measure in ("average_accuracy", "backward_transfer", "forgetting"):
                cells[label, measure, column].append(np.nan if results[measure] is None else results[measure])
        for label, measure in dict.fromkeys(key[:2] for key in cells):
            values = [cells.get((label, measure, column), [np.nan]) for column in columns]
            rows.append([f"{label}: {measure.replace('_', ' ')}", *(
                number(np.mean(v)) + (f" ± {np.std(v, ddof=1):.1f} ({len(v)} seeds)" if len(v) > 1 else "") for v in values)])
        if method in PAPER:
            rows.append([f"  paper, {method}: average accuracy", *(number(PAPER[method][orders[c] - 1] if orders[c] else None) for c in columns)])
    return table(["", *columns], rows)


def plot(runs, file):
    """A picture: the mean accuracy over the tasks so far, after each task, for each method (needs --eval all)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = defaultdict(list)
    for config, results in runs:
        matrix = np.array(results["matrix"], float)
        curves[f"{config['model_name']} {config['method']}"].append([row[:i + 1].mean() for i, row in enumerate(matrix)])
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, values in sorted(curves.items()):
        mean = np.mean(values, 0)
        axes.plot(range(1, len(mean) + 1), mean, marker="o", label=method)
    axes.set(xlabel="tasks learned", ylabel="mean accuracy on them, %", ylim=(0, 102))
    axes.legend()
    figure.savefig(file, dpi=150)
    print(f"wrote {file}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; others are passed over")
    parser.add_argument("--plot", nargs="?", const="runs.png", metavar="FILE", help="draw the accuracies (default runs.png)")
    args = parser.parse_args()
    folders = [folder for folder in args.runs if (Path(folder) / "results.json").exists()]
    try:
        if not folders:
            raise FileNotFoundError(f"no finished task in {' '.join(args.runs)}: give folders that train.py wrote, such as runs/*")
        runs = load_runs(folders)
    except (ValueError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(compare(runs))
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
