"""Fine-tune a language model on one task after another, with MIGU or without, and measure what it forgets.

    python train.py --demo                               # offline, on a CPU, in about two minutes
    python train.py --order 1                            # t5-large, full tuning with MIGU, the paper's settings
    python train.py --order 1 2 3 --seed 42 1024 2048 --tune lora --replay 0.02        # nine runs, and a table over them
    python train.py --tasks my_tasks/news my_tasks/mail  # folders with train.json, test.json and labels.json
"""
import argparse, contextlib, csv, itertools, json, math, re, resource, shutil, sys, time
from pathlib import Path
import numpy as np
import torch
from tqdm import tqdm
import data, download, eval as evaluation
from migu import CRITERIA, MIGU, NOT_THE_HEAD, adapted, add_lora, merge_lora, orthogonality_penalty, plain_weights
from model import T5, check, load_model, read_json, read_safetensors, save_model, write_file, write_safetensors

LEARNING_RATE = {"full": 1e-4, "lora": 1e-3, "inclora": 1e-3, "olora": 1e-3}               # the paper's
THRESHOLD = {"full": 0.7, "lora": 0.7, "inclora": 0.7, "olora": 0.05, "replay": 0.4}

# ---- the command line
def fail(message):
    sys.exit(print(f"train.py: {' '.join(str(message).split())}", file=sys.stderr) or 2)
@contextlib.contextmanager
def explained(*errors):
    """These errors are a user's to mend: one line on stderr, exit code 2. Any other keeps its traceback."""
    try:
        yield
    except errors as error:
        fail(error)

def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("--demo", action="store_true", help="plain tuning beside MIGU, on made-up tasks and a tiny T5 (heeds --seed and --out)")
    add("--order", type=int, nargs="+", choices=data.ORDERS, help="orders of the benchmark's tasks")
    add("--tasks", nargs="+", metavar="TASK", help="instead: task folders of your own, or names of the benchmark's tasks")
    add("--model", default="t5-large", help=f"a folder, {', '.join(download.MODELS)}, or a hub repository (default %(default)s)")
    add("--tune", choices=LEARNING_RATE, default="full", help="all weights; one adapter; one for each task; these kept orthogonal")
    add("--mask", choices=("migu", *CRITERIA[1:], "none"), default="migu", help="by what the kept rows are chosen (default %(default)s)")
    add("--replay", type=float, default=0.0, metavar="FRACTION", help="of each past task's records, mixed into the later tasks")
    add("--joint", action="store_true", help="an upper bound: train on all tasks at once, then test each")
    add("--threshold", type=float, help=f"fraction of the rows that is masked (default {THRESHOLD})")
    add("--layers", default=NOT_THE_HEAD, help="the linear layers to mask, a regular expression (default: all but the head)")
    add("--mask-first", action="store_true", help="mask the first task too")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw", help="(default %(default)s)")
    add("--lr", type=float, help=f"learning rate (default {LEARNING_RATE})")
    add("--l1", type=float, default=0.5, help="O-LoRA's weight of the orthogonality penalty (default %(default)s)")
    add("--l2", type=float, default=0.0, help="O-LoRA's weight of the adapters' norms (default %(default)s)")
    add("--epochs", type=int, help="passes over each task (default 1; WiC in order 5 and MNLI in order 6: 2)")
    add("--batch-size", type=int, default=64, help="examples in a step (default %(default)s)")
    add("--micro-batch", type=int, help="examples in memory at once (default: all of a step)")
    add("--limit", type=int, help="only the first N records of each split")
    add("--eval", choices=("last", "all"), default="last", help="test after the last task, or after each (default %(default)s)")
    add("--seed", type=int, nargs="+", default=[42], help="a run for each (default 42)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(here: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic; trained weights are float32 (default: bfloat16 on cuda)")
    add("--data", default="data", help="folder of the benchmark (default %(default)s)")
    add("--out", default="runs", help="folder of the runs (default %(default)s)")
    add("--checkpointing", action="store_true", help="less memory, more time: activations are computed again when they are needed")
    add("--bench", action="store_true", help="only time steps and tests of --model: t5-base and others with random weights, or a folder")
    add("--resume", action="store_true", help="go on with runs that were stopped")
    args = parser.parse_args(argv)
    numbers = [x for x in (args.lr, args.epochs, args.batch_size, args.micro_batch, args.limit) if x is not None]
    with explained(ValueError, re.error, RuntimeError, AssertionError):
        check(all(0 < x < math.inf for x in numbers) and all(0 <= x <= 1 for x in (args.threshold or 0, args.replay)),
              "--threshold and --replay must be from 0 to 1, and --lr, --epochs, --batch-size, --micro-batch, --limit above 0")
        check(args.demo + args.bench + bool(args.order) + bool(args.tasks) == 1,
              "say what to do: --demo, --order 1, --tasks FOLDER FOLDER, or --bench")
        re.compile(args.layers)
        torch.zeros(1, device=args.device)
    return args

