"""How good a model is on a task, and how much of a sequence of tasks it forgets.

    python eval.py runs/*           # tables: a row a method, a column an order
    python eval.py runs/* --plot    # and a picture of every task's accuracy over the sequence
    python eval.py --overlap models/t5-large --tasks dbpedia amazon    # do tasks share large rows?

matrix[i, j] is the accuracy on task j after training on task i, in percent; NaN: not measured.
"""

import argparse
import string
import unicodedata
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from migu import MIGU, keep_rows
from model import RANK, Parser, check, load_model, one_line_errors, read_json

# What runs of one row of a table may differ in: the seed, the tasks, and where they ran.
NOT_SETTINGS = (
    "seed order tasks model_name versions device checkpointing row_sparse processes".split()
)
MASK_SETTINGS = "mask threshold layers mask_first method".split()
PICTURES = (".png", ".pdf", ".svg")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ---- a model on a task


def normalize(text):
    """What is compared: NFKC, lower case, no ASCII punctuation, single spaces. Articles stay."""
    text = unicodedata.normalize("NFKC", text).lower().translate(NO_PUNCTUATION)
    return " ".join(text.split())


def is_correct(prediction, answer):
    """An answer of which nothing is left, such as "-" for unknown, is never met."""
    return normalize(prediction) == normalize(answer) != ""


def check_task(task, tokenizer):
    """UserError unless the options leave room to the text, and the tokenizer knows all of it.

    And unless each label, written and read back, counts as itself and as no other label.
    """
    options = len(tokenizer.encode(", ".join(task.labels)))
    check(options < 400, f"task {task.name}: its labels take {options} of a prompt's 512 tokens")
    for example in task.train + task.test:
        found = tokenizer.unknown.search(example.prompt)
        fault = f"task {task.name}: {found and found[0]!r} in {example.prompt[-60:]!r}"
        check(not found, f"{fault}: the model's own tokens beyond its vocabulary are not supported")
    for label in task.labels:
        where = f"task {task.name}: label {label!r}, in up to {data.LONGEST_ANSWER - 1} tokens,"
        back = tokenizer.decode(tokenizer.encode(label)[: data.LONGEST_ANSWER - 1])
        same = [other for other in task.labels if is_correct(back, other)]
        check(same == [label], f"{where} is read back as {back!r}, and counts as {same}: rename it")


def check_tokenizer(model, tokenizer, path):
    fits = len(tokenizer) <= model.config.vocab_size
    check(fits, f"{path}: the tokenizer has more tokens than the model's {model.config.vocab_size}")
    ends = tokenizer.eos_id in model.eos
    check(ends, f"{path}: eos_token_id {model.eos} is not the tokenizer's, {tokenizer.eos_id}")


def autocast(model, dtype):
    return torch.autocast(model.device.type, getattr(torch, dtype), enabled=dtype != "float32")


