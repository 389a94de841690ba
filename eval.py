"""How good a model is on a task, and how much of a sequence of tasks is forgotten:  python eval.py runs/* [--plot]

matrix[i, j] is the accuracy on task j after training on task i, in percent; NaN where it was not measured.
"""
import argparse, itertools, re, string, sys, time
from pathlib import Path
import numpy as np
import torch
from tqdm import tqdm
import data
from model import read_json

PAPER = {"full none": (74.4, 75.0, 77.5, 70.6, 69.7, 65.6), "full none replay0.02": (77.4, 77.1, 77.9),     # table 8, by order
         "full migu": (78.3, 79.8, 78.3, 77.1, 73.6, 70.7), "full migu replay0.02": (80.8, 77.0, 78.0),
         "lora none": (60.7, 70.0, 73.1, 53.7, 44.4, 39.8), "lora none replay0.02": (77.1, 73.4, 73.2, 74.5, 75.4, 75.7),
         "lora migu": (74.8, 71.6, 73.5, 66.9, 64.8, 51.8), "lora migu replay0.02": (77.8, 75.1, 75.9, 75.4, 76.8, 77.2),
         "inclora none": (67.0, 66.7, 72.6, 65.5, 64.9, 63.9), "inclora migu": (77.2, 76.7, 75.4, 71.3, 67.7, 67.3),
         "olora none": (77.1, 76.2, 76.6, 68.4, 68.8, 71.4), "olora migu": (77.1, 77.0, 75.6, 67.3, 68.5, 74.2)}
MEASURES = ("average_accuracy", "backward_transfer", "forgetting")

def normalize(text):
    """What is compared: lower case, no punctuation, single spaces. Articles stay."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
def is_correct(prediction, answer):
    return answer != data.UNKNOWN and normalize(prediction) == normalize(answer)

def evaluate(model, tokenizer, examples, dtype=torch.float32, tokens=16384, name=""):
    """(accuracy in percent, greedy answers, seconds). Longest first, in batches of at most `tokens` tokens with padding."""
    started, device = time.perf_counter(), model.eval().lm_head.weight.device
    sources = [tokenizer.source(example.prompt) for example in examples]
    waiting, batches, predictions = sorted(range(len(sources)), key=lambda i: -len(sources[i])), [], [""] * len(sources)
    while waiting:
        batches.append(waiting[:max(1, tokens // len(sources[waiting[0]]))])
        del waiting[:len(batches[-1])]
    for batch in tqdm(batches, desc=f"test {name}", leave=False):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            new = model.generate(**data.collate([sources[i] for i in batch]), max_new_tokens=50)
        for i, ids in zip(batch, new.tolist()):
            predictions[i] = tokenizer.decode(itertools.takewhile(lambda token: token not in model.eos, ids))
    correct = sum(map(is_correct, predictions, [example.answer for example in examples]))
    return 100 * correct / len(examples), predictions, time.perf_counter() - started

def average_accuracy(matrix):
    """A_T = 1/T sum_t a(T, t): the mean over tasks after the last one."""
    return float(np.mean(matrix[-1]))
def backward_transfer(matrix):
    """1/(T-1) sum_{t<T} a(T, t) - a(t, t) (Lopez-Paz & Ranzato 2017); NaN for a single task."""
    return float((matrix[-1] - matrix.diagonal())[:-1].mean()) if len(matrix) > 1 else np.nan
def forgetting(matrix):
    """1/(T-1) sum_{t<T} max_{k<T} a(k, t) - a(T, t) (Chaudhry et al. 2018), max: of those measured; NaN for one task."""
    return float((np.fmax.reduce(matrix[:-1], 0, initial=np.nan) - matrix[-1])[:-1].mean()) if len(matrix) > 1 else np.nan

def table(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)
def cell(value):
    return "-" if value is None or np.isnan(value) else f"{value:.1f}"
def matrix_table(tasks, matrix):
    return table([["after \\ on", *tasks], *([task, *map(cell, row)] for task, row in zip(tasks, matrix) if not np.isnan(row).all())])

def read_runs(folders):
    """(model, method, column) -> results, one a seed, of the folders that have some; column: an order or the tasks."""
    folders, runs = [Path(folder) for folder in folders if Path(folder, "results.json").exists()], {}
    if not folders:
        raise FileNotFoundError("no results in these folders: give those that train.py wrote, such as runs/*")
    for folder in folders:
        config, results = read_json(folder / "config.json"), read_json(folder / "results.json")
        where = f"{folder.parent} " if len({f.parent for f in folders}) > 1 else ""
        column = f"order {config['order']}" if config["order"] else " ".join(results["tasks"])
        runs.setdefault((where + config["model_name"], config["method"], column), []).append(results)
    return runs
def row(label, seeds, model, method, columns):
    """Mean and std over seeds in each column, the columns' mean, its gain over the same tuning and replay unmasked."""
    unmasked = re.sub(r" \w+", " none", method, count=1)
    ours, plain = ([seeds.get((model, m, column), np.array([np.nan])) for column in columns] for m in (method, unmasked))
    mean, baseline = np.mean([x.mean() for x in ours]), np.mean([x.mean() for x in plain])
    cells = [cell(x.mean()) + (f" ± {x.std(ddof=1):.1f} ({len(x)} seeds)" if len(x) > 1 and np.isfinite(x.mean()) else "") for x in ours]
    return [label, *cells, cell(mean), "" if method == unmasked or np.isnan(mean - baseline) else f"{mean - baseline:+.1f}"]
def compare(folders):
    """A table a measure: a row a method, a column an order; under t5-large's accuracies those of the paper's table 8."""
    runs, tables = read_runs(folders), []
    methods, columns = sorted({key[:2] for key in runs}), sorted({key[2] for key in runs})
    paper = {("paper", method, f"order {n}"): np.array([x]) for method, xs in PAPER.items() for n, x in enumerate(xs, 1)}
    for measure in MEASURES:
        seeds = {key: np.array([results[measure] for results in found], float) for key, found in runs.items()}
        rows = [[measure.replace("_", " "), *columns, "mean", "gain over no mask"]]
        for model, method in methods:
            rows.append(row(f"{model} {method}", seeds, model, method, columns))
            if model.split()[-1] == "t5-large" and measure == "average_accuracy":
                rows.append(row("  in the paper", paper, "paper", method, columns))
        tables.append(table(rows))
    return "\n\n".join(tables)

def plot(folders, file):
    """A picture of the mean accuracy over the tasks so far, after each task, for each method (needs --eval all)."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for key, seeds in sorted(read_runs(folders).items()):
        matrix = np.mean([np.array(results["matrix"], float) for results in seeds], 0)
        means = {str(i): row[:i].mean() for i, row in enumerate(matrix, 1)}
        axes.plot(means.keys(), means.values(), marker="o", label="{} {}, {}".format(*key))
    axes.set(xlabel="tasks learned", ylabel="mean accuracy on them, %", ylim=(0, 102))
    axes.legend()
    axes.figure.savefig(file, dpi=150)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; others are passed over")
    parser.add_argument("--plot", nargs="?", const="runs.png", metavar="FILE", help="draw the accuracies (default runs.png)")
    args = parser.parse_args()
    try:
        print(compare(args.runs))
        if args.plot:
            plot(args.runs, args.plot)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(print(f"eval.py: {error}", file=sys.stderr) or 2)

if __name__ == "__main__":
    main()