def plan(args):
    """The runs that a command asks for, each order with each seed: [(folder, what its config.json will say)]."""
    runs, versions = [], {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    method = [args.tune, args.mask] + [f"replay{args.replay:g}"] * (args.replay > 0) + ["joint"] * args.joint
    threshold = THRESHOLD["replay" if args.replay else args.tune] if args.threshold is None else args.threshold
    micro_batch = min(args.micro_batch or args.batch_size, args.batch_size)
    one_pass = args.tune == "full" and micro_batch == args.batch_size and not re.search(args.layers, "lm_head")
    for order, seed in itertools.product(args.order or [None], args.seed):
        tasks = [*data.ORDERS[order]] if order else args.tasks
        names, model = [Path(task).name for task in tasks], Path(args.model).name
        check(len({*names}) == len(names), f"two tasks have the same name: {', '.join(names)}")
        config = {key: value for key, value in vars(args).items() if key not in ("demo", "bench", "out", "resume")}
        config |= {"order": order, "tasks": tasks, "seed": seed, "model_name": model, "method": " ".join(method), "threshold": threshold,
                   "criterion": "magnitude" if args.mask == "migu" else args.mask, "micro_batch": micro_batch,
                   "row_sparse": one_pass and args.mask not in ("gradient", "none"), "lr": args.lr or LEARNING_RATE[args.tune],
                   "dtype": args.dtype or ("bfloat16" if "cuda" in args.device else "float32"), "versions": versions}
        folder = Path(args.out, "-".join([f"order{order}" if order else "+".join(names), model, *method, f"s{seed}"]))
        check(args.resume or not folder.exists(), f"{folder} is in use: add --resume to go on with it, or choose another --out")
        before = read_json(folder / "config.json") if (folder / "config.json").exists() else config
        differ = [f"{k} {before[k]}, not {config[k]}" for k in {*before} & {*config} - {"versions", "checkpointing"} if before[k] != config[k]]
        check(not differ, f"{folder} has other arguments: {'; '.join(differ)}")
        runs.append((folder, config))
    return runs

# ---- one task: the training loop
def seeded(seed, index):
    """A generator for a task, the same however the run came to it; torch is seeded too."""
    sequence = np.random.SeedSequence([seed, index])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)
def make_optimizer(model, c):
    trained = [p for p in model.parameters() if p.requires_grad]
    adamw = dict(weight_decay=0.01, fused=model.lm_head.weight.device.type in ("cpu", "cuda"))
    return torch.optim.SGD(trained, c.lr) if c.optimizer == "sgd" else torch.optim.AdamW(trained, c.lr, **adamw)

