"""Fine-tune a language model on one task after another, with MIGU or without it.

    python train.py --demo                               # offline, on a CPU, in a few minutes
    python train.py --order 1                            # t5-large, full tuning, MIGU, as the paper
    python train.py --order 1 2 3 --seed 42 1024 2048    # nine runs, and a table over them
    python train.py --order 4 --tune lora --mask none --replay 0.02
    python train.py --tasks my_tasks/news my_tasks/mail  # your own: train, test, labels .json
    torchrun --nproc-per-node 8 train.py --order 1       # on 8 GPUs: each batch is split over them

A run is a folder: config.json, log.csv, matrix.csv, results.json, predictions/, model/, and for
LoRA and O-LoRA adapters/.
"""

import argparse
import csv
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
import download
import eval as evaluation
from migu import CRITERIA, MIGU, NOT_THE_HEAD, RowSparseMIGU, add_lora, lora_layers, merge_lora
from migu import orthogonality_penalty, plain_weights
from model import PROCESSES, RANK, T5, Parser, as_user_error, check, load_model, lock
from model import one_line_errors, open_safetensors, read_json, read_safetensors, save_model
from model import write_safetensors, write_text

# The paper's settings, by --tune.
LEARNING_RATE = {"full": 1e-4, "lora": 1e-3, "inclora": 1e-3, "olora": 1e-3}
THRESHOLD = {"full": 0.7, "lora": 0.7, "inclora": 0.7, "olora": 0.05}
REPLAY_THRESHOLD = 0.4
OTHERS = [name for name in CRITERIA if name != "magnitude"]
MASKS = ("migu", *OTHERS, "none")  # migu is the criterion "magnitude"
MAY_CHANGE = ("versions", "checkpointing")  # when a run is resumed

RANGES = (  # of options: what a value must do, a test of it, and which options these are
    ("be above 0", lambda x: 0 < x < math.inf, "lr epochs batch_size micro_batch limit"),
    ("be from 0 to 1", lambda x: 0 <= x <= 1, "threshold replay"),
    ("not be below 0", lambda x: 0 <= x < math.inf, "clip l1 seed"),
)
GPUS = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
DEVICES = ["cpu", *GPUS, "cuda"] if torch.cuda.is_available() else ["cpu"]
MODELS = f"a folder, {', '.join(download.MODELS)}, or a hub repository's owner/name"
TUNINGS = "all weights; one adapter; an adapter a task; these orthogonal (default full)"


# ---- settings


def parse_args(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--demo", action="store_true", help="a tiny T5 on made-up tasks (heeds --seed and --out)")
    add("--order", type=int, nargs="+", choices=data.ORDERS, help="orders of the benchmark's tasks")
    add("--tasks", nargs="+", metavar="TASK", type=expanduser, help="its tasks, or your folders")
    add = parser.add_argument
    add("--model", default="t5-large", type=expanduser, help=MODELS)
    add("--tune", choices=LEARNING_RATE, default="full", help=TUNINGS)
    add("--mask", choices=MASKS, default="migu", help="which rows are updated (default migu)")
    add("--threshold", type=float, help=f"fraction of rows that is masked (default {THRESHOLD})")
    add("--layers", default=NOT_THE_HEAD, help="linear layers to mask, a regular expression")
    add("--mask-first", action="store_true", help="mask the first task too")
    add("--replay", type=float, default=0.0, metavar="FRACTION", help="of each past task's records")
    add("--joint", action="store_true", help="an upper bound: train on all tasks at once")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="(default adamw)")
    add("--lr", type=float, help=f"learning rate (default {LEARNING_RATE})")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient, 0: any (default 1.0)")
    add("--l1", type=float, default=0.5, help="O-LoRA's weight of the penalty (default 0.5)")
    add("--epochs", type=int, help="passes over each task (default 1; order 5 WiC, 6 MNLI: 2)")
    add("--batch-size", type=int, default=64, help="examples in a step (default 64)")
    add("--micro-batch", type=int, help="examples in memory at once (default: all of a step)")
    add("--checkpointing", action="store_true", help="less memory, more time: compute blocks twice")
    add("--limit", type=int, nargs="+", metavar="N", help="first records of train (and of test)")
    add("--eval", choices=("last", "all"), default="last", help="test after the last task, or each")
    add("--seed", type=int, nargs="+", help="a run for each (default 42; the demo: 42 1024 2048)")
    add("--device", choices=DEVICES, default=DEVICES[-1], help="(default here: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic (bfloat16 on cuda)")
    add("--data", default="data", type=expanduser, help="folder of the benchmark (default data)")
    add("--out", default="runs", type=expanduser, help="folder of the runs (default runs)")
    add("--resume", action="store_true", help="go on with runs that were stopped")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args):
    check(len(args.limit or []) <= 2, "--limit takes a number for train, and one for test")
    for must, fine, names in RANGES:
        for name in names.split():
            for value in np.ravel(getattr(args, name)):
                check(value is None or fine(value), f"--{name.replace('_', '-')} must {must}")
    with as_user_error(f"--layers {args.layers}: no regular expression", re.error):
        re.compile(args.layers)
    if PROCESSES > 1:
        check(args.device not in GPUS and not args.demo, "torchrun: no --demo, no cuda:N")
        enough = args.device == "cpu" or int(os.environ["LOCAL_WORLD_SIZE"]) <= len(GPUS)
        check(enough, f"torchrun: {len(GPUS)} GPUs: lower --nproc-per-node, or add --device cpu")


