"""How good a model is on a task, and how much of a sequence of tasks it forgets.

    python eval.py runs/*           # tables: a row a method, a column an order
    python eval.py runs/* --plot    # and a picture of every task's accuracy over the sequence
    python eval.py --overlap models/t5-large --tasks dbpedia amazon    # do tasks share large rows?

matrix[i, j] is the accuracy on task j after training on task i, in percent; NaN: not measured.
"""

import argparse
import json
import string
import unicodedata
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from migu import MIGU, keep_rows
from model import RANK, Parser, UserError, check, load_model, one_line_errors, read_json

# What runs of one row of a table may differ in: the seed, the tasks, and where they ran.
NOT_SETTINGS = (
    "seed order tasks model_name versions device data checkpointing row_sparse processes".split()
)
MASK_SETTINGS = "mask threshold layers mask_first method".split()
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
    """UserError unless each label can be written, read back and told from the others.

    And unless the options leave room to the text, and all of it is known to the tokenizer.
    """
    longest = data.LONGEST_ANSWER
    options = len(tokenizer.encode(", ".join(task.labels)))
    check(options < 400, f"task {task.name}: its labels take {options} of a prompt's 512 tokens")
    for example in task.train + task.test:
        found = tokenizer.unknown.search(example.prompt)
        fault = f"task {task.name}: {found and found[0]!r} in {example.prompt[-60:]!r}"
        check(not found, f"{fault}: the model's own tokens beyond its vocabulary are not supported")
    meanings = {}
    for label in task.labels:
        ids = tokenizer.encode(label)
        back, meaning = tokenizer.decode(ids), normalize(label)
        where = f"task {task.name}: label {label!r}"
        check(meaning, f"{where}: nothing of it is left when answers are compared: rename it")
        check(len(ids) < longest, f"{where} has {len(ids)} tokens: more than {longest - 1}")
        same = normalize(back) == meaning
        check(same, f"{where} comes back from this model's tokenizer as {back!r}: rename it")
        other = meanings.setdefault(meaning, label)
        check(other == label, f"{where} counts as the same answer as {other!r}: rename one")


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
    return float(np.mean(values)) if len(values) else np.nan


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


MEASURES = (average_accuracy, backward_transfer, forgetting)


def measures(matrix):
    """name -> value, None where it was not measured."""
    values = {measure.__name__: measure(matrix) for measure in MEASURES}
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


def read_runs(folders):
    """Finished runs, each its config, results and what is derived here; notes on the others."""
    for name in ("config.json", "results.json"):
        folders = [folder for folder in folders if Path(folder, name).exists()]
    check(folders, "no results in these folders: give those that train.py wrote, such as runs/*")
    runs, notes = {}, []
    for folder in folders:
        config = read_json(Path(folder, "config.json"))
        if "mask" not in config:
            notes.append(f"not counted, as it is no run of this project: {folder}")
            continue
        run = {**config, **read_json(Path(folder, "results.json"))}
        run["column"] = f"order {run['order']}" if run["order"] else " ".join(run["tasks"])
        run["settings"] = leave_out(config, NOT_SETTINGS)
        but_mask = leave_out(run["settings"], MASK_SETTINGS)
        run["but_mask"] = json.dumps([but_mask, run["column"], run["seed"]])
        place = json.dumps([run["settings"], run["column"], run["seed"]])
        if run["average_accuracy"] is None:
            notes.append(f"not counted, as it is not finished: {folder}")
        elif runs.setdefault(place, run) is not run:
            notes.append(f"not counted, as it repeats another: {folder}")
    return name_rows(list(runs.values())), notes


def leave_out(settings, names):
    return {name: value for name, value in sorted(settings.items()) if name not in names}


def name_rows(runs):
    """Gives each run the name of its row: model, method, and in what others of these differ."""
    for run in runs:
        words = [run["model_name"], run["method"]]
        alike = [other for other in runs if [other["model_name"], other["method"]] == words]
        for key, value in run["settings"].items():
            if any(other["settings"].get(key) != value for other in alike):
                words.append(f"{key} {value}")
        run["name"] = " ".join(words)
    return runs


def compare(folders):
    """A table a measure: mean, std over seeds, and the gain over the same runs without a mask."""
    runs, notes = read_runs(folders)
    columns = sorted({run["column"] for run in runs})
    tables = []
    unmasked = {run["but_mask"]: run for run in runs if run["mask"] == "none"}
    for function in MEASURES:
        measure = function.__name__
        if all(run[measure] is None for run in runs):
            continue
        rows = [[measure.replace("_", " "), *columns, "mean", "gain over no mask"]]
        for name in sorted({run["name"] for run in runs}):
            row = [run for run in runs if run["name"] == name]
            rows.append([name, *row_cells(row, unmasked, columns, measure)])
        tables.append(table(rows))
    return "\n\n".join(tables + notes)


def row_cells(row, unmasked, columns, measure):
    """A cell a column, the mean over columns, and its gain where each run has one without mask."""
    cells, means, gains = [], [], []
    for column in columns:
        here = [run for run in row if run["column"] == column]
        values = np.array([run[measure] for run in here], float)
        plain = np.array([unmasked.get(run["but_mask"], {}).get(measure) for run in here], float)
        cells.append(cell(values, f" ({len(here)} seeds)"))
        means.append(mean(values))
        gains.append(mean(values - plain))
    known = row[0]["mask"] != "none" and not np.isnan(mean(gains))
    return [*cells, cell([mean(means)]), f"{mean(gains):+.1f}" if known else ""]


