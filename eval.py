"""How good a model is on a task, and how much of a sequence of tasks is forgotten.

    python eval.py runs/*            # a row a method, a column an order: mean and std over seeds, beside the paper's
    python eval.py runs/* --plot     # and a picture

matrix[i, j] is the accuracy on task j after training on task i, in percent; NaN where it was not measured.
"""
import argparse
import string
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from model import read_json

PAPER = {                                                          # table 8: average accuracy of orders 1 to 6
    "t5-large full none": (74.4, 75.0, 77.5, 70.6, 69.7, 65.6),
    "t5-large full migu": (78.3, 79.8, 78.3, 77.1, 73.6, 70.7),
}
MEASURES = ("average_accuracy", "backward_transfer", "forgetting")
SETTINGS = ("threshold", "lr", "optimizer", "layers", "mask_first", "epochs", "batch_size", "limit")

# ---- one model, one task

def normalize(text):
    """What is compared: lower case, no punctuation, single spaces. Articles stay."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())

def is_correct(prediction, answer):
    return answer != data.UNKNOWN and normalize(prediction) == normalize(answer)

def evaluate(model, tokenizer, examples, dtype=torch.float32, tokens=16384, name=""):
    """Greedy answers: (accuracy in percent, predictions in the examples' order, seconds). Longest first, in batches of at
    most `tokens` tokens, padding included."""
    started, device = time.perf_counter(), model.lm_head.weight.device
    model.eval()
    sources = [tokenizer.source(example.prompt) for example in examples]
    waiting = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    predictions = [""] * len(examples)
    with tqdm(total=len(examples), desc=f"test {name}", leave=False) as bar:
        while waiting:
            size = max(1, tokens // len(sources[waiting[0]]))
            chosen, waiting = waiting[:size], waiting[size:]
            batch = data.collate([sources[i] for i in chosen])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                new = model.generate(**batch, max_new_tokens=50)
            for i, ids in zip(chosen, new.tolist()):
                end = next((n for n, token in enumerate(ids) if token in model.eos), len(ids))
                predictions[i] = tokenizer.decode(ids[:end])
            bar.update(len(chosen))
    correct = sum(is_correct(prediction, example.answer) for prediction, example in zip(predictions, examples))
    return 100 * correct / len(examples), predictions, time.perf_counter() - started

# ---- a sequence of tasks

def average_accuracy(matrix):
    """A_T = 1/T sum_t a(T, t): the mean over tasks after the last one."""
    return float(np.mean(matrix[-1]))

def backward_transfer(matrix):
    """1/(T-1) sum_{t<T} a(T, t) - a(t, t) (Lopez-Paz & Ranzato 2017); NaN for a single task."""
    changes = (matrix[-1] - matrix.diagonal())[:-1]
    return float(changes.mean()) if len(changes) else float("nan")

def forgetting(matrix):
    """1/(T-1) sum_{t<T} max_{k<T} a(k, t) - a(T, t) (Chaudhry et al. 2018); NaN for a single task."""
    best = np.fmax.reduce(matrix[:-1], 0, initial=np.nan)          # fmax passes over what was not measured
    losses = (best - matrix[-1])[:-1]
    return float(losses.mean()) if len(losses) else float("nan")

# ---- tables

def table(rows):
    """Rows of text, the first of them the header, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)

def cell(value):
    return "-" if value is None or np.isnan(value) else f"{value:.1f}"

def matrix_table(tasks, matrix):
    measured = [(task, row) for task, row in zip(tasks, matrix) if not np.isnan(row).all()]
    return table([["after \\ on", *tasks], *([task, *map(cell, row)] for task, row in measured)])

def load_runs(folders):
    """(config, results) of each run folder. ValueError or OSError names the file."""
    return [tuple(read_json(Path(folder) / name) for name in ("config.json", "results.json")) for folder in folders]

def compare(runs):
    """A table over runs: mean and std over seeds for each method and order, beside the paper's average accuracy."""
    methods, orders = defaultdict(list), {}
    for config, results in runs:
        column = f"order {config['order']}" if config["order"] else " ".join(results["tasks"])
        orders[column] = config["order"]
        methods[f"{config['model_name']} {config['method']}"].append((column, config, results))
    columns = sorted(orders)
    rows = [["", *columns]]
    for method, its_runs in sorted(methods.items()):
        differ = [key for key in SETTINGS if len({config[key] for _, config, _ in its_runs}) > 1]
        values = defaultdict(list)                                 # (settings, measure, column) -> one number a seed
        for column, config, results in its_runs:
            settings = " ".join([method, *(f"{key}={config[key]}" for key in differ)])
            for measure in MEASURES:
                values[settings, measure, column].append(np.nan if results[measure] is None else results[measure])
        for settings, measure in dict.fromkeys(key[:2] for key in values):
            seeds = [values.get((settings, measure, column), [np.nan]) for column in columns]
            rows.append([f"{settings}: {measure.replace('_', ' ')}", *(
                cell(np.mean(x)) + (f" ± {np.std(x, ddof=1):.1f} ({len(x)} seeds)" if len(x) > 1 else "") for x in seeds)])
        if method in PAPER:
            rows.append([f"  the paper's {method}: average accuracy", *(
                cell(PAPER[method][orders[column] - 1] if orders[column] else None) for column in columns)])
    return table(rows)

def plot(runs, file):
    """A picture of the mean accuracy over the tasks so far, after each task, for each method (needs --eval all)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = defaultdict(list)
    for config, results in runs:
        matrix = np.array(results["matrix"], float)
        curves[f"{config['model_name']} {config['method']}"].append([row[:i + 1].mean() for i, row in enumerate(matrix)])
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, values in sorted(curves.items()):
        axes.plot(range(1, len(values[0]) + 1), np.mean(values, 0), marker="o", label=method)
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
            raise FileNotFoundError("no results in these folders: give those that train.py wrote, such as runs/*")
        print(compare(load_runs(folders)))
        if args.plot:
            plot(load_runs(folders), args.plot)
    except (ValueError, OSError) as error:
        sys.exit(print(f"eval.py: {error}", file=sys.stderr) or 2)

if __name__ == "__main__":
    main()
