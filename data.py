"""The benchmark: 15 text classification tasks posed as text to text; orders, prompts, batches.

A task is a folder <group>/<name>/ with train.json, test.json: [{"sentence", "label"}, ...], and
labels.json: [label, ...]. A model reads a prompt and writes the label as plain text.
"""

import io
import json
import math
from collections import namedtuple
from pathlib import Path

import sentencepiece
import torch

from model import UserError, check, read_json, write_text

Example = namedtuple("Example", "prompt answer")
Task = namedtuple("Task", "name train test labels")  # train, test: lists of Example

# ---- the benchmark's tasks

GROUPS = {
    "TC": ("dbpedia", "yahoo", "agnews"),
    "SC": ("amazon", "yelp", "IMDB", "SST-2"),
    "NLI": ("MNLI", "CB", "RTE"),
    "QQP": ("QQP",),
    "BoolQA": ("BoolQA",),
    "MultiRC": ("MultiRC",),
    "COPA": ("COPA",),
    "WiC": ("WiC",),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}

ORDERS = {
    1: "dbpedia amazon yahoo agnews",
    2: "dbpedia amazon agnews yahoo",
    3: "yahoo amazon agnews dbpedia",
    4: "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    5: "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}
ORDERS = {order: tuple(names.split()) for order, names in ORDERS.items()}
TWO_EPOCHS = {(5, "WiC"), (6, "MNLI")}  # as in the official scripts; all else has one

INSTRUCTIONS = {
    "TC": "What is the topic of the following paragraph?",
    "SC": "What is the sentiment of the following paragraph?",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC": "According to the following passage and question, "
    "is the candidate answer true or false?",
    "WiC": "Given a word and two sentences, "
    "whether the word is used with the same sense in both sentence?",
}
GENERAL = "Which label fits the following text?"  # for groups of your own
UNKNOWN = "-"  # in MNLI's test split: unpublished, so that no answer is correct


def prompt(group, name, labels, sentence):
    """The text that a model reads. Joined, not formatted: sentences may contain braces."""
    question = f"{INSTRUCTIONS.get(group, GENERAL)} Choose one from the option.\n"
    options = f"Option: {', '.join(labels)} \n"
    if group == "COPA":  # its sentences ask for themselves
        question = options = ""
    return f"Task:{group}\nDataset:{name}\n{question}{options}{sentence}{END_OF_PROMPT}"


END_OF_PROMPT = "\nAnswer:"


def resolve(name):
    """The full path of a folder that holds a task, or else a name of the benchmark."""
    folder = Path(name).expanduser().resolve()
    own = (folder / "labels.json").exists() or name not in GROUP_OF
    return str(folder) if own else name


def task_folder(root, name):
    return Path(root, GROUP_OF[name], name) if name in GROUP_OF else Path(name)


def is_text(value):
    """Half a surrogate pair is valid JSON, but no text: nothing can write it."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def load_labels(path):
    labels = read_json(path, list)
    fine = labels and all(is_text(label) for label in labels) and len(set(labels)) == len(labels)
    check(fine, f"{path}: labels are texts, at least one, each once")
    return labels


def load_split(path, known):
    """The records of a file, each with a sentence and a known label."""
    records = read_json(path, list)
    check(records, f"{path}: no record in it")
    for number, record in enumerate(records, 1):
        where = f"{path}: record {number}"
        check(isinstance(record, dict), f"{where} is not an object")
        for key in ("sentence", "label"):
            check(is_text(record.get(key)), f'{where} needs a text "{key}"')
        label = record["label"]
        check(label in known, f"{where}: label {label!r} is not in labels.json")
    return records


def load_task(root, name, limits=(None, None)):
    """A Task, all of its records checked (UserError names file and record).

    limits: how many records of train and test to take.
    """
    folder = task_folder(root, name)
    group = folder.parent.name
    labels = load_labels(folder / "labels.json")
    splits = []
    for split, limit in zip(("train", "test"), limits):
        unknown = [UNKNOWN] if (split, group, folder.name) == ("test", "NLI", "MNLI") else []
        records = load_split(folder / f"{split}.json", set(labels + unknown))
        examples = []
        for record in records[:limit]:
            text = prompt(group, folder.name, labels, record["sentence"])
            examples.append(Example(text, record["label"]))
        splits.append(examples)
    return Task(folder.name, *splits, labels)


# ---- tokenizers


class SentencePiece:
    """The vocabulary of T5 (spiece.model) and of Llama 1 and 2 (tokenizer.model)."""

    def __init__(self, file, has_start):
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{file}: not a sentencepiece model: {error}") from None
        self.encode = self.pieces.encode
        self.start = [self.pieces.bos_id()] if has_start else []
        self.eos_id = self.pieces.eos_id()

    def __len__(self):
        return len(self.pieces)

    def decode(self, ids):
        """Models have spare rows beyond the vocabulary, which say nothing."""
        return self.pieces.decode([i for i in ids if i < len(self)])


def load_tokenizer(path):
    """The tokenizer of a model's folder. UserError names what is missing or not supported."""
    options = {}
    if Path(path, "tokenizer_config.json").exists():
        options = read_json(Path(path, "tokenizer_config.json"))
    if Path(path, "spiece.model").is_file():
        return SentencePiece(Path(path, "spiece.model"), has_start=False)
    if Path(path, "tokenizer.model").is_file():
        return SentencePiece(Path(path, "tokenizer.model"), options.get("add_bos_token", True))
    raise UserError(f"{path} holds neither spiece.model nor tokenizer.model")


