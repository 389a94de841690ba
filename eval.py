"""How good a model is on a task, and how much of a sequence of tasks it forgets.

    python eval.py runs/*           # tables: a row a method, a column an order
    python eval.py runs/* --plot    # and a picture of every task's accuracy over the sequence

matrix[i, j] is the accuracy on task j after training on task i, in percent; NaN: not measured.
"""

import argparse
import json
import string
import unicodedata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from model import Parser, check, one_line_errors, read_json

# What runs of one row of a table may differ in: the seed, the tasks, and where they ran.
NOT_SETTINGS = "seed order tasks model_name versions device data checkpointing row_sparse".split()
MASK_SETTINGS = "mask threshold layers mask_first method".split()


# ---- a model on a task


def normalize(text):
    """What is compared: NFKC, lower case, no ASCII punctuation, single spaces. Articles stay."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = text.translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.split())


def is_correct(prediction, answer):
    """An answer of which nothing is left, such as "-" for unknown, is never met."""
    expected = normalize(answer)
    return expected != "" and normalize(prediction) == expected


def check_task(task, tokenizer, longest=50):
    """UserError unless each label can be written, read back and told from the others."""
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


def until_end(ids, ends):
    for n, token in enumerate(ids):
        if token in ends:
            return ids[:n]
    return ids


def evaluate(model, tokenizer, sources, dtype=torch.float32, tokens=16384, name=""):
    """Greedy answers to rows of ids. Longest first, in batches of so many tokens with padding."""
    model.eval()
    waiting = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
    batches = []
    while waiting:
        size = max(1, tokens // len(sources[waiting[0]]))
        batches.append(waiting[:size])
        waiting = waiting[size:]
    predictions = [""] * len(sources)
    for batch in tqdm(batches, desc=f"test {name}", leave=False):
        inputs = data.collate([sources[i] for i in batch])
        with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
            new = model.generate(**inputs, max_new_tokens=50)
        for i, ids in zip(batch, new.tolist()):
            predictions[i] = tokenizer.decode(until_end(ids, model.eos))
    return predictions


def accuracy(predictions, examples):
    """Percent of the predictions that are their example's answer."""
    correct = [is_correct(p, example.answer) for p, example in zip(predictions, examples)]
    return 100 * sum(correct) / len(correct)


# ---- measures of a sequence of tasks


def average_accuracy(matrix):
    """A_T = 1/T sum_t a(T, t): the mean over tasks after the last one."""
    return float(np.mean(matrix[-1]))


def backward_transfer(matrix):
    """1/(T-1) sum_{t<T} a(T, t) - a(t, t) (Lopez-Paz & Ranzato 2017); NaN for a single task."""
    if len(matrix) == 1:
        return np.nan
    change = matrix[-1] - matrix.diagonal()
    return float(change[:-1].mean())


def forgetting(matrix):
    """1/(T-1) sum_{t<T} max_{k<T} a(k, t) - a(T, t) (Chaudhry et al. 2018); NaN for one task."""
    if len(matrix) == 1:
        return np.nan
    best = np.fmax.reduce(matrix[:-1], axis=0)  # of those that were measured
    return float((best - matrix[-1])[:-1].mean())


MEASURES = (average_accuracy, backward_transfer, forgetting)


def measures(matrix):
    """name -> value, None where it was not measured."""
    values = {measure.__name__: measure(matrix) for measure in MEASURES}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


# ---- tables