def new_plot(width, height):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def plot(folders, file):
    """A panel a task: its accuracy after each task, a line a method, the mean over seeds."""
    runs, _ = read_runs(folders)
    check(runs, "no finished run to draw")
    tasks = {run["column"]: run["tasks"] for run in runs}
    names = sorted({run["name"] for run in runs})
    columns = sorted(tasks)
    most = max(map(len, tasks.values()))
    figure = new_plot(2.4 * most, 2.6 * len(tasks) + 0.6)
    panels = figure.subplots(len(tasks), most, sharex=True, sharey=True, squeeze=False)
    for column, name in sorted({(run["column"], run["name"]) for run in runs}):
        here = [run["matrix"] for run in runs if (run["column"], run["name"]) == (column, name)]
        line = panels[columns.index(column)]
        line[0].set_ylabel(f"{column if len(tasks) > 1 else ''} accuracy, %")
        matrix = np.mean(np.array(here, float), 0)
        steps = range(1, len(matrix) + 1)
        for panel, task, accuracies in zip(line, tasks[column], matrix.T):
            panel.plot(steps, accuracies, f"C{names.index(name)}.-", label=name)
            panel.set(title=task, xlabel="tasks learned", xticks=steps, ylim=(-2, 102))
    lines = {}
    for panel in panels[:, 0]:
        lines |= {line.get_label(): line for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=120)


# ---- why it works: do tasks differ in which rows are large?


def magnitudes(model, tokenizer, examples):
    """name of a layer -> (d_out,), as MIGU adds them up when these examples are a batch."""
    masker = MIGU(model)
    model.train().requires_grad_(False)  # as in training, but without a backward pass
    torch.manual_seed(0)  # of dropout
    for start in range(0, len(examples), 16):
        part = examples[start : start + 16]
        encoded = [data.encode_example(tokenizer, e, model.decoder_only) for e in part]
        model.loss(**data.collate(*zip(*encoded)))
    masker.remove()
    model.requires_grad_(True)
    return masker.magnitude


def common_rows(one, other, threshold=0.7):
    """Of the rows kept by one's magnitudes, the share that the other's keep too: mean of layers."""
    shares = []
    for name in one:
        kept = keep_rows(one[name], threshold)
        shares.append(kept[keep_rows(other[name], threshold)].sum() / kept.sum())
    return float(torch.stack(shares).mean())


def overlap(folder, names, root):
    """Rows in common between a batch of a task (line) and another of each task (column).

    Returns the tasks' titles, the shares (tasks, tasks), and the first batches' magnitudes.
    """
    check(Path(folder, "config.json").exists(), f"{folder} is no model's folder: no config.json")
    tasks = [data.load_task(root, data.resolve(name), (128, 1)) for name in names]
    for task in tasks:
        check(len(task.train) > 1, f"task {task.name}: two batches need two records")
    tokenizer = data.load_tokenizer(folder)
    model = load_model(folder)
    ones, others = [], []
    for task in tqdm(tasks, desc="tasks"):
        ones.append(magnitudes(model, tokenizer, task.train[0::2]))
        others.append(magnitudes(model, tokenizer, task.train[1::2]))
    shares = np.array([[common_rows(one, other) for other in others] for one in ones])
    return [task.name for task in tasks], shares, ones


def overlap_table(titles, shares):
    rows = [["rows in common (chance: 0.30)", *titles]]
    for title, line in zip(titles, shares):
        rows.append([title, *(f"{share:.2f}" for share in line)])
    return table(rows)


def plot_overlap(titles, shares, ones, file):
    """The table as a heat map; one layer's magnitudes on two tasks, in the order of the first's."""
    figure = new_plot(10, 4)
    left, right = figure.subplots(1, 2)
    image = left.imshow(shares, vmin=0.3, vmax=1)
    left.set_title("rows kept in common")
    left.set_xticks(range(len(titles)), titles, rotation=45)
    left.set_yticks(range(len(titles)), titles)
    figure.colorbar(image)
    name = list(ones[0])[len(ones[0]) // 2]
    order = ones[0][name].argsort(descending=True)
    for title, one in zip(titles[1::-1], ones[1::-1]):
        right.plot(one[name][order] / one[name].sum(), ".", markersize=3, label=title)
    right.set(title=name, xlabel=f"row, in the order of {titles[0]}", ylabel="share of magnitude")
    right.legend()
    figure.savefig(file, dpi=120)


def main(argv=None):
    with one_line_errors("eval.py"):
        parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = parser.add_argument
        add("runs", nargs="*", help="run folders; others are passed over")
        add("--overlap", metavar="MODEL", help="or: a model's folder, to compare the rows of tasks")
        add(
            "--tasks", nargs="+", default=[], help="with --overlap: names or folders, as train.py's"
        )
        add("--data", default="data", help="folder of the benchmark (default data)")
        add("--plot", nargs="?", const="plot.png", metavar="FILE", help="(default plot.png)")
        args = parser.parse_args(argv)
        picture = args.plot or "plot.png"
        check(picture.endswith((".png", ".pdf", ".svg")), f"--plot {picture}: no .png, .pdf, .svg")
        fine = bool(args.overlap) == bool(args.tasks) != bool(args.runs)
        check(fine, "give run folders, or --overlap MODEL with --tasks")
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
