"""Fine-tune a language model on one task after another, with MIGU or without, and measure what it forgets.

    python train.py --demo                               # offline, on a CPU, in about two minutes
    python train.py --order 1                            # t5-large, full tuning with MIGU, the paper's settings
    python train.py --order 1 2 3 --seed 42 1024 2048    # nine runs, and a table over them
    python train.py --tasks my_tasks/news my_tasks/mail  # folders with train.json, test.json and labels.json

The method is three lines of train_task(); everything else is what any fine-tuning needs.
"""
import argparse
import csv
import io
import json
import math
import re
import resource
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import download
import eval as evaluation
from migu import CRITERIA, MIGU, NOT_THE_HEAD
from model import T5, load_model, open_safetensors, read_json, save_model, write_file

LEARNING_RATE = {"full": 1e-4}                                     # the paper's, for each --tune
THRESHOLD = {"full": 0.7}


# ---- the command line

def number(kind, low, high=math.inf):
    """An argparse type: a number above `low`, at most `high`."""
    def parse(text):
        value = kind(text)
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not above {low}" + (f", at most {high}" if high < math.inf else ""))
        return value
    parse.__name__ = kind.__name__
    return parse


def pattern(text):
    try:
        return re.compile(text).pattern
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("--demo", action="store_true", help="small made-up tasks and a tiny T5: plain tuning beside MIGU")
    add("--order", type=int, nargs="+", choices=data.ORDERS, help="the benchmark's orders of tasks")
    add("--tasks", nargs="+", metavar="TASK", help="instead: task folders of your own, or names of the benchmark's tasks")
    add("--model", default="t5-large", help=f"a folder, {', '.join(download.MODELS)}, or a hub repository (default t5-large)")
    add("--tune", choices=LEARNING_RATE, default="full", help="what is trained (default full)")
    add("--mask", choices=("migu", *CRITERIA[1:], "none"), default="migu", help="which rows of a gradient are kept (default migu)")
    add("--threshold", type=number(float, -1e-9, 1), help="fraction of rows masked (default: full 0.7)")
    add("--layers", type=pattern, default=NOT_THE_HEAD, help="masked linear layers, by regular expression (default all but the head)")
    add("--mask-first", action="store_true", help="mask the first task too")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="(default adamw)")
    add("--lr", type=number(float, 0), help="learning rate (default: full 1e-4)")
    add("--epochs", type=number(int, 0), help="passes over each task (default 1; WiC in order 5 and MNLI in order 6: 2)")
    add("--batch-size", type=number(int, 0), default=64, help="examples in a step (default 64)")
    add("--micro-batch", type=number(int, 0), help="examples in memory at once (default all of a step)")
    add("--limit", type=number(int, 0), help="only the first N records of each split")
    add("--eval", choices=("last", "all"), default="last", help="test after the last task, or after every task (default last)")
    add("--seed", type=int, nargs="+", default=[42], help="one run for each (default 42)")
    add("--device", help="(default cuda if there is one, else cpu)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic; weights stay float32 (default bfloat16 on cuda)")
    add("--data", default="data", help="folder of the benchmark (default data)")
    add("--out", default="runs", help="folder of the runs (default runs)")
    add("--resume", action="store_true", help="go on with runs that were stopped")
    return parser.parse_args(argv)