# ---- rows of ids, and batches of rows


def source_row(tokenizer, text, decoder_only, longest=512):
    """What a model reads: T5 prompt + end, Llama start + prompt; too much is cut from the text."""
    ids = tokenizer.encode(text)
    room = longest - 1
    if len(ids) > room:
        tail = len(tokenizer.encode(END_OF_PROMPT))
        ids = ids[: room - tail] + ids[-tail:]
    if decoder_only:
        return tokenizer.start + ids
    return ids + [tokenizer.eos_id]


def training_row(tokenizer, example, decoder_only, longest=50):
    """(input ids, labels): what the model reads and what it must write, the answer and its end."""
    source = source_row(tokenizer, example.prompt, decoder_only)
    target = tokenizer.encode(example.answer)[: longest - 1] + [tokenizer.eos_id]
    if decoder_only:
        return source + target, [-100] * len(source) + target
    return source, target


def pad(rows, value):
    """Lists of ids -> (B, S), filled on the right; S is a multiple of 16, which kernels like."""
    length = math.ceil(max(len(row) for row in rows) / 16) * 16
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def collate(inputs, labels=None):
    """Lists of ids -> a model's arguments, on the CPU: it moves them to its device itself."""
    batch = {
        "input_ids": pad(inputs, 0),
        "attention_mask": pad([[1] * len(row) for row in inputs], 0),
    }
    if labels is not None:
        batch["labels"] = pad(labels, -100)
    return batch


def batches(rows, size, rng):
    """One epoch: lists of at most `size` rows, in an order that rng decides."""
    order = rng.permutation(len(rows))
    return [[rows[i] for i in order[start : start + size]] for start in range(0, len(rows), size)]


# ---- the demo's tasks: each topic has made-up words of its own, which its texts are made of

DEMO_LABELS = (
    "music sport food travel health money science history nature fashion "
    "weather cinema gardens animals crafts law trains games painting theatre"
).split()


def make_demo_task(folder, sizes, rng, topics=4, words=8):
    """Write a task: a text has 3 words of its topic and 2 that say nothing; sizes: train, test."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    labels = [str(label) for label in rng.choice(DEMO_LABELS, topics, replace=False)]
    own_words = {}
    for topic in [*labels, "nothing"]:
        own_words[topic] = ["".join(rng.choice(syllables, 3)) for _ in range(words)]
    label_of = {}  # no text twice, so that none is in both train and test
    while len(label_of) < sum(sizes):
        label = labels[len(label_of) % topics]
        said = [*rng.choice(own_words[label], 3), *rng.choice(own_words["nothing"], 2)]
        label_of[" ".join(rng.permutation(said))] = label
    records = []
    for text in rng.permutation(list(label_of)):
        records.append({"sentence": str(text), "label": label_of[text]})
    parts = {"train": records[: sizes[0]], "test": records[sizes[0] :], "labels": labels}
    for part, content in parts.items():
        write_text(Path(folder, f"{part}.json"), json.dumps(content))


def train_vocabulary(texts, size):
    """A sentencepiece vocabulary in T5's form (pad 0, end 1, unknown 2): its file's bytes."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        vocab_size=size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return file.getvalue()