def model_folder(name):
    """A local folder, or else where download.py puts a model of this name."""
    folder = Path(name)
    local = folder.exists() or name[:1] in "./~"
    return Path(os.path.abspath(name)) if local else Path("models", name)


def settings(args, order, seed):
    """A run's arguments as resolved: what its config.json says."""
    c = argparse.Namespace(**vars(args) | {"order": order, "seed": seed})
    del c.demo, c.out, c.resume
    c.tasks = list(data.ORDERS[order]) if order else [data.resolve(name) for name in args.tasks]
    c.model = str(model_folder(args.model))
    c.model_name = Path(c.model).name
    c.method = f"{args.tune} {args.mask}"
    if args.replay:
        c.method += f" replay{args.replay:g}"
    if args.joint:
        c.method += " joint"
    c.lr = args.lr or LEARNING_RATE[args.tune]
    if args.threshold is None:
        c.threshold = REPLAY_THRESHOLD if args.replay else THRESHOLD[args.tune]
    c.dtype = args.dtype or ("bfloat16" if "cuda" in args.device else "float32")
    c.micro_batch = min(args.micro_batch or args.batch_size, args.batch_size)
    c.processes = PROCESSES
    one_pass = c.tune == "full" and c.micro_batch == c.batch_size and c.processes == 1
    c.row_sparse = one_pass and c.mask == "migu" and not re.search(c.layers, "lm_head")
    c.versions = {"python": platform.python_version(), "torch": torch.__version__}
    names = [Path(task).name for task in c.tasks]
    check(len(set(names)) == len(names), f"two tasks have the same name: {', '.join(names)}")
    check(not (c.joint and c.replay), "--joint has all tasks at once: leave out --replay")
    never = c.mask != "none" and not c.mask_first and (c.joint or len(names) == 1)
    check(not never, "the first of the tasks is not masked: add --mask-first, or --mask none")
    return c


def run_folder(c, out):
    """Bears what the run is; of many tasks' names the first 100 bytes, as config.json has all."""
    what = f"order{c.order}" if c.order else "+".join(Path(task).name for task in c.tasks)
    what = what.encode(errors="surrogateescape")[:100].decode(errors="ignore")
    return Path(out, f"{what}-{c.model_name}-{c.method.replace(' ', '-')}-s{c.seed}")


def check_folder(folder, c, resume):
    """A folder in use is gone on with on request alone, and by the run that it belongs to."""
    used = any(file.name != ".lock" for file in folder.glob("*"))
    fault = f"{folder} is in use: add --resume to go on with it, or choose another --out"
    check(resume or not used, fault)
    if (folder / "config.json").exists():
        before, now = read_json(folder / "config.json"), vars(c)
        differ = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
        faults = "; ".join(f"{name} {before.get(name)}, not {now[name]}" for name in differ)
        check(not differ, f"{folder} has other arguments: {faults}")


# ---- one task: the training loop


def seeded(seed, index):
    """A generator for a task, the same however the run came to it; torch is seeded too."""
    sequence = np.random.SeedSequence([seed, index])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)


def make_optimizer(model, c):
    """The paper's AdamW; as in transformers, norms, biases and position tables do not decay."""
    if c.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), c.lr)
    # Frozen ones have no gradient: they are passed over.
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1 and "bias" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "bias" in name]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, c.lr, fused=model.device.type in ("cpu", "cuda"))


