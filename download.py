"""Fetch models and the benchmark, resumed where cut and verified file by file:  python download.py t5-large data

Models come from the Hugging Face hub (HF_ENDPOINT: another server; HF_TOKEN: for gated models) into models/, the 15 tasks
from O-LoRA's repository into data/. What is there and right is left alone; no half file ever has its final name.
"""

import contextlib, hashlib, http.client, json, os, re, sys, urllib.error, urllib.request
from pathlib import Path
from urllib.parse import quote, urlsplit
from tqdm import tqdm

MODELS = {
    "t5-large": "google-t5/t5-large",
    "flan-t5-large": "google/flan-t5-large",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}
WANTED = r"[^/]*(\.safetensors(\.index\.json)?|config\.json)|spiece\.model|tokenizer[^/]*|special_tokens_map\.json"
GITHUB, RAW = "https://api.github.com", "https://raw.githubusercontent.com"
BENCHMARK, COMMIT = "cmnfriend/O-LoRA", "07117e1fc4a5f5ad9308a815a42cee8f46502dc8"
REFUSALS = {
    404: "not there: check the name",
    401: "not there, or gated: accept its licence on its page and set HF_TOKEN",
    403: "refused: accept its licence with the account of HF_TOKEN, or try again in an hour",
}


class SameHostToken(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, *args):
        """Follows a redirect, but takes the token to no other host."""
        new = super().redirect_request(request, *args)
        if new and urlsplit(new.full_url)[:2] != urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")
        return new


def open_url(url, token=None, start=0):
    """A response, from byte `start` on; OSError says in one line what a refusal means."""
    headers = {
        "User-Agent": "migu",
        "Authorization": token and f"Bearer {token}",
        "Range": start and f"bytes={start}-",
    }
    request = urllib.request.Request(
        url, headers={name: value for name, value in headers.items() if value}
    )
    try:
        return urllib.request.build_opener(SameHostToken).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        raise OSError(
            f"{url}: {error.code} {error.reason}: {REFUSALS.get(error.code, 'try again later')}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"{url}: no answer ({getattr(error, 'reason', error)}): check the network"
        ) from None


def read_listing(url, token=None):
    try:
        return json.load(open_url(url, token))
    except (ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url}: the answer is not a listing: {error}") from None


def is_right(path, size, digest):
    """Whether a file has this hash: 64 digits are sha-256, 40 a git blob's sha-1, which is of its size too."""
    hasher = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest() == digest


def fetch(url, path, size, digest, token=None):
    """Bring one file, going on where a transfer was cut. It gets its name when it is whole and its hash is right."""
    if path.exists() and is_right(path, size, digest):
        return
    part, cuts = (
        path.with_name(path.name + ".part"),
        0,
    )  # cuts: one after another without a new byte
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True) as bar:
        while (start := part.stat().st_size) < size:
            if cuts == 5:
                raise OSError(
                    f"{url}: cut off at byte {start} of {size}: run again, it goes on from there"
                )
            with (
                open_url(url, token, start) as response,
                open(part, "ab" if response.status == 206 else "wb") as file,
            ):
                bar.n = file.tell()
                with contextlib.suppress(
                    http.client.HTTPException, ConnectionError, TimeoutError
                ):  # keep what came
                    while block := response.read(1 << 20):
                        bar.update(file.write(block))
                file.flush()
                os.fsync(file.fileno())
            cuts = cuts + 1 if part.stat().st_size <= start else 0
    if not is_right(part, size, digest):
        part.unlink()
        raise OSError(
            f"{url}: what came has another hash than its listing, and was removed: run again"
        )
    os.replace(part, path)


def fetch_model(name):
    """Weights (safetensors alone), tokenizer and configuration from the hub -> models/name."""
    repo, token = quote(MODELS.get(name, name)), os.environ.get("HF_TOKEN")
    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    files = [
        f
        for f in read_listing(f"{server}/api/models/{repo}/tree/main", token)
        if re.fullmatch(WANTED, f["path"])
    ]
    if not any(file["path"].endswith(".safetensors") for file in files):
        raise OSError(
            f"{repo} has no safetensors, and pickled weights are never opened: choose another repository"
        )
    for file in sorted(
        files, key=lambda file: file["path"] == "config.json"
    ):  # last: with it the folder counts as whole
        url = f"{server}/{repo}/resolve/main/{quote(file['path'])}"
        fetch(
            url,
            Path("models", name) / file["path"],
            file["size"],
            file.get("lfs", file)["oid"],
            token,
        )


def fetch_data(folder="data"):
    """The 15 tasks -> folder/<group>/<name>/{train,test,labels}.json (dev.json is a copy of test.json)."""
    for file in read_listing(f"{GITHUB}/repos/{BENCHMARK}/git/trees/{COMMIT}?recursive=1")["tree"]:
        if match := re.fullmatch(
            r"CL_Benchmark/([\w-]+/[\w-]+/(train|test|labels)\.json)", file["path"]
        ):
            fetch(
                f"{RAW}/{BENCHMARK}/{COMMIT}/{quote(file['path'])}",
                Path(folder) / match[1],
                file["size"],
                file["sha"],
            )


def main(names):
    if not names or names[0].startswith("-"):
        return print(f"{__doc__}\nNames: data, {', '.join(MODELS)}, or owner/name on the hub.")
    try:
        for name in names:
            fetch_data() if name == "data" else fetch_model(name)
            print(f"{name}: complete in {'data' if name == 'data' else Path('models', name)}/")
    except OSError as error:  # also a full disk, or a folder that is not ours
        sys.exit(print(f"download.py: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    main(sys.argv[1:])