def train_step(model, optimizer, masker, batch, c, earlier):
    """One update by rows of (input ids, labels). Returns loss and fraction of rows kept, () on the device: no step waits for it."""
    targets = lambda rows: sum(label != -100 for _, labels in rows for label in labels)
    dtype, total, whole = getattr(torch, c.dtype), 0.0, targets(batch)
    for start in range(0, len(batch), c.micro_batch):
        part = batch[start:start + c.micro_batch]                  # the loss is the mean over all of the batch's targets
        with torch.autocast(model.lm_head.weight.device.type, dtype, enabled=dtype != torch.float32):
            loss = model.loss(**data.collate(*zip(*part))) * (targets(part) / whole)
        loss.backward()
        total = total + loss.detach()
    if c.tune == "olora":
        orthogonality_penalty(model, earlier, c.l1, c.l2).backward()
    kept = masker.mask_gradients() if masker else 1.0              # MIGU: the rows of small magnitude get no gradient
    optimizer.step()
    optimizer.zero_grad()
    return total, kept

def train_task(model, rows, c, masked, rng, name, epochs, earlier):
    """Train on rows of (input ids, labels), with a fresh optimizer; returns (step, loss, kept) of each step."""
    optimizer, log = make_optimizer(model, c), []
    masker = MIGU(model, c.threshold, c.criterion, c.layers, c.row_sparse) if masked else None
    model.train()
    bar = tqdm([batch for _ in range(epochs) for batch in data.batches(rows, c.batch_size, rng)], desc=f"train {name}", unit="step")
    for step, batch in enumerate(bar, 1):
        loss, kept = train_step(model, optimizer, masker, batch, c, earlier)
        log.append((step, loss, kept))
        if step % 10 == 0 or step == len(bar):                     # reading a number waits for the GPU: not every step
            bar.set_postfix(loss=f"{float(loss):.3f}")
            if not math.isfinite(loss + sum(p.detach().sum() for p in optimizer.param_groups[0]["params"])):
                raise FloatingPointError(f"loss or weights not finite at step {step} of {name}: lower --lr; what is finished is kept")
    if masker:
        masker.remove()
    return [(step, float(loss), float(kept)) for step, loss, kept in log]

# ---- one run: the tasks in turn
def prepare(folder, source, c, finished):
    """The model as it was left, and what is kept of its adapters: LoRA's own, or O-LoRA's earlier A, layer -> (ranks, d_in)."""
    model, kept = load_model(folder / "model" if finished and c.tune != "lora" else source), {}
    model.c.checkpointing = c.checkpointing
    if c.tune in ("lora", "olora") and finished:
        kept = {name: t.to(c.device, copy=True) for name, t in read_safetensors(folder / "adapters" / f"{finished}.safetensors").items()}
    seeded(c.seed, 0)
    if c.tune != "full":
        add_lora(model, dtype=getattr(torch, c.dtype))
    if c.mask != "none":
        MIGU(model, c.threshold, c.criterion, c.layers).remove()   # --layers must select something before hours go by
    if c.tune == "lora":
        model.load_state_dict(kept, strict=False)
    else:
        merge_lora(model)                                          # B is zero: the plain model
    return model.to(c.device), kept
