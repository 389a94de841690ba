"""The benchmark: 15 text classification tasks posed as text to text; orders, prompts, batches.

A task is a folder <group>/<name>/ with train.json, test.json: [{"sentence", "label"}, ...], and
labels.json: [label, ...]. A model reads a prompt and writes the label as plain text.
"""

import functools
import io
import itertools
import json
import math
import re
import unicodedata
from collections import namedtuple
from pathlib import Path

import sentencepiece
import torch

from model import UserError, check, read_json, write_text

Example = namedtuple("Example", "prompt answer")
Task = namedtuple("Task", "name train test labels")  # train, test: lists of Example

PARTS = ("train", "test", "labels")  # a task's files, .json
LONGEST_PROMPT = 512  # tokens, as in the paper
LONGEST_ANSWER = 50  # its end included

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
EPOCHS = {(5, "WiC"): 2, (6, "MNLI"): 2}  # as in the official scripts; all else has one

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
# MNLI's test labels are in part unpublished: no answer is correct there.
EXTRA_LABELS = {("NLI", "MNLI", "test.json"): ["-"]}


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
    folder = Path(name).resolve()
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


def load_split(path, labels, limit):
    """The first examples of a file; all of its records have a sentence and a known label."""
    group, name = path.parent.parent.name, path.parent.name
    known = labels + EXTRA_LABELS.get(path.parts[-3:], [])
    records = read_json(path, list)
    check(records, f"{path}: no record in it")
    examples = []
    for number, record in enumerate(records, 1):
        where = f"{path}: record {number}"
        check(isinstance(record, dict), f"{where} is not an object")
        for key in ("sentence", "label"):
            check(is_text(record.get(key)), f'{where} needs a text "{key}", no half surrogate')
        label = record["label"]
        check(label in known, f"{where}: label {label!r} is not in labels.json")
        examples.append(Example(prompt(group, name, labels, record["sentence"]), label))
    return examples[:limit]


def load_task(root, name, limits=(None, None)):
    """A Task, all of its records checked (UserError names file and record).

    limits: how many records of train and test to take.
    """
    folder = task_folder(root, name)
    check(is_text(str(folder)), f"{str(folder)!r} is no text in this locale: set PYTHONUTF8=1")
    way_out = "give a task's folder, or fetch the benchmark: python download.py data"
    check((folder / "labels.json").exists(), f"{folder} has no labels.json: {way_out}")
    labels = load_labels(folder / "labels.json")
    train = load_split(folder / "train.json", labels, limits[0])
    test = load_split(folder / "test.json", labels, limits[1])
    return Task(folder.name, train, test, labels)


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


# ---- byte-level BPE: a text is cut into words, a word into bytes, and bytes are merged to tokens

# How models cut a text into words. In the files these patterns have \p{L} (letters), \p{N}
# (numbers) and \s. Python's re knows no \p, and to it \x1c-\x1f are \s too: word_pattern() puts
# ranges of characters in their place.
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|[\s]+(?![^\s])|[\s]+"
# Each digit is a word, and white space before it ends as white space before the text's end does.
SMOLLM_2 = (
    r"[\p{N}]|'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[^\s\p{L}\p{N}]+|[\s]+(?![^\s\p{N}])|[\s]+"
)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|[\s]*[\r\n]+|[\s]+(?![^\s])|[\s]+"
)
LLAMA_3_IN_FILES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The pre-tokenizers that we know: their steps in a file, and the pattern that does the same.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
PRE_TOKENIZERS = (
    ([BYTE_LEVEL], GPT_2),
    ([DIGITS, BYTE_LEVEL], SMOLLM_2),
    (
        [{**SPLIT, "pattern": {"Regex": LLAMA_3_IN_FILES}}, {**BYTE_LEVEL, "use_regex": False}],
        LLAMA_3,
    ),
)
NOT_SUPPORTED = (  # options of the file, its model and its added tokens
    "normalizer dropout unk_token continuing_subword_prefix end_of_word_suffix byte_fallback "
    "fuse_unk single_word lstrip rstrip"
).split()

# Vocabularies write each byte as a printable character: 188 as their own, the others as those
# from 256 on, so that b" " is "Ġ".
SHOWN = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
SYMBOLS = [chr(byte) for byte in SHOWN] + [chr(256 + n) for n in range(len(HIDDEN))]
SYMBOL_OF = dict(zip(SHOWN + HIDDEN, SYMBOLS))
BYTE_OF = dict(zip(SYMBOLS, SHOWN + HIDDEN))