def make_masker(model, c):
    criterion = "magnitude" if c.mask == "migu" else c.mask
    with as_user_error("--layers", ValueError):
        if c.row_sparse:
            return RowSparseMIGU(model, c.threshold, c.layers)
        return MIGU(model, c.threshold, criterion, c.layers)


def count_targets(batch):
    """How many tokens a model must write."""
    return sum(label != -100 for _, labels in batch for label in labels)


def sum_over_processes(model, masker, loss):
    """Each process has seen a share of the batch: now all have the whole batch's sums."""
    tensors = [loss] + [p.grad for p in model.parameters() if p.grad is not None]
    if masker:
        tensors += masker.magnitude.values()
    for tensor in tensors:
        dist.all_reduce(tensor)


def train_step(model, optimizer, masker, batch, c, earlier):
    """One update by a batch of (input ids, labels). Returns loss, rows kept / rows, norm.

    Each is (), on the device: reading it would wait for a GPU.
    """
    seed = torch.initial_seed()
    torch.manual_seed(seed + 1_000_000 * RANK)  # each process has dropout of its own
    total = torch.zeros((), device=model.device)
    if len(batch) < PROCESSES:  # repeat it, so that each has some: mean and mask stay
        batch = batch * PROCESSES
    targets = count_targets(batch)
    share = batch[RANK::PROCESSES]
    for start in range(0, len(share), c.micro_batch):
        part = share[start : start + c.micro_batch]
        with evaluation.autocast(model, c.dtype):
            loss = model.loss(**data.collate(*zip(*part)))
        # The mean over the targets of the whole batch, however it is cut.
        loss = loss * (count_targets(part) / targets)
        loss.backward()
        total += loss.detach()
    if PROCESSES > 1:
        sum_over_processes(model, masker, total)
    if earlier:
        (c.l1 * orthogonality_penalty(model, earlier)).backward()
    torch.manual_seed(seed + 1)  # and all draw the same random rows
    kept = 1.0
    if masker:
        kept = masker.mask_gradients()  # MIGU: the rows of small magnitude get no gradient
    norm = nn.utils.clip_grad_norm_(model.parameters(), c.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return total, kept, norm


def train_task(model, steps, c, masker, name):
    """Train on batches of (input ids, labels) with a fresh optimizer; a log entry for each."""
    optimizer = make_optimizer(model, c)
    log = []
    model.train()
    bar = tqdm(steps, desc=f"train {name}", unit="step", disable=RANK > 0)
    for step, batch in enumerate(bar, 1):
        log.append(train_step(model, optimizer, masker, batch, c, model.earlier_A))
        where = f"step {step} of {name}: lower --lr; finished tasks are kept"
        if step % 10 == 0 or step == len(steps):  # not each step: reading waits for the GPU
            loss, _, norm = map(float, log[-1])
            bar.set_postfix(loss=f"{loss:.3f}")
            check(math.isfinite(norm), f"the gradient's norm is {norm} at {where}")
    finite = all(p.isfinite().all() for p in model.parameters())
    check(finite, f"weights not finite at {where}")
    return [(name, step, *map(float, values)) for step, values in enumerate(log, 1)]


# ---- one stage of a run: a task (--joint: all), what is replayed of earlier ones, the tests


def stage_examples(c, tasks, stage):
    """The training examples of a task, and a fixed part of those of each earlier one."""
    if c.joint:
        return [example for task in tasks for example in task.train]
    examples = list(tasks[stage].train)
    for j, past in enumerate(tasks[:stage]):
        # Another seed than that of seeded(), which puts that task's own training in order.
        order = np.random.default_rng([c.seed, j, 1]).permutation(len(past.train))
        examples += [past.train[i] for i in order[: int(len(order) * c.replay)]]
    return examples


def add_adapters(model, c):
    """Put adapters on; frozen linear weights get the arithmetic's type once, not in each step.

    Adapted ones and the head (it may be the embedding) stay: folding must not drift.
    """
    add_lora(model)
    for layer in model.modules():
        frozen = type(layer) is nn.Linear and not layer.weight.requires_grad
        if frozen and layer is not model.lm_head:
            layer.to(getattr(torch, c.dtype))


def tell_cut(prompts, what):
    longest = data.LONGEST_PROMPT
    count = sum(len(ids) >= longest for ids in prompts)
    if count:
        print(f"{what}: {count} of {len(prompts)} texts end at the limit of {longest} tokens")


def train_stage(model, tokenizer, c, tasks, stage, name):
    """Train on a stage's examples. Returns its log."""
    rng = seeded(c.seed, 0 if c.joint else stage)
    examples = stage_examples(c, tasks, stage)
    bar = tqdm(examples, desc=f"tokenize {name}", leave=False, disable=RANK > 0)
    encoded = [data.encode_example(tokenizer, example, model.decoder_only) for example in bar]
    tell_cut([ids[: labels.count(-100) or None] for ids, labels in encoded], f"training on {name}")
    epochs = c.epochs or data.EPOCHS.get((c.order, name), 1)
    steps = [batch for _ in range(epochs) for batch in data.batches(encoded, c.batch_size, rng)]

    if c.tune in ("inclora", "olora"):  # a new adapter, folded in once it is trained
        add_adapters(model, c)
    masker = None if c.mask == "none" else make_masker(model, c)
    if masker and stage == 0 and not c.mask_first:
        masker.remove()  # it was made all the same: a wrong --layers is found at once
        masker = None
    log = train_task(model, steps, c, masker, name)
    if masker:
        masker.remove()
    if c.tune == "olora":
        for layer, adapted in lora_layers(model).items():
            A = adapted.lora_A.weight.detach()
            model.earlier_A[layer] = torch.cat([model.earlier_A.get(layer, A[:0]), A])
    if c.tune in ("inclora", "olora"):
        merge_lora(model)
    return log


def test_stage(model, tokenizer, c, tasks, stage, folder):
    """Accuracies on the tasks so far, None on later ones; predictions go to the folder."""
    accuracies = [None] * len(tasks)
    # On a GPU more at once, where the cache is small: T5's holds answers, Llama's prompts too.
    tokens = 65536 if "cuda" in c.device and not model.decoder_only else 16384
    for j, task in enumerate(tasks[: stage + 1]):
        prompts = [data.encode_prompt(tokenizer, e.prompt, model.decoder_only) for e in task.test]
        tell_cut(prompts, f"testing on {task.name}")
        size = math.ceil(len(prompts) / PROCESSES)
        share = prompts[RANK * size :][:size]
        predictions = evaluation.evaluate(model, tokenizer, share, c.dtype, tokens, task.name)
        if PROCESSES > 1:
            shares = [None] * PROCESSES
            dist.all_gather_object(shares, predictions)
            predictions = sum(shares, [])
        accuracies[j] = evaluation.accuracy(predictions, task.test)
        rows = [{**e._asdict(), "prediction": p} for e, p in zip(task.test, predictions)]
        place = folder / "predictions" / f"{stage + 1}-{tasks[stage].name}" / f"{task.name}.jsonl"
        if RANK == 0:
            write_text(place, "".join(json.dumps(row) + "\n" for row in rows))
    return accuracies


# ---- one run: its stages in turn, each saved when it is done


def load_results(folder, names):
    """How many stages are finished (the weights' file tells), results.json, rows of log.csv.

    A later stage that was cut off may stand in both: run() writes its rows anew, its time counts.
    """
    results = {"tasks": names, "matrix": [[None] * len(names) for _ in names], "seconds": 0.0}
    log = [["task", "step", "loss", "kept", "norm"]]
    weights = folder / "model" / "model.safetensors"
    if not weights.exists():
        return 0, results, log
    _, metadata = open_safetensors(weights)
    check("finished" in metadata, f"{weights} was not written by a run: choose another --out")
    with open(folder / "log.csv", encoding="utf-8", newline="") as file:
        log = list(csv.reader(file))
    return int(metadata["finished"]), read_json(folder / "results.json"), log


def load_stage(folder, c, finished):
    """The model as the last finished stage left it.

    model.earlier_A, for O-LoRA: name of a layer -> A of all finished tasks (ranks, d_in).
    """
    adapters = {}
    if finished and c.tune in ("lora", "olora"):
        adapters = read_safetensors(folder / "adapters" / f"{finished}.safetensors")
    model = load_model(folder / "model" if finished and c.tune != "lora" else c.model)
    model.checkpointing = c.checkpointing
    model.earlier_A = {}
    if c.tune == "lora":  # one adapter for all tasks
        seeded(c.seed, 0)
        add_adapters(model, c)
        model.load_state_dict(adapters, strict=False)
    else:
        model.earlier_A = {name: A.to(c.device, copy=True) for name, A in adapters.items()}
    return model.to(c.device)


def write_csv(path, rows):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    write_text(path, file.getvalue())


def save_stage(model, folder, c, results, log, finished):
    """The weights come last: once they are renamed into place, the stage is finished."""
    names, matrix = results["tasks"], results["matrix"]
    results |= evaluation.measures(np.array(matrix, float))
    write_text(folder / "config.json", json.dumps(vars(c), indent=1))
    write_csv(folder / "matrix.csv", [["", *names], *([n, *row] for n, row in zip(names, matrix))])
    write_csv(folder / "log.csv", log)
    write_text(folder / "results.json", json.dumps(results, indent=1))

    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    adapters |= model.earlier_A
    if adapters:
        write_safetensors(folder / "adapters" / f"{finished}.safetensors", adapters)
    weights = plain_weights(model)
    rounded = [name for name, weight in weights.items() if weight.dtype != torch.float32]
    if rounded:  # by add_adapters(): frozen, they are what they were at the start
        start = load_model(c.model)
        weights |= {name: start.get_parameter(name) for name in rounded}
    save_model(model, folder / "model", weights, {"finished": str(finished)})


def run(folder, c, tasks, tokenizer):
    """Train on each task, test as --eval says, save."""
    finished, results, log = load_results(folder, [task.name for task in tasks])
    if finished == len(tasks):
        print("nothing left to do")
        return
    model = load_stage(folder, c, finished)
    evaluation.check_tokenizer(model, tokenizer, c.model)
    if "cuda" in c.device:
        torch.cuda.reset_peak_memory_stats(c.device)
    first = len(tasks) - 1 if c.joint else finished  # the last task's stage has all
    for stage in range(first, len(tasks)):
        name = "+".join(results["tasks"]) if c.joint else tasks[stage].name
        started = time.perf_counter()
        entries = train_stage(model, tokenizer, c, tasks, stage, name)
        if c.eval == "all" or stage == len(tasks) - 1:
            results["matrix"][stage] = test_stage(model, tokenizer, c, tasks, stage, folder)
            print(evaluation.matrix_table(results["tasks"], np.array(results["matrix"], float)))
        results["seconds"] += time.perf_counter() - started
        if "cuda" in c.device:
            used = torch.cuda.max_memory_allocated(c.device) / 1e9
            results["gpu_memory_gb"] = max(used, results.get("gpu_memory_gb", 0))
        log = log[:1] + [row for row in log[1:] if row[0] != name] + entries
        if RANK == 0:
            save_stage(model, folder, c, results, log, stage + 1)
        print(f"{name} is finished, {results['seconds']:.0f} seconds in all", flush=True)


# ---- commands


def train(args):
    """Each order with each seed, one run after another. Returns the runs' folders."""
    runs = {}
    for order, seed in itertools.product(args.order or [None], args.seed or [42]):
        c = settings(args, order, seed)
        folder = run_folder(c, args.out)
        check_folder(folder, c, args.resume)
        runs[folder] = c
    names = dict.fromkeys(name for c in runs.values() for name in c.tasks)
    folders = [data.task_folder(args.data, name) for name in names if name in data.GROUP_OF]
    if not all((folder / f"{part}.json").exists() for folder in folders for part in data.PARTS):
        download.fetch_data(args.data, keep=True)
    limits = (args.limit or [None]) * 2  # one number holds for both
    tasks = {name: data.load_task(args.data, name, limits) for name in names}
    for name in itertools.chain(*(c.tasks[:-1] for c in runs.values())):
        count = len(tasks[name].train)
        fault = f"--replay {args.replay:g} of {tasks[name].name}'s {count} records is none"
        check(not 0 < args.replay * count < 1, f"{fault}: raise it")
    path = model_folder(args.model)
    if not (path / "config.json").exists():
        check(not Path(args.model).exists(), f"{path} is no model's folder: no config.json")
        download.fetch_model(args.model)
    tokenizer = data.load_tokenizer(path)
    for task in tasks.values():
        evaluation.check_task(task, tokenizer)
    if PROCESSES > 1:
        start_processes(args.device)
    for folder, c in runs.items():
        print(f"# {folder}", flush=True)
        held = nullcontext() if RANK > 0 else lock(folder / ".lock")
        check(held, f"{folder} is in use by another process: wait, or choose another --out")
        with held:
            check_folder(folder, c, args.resume)  # once more: another process may have been here
            run(folder, c, [tasks[name] for name in c.tasks], tokenizer)
    if PROCESSES > 1:
        dist.destroy_process_group()
    if RANK == 0:
        print(evaluation.compare(runs))
    return list(runs)


def start_processes(device):
    """Join the processes that torchrun started, each with a GPU of its own; the first prints."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # While the first saves a large model, the others wait.
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(hours=2))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")


# ---- the demo: what a user would type, on a tiny T5 and tasks made here

DEMO_SIZES = dict(vocab_size=600, d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4)
DEMO_OTHER = dict(dropout_rate=0.0, layer_norm_epsilon=1e-6, relative_attention_num_buckets=32)
DEMO_IDS = dict(pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)


def demo(args):
    """Plain tuning beside MIGU: how much of the old and the new tasks is left."""
    root, seeds = Path(args.out, "demo"), args.seed or [42, 1024, 2048]
    check(not root.exists(), f"{root} is in use: remove it, or choose another --out")
    known = [f"{root}/known/words{i}" for i in range(12)]
    new = [f"{root}/new/{name}" for name in ("alpha", "beta", "gamma", "delta")]
    make_demo(root, known, new)
    joint = "--joint --mask none --lr 1e-3 --epochs 6"
    (folder,) = demo_step("A tiny T5 learns 12 tasks at once", known, root, "untrained", joint)
    shutil.copytree(folder / "model", root / "tiny-t5")
    each = f"--lr 5e-4 --epochs 5 --eval all --seed {' '.join(map(str, seeds))}"
    found = {}  # (seeds, 3) each
    for title, how, mask in (("Plainly", "plain", "none"), ("With MIGU", "MIGU", "migu")):
        title += ", it learns four more, one after another"
        folders = demo_step(title, new, root, "tiny-t5", f"--mask {mask} {each}")
        found[how] = np.array([demo_measures(folder, known) for folder in folders])
    found["gain"] = found["MIGU"] - found["plain"]
    rows = [["", "average accuracy", "backward transfer", "accuracy on the 12 known tasks"]]
    for how, values in found.items():
        rows.append([how, *map(evaluation.cell, values.T)])
    for seed, gains in zip(seeds, found["gain"]):
        rows.append([f"gain, seed {seed}", *(f"{gain:+.1f}" for gain in gains)])
    print(f"\nIn percent, mean ± std over the seeds {seeds}:\n{evaluation.table(rows)}")


def make_demo(root, known, new):
    """Write the tasks, and an untrained T5 with a vocabulary of its own."""
    texts = []
    for folders, sizes, seed in ((known, (200, 25), 1), (new, (400, 100), 2)):
        rng = np.random.default_rng(seed)
        for folder in folders:
            data.make_demo_task(folder, sizes, rng)
            texts += itertools.chain(*data.load_task("", folder).train)
    torch.manual_seed(0)
    model = T5(DEMO_SIZES | DEMO_OTHER | DEMO_IDS)
    model.files["spiece.model"] = data.train_vocabulary(texts, DEMO_SIZES["vocab_size"])
    save_model(model, root / "untrained")


def demo_step(title, tasks, root, model, arguments):
    words = ["--tasks", *tasks, "--model", f"{root}/{model}", *arguments.split()]
    words += ["--batch-size", "32", "--device", "cpu", "--out", str(root)]
    print(f"\n{title}.\n$ python train.py {' '.join(words)}", flush=True)
    return train(parse_args(words))


def demo_measures(folder, known):
    """Average accuracy, backward transfer, and accuracy on the tasks known before."""
    model, tokenizer = load_model(folder / "model"), data.load_tokenizer(folder / "model")
    tests = [example for task in known for example in data.load_task("", task).test]
    prompts = [data.encode_prompt(tokenizer, example.prompt, False) for example in tests]
    skill = evaluation.accuracy(evaluation.evaluate(model, tokenizer, prompts), tests)
    results = read_json(folder / "results.json")
    return results["average_accuracy"], results["backward_transfer"], skill


def main(argv=None):
    with one_line_errors("train.py"):
        args = parse_args(argv)
        (demo if args.demo else train)(args)


if __name__ == "__main__":
    main()