def peak_memory(device):
    """Gigabytes that torch has held on a GPU at most, or the process on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if "cuda" in device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-6
def learn(model, kept, c, tasks, tokenizer, stage):
    """Train on a task and what is replayed of earlier ones (--joint: on all). Returns what is kept of adapters, log, speeds."""
    now, started, rng = tasks if c.joint else [tasks[stage]], time.perf_counter(), seeded(c.seed, stage)
    name, examples = "+".join(task.name for task in now), [example for task in now for example in task.train]
    for j, past in enumerate(tasks[:stage]):
        order = np.random.default_rng([c.seed, j]).permutation(len(past.train))            # the same for every later task
        examples += [past.train[i] for i in order[:int(len(order) * c.replay)]]
    rows = [tokenizer.training_row(example) for example in examples]
    epochs = c.epochs or (2 if (c.order, name) in data.TWO_EPOCHS else 1)
    masked = c.mask != "none" and (stage > 0 or c.mask_first)
    if c.tune in ("inclora", "olora"):                             # a new adapter, folded in when it is trained
        add_lora(model, dtype=getattr(torch, c.dtype))
    log = train_task(model, rows, c, masked, rng, name, epochs, kept if c.tune == "olora" else {})
    if c.tune == "lora":
        kept = {key: p.detach() for key, p in model.named_parameters() if ".lora_" in key}
    elif c.tune == "olora":
        new = {key: layer.lora_A.weight.detach() for key, layer in adapted(model).items()}
        kept = {key: torch.cat([kept[key], new[key]]) if kept else new[key] for key in new}
    if c.tune in ("inclora", "olora"):
        merge_lora(model)
    seconds, count = time.perf_counter() - started, epochs * len(rows)
    tokens = epochs * sum(len(ids) + (not tokenizer.decoder_only) * len(labels) for ids, labels in rows)
    return kept, log, {"task": name, "train_seconds": seconds, "train_examples_per_second": count / seconds,
                       "train_tokens_per_second": tokens / seconds, "test_seconds": 0.0, "peak_memory_gb": peak_memory(c.device)}
def write_csv(path, rows):
    csv.writer(argparse.Namespace(write=(lines := []).append), lineterminator="\n").writerows(rows)
    write_file(path, lines)

def run(folder, config, source, tasks, tokenizer):
    """Train on each task, save, test as --eval says. The weights' file also tells what is finished: one rename saves both."""
    c, names, results = argparse.Namespace(**config), [task.name for task in tasks], folder / "results.json"
    state = {"stages": [], "matrix": [[None] * len(tasks) for _ in tasks], "log": []}
    with explained(ValueError, OSError):
        if (weights := folder / "model" / "model.safetensors").exists():
            read_safetensors(weights, metadata := {})
            check("migu" in metadata, f"{weights} was not written by a run: move {folder} away, or choose another --out")
            state = json.loads(metadata["migu"])
        finished, stages = len(state["stages"]), 1 if c.joint else len(tasks)
        if finished == stages and results.exists() and len(read_json(results).get("stages", ())) == stages:
            return print("nothing left to do")
        model, kept = prepare(folder, source, c, finished)
        check(len(tokenizer.pieces) <= model.c.vocab_size and tokenizer.decoder_only != isinstance(model, T5),
              f"{source}: the tokenizer does not fit the model")
    write_file(folder / "config.json", [json.dumps(config, indent=1)])
    for stage in range(max(finished - 1, 0), stages):
        if stage >= finished:                                      # else it is trained, and maybe not tested
            kept, log, speeds = learn(model, kept, c, tasks, tokenizer, stage)
            state["stages"].append(speeds)
            state["log"] += [(speeds["task"], *entry) for entry in log]
            write_csv(folder / "log.csv", [("task", "step", "loss", "kept"), *state["log"]])
            if kept:
                write_safetensors(folder / "adapters" / f"{stage + 1}.safetensors", kept)
            save_model(model, folder / "model", {"migu": json.dumps(state)}, plain_weights(model))
        speeds, tested, last = state["stages"][stage], 0, len(tasks) - 1 if c.joint else stage
        budget = 65536 if "cuda" in c.device and not tokenizer.decoder_only else 16384     # Llama's cache is larger
        for j in range(last + 1) if c.eval == "all" or stage == stages - 1 else ():
            state["matrix"][last][j], predictions, seconds = evaluation.evaluate(
                model, tokenizer, tasks[j].test, getattr(torch, c.dtype), budget, names[j])
            lines = [json.dumps({**e._asdict(), "prediction": p}) + "\n" for e, p in zip(tasks[j].test, predictions)]
            write_file(folder / "predictions" / f"{last + 1}-{names[last]}" / f"{names[j]}.jsonl", lines)
            tested, speeds["test_seconds"] = tested + len(predictions), speeds["test_seconds"] + seconds
            speeds["test_examples_per_second"] = tested / speeds["test_seconds"]
        matrix = np.array(state["matrix"], float)
        measures = {name: None if np.isnan(x := getattr(evaluation, name)(matrix)) else x for name in evaluation.MEASURES}
        write_csv(folder / "matrix.csv", [["", *names], *([name, *row] for name, row in zip(names, state["matrix"]))])
        write_file(results, [json.dumps({
            "tasks": names, "matrix": state["matrix"], **measures, "stages": state["stages"], "peak_memory_gb": speeds["peak_memory_gb"],
            "seconds": sum(s["train_seconds"] + s["test_seconds"] for s in state["stages"])}, indent=1)])
        print(", ".join(f"{key.replace('_', ' ')} {x if key == 'task' else format(x, '.4g')}" for key, x in speeds.items()))
        print(evaluation.matrix_table(names, matrix), flush=True)

