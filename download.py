"""Fetch models and the benchmark:  python download.py t5-large data

Models come from the Hugging Face hub into models/, the 15 tasks from O-LoRA's repository into
data/. HF_ENDPOINT names another server, HF_TOKEN opens gated models. What is there and right is
left alone, a cut transfer goes on where it stopped, and no file has its name before it is right.
"""

import hashlib
import http.client
import io
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections import namedtuple
from pathlib import Path
from urllib.parse import quote, urljoin

from tqdm import tqdm

from model import INDEX, MALFORMED, TOKENIZER_FILES, WEIGHTS, UserError, as_user_error, check
from model import empty_model, lock, one_line_errors, parse_json, shard_names

MODELS = {
    "t5-large": "google-t5/t5-large",
    "flan-t5-large": "google/flan-t5-large",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
}

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

GITHUB = "https://api.github.com"
RAW = "https://raw.githubusercontent.com"
BENCHMARK = "cmnfriend/O-LoRA"
COMMIT = "07117e1fc4a5f5ad9308a815a42cee8f46502dc8"
TASK_FILE = r"CL_Benchmark/[\w-]+/[\w-]+/(train|test|labels)\.json"  # dev is a copy of test

REFUSALS = {
    401: "not there, or gated: check the name, or accept its licence on its page and set HF_TOKEN",
    403: "refused: accept its licence with the account of HF_TOKEN, or try again in an hour",
    404: "not there: check the name",
}
NETWORK_ERRORS = (OSError, http.client.HTTPException)  # or the disk is full
UNEXPECTED = "the answer is not the expected JSON: check the network and HF_ENDPOINT"
WAITS = (1, 2, 4, 8)  # seconds, each before another try
LONGEST_WAIT = 60  # even if a server asks for more

# digest: 64 hex digits are the sha-256 of the content, 40 the sha-1 that git gives it
File = namedtuple("File", "url size digest")


# ---- asking a server


def hub():
    """The hub's address, without a slash at its end."""
    address = os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co"
    check(re.fullmatch("https?://[!-~]+", address), f"HF_ENDPOINT {address!r} is no https://...")
    return address.rstrip("/")


def make_request(url, headers):
    """The token goes to the hub alone, and is never printed."""
    request = urllib.request.Request(url, headers=headers)
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and url.startswith(f"{hub()}/"):
        check(re.fullmatch("[!-~]+", token), "HF_TOKEN holds what no token does: copy it again")
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


class Redirects(urllib.request.HTTPRedirectHandler):
    """Asks the new address afresh, so that the token goes to no other host."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # not in Python 3.10

    def redirect_request(self, request, response, code, message, headers, url):
        return make_request(url, request.headers)


OPENER = urllib.request.build_opener(Redirects)
OPENER.addheaders = [("User-Agent", "migu")]


def receive(url, target):
    """Append to a file what it lacks of what `url` holds; returns the answer's headers.

    After a cut, or where the server is busy or the network fails, it waits a little and goes on.
    UserError: a refusal, or several tries without a new byte.
    """
    tries = 0
    while True:
        start, asked = target.tell(), ""  # asked: the seconds that a busy server asks for
        try:
            headers = {"Range": f"bytes={start}-"} if start else {}
            with OPENER.open(make_request(url, headers), timeout=30) as response:
                if response.status != 206:
                    target.truncate(target.seek(0))  # The server begins at the beginning.
                shutil.copyfileobj(response, target, 1 << 20)
                if not response.length:
                    return response.headers
            fault = f"cut off at byte {target.tell()}: run again, it goes on from there"
        except urllib.error.HTTPError as error:
            fault = f"{error.code} {error.reason}: {REFUSALS.get(error.code, 'try again later')}"
            check(error.code >= 500 or error.code in (408, 429), f"{url}: {fault}")
            asked = error.headers.get("Retry-After", "")
        except NETWORK_ERRORS as error:
            fault = f"it failed ({getattr(error, 'reason', error)}): check network and disk"
        tries = 1 if target.tell() > start else tries + 1
        check(tries <= len(WAITS), f"{url}: {fault}")
        wait = int(asked) if asked.isdecimal() else WAITS[tries - 1]
        time.sleep(min(wait, LONGEST_WAIT))


def ask_json(url, kind=dict):
    """The JSON object (or list) at an address, and the answer's headers."""
    content = io.BytesIO()
    headers = receive(url, content)
    return parse_json(f"{url}: {UNEXPECTED}", content.getvalue(), kind), headers


def read_listing(url, place):
    """path -> File, from all pages of the hub's or GitHub's listing; place: where the files lie."""
    files = {}
    while url:
        page, headers = ask_json(url, (dict, list))
        with as_user_error(f"{url}: {UNEXPECTED}", *MALFORMED):
            for entry in page["tree"] if isinstance(page, dict) else page:
                if entry["type"] in ("blob", "file"):
                    digest = (entry.get("lfs") or entry).get("oid") or entry["sha"]
                    address = f"{place}/{quote(entry['path'])}"
                    files[entry["path"]] = File(address, int(entry["size"]), str(digest))
        following = re.search(r'<([^>]*)>[^,<]*rel="?next', headers.get("Link", ""))
        url = following and urljoin(url, following[1])
    return files