def to_bytes(token):
    """What a token stands for: "Ġcaf" -> b" caf". Added tokens may have other characters."""
    if set(token) <= BYTE_OF.keys():
        return bytes(BYTE_OF[symbol] for symbol in token)
    return token.encode()


@functools.cache
def unicode_classes():
    """Unicode's categories as ranges for a regex: {"L": "A-Za-zª-ª...", "N": "0-9²-³...", ...}."""
    classes = {}
    characters = map(chr, range(0x40000))  # no letters and numbers lie beyond
    for category, run in itertools.groupby(characters, lambda char: unicodedata.category(char)[0]):
        run = list(run)
        classes[category] = classes.get(category, "") + f"{run[0]}-{run[-1]}"
    return classes


def word_pattern(pre_tokenizer):
    """The regex whose matches are the words of a text."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for step in steps:
        step.pop("trim_offsets", None)  # changes no ids
        if step["type"] == "ByteLevel":
            step.setdefault("use_regex", True)  # old files do not say
    patterns = [pattern for known, pattern in PRE_TOKENIZERS if known == steps]
    check(patterns, f"pre_tokenizer {pre_tokenizer} is not supported")
    pattern = patterns[0].replace(r"\s", WHITE_SPACE)
    for name in "LN":
        pattern = pattern.replace(rf"\p{{{name}}}", unicode_classes()[name])
    return re.compile(pattern)


def start_ids(post_processor):
    """The ids that a file's template puts before a text: Llama 3 has one, SmolLM2 none."""
    ids = []
    for step in post_processor.get("processors", [post_processor]):
        known = step["type"] in ("ByteLevel", "TemplateProcessing")
        check(known, f"post_processor {step['type']} is not supported")
        pieces = step.get("single", [])
        for piece in itertools.takewhile(lambda piece: "Sequence" not in piece, pieces):
            ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids


class ByteLevelBPE:
    """The vocabulary of GPT-2, SmolLM2 or Llama 3, from the tokenizer.json of Hugging Face."""

    def __init__(self, file, eos_id):
        parts = read_json(file)
        try:
            self.read(parts)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{file}: not in the form of a tokenizer.json: {error!r}") from None
        self.eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
        self.word_ids = functools.cache(self.encode_word)

    def read(self, parts):
        """vocab: token -> id; ranks: pair of tokens -> its place among the merges as learned."""
        model = parts["model"]
        for settings in (parts, model, *parts["added_tokens"]):
            for option in NOT_SUPPORTED:
                given = settings.get(option)
                check(not given, f"{option} {given!r} is not supported")
        kinds = model.get("type", "BPE"), parts["decoder"]["type"]
        check(kinds == ("BPE", "ByteLevel"), f"a {kinds} model and decoder is not supported")
        self.word_pattern = word_pattern(parts["pre_tokenizer"])
        self.start = start_ids(parts["post_processor"] or {"processors": []})
        self.ignore_merges = model.get("ignore_merges", False)
        self.vocab = model["vocab"]
        self.ranks = {}
        for rank, merge in enumerate(model["merges"]):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            known = len(pair) == 2 and "".join(pair) in self.vocab
            check(known, f"merge {merge} makes no token of the vocabulary")
            self.ranks[tuple(pair)] = rank

        # What is found in a text before it is cut into words, the longest first: "<|im_end|>".
        self.added = {token["content"]: token["id"] for token in parts["added_tokens"]}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        ids = self.vocab | self.added
        self.bytes_of = {number: to_bytes(token) for token, number in ids.items()}
        special = {token["id"] for token in parts["added_tokens"] if token["special"]}
        self.bytes_of |= dict.fromkeys(special, b"")

    def __len__(self):
        return max(self.bytes_of) + 1

    def encode_word(self, word):
        """Of all pairs, the one learned first is merged: l o w e r -> lo w e r -> low e r -> ..."""
        symbols = "".join(SYMBOL_OF[byte] for byte in word.encode())
        if self.ignore_merges and symbols in self.vocab:
            return [self.vocab[symbols]]
        # SmolLM2 lacks some bytes that hardly any text has; as the library does, we leave them out.
        tokens = [symbol for symbol in symbols if symbol in self.vocab]
        never = math.inf
        while len(tokens) > 1:
            ranks = [self.ranks.get(pair, never) for pair in zip(tokens, tokens[1:])]
            place = ranks.index(min(ranks))
            if ranks[place] == never:
                break
            tokens[place : place + 2] = [tokens[place] + tokens[place + 1]]
        return [self.vocab[token] for token in tokens]

    def encode(self, text):
        """The ids of a text, without start and end."""
        ids = []
        for piece in self.added_pattern.split(text):
            if piece in self.added:
                ids.append(self.added[piece])
            else:
                words = self.word_pattern.findall(piece)
                ids += itertools.chain.from_iterable(map(self.word_ids, words))
        return ids

    def decode(self, ids):
        """The text of ids. Special tokens say nothing, nor do ids beyond the vocabulary."""
        said = [self.bytes_of.get(number, b"") for number in ids]
        return b"".join(said).decode(errors="replace")