def demo(args):
    """Plain tuning beside MIGU on made-up tasks: the commands a user would type, on a tiny T5 made here."""
    root = Path(args.out) / "demo"
    if root.exists():
        fail(f"{root} is in use: remove it, or choose another --out")
    known, new = [f"{root}/known/words{i}" for i in range(12)], [f"{root}/new/{name}" for name in ("alpha", "beta", "gamma", "delta")]
    data.make_demo(known, sizes=(200, 25), seed=1)
    data.make_demo(new, sizes=(400, 100), seed=2)
    tasks = [data.load_task("", folder) for folder in known + new]
    seeded(0, 0)
    model = T5(data.DEMO_T5)
    model.files["spiece.model"] = data.train_vocabulary([text for task in tasks for example in task.train for text in example])
    save_model(model, root / "untrained")
    learned, rows = root / "untrained", [["", "average accuracy", "backward transfer", "accuracy on the 12 known tasks"]]
    for title, names, settings in (
            ("A tiny T5 learns 12 tasks at once", known, "--joint --mask none --lr 1e-3 --epochs 6"),
            ("Plainly, it learns four more, one after another", new, "--mask none --lr 5e-4 --epochs 5 --eval all"),
            ("With MIGU, it learns the same four", new, "--mask migu --lr 5e-4 --epochs 5 --eval all")):
        command = ["--tasks", *names, "--model", str(learned), *settings.split(), "--batch-size", "32", "--seed", str(args.seed[0]),
                   "--device", "cpu", "--out", str(root)]
        print(f"\n{title}.\n$ python train.py {' '.join(command)}", flush=True)
        (folder, results), = main(command)
        tests = [example for task in tasks[:len(known)] for example in task.test]
        skill, *_ = evaluation.evaluate(load_model(folder / "model"), data.load_tokenizer(learned), tests)
        rows.append([title.split(",")[0], *map(evaluation.cell, (results["average_accuracy"], results["backward_transfer"], skill))])
        learned = shutil.copytree(folder / "model", root / "tiny-t5") if names is known else learned
    gains = [f"{title} {float(migu) - float(plain):+.1f}" for title, _, plain, migu in [*zip(*rows)][1:]]
    print(f"\n{evaluation.table(rows)}\n\nMIGU against plain tuning, seed {args.seed[0]}, in points: {', '.join(gains)}")

def main(argv=None):
    args = parse_args(argv)
    if args.demo:
        with explained(OSError):
            return demo(args)
    if args.bench:
        import test_migu                                           # it measures, beside the tests (and imports pytest)
        return test_migu.bench(args)
    with explained(ValueError, OSError):
        runs = plan(args)
        needed = {name for _, config in runs for name in config["tasks"]}
        folders = [data.task_folder(args.data, name) for name in needed & data.GROUP_OF.keys()]
        if not all((folder / f"{part}.json").exists() for folder in folders for part in ("train", "test", "labels")):
            download.fetch_data(args.data)
        tasks = {name: data.load_task(args.data, name, args.limit) for name in sorted(needed)}
        source = Path(args.model) if args.model[:1] in "./~" or Path(args.model).exists() else Path("models", args.model)
        if source != Path(args.model) and not (source / "config.json").exists():
            download.fetch_model(args.model)
        tokenizer = data.load_tokenizer(source)
    for folder, config in runs:
        print(f"# {folder}", flush=True)
        with explained(OSError, FloatingPointError, torch.OutOfMemoryError):
            run(folder, config, source, [tasks[name] for name in config["tasks"]], tokenizer)
    print(evaluation.compare([folder for folder, _ in runs]))
    return [(folder, read_json(folder / "results.json")) for folder, _ in runs]

if __name__ == "__main__":
    main()
