"""Fetch models and the benchmark: listed, fetched, resumed where cut, verified file by file.

    python download.py t5-large data

Models come from the Hugging Face hub (HF_ENDPOINT: another server; HF_TOKEN: for gated models) into models/, the 15 tasks
from O-LoRA's repository into data/. What is there and right is left alone; no half file ever has its final name.
"""
import hashlib, http.client, json, os, re, sys, urllib.error, urllib.request
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, urlsplit

from tqdm import tqdm

MODELS = {"t5-large": "google-t5/t5-large", "flan-t5-large": "google/flan-t5-large",
          "llama-2-7b": "meta-llama/Llama-2-7b-hf", "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"}
WANTED = ("*.safetensors", "*.safetensors.index.json", "spiece.model", "tokenizer*", "special_tokens_map.json", "*config.json")
GITHUB, RAW = "https://api.github.com", "https://raw.githubusercontent.com"
BENCHMARK, COMMIT = "cmnfriend/O-LoRA", "07117e1fc4a5f5ad9308a815a42cee8f46502dc8"
REFUSALS = {401: "it does not exist, or needs a token: accept its licence on its page and set HF_TOKEN",
            403: "refused: accept its licence with the account of HF_TOKEN, or try again in an hour",
            404: "it does not exist: check the name"}

class SameHostToken(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but takes the token to no other host."""

    def redirect_request(self, request, *args):
        new = super().redirect_request(request, *args)
        if new and urlsplit(new.full_url)[:2] != urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")
        return new

def open_url(url, token=None, start=0):
    """A response, from byte `start` on; OSError says in one line what a refusal means."""
    request = urllib.request.Request(url, headers={"User-Agent": "migu"})
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        return urllib.request.build_opener(SameHostToken).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        raise OSError(f"{url}: {error.code} {error.reason}: {REFUSALS.get(error.code, 'try again later')}") from None
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: no answer ({getattr(error, 'reason', error)}): check the network") from None

def read_listing(url, token=None):
    try:
        with open_url(url, token) as response:
            return json.load(response)
    except (ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url}: the answer is not a listing: {error}") from None

def is_right(path, size, digest):
    """Whether a file has this size and hash: 64 digits are sha-256, 40 a git blob's sha-1."""
    if not path.exists() or path.stat().st_size != size:
        return False
    hasher = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest() == digest

def fetch(url, path, size, digest, token=None):
    """Bring one file, going on where a transfer was cut. It gets its name when it is whole and its hash is right."""
    if is_right(path, size, digest):
        return
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    cuts = 0
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True) as bar:
        while (start := part.stat().st_size) < size:
            if cuts == 5:
                raise OSError(f"{url}: cut off at byte {start} of {size}: run again, it goes on from there")
            with open_url(url, token, start) as response, open(part, "ab" if response.status == 206 else "wb") as file:
                bar.n = file.tell()
                try:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                except (http.client.HTTPException, ConnectionError, TimeoutError):
                    pass                                           # a cut: what came is kept
                file.flush()
                os.fsync(file.fileno())
            cuts = cuts + 1 if part.stat().st_size <= start else 0
    if not is_right(part, size, digest):
        part.unlink()
        raise OSError(f"{url}: what came has another hash than its listing, and was removed: run again")
    os.replace(part, path)

def model_folder(name):
    """Where a model lies that was fetched by its short name or as owner/name."""
    return Path("models") / name

def fetch_model(name):
    """Weights (safetensors alone), tokenizer and configuration from the hub -> model_folder(name)."""
    repository, token = quote(MODELS.get(name, name)), os.environ.get("HF_TOKEN")
    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    listing = read_listing(f"{server}/api/models/{repository}/tree/main", token)
    files = [file for file in listing if "/" not in file["path"] and any(fnmatch(file["path"], wanted) for wanted in WANTED)]
    if not any(file["path"].endswith(".safetensors") for file in files):
        raise OSError(f"{repository} has no safetensors, and pickled weights are never opened: choose another repository")
    for file in sorted(files, key=lambda file: file["path"] == "config.json"):     # last: with it the folder counts as whole
        digest = file["lfs"]["oid"] if "lfs" in file else file["oid"]
        url = f"{server}/{repository}/resolve/main/{quote(file['path'])}"
        fetch(url, model_folder(name) / file["path"], file["size"], digest, token)

def fetch_data(folder="data"):
    """The 15 tasks -> folder/<group>/<name>/{train,test,labels}.json (dev.json is a copy of test.json)."""
    for file in read_listing(f"{GITHUB}/repos/{BENCHMARK}/git/trees/{COMMIT}?recursive=1")["tree"]:
        if match := re.fullmatch(r"CL_Benchmark/([\w-]+/[\w-]+/(train|test|labels)\.json)", file["path"]):
            fetch(f"{RAW}/{BENCHMARK}/{COMMIT}/{quote(file['path'])}", Path(folder) / match[1], file["size"], file["sha"])

def main(names):
    if not names or names[0].startswith("-"):
        print(__doc__ + "\nNames: data, " + ", ".join(MODELS) + ", or owner/name on the hub.")
        return
    try:
        for name in names:
            fetch_data() if name == "data" else fetch_model(name)
            print(f"{name}: complete in {'data' if name == 'data' else model_folder(name)}/")
    except OSError as error:                                       # also a full disk, or a folder that is not ours
        print(f"download.py: {error}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main(sys.argv[1:])
