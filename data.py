"""The benchmark: 15 text classification tasks posed as text to text; their orders, prompts, tokens and batches.

A task is a folder <group>/<name>/ with train.json, test.json: [{"sentence", "label"}, ...], and labels.json: [label, ...].
"""
import collections, io, json
from pathlib import Path
import numpy as np
import sentencepiece
import torch

Example = collections.namedtuple("Example", "prompt answer")
Task = collections.namedtuple("Task", "name train test labels")    # train, test: lists of Example

ORDERS = {1: "dbpedia amazon yahoo agnews", 2: "dbpedia amazon agnews yahoo", 3: "yahoo amazon agnews dbpedia",
          4: "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
          5: "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
          6: "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC"}
ORDERS = {order: tuple(names.split()) for order, names in ORDERS.items()}
TWO_EPOCHS = {(5, "WiC"), (6, "MNLI")}                             # as in the official scripts; all else has one
GROUPS = {"TC": ("dbpedia", "yahoo", "agnews"), "SC": ("amazon", "yelp", "IMDB", "SST-2"), "NLI": ("MNLI", "CB", "RTE"),
          "QQP": ("QQP",), "BoolQA": ("BoolQA",), "MultiRC": ("MultiRC",), "COPA": ("COPA",), "WiC": ("WiC",)}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
INSTRUCTIONS = {
    "SC": "What is the sentiment of the following paragraph?", "TC": "What is the topic of the following paragraph?",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC": "According to the following passage and question, is the candidate answer true or false?",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence?"}
GENERAL = "Which label fits the following text?"                   # for groups of your own
UNKNOWN = "-"                                                      # MNLI's unpublished test labels: no answer is correct

def prompt(group, name, labels, sentence):
    """The text a model reads, joined, not formatted: sentences may contain braces. COPA's sentences ask for themselves."""
    question = f"{INSTRUCTIONS.get(group, GENERAL)} Choose one from the option.\nOption: {', '.join(labels)} \n"
    return f"Task:{group}\nDataset:{name}\n" + ("" if group == "COPA" else question) + sentence + "\nAnswer:"
def task_folder(root, name):
    return Path(root) / GROUP_OF[name] / name if name in GROUP_OF else Path(name)          # else a folder of your own
def read_list(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path}: not a list, or empty")
    return value
def load_task(root, name, limit=None):
    """A Task, every record checked (ValueError or OSError names file and record); limit: records of each split."""
    folder = task_folder(root, name).absolute()
    labels = read_list(folder / "labels.json")
    if not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        raise ValueError(f"{folder / 'labels.json'}: labels are texts, each once")
    splits = []
    for path, known in ((folder / "train.json", labels), (folder / "test.json", [*labels, UNKNOWN])):
        records = read_list(path)
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("sentence", "label")):
                raise ValueError(f"{path}: record {number} needs a text \"sentence\" and a text \"label\"")
            if record["label"] not in known:
                raise ValueError(f"{path}: record {number}: label {record['label']!r} is not in labels.json")
        splits.append([Example(prompt(folder.parent.name, folder.name, labels, record["sentence"]), record["label"])
                       for record in records[:limit]])
    return Task(folder.name, *splits, labels)

class Tokenizer:
    """T5 reads prompt + end and writes answer + end; Llama reads start + prompt and goes on with answer + end."""
    def __init__(self, file, decoder_only):
        self.pieces, self.decoder_only = sentencepiece.SentencePieceProcessor(model_file=str(file)), decoder_only
        self.encode = self.pieces.encode                           # text -> ids
    def decode(self, ids):
        return self.pieces.decode([i for i in ids if i < len(self.pieces)])    # models have spare rows beyond the vocabulary
    def source(self, text, longest=512):
        """The prompt's ids, cut at its end to leave room for T5's end or Llama's start."""
        ids = self.encode(text)[:longest - 1]
        return [self.pieces.bos_id()] + ids if self.decoder_only else ids + [self.pieces.eos_id()]
    def training_row(self, example, longest=50):
        """(input ids, labels): what the model reads and what it must write."""
        source = self.source(example.prompt)
        target = self.encode(example.answer)[:longest - 1] + [self.pieces.eos_id()]
        return (source + target, [-100] * len(source) + target) if self.decoder_only else (source, target)

def load_tokenizer(path):
    """A model folder's tokenizer: T5's spiece.model or Llama's tokenizer.model. ValueError or OSError names the fault."""
    for file in (Path(path, "spiece.model"), Path(path, "tokenizer.model")):
        if file.exists():
            try:
                return Tokenizer(file, decoder_only=file.name == "tokenizer.model")
            except (RuntimeError, OSError) as error:
                raise ValueError(f"{file}: not a sentencepiece model: {error}") from None
    raise FileNotFoundError(f"{path} holds neither spiece.model nor tokenizer.model; a tokenizer.json is not supported")

def pad(rows, value):
    """Lists of ids -> (B, S), filled on the right; S is a multiple of 16, which attention kernels like."""
    length = -(-max(map(len, rows)) // 16) * 16
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
def collate(inputs, labels=None):
    """Lists of ids -> the model's arguments, on the CPU: the model moves them to its device."""
    batch = {"input_ids": pad(inputs, 0), "attention_mask": pad([[1] * len(row) for row in inputs], 0)}
    return batch if labels is None else {**batch, "labels": pad(labels, -100)}
def batches(rows, size, rng):
    """One epoch: lists of at most `size` rows, in an order that rng decides."""
    order = rng.permutation(len(rows))
    return [[rows[i] for i in order[start:start + size]] for start in range(0, len(rows), size)]

# ---- the demo's tasks: each topic has made-up words of its own, and a text is about the topic of its words
DEMO_LABELS = ("music sport food travel health money science history nature fashion weather cinema gardens animals crafts "
               "law trains games painting theatre").split()
DEMO_T5 = dict(vocab_size=600, d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
               layer_norm_epsilon=1e-6, relative_attention_num_buckets=32, decoder_start_token_id=0)

def make_demo(folders, sizes, seed, topics=4, words=8):
    """Write a task into each folder: a text has 3 words of its label's and 2 that say nothing; sizes: of train and test."""
    rng = np.random.default_rng(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    for folder in map(Path, folders):
        labels = [str(label) for label in rng.choice(DEMO_LABELS, topics, replace=False)]
        own = {label: ["".join(rng.choice(syllables, 3)) for _ in range(words)] for label in [*labels, "nothing"]}
        label_of = {}
        while len(label_of) < sum(sizes):
            label = labels[len(label_of) % topics]
            text = rng.permutation([*rng.choice(own[label], 3), *rng.choice(own["nothing"], 2)])
            label_of[" ".join(text)] = label                       # no text twice: none is in both train and test
        records = [{"sentence": str(text), "label": label_of[text]} for text in rng.permutation([*label_of])]
        folder.mkdir(parents=True)
        for file, content in (("train", records[:sizes[0]]), ("test", records[sizes[0]:]), ("labels", labels)):
            (folder / f"{file}.json").write_text(json.dumps(content))
def train_vocabulary(texts, size=DEMO_T5["vocab_size"]):
    """A sentencepiece vocabulary in T5's form (pad 0, end 1, unknown 2): its file's bytes."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, vocab_size=size, hard_vocab_limit=False, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    return file.getvalue()