def evaluate(model, tokenizer, prompts, dtype="float32", tokens=16384, name=""):
    """Greedy answers to prompts (ids). Longest first, in batches of so many tokens with padding."""
    model.eval()
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = []
    while waiting:
        size = max(1, tokens // len(prompts[waiting[0]]))
        batches.append(waiting[:size])
        waiting = waiting[size:]
    predictions = [""] * len(prompts)
    for batch in tqdm(batches, desc=f"test {name}", leave=False, disable=RANK > 0):
        inputs = data.collate([prompts[i] for i in batch])
        with autocast(model, dtype):
            new = model.generate(**inputs, max_new_tokens=data.LONGEST_ANSWER)
        for i, ids in zip(batch, new.tolist()):
            answer = takewhile(lambda token: token not in model.eos, ids)
            predictions[i] = tokenizer.decode(list(answer))
    return predictions


def accuracy(predictions, examples):
    """Percent of the predictions that are their example's answer."""
    correct = [is_correct(p, example.answer) for p, example in zip(predictions, examples)]
    return 100 * sum(correct) / len(correct)


# ---- measures of a sequence of tasks


def mean(values):
    """NaN where there are no values, or where one is None or NaN."""
    return float(np.mean(np.array(values, float))) if len(values) else np.nan


def average_accuracy(matrix):
    """A_T = 1/T sum_t a(T, t): the mean over tasks after the last one."""
    return mean(matrix[-1])


def backward_transfer(matrix):
    """1/(T-1) sum_{t<T} a(T, t) - a(t, t) (Lopez-Paz & Ranzato 2017); NaN for a single task."""
    return mean((matrix[-1] - matrix.diagonal())[:-1])


def forgetting(matrix):
    """1/(T-1) sum_{t<T} max_{k<T} a(k, t) - a(T, t) (Chaudhry et al. 2018); NaN for one task."""
    best = np.fmax.reduce(matrix[:-1], initial=np.nan)  # of those that were measured
    return mean((best - matrix[-1])[:-1])


MEASURES = {f.__name__: f for f in (average_accuracy, backward_transfer, forgetting)}


def measures(matrix):
    """name -> value, None where it was not measured."""
    values = {name: measure(matrix) for name, measure in MEASURES.items()}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


# ---- tables


def table(rows):
    """Rows of text, in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = map(str.rjust, others, widths[1:])
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def cell(values, note=""):
    """The mean, "-" where it is not known; of several values ± the standard deviation too."""
    if np.isnan(mean(values)):
        return "-"
    spread = f" ± {np.std(values, ddof=1):.1f}{note}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


def matrix_table(tasks, matrix):
    rows = [["after \\ on", *tasks]]
    for task, accuracies in zip(tasks, matrix):
        if not np.isnan(accuracies).all():
            rows.append([task, *map(cell, accuracies[:, None])])
    return table(rows)


# ---- tables and pictures over runs


def words(config, without):
    """A run's settings but for these: {"lr 0.0001", "threshold 0.7", ...}."""
    return frozenset(f"{name} {value}" for name, value in config.items() if name not in without)


def read_runs(folders):
    """(column, row) of a table -> its finished runs, one a seed; and notes on the others."""
    for name in ("config.json", "results.json"):
        folders = [folder for folder in folders if Path(folder, name).exists()]
    check(folders, "no results in these folders: give those that train.py wrote, such as runs/*")
    runs, notes, common, columns = {}, [], {}, {}
    for folder in folders:
        config = read_json(Path(folder, "config.json"))
        run = config | read_json(Path(folder, "results.json"))
        if run.get("average_accuracy") is None:
            notes.append(f"not counted, as it is no finished run: {folder}")
            continue
        column = f"order {run['order']}" if run["order"] else " ".join(run["tasks"])
        if columns.setdefault(column, config["tasks"]) != config["tasks"]:
            column = " ".join(config["tasks"])  # other tasks of the same names
        run["column"] = column
        run["title"] = f"{run['model_name']} {run['method']}"
        run["settings"] = words(config, NOT_SETTINGS)
        run["but_mask"] = words(config, NOT_SETTINGS + MASK_SETTINGS), run["column"], run["seed"]
        place = run["settings"], run["column"], run["seed"]
        if runs.setdefault(place, run) is not run:
            notes.append(f"not counted, as it repeats another: {folder}")
        common[run["title"]] = run["settings"] & common.get(run["title"], run["settings"])

    # A row is named by model and method, and by what not all runs of this name have in common.
    cells = {}
    for run in runs.values():
        name = " ".join([run["title"], *sorted(run["settings"] - common[run["title"]])])
        cells.setdefault((run["column"], name), []).append(run)
    return cells, notes


def compare(folders):
    """A table a measure: mean, std over seeds, and the gain over the same runs without a mask."""
    cells, notes = read_runs(folders)
    runs = sum(cells.values(), [])
    columns = sorted({column for column, _ in cells})
    tables = []
    for measure in MEASURES:
        if all(run[measure] is None for run in runs):
            continue
        unmasked = {run["but_mask"]: run[measure] for run in runs if run["mask"] == "none"}
        rows = [[measure.replace("_", " "), *columns, "mean", "gain over no mask"]]
        for name in sorted({name for _, name in cells}):
            row, means, gains = [name], [], []
            for column in columns:
                here = cells.get((column, name), [])
                values = [run[measure] for run in here]
                plain = [unmasked.get(run["but_mask"]) for run in here if run["mask"] != "none"]
                row.append(cell(values, f" ({len(here)} seeds)"))
                means.append(mean(values))
                gains.append(mean(values) - mean(plain))
            gain = "" if np.isnan(mean(gains)) else f"{mean(gains):+.1f}"
            rows.append([*row, cell([mean(means)]), gain])
        tables.append(table(rows))
    return "\n\n".join(tables + notes)


def plot(folders, file):
    """A panel a task: its accuracy after each task, a line a method, the mean over seeds."""
    from matplotlib.figure import Figure

    cells, _ = read_runs(folders)
    check(cells, "no finished run to draw")
    columns = sorted({column for column, _ in cells})
    names = sorted({name for _, name in cells})
    most = max(len(runs[0]["tasks"]) for runs in cells.values())
    figure = Figure(figsize=(1 + 2.6 * most, 1 + 2.6 * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), most, sharex=True, sharey=True, squeeze=False)
    lines = {}
    for (column, name), runs in sorted(cells.items()):
        matrix = np.mean(np.array([run["matrix"] for run in runs], float), 0)
        steps = range(1, len(matrix) + 1)
        row = panels[columns.index(column)]
        for panel, task, accuracies in zip(row, runs[0]["tasks"], matrix.T):
            (lines[name],) = panel.plot(steps, accuracies, f"C{names.index(name)}.-")
            panel.set(title=task, xlabel="tasks learned", xticks=steps, ylim=(-2, 102))
        row[0].set_ylabel(f"{column}, accuracy in %")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=120)