def load_tokenizer(path):
    """The tokenizer of a model's folder. UserError names what is missing or not supported.

    unknown: finds tokens that the model has beyond that file, such as T5's "<extra_id_0>".
    """
    names = ("config.json", "tokenizer_config.json", "added_tokens.json")
    files = [Path(path, name) for name in names]
    config, options, added = [read_json(file) if file.exists() else {} for file in files]
    if Path(path, "spiece.model").is_file():
        tokenizer = SentencePiece(Path(path, "spiece.model"), has_start=False)
    elif Path(path, "tokenizer.model").is_file():
        has_start = options.get("add_bos_token", True)
        tokenizer = SentencePiece(Path(path, "tokenizer.model"), has_start)
    else:
        way_out = "copy spiece.model from the model that it was tuned from"
        check(config.get("model_type") != "t5", f"{path} has no spiece.model: {way_out}")
        known = Path(path, "tokenizer.json").is_file()
        check(known, f"{path} holds neither spiece.model, tokenizer.model nor tokenizer.json")
        tokenizer = ByteLevelBPE(Path(path, "tokenizer.json"), config.get("eos_token_id", 2))
    try:
        added |= {t["content"]: int(i) for i, t in options.get("added_tokens_decoder", {}).items()}
        beyond = [re.escape(t) for t, i in added.items() if t and i >= len(tokenizer)]
        tokenizer.unknown = re.compile("|".join(beyond) or "(?!)")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: {names[1]} or {names[2]}: {error!r}") from None
    return tokenizer


# ---- examples as ids, and batches of them


def encode_prompt(tokenizer, text, decoder_only):
    """What a model reads: T5 prompt + end, Llama start + prompt; too much is cut from the text."""
    ids = tokenizer.encode(text)
    room = LONGEST_PROMPT - (len(tokenizer.start) if decoder_only else 1)
    if len(ids) > room:
        tail = len(tokenizer.encode(END_OF_PROMPT))
        ids = ids[: room - tail] + ids[-tail:]
    if decoder_only:
        return tokenizer.start + ids
    return ids + [tokenizer.eos_id]


def encode_example(tokenizer, example, decoder_only):
    """(input ids, labels): what the model reads and what it must write, the answer and its end."""
    prompt = encode_prompt(tokenizer, example.prompt, decoder_only)
    answer = tokenizer.encode(example.answer)[: LONGEST_ANSWER - 1] + [tokenizer.eos_id]
    if decoder_only:
        return prompt + answer, [-100] * len(prompt) + answer
    return prompt, answer


def pad(lists, value):
    """Lists of ids -> (B, S), filled on the right; S is a multiple of 16, which kernels like."""
    length = math.ceil(max(map(len, lists)) / 16) * 16
    return torch.tensor([ids + [value] * (length - len(ids)) for ids in lists])


def collate(inputs, labels=None):
    """Lists of ids -> a model's arguments, on the CPU: it moves them to its device itself."""
    mask = [[1] * len(ids) for ids in inputs]
    batch = {"input_ids": pad(inputs, 0), "attention_mask": pad(mask, 0)}
    if labels is not None:
        batch["labels"] = pad(labels, -100)
    return batch


def batches(examples, size, rng):
    """One epoch: lists of at most `size` examples, in an order that rng decides."""
    shuffled = [examples[i] for i in rng.permutation(len(examples))]
    return [shuffled[start : start + size] for start in range(0, len(shuffled), size)]


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
    texts = rng.permutation(list(label_of)).tolist()
    records = [{"sentence": text, "label": label_of[text]} for text in texts]
    parts = {"train": records[: sizes[0]], "test": records[sizes[0] :], "labels": labels}
    for part, content in parts.items():
        write_text(Path(folder, f"{part}.json"), json.dumps(content))


def train_vocabulary(texts, size):
    """A sentencepiece vocabulary in T5's form (pad 0, end 1, unknown 2): its file's bytes."""
    file = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    how = {"hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, vocab_size=size, **ids, **how
    )
    return file.getvalue()