def table(rows):
    """Rows of text, in columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def cell(value):
    return "-" if value is None or np.isnan(value) else f"{value:.1f}"


def matrix_table(tasks, matrix):
    rows = [["after \\ on", *tasks]]
    for task, accuracies in zip(tasks, matrix):
        if not np.isnan(accuracies).all():
            rows.append([task, *(cell(value) for value in accuracies)])
    return table(rows)


# ---- tables and pictures over runs


def settings_of(config, but=()):
    """What runs must share to stand in one row, as text."""
    shared = {key: x for key, x in config.items() if key not in (*NOT_SETTINGS, *but)}
    return json.dumps(shared, sort_keys=True)


def read_runs(folders):
    """settings -> column -> seed -> (config, results); a note for each run that is not counted."""
    folders = [Path(folder) for folder in folders if Path(folder, "results.json").exists()]
    check(folders, "no results in these folders: give those that train.py wrote, such as runs/*")
    rows, notes = {}, []
    for folder in folders:
        config, results = read_json(folder / "config.json"), read_json(folder / "results.json")
        order, seed = config["order"], config["seed"]
        column = f"order {order}" if order else " ".join(results["tasks"])
        if results["average_accuracy"] is None:
            notes.append(f"not counted, as it is not finished: {folder}")
            continue
        seeds = rows.setdefault(settings_of(config), {}).setdefault(column, {})
        if seed in seeds:
            notes.append(f"not counted, as it repeats another: {folder}")
        seeds.setdefault(seed, (config, results))
    return rows, notes


def row_names(rows):
    """settings -> model, method, and in what it differs from other rows of that name."""
    configs = {}
    for settings, columns in rows.items():
        configs[settings], _ = next(iter(next(iter(columns.values())).values()))
    names = {}
    for settings, config in configs.items():
        words = [config["model_name"], config["method"]]
        alike = [c for c in configs.values() if [c["model_name"], c["method"]] == words]
        for key, value in json.loads(settings).items():
            if any(other.get(key) != value for other in alike):
                words.append(f"{key} {value}")
        names[settings] = " ".join(words)
    return dict(sorted(names.items(), key=lambda item: item[1])), configs


def compare(folders):
    """A table a measure: mean, std over seeds, and the gain over the same runs without a mask."""
    rows, notes = read_runs(folders)
    names, configs = row_names(rows)
    columns = sorted({column for row in rows.values() for column in row})
    unmasked = {}
    for settings, config in configs.items():
        if config["mask"] == "none":
            unmasked[settings_of(config, MASK_SETTINGS)] = rows[settings]
    tables = []
    for measure in (function.__name__ for function in MEASURES):
        lines = [[measure.replace("_", " "), *columns, "mean", "gain over no mask"]]
        for settings, name in names.items():
            plain = unmasked.get(settings_of(configs[settings], MASK_SETTINGS))
            lines.append([name, *row_cells(rows[settings], plain, columns, measure)])
        tables.append(table(lines))
    return "\n\n".join(tables + notes)


def row_cells(row, plain, columns, measure):
    """A cell a column, the mean over columns, and its gain where plain has the same seeds."""
    cells, means, gains = [], [], []
    for column in columns:
        seeds = row.get(column, {})
        values = np.array([results[measure] for _, results in seeds.values()] or [np.nan], float)
        text = cell(values.mean())
        if len(values) > 1 and text != "-":
            text += f" ± {values.std(ddof=1):.1f} ({len(values)} seeds)"
        cells.append(text)
        means.append(values.mean())
        if plain and plain.get(column, {}).keys() == seeds.keys():
            gains.append(
                values.mean() - np.mean([plain[column][s][1][measure] or 0 for s in seeds])
            )
    gain = np.mean(gains) if len(gains) == len(columns) and plain is not row else np.nan
    return [*cells, cell(np.mean(means)), "" if np.isnan(gain) else f"{gain:+.1f}"]


def plot(folders, file):
    """A panel a task: its accuracy after each task, a line a method, the mean over seeds."""
    from matplotlib.figure import Figure

    rows, _ = read_runs(folders)
    names, _ = row_names(rows)
    columns = sorted({column for row in rows.values() for column in row})
    tasks = {}
    for row in rows.values():
        for column, seeds in row.items():
            tasks[column] = next(iter(seeds.values()))[1]["tasks"]
    most = max(len(names) for names in tasks.values())
    figure = Figure(figsize=(2.2 * most + 1, 2.4 * len(columns) + 0.6), layout="constrained")
    panels = figure.subplots(len(columns), most, sharey=True, squeeze=False)
    for column, line in zip(columns, panels):
        for settings, name in names.items():
            runs = rows[settings].get(column, {}).values()
            matrices = [np.array(results["matrix"], float) for _, results in runs]
            for j, task in enumerate(tasks[column] if matrices else ()):
                accuracies = np.mean(matrices, 0)[:, j]
                line[j].plot(range(1, len(accuracies) + 1), accuracies, marker=".", label=name)
                line[j].set(title=task, xlabel="tasks learned", ylim=(-2, 102))
        line[0].set_ylabel(f"{column}: accuracy, %")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center")
    figure.savefig(file, dpi=120)


def main(argv=None):
    with one_line_errors("eval.py"):
        parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        add = parser.add_argument
        add("runs", nargs="+", help="run folders; others are passed over")
        add("--plot", nargs="?", const="runs.png", metavar="FILE", help="(default runs.png)")
        args = parser.parse_args(argv)
        print(compare(args.runs))
        if args.plot:
            plot(args.runs, args.plot)


if __name__ == "__main__":
    main()
