"""How good a model is on a task, and how much of a sequence of tasks is forgotten.

    python eval.py runs/*            # a row a method, a column an order: mean and std over seeds, beside the paper's
    python eval.py runs/* --plot     # and a picture

matrix[i, j] is the accuracy on task j after training on task i, in percent; NaN where it was not measured.
"""
import argparse, string, sys, time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from model import read_json

PAPER = {                                                          # table 8, t5-large: average accuracy of orders 1 to 6
    "full none": (74.4, 75.0, 77.5, 70.6, 69.7, 65.6), "full migu": (78.3, 79.8, 78.3, 77.1, 73.6, 70.7),
    "full none replay0.02": (77.4, 77.1, 77.9), "full migu replay0.02": (80.8, 77.0, 78.0),
    "lora none": (60.7, 70.0, 73.1, 53.7, 44.4, 39.8), "lora migu": (74.8, 71.6, 73.5, 66.9, 64.8, 51.8),
    "inclora none": (67.0, 66.7, 72.6, 65.5, 64.9, 63.9), "inclora migu": (77.2, 76.7, 75.4, 71.3, 67.7, 67.3),
    "olora none": (77.1, 76.2, 76.6, 68.4, 68.8, 71.4), "olora migu": (77.1, 77.0, 75.6, 67.3, 68.5, 74.2),
    "lora none replay0.02": (77.1, 73.4, 73.2, 74.5, 75.4, 75.7), "lora migu replay0.02": (77.8, 75.1, 75.9, 75.4, 76.8, 77.2),
}
MEASURES = ("average_accuracy", "backward_transfer", "forgetting")

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

def read_runs(folders):
    """(label, column, config, results) of each run; the label names its folder's parent where there are several."""
    folders = [Path(folder) for folder in folders]
    for folder in folders:
        config, results = read_json(folder / "config.json"), read_json(folder / "results.json")
        where = f"{folder.parent} " if len({folder.parent for folder in folders}) > 1 else ""
        column = f"order {config['order']}" if config["order"] else " ".join(results["tasks"])
        yield where + config["model_name"], column, config, results

def compare(folders):
    """A table for each measure: a row a method, a column an order, mean and std over seeds; then the mean of the columns and
    the gain over no mask; under t5-large's accuracies, the paper's."""
    values, orders = defaultdict(list), {}                         # (model, method, column, measure) -> a number a seed
    for model, column, config, results in read_runs(folders):
        orders[column] = config["order"]
        for measure in MEASURES:
            values[model, config["method"], column, measure].append(np.nan if results[measure] is None else results[measure])
    columns, tables = sorted(orders), []
    for measure in MEASURES:
        tables.append([[measure.replace("_", " "), *columns, "mean", "gain over no mask"]])
        for model, method in sorted({key[:2] for key in values}):
            ours = lambda method: [values.get((model, method, column, measure), [np.nan]) for column in columns]
            paper = lambda method: [[np.nan, *PAPER.get(method, ())][orders[column] or 0:][:1] or [np.nan] for column in columns]
            unmasked = " ".join([method.split()[0], "none", *method.split()[2:]])
            for label, seeds in [(f"{model} {method}", ours)] + [("  in the paper", paper)] * (model == "t5-large" and measure == MEASURES[0]):
                means = [np.mean(x) for x in seeds(method)]
                gain = np.mean(means) - np.mean([np.mean(x) for x in seeds(unmasked)])
                stds = [f" ± {np.std(x, ddof=1):.1f} ({len(x)} seeds)" if len(x) > 1 else "" for x in seeds(method)]
                tables[-1].append([label, *(cell(m) + s for m, s in zip(means, stds)), cell(np.mean(means)),
                                   "" if method == unmasked or np.isnan(gain) else f"{gain:+.1f}"])
    return "\n\n".join(table(rows) for rows in tables)

def plot(folders, file):
    """A picture of the mean accuracy over the tasks so far, after each task, for each method (needs --eval all)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = defaultdict(list)
    for model, column, config, results in read_runs(folders):
        matrix = np.array(results["matrix"], float)
        curves[f"{model} {config['method']}, {column}"].append([row[:i + 1].mean() for i, row in enumerate(matrix)])
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, seeds in sorted(curves.items()):
        axes.plot(range(1, len(seeds[0]) + 1), np.mean(seeds, 0), marker="o", label=label)
    axes.set(xlabel="tasks learned", ylabel="mean accuracy on them, %", ylim=(0, 102))
    axes.legend()
    figure.savefig(file, dpi=150)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; others are passed over")
    parser.add_argument("--plot", nargs="?", const="runs.png", metavar="FILE", help="draw the accuracies (default runs.png)")
    args = parser.parse_args()
    folders = [folder for folder in args.runs if (Path(folder) / "results.json").exists()]
    try:
        if not folders:
            raise FileNotFoundError("no results in these folders: give those that train.py wrote, such as runs/*")
        print(compare(folders))
        if args.plot:
            plot(folders, args.plot)
    except (ValueError, OSError) as error:
        sys.exit(print(f"eval.py: {error}", file=sys.stderr) or 2)

if __name__ == "__main__":
    main()
