"""The benchmark: 15 text classification tasks posed as text to text; orders, prompts, batches.

A task is a folder <group>/<name>/ with train.json, test.json: [{"sentence", "label"}, ...], and
labels.json: [label, ...]. A model reads a prompt and writes the label as plain text.
"""

import functools
import io
import itertools
import json
import math
import os
import re
import unicodedata
from collections import namedtuple
from pathlib import Path

import sentencepiece
import torch

from model import MALFORMED, as_user_error, check, read_json, write_text

Example = namedtuple("Example", "prompt answer")
Task = namedtuple("Task", "name train test labels")  # train, test: lists of Example

PARTS = ("train", "test", "labels")  # a task's files, .json
LONGEST_PROMPT = 512  # tokens, as in the paper
LONGEST_ANSWER = 50  # its end included

# ---- the benchmark's tasks

ORDERS = {
    1: "dbpedia amazon yahoo agnews",
    2: "dbpedia amazon agnews yahoo",
    3: "yahoo amazon agnews dbpedia",
    4: "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    5: "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
}
ORDERS = {order: tuple(names.split()) for order, names in ORDERS.items()}

GROUPS = {"TC": "dbpedia yahoo agnews", "SC": "amazon yelp IMDB SST-2", "NLI": "MNLI CB RTE"}
GROUPED = {name: group for group, names in GROUPS.items() for name in names.split()}
# Every task of the orders; one that is in none of these groups is a group of its own.
GROUP_OF = {name: GROUPED.get(name, name) for name in sum(ORDERS.values(), ())}
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
    instruction = f"{INSTRUCTIONS.get(group, GENERAL)} Choose one from the option.\n"
    options = f"Option: {', '.join(labels)} \n"
    if group == "COPA":  # its sentences ask for themselves
        instruction = options = ""
    return f"Task:{group}\nDataset:{name}\n{instruction}{options}{sentence}{END_OF_PROMPT}"


END_OF_PROMPT = "\nAnswer:"


def resolve(name):
    """The full path of a folder that holds a task, or else a name of the benchmark.

    A link keeps its own name: it chooses the instruction.
    """
    if name in GROUP_OF and not Path(name, "labels.json").exists():
        return name
    return os.path.abspath(name)


def task_folder(root, name):
    return Path(root, GROUP_OF[name], name) if name in GROUP_OF else Path(name)