# ---- files: whole and right, or not there


def is_right(path, file):
    """Whether path holds this file: by its size and its hash."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    git = len(file.digest) == 40
    hasher = hashlib.sha1(b"blob %d\0" % file.size) if git else hashlib.sha256()
    with open(path, "rb") as content:
        for block in iter(lambda: content.read(1 << 20), b""):
            hasher.update(block)
    return hasher.hexdigest() == file.digest


def fetch(file, path):
    """Bring one file, unless it is there; it gets its name when it is right."""
    if is_right(path, file):
        return
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as target:
        start = target.tell()
        if start < file.size:
            with tqdm.wrapattr(target, "write", file.size, initial=start, desc=path.name) as bar:
                receive(file.url, bar)
        target.flush()
        os.fsync(target.fileno())
    if not is_right(part, file):
        part.unlink()
        raise UserError(f"{file.url}: what came has another hash than its listing: run again")
    os.replace(part, path)


def fetch_all(files, folder):
    """Bring files (name -> File) in their order; of several processes one after the other."""
    held = lock(folder / ".lock")
    if not held:
        print(f"{folder}: another process fetches it, waiting", file=sys.stderr)
    while not held:
        time.sleep(1)
        held = lock(folder / ".lock")
    with held:
        for name, file in files.items():
            fetch(file, folder / name)


# ---- models and the benchmark


def choose_files(repo, files, folder):
    """Those that load_model and load_tokenizer read, in the order in which they shall come.

    UserError: a model that could not be loaded, before its weights come.
    """
    check("config.json" in files, f"{repo} has no config.json: choose another repository")
    config, _ = ask_json(files["config.json"].url)
    model = empty_model(repo, config)
    check("quantization_config" not in config, f"{repo} is quantized: choose its full weights")

    vocabulary = "tokenizer.model" if model.decoder_only else "spiece.model"
    known = vocabulary in files or (folder / vocabulary).is_file()
    if not known and "tokenizer.json" in files:  # a byte-level BPE?
        tokenizer, _ = ask_json(files["tokenizer.json"].url)
        known = "ByteLevel" in str(tokenizer.get("decoder"))
    way_out = f"copy {vocabulary} from the model it was tuned from to {folder}, and run again"
    check(known, f"{repo} has no {vocabulary}: {way_out}")

    weights = [WEIGHTS]
    if WEIGHTS not in files:  # they are cut into shards?
        check(INDEX in files, f"{repo}: no safetensors of a whole model; adapters are never opened")
        index, _ = ask_json(files[INDEX].url)
        weights = [*shard_names(f"{repo}: {INDEX}", index), INDEX]
        gone = set(weights) - files.keys()
        check(not gone, f"{repo}: {INDEX} names {gone}, which it has not")
    # config.json comes last: where it is, the folder is whole.
    wanted = [*TOKENIZER_FILES, *weights, "config.json"]
    return {path: files[path] for path in wanted if path in files}


def fetch_model(name):
    """Weights (safetensors alone), tokenizer and configuration from the hub -> models/name."""
    check(NAME.fullmatch(name), f"{name!r} is neither data, {[*MODELS]}, nor owner/name on the hub")
    repo = MODELS.get(name, name)
    folder = Path("models", name)
    files = read_listing(f"{hub()}/api/models/{repo}/tree/main", f"{hub()}/{repo}/resolve/main")
    fetch_all(choose_files(repo, files, folder), folder)
    return folder


def fetch_data(folder="data", keep=False):
    """The 15 tasks from GitHub -> folder/<group>/<name>/{train,test,labels}.json.

    keep: files that are there stay, whatever they hold.
    """
    url = f"{GITHUB}/repos/{BENCHMARK}/git/trees/{COMMIT}?recursive=1"
    files = read_listing(url, f"{RAW}/{BENCHMARK}/{COMMIT}")
    paths = [path for path in files if re.fullmatch(TASK_FILE, path)]
    check(len(paths) == 45, f"{url}: {len(paths)} files, not 45 of 15 tasks: try again later")
    wanted = {path.removeprefix("CL_Benchmark/"): files[path] for path in paths}
    if keep:
        wanted = {name: file for name, file in wanted.items() if not Path(folder, name).exists()}
    fetch_all(wanted, Path(folder))
    return folder


def main(names):
    if not names or names[0].startswith("-"):
        print(f"{__doc__}\nNames: data, {', '.join(MODELS)}, or owner/name on the hub.")
        return
    with one_line_errors("download.py"):
        for name in names:
            folder = fetch_data() if name == "data" else fetch_model(name)
            print(f"{name}: complete in {folder}/")


if __name__ == "__main__":
    main(sys.argv[1:])