def fail(message):
    """A user's mistake: one line, exit code 2."""
    print(f"train.py: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def explained(*errors):
    """These errors are a user's to mend and end in one line; all others keep their traceback."""
    try:
        yield
    except errors as error:
        fail(error)


def plan(args):
    """The runs that a command asks for: a list of (folder, config.json's content), all checked."""
    if bool(args.order) == bool(args.tasks):
        fail("say what to train on: --demo, --order 1, or --tasks FOLDER FOLDER")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        fail(f"--device {device} cannot be used here: try --device cpu")
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    model_name = Path(args.model).name
    runs = []
    for order in args.order or [None]:
        tasks = list(data.ORDERS[order] if order else args.tasks)
        names = [Path(task).name for task in tasks]
        if len(set(names)) < len(names):
            fail(f"two tasks have the same name: {', '.join(names)}")
        method = f"{args.tune} {args.mask}"
        for seed in args.seed:
            folder = "-".join([f"order{order}" if order else "+".join(names), model_name, *method.split(), f"s{seed}"])
            config = {**vars(args), "order": order, "tasks": tasks, "seed": seed, "device": device, "dtype": dtype,
                      "model_name": model_name, "method": method, "lr": args.lr or LEARNING_RATE[args.tune],
                      "threshold": THRESHOLD[args.tune] if args.threshold is None else args.threshold,
                      "micro_batch": min(args.micro_batch or args.batch_size, args.batch_size)}
            for key in ("demo", "resume", "out"):
                del config[key]
            config["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
            runs.append((Path(args.out) / folder, config))
    for folder, config in runs:
        check_folder(folder, config, args.resume)
    return runs


def check_folder(folder, config, resume):
    """A run's folder is new, or holds the same run, to be resumed."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not resume:
        fail(f"{folder} is in use: add --resume to go on with it, or choose another --out")
    if (folder / "config.json").exists():
        before = read_json(folder / "config.json")
        differ = [key for key in config if key != "versions" and config[key] != before.get(key)]
        if differ:
            fail(f"{folder} was run with other arguments: " + ", ".join(f"{key} {before.get(key)}, not {config[key]}" for key in differ))


# ---- one task, one run

def train_task(model, rows, config, index, name, epochs):
    """Train on (input ids, labels) rows with a fresh optimizer; returns the log, a (step, loss, kept) for each step."""
    seed = np.random.SeedSequence([config["seed"], index])         # a resumed run is the same run
    torch.manual_seed(int(seed.generate_state(1)[0]))
    rng = np.random.default_rng(seed)
    device = model.lm_head.weight.device
    dtype = getattr(torch, config["dtype"])
    if config["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=0.01, fused=device.type in ("cpu", "cuda"))
    masker = None
    if config["mask"] != "none" and (index > 0 or config["mask_first"]):
        masker = new_masker(model, config)
    model.train()
    log, waiting = [], []                                          # losses are read ten at a time: reading waits for the GPU
    steps = [batch for _ in range(epochs) for batch in data.batches(rows, config["batch_size"], rng)]
    bar = tqdm(steps, desc=f"train {name}", unit="step", file=sys.stderr)
    for step, batch in enumerate(bar, 1):
        targets = [sum(label != -100 for label in labels) for _, labels in batch]
        total = 0.0
        for start in range(0, len(batch), config["micro_batch"]):
            part = slice(start, start + config["micro_batch"])
            share = sum(targets[part]) / sum(targets)              # the loss is the mean over the whole batch's targets
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model.loss(**data.collate(*zip(*batch[part]))) * share
            loss.backward()
            total = total + loss.detach()
        kept = masker.mask_gradients() if masker else 1.0          # MIGU: the rows of small magnitude get no gradient
        optimizer.step()
        optimizer.zero_grad()

        waiting.append((step, total, kept))
        if len(waiting) == 10 or step == len(steps):
            log += [(n, float(loss), float(kept)) for n, loss, kept in waiting]
            waiting = []
            bar.set_postfix(loss=f"{log[-1][1]:.3f}")
            for n, loss, _ in log[-10:]:
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {n} of {name}: try a lower --lr than {config['lr']:g}; "
                                             "the last finished task is kept, --resume goes on after it")
    if masker:
        masker.remove()
    return log


def new_masker(model, config):
    criterion = "magnitude" if config["mask"] == "migu" else config["mask"]
    return MIGU(model, config["threshold"], criterion, config["layers"])


def peak_memory(device):
    """Bytes: of the GPU's memory, or of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_json(path, value):
    write_file(path, [json.dumps(value, indent=1).encode()])


def write_csv(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_file(path, [text.getvalue().encode()])


class Progress:
    """What a run has done, and its files: the weights say how many tasks are finished, results.json what was tested."""

    def __init__(self, folder, tasks):
        self.folder, self.names = folder, [task.name for task in tasks]
        self.finished, self.stages, self.log = 0, [], []
        self.matrix = np.full((len(tasks), len(tasks)), np.nan)
        weights = folder / "model" / "model.safetensors"
        if weights.exists():
            state = json.loads(open_safetensors(weights)[1]["migu"])
            self.finished, self.stages, self.log = state["finished"], state["stages"], state["log"]
        if (folder / "results.json").exists():
            before = read_json(folder / "results.json")
            self.matrix = np.array(before["matrix"], float)
            if len(before["stages"]) == self.finished:
                self.stages = before["stages"]

    def save_weights(self, model):
        """The log first, then in one rename the weights and how far they are."""
        write_csv(self.folder / "log.csv", [("task", "step", "loss", "kept"), *self.log])
        state = {"finished": self.finished, "stages": self.stages, "log": self.log}
        save_model(model, self.folder / "model", {"migu": json.dumps(state)})

    def save_results(self):
        none = lambda value: None if np.isnan(value) else float(value)
        measures = {f.__name__: none(f(self.matrix)) for f in
                    (evaluation.average_accuracy, evaluation.backward_transfer, evaluation.forgetting)}
        seconds = sum(stage.get("train_seconds", 0) + stage.get("test_seconds", 0) for stage in self.stages)
        write_csv(self.folder / "matrix.csv", [["", *self.names], *([n, *map(none, row)] for n, row in zip(self.names, self.matrix))])
        write_json(self.folder / "results.json", {
            "tasks": self.names, "matrix": [[none(x) for x in row] for row in self.matrix], **measures,
            "seconds": seconds, "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in self.stages), "stages": self.stages})


def run(folder, config, tasks, tokenizer):
    """Train on the tasks in turn, saving after each, testing as --eval says; goes on where an earlier run stopped."""
    progress = Progress(folder, tasks)
    device, dtype = torch.device(config["device"]), getattr(torch, config["dtype"])
    to_test = [range(i + 1) if config["eval"] == "all" or i == len(tasks) - 1 else range(0) for i in range(len(tasks))]
    is_tested = lambda i: not np.isnan(progress.matrix[i, list(to_test[i])]).any()
    if progress.finished == len(tasks) and is_tested(len(tasks) - 1):
        print(f"{folder}: nothing left to do")
        return
    with explained(ValueError, OSError):
        model = load_model(folder / "model" if progress.finished else config["folder"]).to(device)
        if config["mask"] != "none":
            new_masker(model, config).remove()                     # --layers must select something before hours go by
    write_json(folder / "config.json", {k: v for k, v in config.items() if k != "folder"})
    for index, task in enumerate(tasks):
        if index >= progress.finished:
            epochs = config["epochs"] or (2 if (config["order"], task.name) in data.TWO_EPOCHS else 1)
            rows = [tokenizer.training_row(example) for example in task.train]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            started = time.perf_counter()
            log = train_task(model, rows, config, index, task.name, epochs)
            seconds = time.perf_counter() - started
            tokens = sum(len(source) + len(target) * (not tokenizer.decoder_only) for source, target in rows)
            progress.stages.append({
                "task": task.name, "train_seconds": seconds, "train_examples_per_second": epochs * len(rows) / seconds,
                "train_tokens_per_second": epochs * tokens / seconds, "peak_memory_bytes": peak_memory(device)})
            progress.log += [(task.name, *entry) for entry in log]
            progress.finished = index + 1
            progress.save_weights(model)
        if not is_tested(index):
            started, count = time.perf_counter(), 0
            for j in to_test[index]:
                accuracy, predictions, _ = evaluation.evaluate(model, tokenizer, tasks[j].test, dtype, name=tasks[j].name)
                lines = [json.dumps({**e._asdict(), "prediction": p}) + "\n" for e, p in zip(tasks[j].test, predictions)]
                write_file(folder / "predictions" / f"{index + 1}-{task.name}" / f"{tasks[j].name}.jsonl", ["".join(lines).encode()])
                progress.matrix[index, j] = accuracy
                count += len(predictions)
            seconds = time.perf_counter() - started
            progress.stages[index].update(test_seconds=seconds, test_examples_per_second=count / seconds)
        if index >= progress.finished - 1:
            progress.save_results()
            stage = progress.stages[index]
            print(f"{task.name}: " + ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in stage.items() if key != "task"))
            print(evaluation.matrix_table(progress.names, progress.matrix), flush=True)


def demo(args):
    """Plain tuning beside MIGU on made-up tasks: the very commands a user would type, on a tiny T5 made here."""
    root = Path(args.out) / "demo"
    if root.exists() and not (root / "tiny-t5").exists():
        fail(f"{root} is in use: choose another --out")
    shutil.rmtree(root, ignore_errors=True)
    known = [str(root / "known" / f"words{i}") for i in range(12)]
    tasks = [str(root / "tasks" / name) for name in ("alpha", "beta", "gamma", "delta")]
    data.make_demo(known, sizes=(200, 25), seed=1)
    data.make_demo(tasks, sizes=(400, 100), seed=2)
    known, fresh = ([data.load_task("", name) for name in names] for names in (known, tasks))
    print("A tiny T5 learns 12 made-up tasks together; it will never see them again.", flush=True)
    torch.manual_seed(0)
    model = T5(data.DEMO_T5)
    texts = [text for task in known + fresh for example in task.train for text in example]
    model.files["spiece.model"] = data.train_vocabulary(texts, data.DEMO_T5["vocab_size"])
    save_model(model, root / "tiny-t5")
    tokenizer = data.load_tokenizer(root / "tiny-t5")
    rows = [tokenizer.training_row(example) for task in known for example in task.train]
    pretraining = {"seed": 0, "dtype": "float32", "optimizer": "adamw", "lr": 1e-3, "mask": "none", "mask_first": False,
                   "batch_size": 32, "micro_batch": 32}
    train_task(model, rows, pretraining, 0, "12 known tasks", epochs=6)
    save_model(model, root / "tiny-t5")
    skill = lambda model: evaluation.evaluate(model, tokenizer, [e for task in known for e in task.test], name="known tasks")[0]
    rows = [["before", "-", "-", f"{skill(model):.1f}"]]
    for mask in ("none", "migu"):
        command = ["--tasks", *tasks, "--model", str(root / "tiny-t5"), "--mask", mask, "--lr", "5e-4", "--epochs", "5",
                   "--batch-size", "32", "--eval", "all", "--device", "cpu", "--out", str(root), "--seed", str(args.seed[0])]
        print("\n$ python train.py " + " ".join(command), flush=True)
        (folder, results), = main(command)
        rows.append(["plain" if mask == "none" else "MIGU", f"{results['average_accuracy']:.1f}",
                     f"{results['backward_transfer']:.1f}", f"{skill(load_model(folder / 'model')):.1f}"])
    print("\n" + evaluation.table(["", "average accuracy", "backward transfer", "known tasks"], rows))
    gains = [f"{float(b) - float(a):+.1f}" for a, b in zip(*(row[1:] for row in rows[1:]))]
    print(f"\nMIGU against plain tuning, seed {args.seed[0]}: average accuracy {gains[0]}, backward transfer {gains[1]}, "
          f"accuracy kept on the known tasks {gains[2]} points.")


def main(argv=None):
    args = parse_args(argv)
    if args.demo:
        return demo(args)
    with explained(ValueError, OSError):
        runs = plan(args)
        names = {name for _, config in runs for name in config["tasks"]}
        if any(not (data.task_folder(args.data, name) / f"{part}.json").exists()
               for name in names & data.GROUP_OF.keys() for part in ("train", "test", "labels")):
            download.fetch_data(args.data)
        tasks = {name: data.load_task(args.data, name, args.limit) for name in sorted(names)}
        source = Path(args.model) if Path(args.model).is_dir() else download.model_folder(args.model)
        if not (source / "config.json").exists():
            download.fetch_model(args.model)
        tokenizer = data.load_tokenizer(source)
    for folder, config in runs:
        print(f"# {folder}", flush=True)
        with explained(OSError, FloatingPointError, torch.OutOfMemoryError):
            run(folder, {**config, "folder": source}, [tasks[name] for name in config["tasks"]], tokenizer)
    finished = evaluation.load_runs([folder for folder, _ in runs])
    print(evaluation.compare(finished))
    return [(folder, results) for (folder, _), (_, results) in zip(runs, finished)]


if __name__ == "__main__":
    main()