def is_text(value):
    """Half a surrogate pair is valid JSON, but no text: nothing can write it."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


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
    labels = read_json(folder / "labels.json", list)
    fine = labels and all(map(is_text, labels)) and len(set(labels)) == len(labels)
    check(fine, f"{folder / 'labels.json'}: labels are texts, at least one, each once")
    train = load_split(folder / "train.json", labels, limits[0])
    test = load_split(folder / "test.json", labels, limits[1])
    return Task(folder.name, train, test, labels)


# ---- tokenizers

VOCABULARIES = ("spiece.model", "tokenizer.model", "tokenizer.json")
WAY_OUT = "copy spiece.model or tokenizer.model from the model that it was tuned from"


class SentencePiece:
    """The vocabulary of T5 (spiece.model) and of Llama 1 and 2 (tokenizer.model)."""

    def __init__(self, file, has_start):
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.encode = self.pieces.encode
        self.start = [self.pieces.bos_id()] if has_start else []
        self.eos_id = self.pieces.eos_id()

    def __len__(self):
        return len(self.pieces)

    def decode(self, ids):
        """Models have spare rows beyond the vocabulary, which say nothing."""
        return self.pieces.decode([i for i in ids if i < len(self)])


# ---- byte-level BPE: a text is cut into words, a word into bytes, and bytes are merged to tokens

# How models cut a text into words. The patterns see it with an ASCII character of the same kind in
# the place of each that is not ASCII: so [a-zA-Z] is any letter, \d any number, \s any white space.
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?\d+| ?[^\sa-zA-Z\d]+|\s+(?!\S)|\s+"
# Each digit is a word, and white space before it ends as white space before the text's end does.
SMOLLM_2 = r"\d|'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[^\sa-zA-Z\d]+|\s+(?![^\s\d])|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z\d]?[a-zA-Z]+|\d{1,3}"
    r"| ?[^\sa-zA-Z\d]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_3_IN_FILES = (
    LLAMA_3.replace("[a-zA-Z]", r"\p{L}").replace("a-zA-Z", r"\p{L}").replace(r"\d", r"\p{N}")
)
# Unicode's letters, numbers and separators; and what is not like its kind: Llama 3 takes 'ſ for 's.
STAND_INS = {"L": "x", "N": "0", "Z": "\t", "ſ": "S", "\x85": "\t"}

# The pre-tokenizers that we know: their steps in a file, and the pattern that does the same.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LLAMA_3_SPLIT = {**SPLIT, "pattern": {"Regex": LLAMA_3_IN_FILES}}
PRE_TOKENIZERS = (
    ([BYTE_LEVEL], GPT_2),
    ([DIGITS, BYTE_LEVEL], SMOLLM_2),
    ([LLAMA_3_SPLIT, {**BYTE_LEVEL, "use_regex": False}], LLAMA_3),
)
POST_PROCESSORS = ("ByteLevel", "TemplateProcessing")
NOT_SUPPORTED = (  # options of the file, its model and its added tokens
    "normalizer dropout unk_token continuing_subword_prefix end_of_word_suffix byte_fallback "
    "fuse_unk single_word lstrip rstrip"
).split()

# Vocabularies write each byte as a printable character: 188 as their own, the others as those
# from 256 on, so that b" " is "Ġ".
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted(set(range(256)) - set(SHOWN))
SYMBOLS = list(map(chr, [*SHOWN, *range(256, 256 + len(HIDDEN))]))
SYMBOL_OF = dict(zip(SHOWN + HIDDEN, SYMBOLS))
BYTE_OF = dict(zip(SYMBOLS, SHOWN + HIDDEN))


def to_bytes(token):
    """What a token stands for: "Ġcaf" -> b" caf". Added tokens may have other characters."""
    if set(token) <= BYTE_OF.keys():
        return bytes(map(BYTE_OF.get, token))
    return token.encode()


@functools.cache
def in_ascii(char):
    """An ASCII character of the same kind: letter, number, white space, or none of these."""
    if char.isascii():
        return char
    return STAND_INS.get(char) or STAND_INS.get(unicodedata.category(char)[0], "!")


def word_pattern(pre_tokenizer):
    """The regex whose matches are the words of a text, for one that in_ascii has made ASCII."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    steps[-1].pop("trim_offsets", None)  # changes no ids
    steps[-1].setdefault("use_regex", True)  # old files do not say
    patterns = [pattern for known, pattern in PRE_TOKENIZERS if known == steps]
    check(patterns, f"pre_tokenizer {pre_tokenizer} is not supported")
    return re.compile(patterns[0], re.ASCII)


def start_ids(post_processor):
    """The ids that a file's template puts before a text: Llama 3 has one, SmolLM2 none."""
    ids = []
    for step in post_processor.get("processors", [post_processor]):
        check(step["type"] in POST_PROCESSORS, f"post_processor {step['type']} is not supported")
        pieces = step.get("single", [])
        for piece in itertools.takewhile(lambda piece: "Sequence" not in piece, pieces):
            ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids


class ByteLevelBPE:
    """The vocabulary of GPT-2, SmolLM2 or Llama 3, from the tokenizer.json of Hugging Face.

    vocab: token -> id; ranks: pair of tokens -> its place among the merges as learned.
    """

    def __init__(self, parts, eos_id):
        model, added_tokens = parts["model"], parts["added_tokens"]
        kinds = [model.get("type", "BPE"), parts["decoder"]["type"]]
        check(kinds == ["BPE", "ByteLevel"], f"{kinds} instead of a byte-level BPE: {WAY_OUT}")
        for settings in (parts, model, *added_tokens):
            for option in NOT_SUPPORTED:
                value = settings.get(option)
                check(not value, f"{option} {value!r} is not supported")
        self.word_pattern = word_pattern(parts["pre_tokenizer"])
        self.start = start_ids(parts["post_processor"] or {"processors": []})
        self.eos_id = eos_id[0] if isinstance(eos_id, list) else eos_id
        self.ignore_merges = model.get("ignore_merges", False)
        self.vocab = model["vocab"]
        self.ranks = {}
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            check(left + right in self.vocab, f"merge {merge} makes no token of the vocabulary")
            self.ranks[left, right] = rank
        self.word_ids = functools.cache(self.encode_word)

        # What is found in a text before it is cut into words, the longest first: "<|im_end|>".
        self.added = {token["content"]: token["id"] for token in added_tokens}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self.bytes_of = {number: to_bytes(token) for token, number in self.vocab.items()}
        for token in added_tokens:
            said = "" if token["special"] else token["content"]
            self.bytes_of[token["id"]] = to_bytes(said)

    def __len__(self):
        return max(self.bytes_of) + 1

    def encode_word(self, word):
        """Of all pairs, the one learned first is merged: l o w e r -> lo w e r -> low e r -> ..."""
        symbols = "".join(map(SYMBOL_OF.get, word.encode()))
        if self.ignore_merges and symbols in self.vocab:
            return [self.vocab[symbols]]
        # SmolLM2 lacks some bytes that hardly any text has; as the library does, we leave them out.
        tokens = [symbol for symbol in symbols if symbol in self.vocab]
        while len(tokens) > 1:
            ranks = [self.ranks.get(pair, math.inf) for pair in zip(tokens, tokens[1:])]
            place = ranks.index(min(ranks))
            if ranks[place] == math.inf:
                break
            tokens[place : place + 2] = [tokens[place] + tokens[place + 1]]
        return list(map(self.vocab.get, tokens))

    def encode(self, text):
        """The ids of a text, without start and end."""
        ids = []
        for piece in self.added_pattern.split(text):
            if piece in self.added:
                ids.append(self.added[piece])
            else:
                for word in self.word_pattern.finditer("".join(map(in_ascii, piece))):
                    ids += self.word_ids(piece[word.start() : word.end()])
        return ids

    def decode(self, ids):
        """The text of ids. Special tokens say nothing, nor do ids beyond the vocabulary."""
        said = [self.bytes_of.get(number, b"") for number in ids]
        return b"".join(said).decode(errors="replace")


def load_tokenizer(path):
    """The tokenizer of a model's folder. UserError names what is missing or not supported.

    unknown: finds tokens that the model has beyond its vocabulary, such as T5's "<extra_id_0>".
    """
    names = ("config.json", "tokenizer_config.json", "added_tokens.json")
    files = [Path(path, name) for name in names]
    config, options, added = [read_json(file) if file.exists() else {} for file in files]
    found = [Path(path, name) for name in VOCABULARIES if Path(path, name).is_file()]
    check(found, f"{path} has no {' or '.join(VOCABULARIES)}: {WAY_OUT}")
    file = found[0]
    form = "it, or a .json file beside it, is not in the form of a supported tokenizer"
    fault = f"{file}: {form} (or a Git LFS pointer: run git lfs pull)"
    with as_user_error(fault, *MALFORMED):
        if file.suffix == ".json":
            tokenizer = ByteLevelBPE(read_json(file), config.get("eos_token_id", 2))
        else:
            has_start = file.name == "tokenizer.model" and options.get("add_bos_token", True)
            tokenizer = SentencePiece(file, has_start)
        added |= {t["content"]: int(i) for i, t in options.get("added_tokens_decoder", {}).items()}
        beyond = [re.escape(t) for t, i in added.items() if t and i >= len(tokenizer)]
        tokenizer.unknown = re.compile("|".join(beyond) or "(?!)")
    return tokenizer


# ---- examples as ids, and batches of them


def encode_prompt(tokenizer, text, decoder_only):
    """What a model reads: T5 prompt + end, Llama start + prompt; too much is cut from the text."""
    ids = tokenizer.encode(text)
    start, end = (tokenizer.start, []) if decoder_only else ([], [tokenizer.eos_id])
    room = LONGEST_PROMPT - len(start) - len(end)
    if len(ids) > room:
        tail = len(tokenizer.encode(END_OF_PROMPT))
        ids = ids[: room - tail] + ids[-tail:]
    return start + ids + end


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
    labels = rng.choice(DEMO_LABELS, topics, replace=False).tolist()
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


T5_IDS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
QUIETLY = {"hard_vocab_limit": False, "num_threads": 1, "minloglevel": 2}


def train_vocabulary(texts, size):
    """A sentencepiece vocabulary in T5's form: its file's bytes."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, vocab_size=size, **T5_IDS, **QUIETLY
    )
    return file.getvalue()
