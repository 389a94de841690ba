"""Fetch models and the benchmark: listed first, then fetched, resumed where cut, and verified file by file.

    python download.py t5-large data

Models come from the Hugging Face hub (HF_ENDPOINT: another server, HF_TOKEN: for gated models) into models/, the 15 tasks
from the O-LoRA repository into data/. What is there and right is left alone; no half file ever has its final name.
"""
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, urlsplit

from tqdm import tqdm

MODELS = {"t5-large": "google-t5/t5-large", "flan-t5-large": "google/flan-t5-large",
          "llama-2-7b": "meta-llama/Llama-2-7b-hf", "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}
WANTED = ("*.safetensors", "*.safetensors.index.json", "spiece.model", "tokenizer*", "*config.json", "special_tokens_map.json")
GITHUB, RAW = "https://api.github.com", "https://raw.githubusercontent.com"
DATA_REPOSITORY, DATA_COMMIT = "cmnfriend/O-LoRA", "07117e1fc4a5f5ad9308a815a42cee8f46502dc8"


class DownloadError(OSError):
    """What went wrong, and what to do, in one line."""


class SameHostToken(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but takes the token to no other host."""

    def redirect_request(self, request, *args):
        new = super().redirect_request(request, *args)
        if new and urlsplit(new.full_url)[:2] != urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")
        return new


def open_url(url, start=0, token=None):
    """An open response, from byte `start` on; DownloadError says what a refusal means."""
    headers = {"User-Agent": "migu", **({"Authorization": f"Bearer {token}"} if token else {}),
               **({"Range": f"bytes={start}-"} if start else {})}
    try:
        return urllib.request.build_opener(SameHostToken).open(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        why = {401: "it does not exist, or needs a token: accept its licence on its page and set HF_TOKEN",
               403: "access refused: accept its licence with the account of HF_TOKEN, or try again in an hour",
               404: "it does not exist: check the name"}.get(error.code, "try again later")
        raise DownloadError(f"{url}: {error.code} {error.reason}: {why}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DownloadError(f"{url}: no answer ({getattr(error, 'reason', error)}): check the network") from None


def read_listing(url, token=None):
    try:
        with open_url(url, token=token) as response:
            return json.load(response)
    except (ValueError, http.client.HTTPException) as error:
        raise DownloadError(f"{url}: the answer is not a listing: {error}") from None


def is_right(path, size, digest):
    """Whether a file has this size and hash: 64 digits are sha-256, 40 are a git blob's sha-1."""
    if not path.exists() or path.stat().st_size != size:
        return False
    hasher = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest() == digest


def fetch(url, path, size, digest, token=None):
    """Bring one file, going on where an earlier transfer was cut. It gets its name only when whole and verified."""
    if is_right(path, size, digest):
        return
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    cuts = 0
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, file=sys.stderr) as bar:
        while (start := part.stat().st_size) < size:
            if cuts == 5:
                raise DownloadError(f"{url}: cut off at byte {start} of {size}: run again, it goes on from there")
            with open_url(url, start, token) as response, open(part, "ab" if response.status == 206 else "wb") as file:
                bar.n = file.tell()
                try:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                except (http.client.HTTPException, ConnectionError, TimeoutError):
                    pass                                           # what came is kept, and asked for no more
                file.flush()
                os.fsync(file.fileno())
            cuts = cuts + 1 if part.stat().st_size <= start else 0
    if not is_right(part, size, digest):
        part.unlink()
        raise DownloadError(f"{url}: what came has another hash than the listing says, and was removed: run again")
    os.replace(part, path)


def model_folder(name):
    """Where a model fetched by its short name or as owner/name lies."""
    return Path("models") / name


def fetch_model(name):
    """Weights (safetensors only), tokenizer and configuration from the hub -> their folder."""
    repository, token = MODELS.get(name, name), os.environ.get("HF_TOKEN")
    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    listing = read_listing(f"{server}/api/models/{quote(repository)}/tree/main", token)
    files = [e for e in listing if any(fnmatch(e["path"], pattern) for pattern in WANTED) and "/" not in e["path"]]
    if not any(e["path"].endswith(".safetensors") for e in files):
        raise DownloadError(f"{repository} has no safetensors, and other weights are never opened: choose another repository")
    for e in sorted(files, key=lambda e: e["path"] == "config.json"):          # last: with it the folder counts as whole
        digest = e["lfs"]["oid"] if "lfs" in e else e["oid"]
        fetch(f"{server}/{quote(repository)}/resolve/main/{quote(e['path'])}", model_folder(name) / e["path"], e["size"], digest, token)
    return model_folder(name)


def fetch_data(folder="data"):
    """The 15 tasks -> folder/<group>/<name>/{train,test,labels}.json (dev.json is a copy of test.json)."""
    listing = read_listing(f"{GITHUB}/repos/{DATA_REPOSITORY}/git/trees/{DATA_COMMIT}?recursive=1")
    for e in listing["tree"]:
        if match := re.fullmatch(r"CL_Benchmark/([\w-]+/[\w-]+/(train|test|labels)\.json)", e["path"]):
            fetch(f"{RAW}/{DATA_REPOSITORY}/{DATA_COMMIT}/{quote(e['path'])}", Path(folder) / match[1], e["size"], e["sha"])


def main(names):
    if not names or names[0].startswith("-"):
        print(__doc__ + "\nNames: data, " + ", ".join(MODELS) + ", or owner/name on the hub.")
    try:
        for name in names:
            fetch_data() if name == "data" else fetch_model(name)
            print(f"{name}: complete in {'data' if name == 'data' else model_folder(name)}/")
    except OSError as error:                                       # the disk is full, a folder is not ours, ...
        print(f"download.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