# ---- why it works: do tasks differ in which rows are large?


def magnitudes(model, tokenizer, examples):
    """name of a layer -> (d_out,), as MIGU adds them up when these examples are a batch."""
    masker = MIGU(model.train())
    torch.manual_seed(0)  # of dropout
    for example in examples:  # in turn, as what a pass leaves for a backward pass takes memory
        inputs, labels = data.encode_example(tokenizer, example, model.decoder_only)
        model.loss(**data.collate([inputs], [labels]))
    masker.remove()
    return masker.magnitude


def common_rows(one, other, threshold=0.7):
    """Of the rows kept by one's magnitudes, the share that the other's keep too: mean of layers."""
    shares = []
    for name in one:
        kept = keep_rows(one[name], threshold)
        shares.append(kept[keep_rows(other[name], threshold)].sum() / kept.sum())
    return mean(shares)


def overlap(folder, names, root):
    """Rows in common between a batch of a task (line) and another of each task (column).

    Returns the tasks' titles, the shares (tasks, tasks), and the first batches' magnitudes.
    """
    tasks = [data.load_task(root, data.resolve(name), (128, 1)) for name in names]
    for task in tasks:
        check(len(task.train) > 1, f"task {task.name}: two batches need two records")
    check(Path(folder, "config.json").exists(), f"{folder} is no model's folder: no config.json")
    tokenizer, model = data.load_tokenizer(folder), load_model(folder)
    check_tokenizer(model, tokenizer, folder)
    ones, others = [], []
    for task in tqdm(tasks, desc="tasks"):
        ones.append(magnitudes(model, tokenizer, task.train[0::2]))
        others.append(magnitudes(model, tokenizer, task.train[1::2]))
    shares = [[common_rows(one, other) for other in others] for one in ones]
    return [task.name for task in tasks], shares, ones


def overlap_table(titles, shares):
    rows = [["rows in common (chance: 0.30)", *titles]]
    for title, line in zip(titles, shares):
        rows.append([title, *(f"{share:.2f}" for share in line)])
    return table(rows)


def plot_overlap(titles, shares, ones, file):
    """The table as a heat map; one layer's magnitudes on two tasks, in the order of the first's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.colorbar(left.imshow(shares, vmin=0.3, vmax=1))
    left.set_title("rows kept in common")
    left.set_xticks(range(len(titles)), titles, rotation=45)
    left.set_yticks(range(len(titles)), titles)
    layer = list(ones[0])[len(ones[0]) // 2]
    order = ones[0][layer].argsort(descending=True)
    for title, one in zip(titles[1::-1], ones[1::-1]):
        right.plot(one[layer][order] / one[layer].sum(), ".", markersize=3, label=title)
    right.set(title=layer, xlabel=f"row, in the order of {titles[0]}", ylabel="share of magnitude")
    right.legend()
    figure.savefig(file, dpi=120)


def main(argv=None):
    with one_line_errors("eval.py"):
        parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = parser.add_argument
        add("runs", nargs="*", help="run folders; others are passed over")
        add("--overlap", metavar="MODEL", help="or: a model's folder, to compare the rows of tasks")
        add("--tasks", nargs="+", default=[], help="with --overlap: tasks, as train.py's")
        add("--data", default="data", help="folder of the benchmark (default data)")
        add("--plot", nargs="?", const="plot.png", metavar="FILE", help="(default plot.png)")
        args = parser.parse_args(argv)
        fine = bool(args.overlap) == bool(args.tasks) != bool(args.runs)
        check(fine, "give run folders, or --overlap MODEL with --tasks")
        if args.plot:
            check(Path(args.plot).suffix in PICTURES, f"--plot {args.plot}: none of {PICTURES}")
            check(find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib")
        if args.overlap:
            titles, shares, ones = overlap(args.overlap, args.tasks, args.data)
            print(overlap_table(titles, shares), flush=True)
            if args.plot:
                plot_overlap(titles, shares, ones, args.plot)
            return
        print(compare(args.runs), flush=True)
        if args.plot:
            plot(args.runs, args.plot)


if __name__ == "__main__":
    main()
