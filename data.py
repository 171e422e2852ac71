"""From text on disk or on the Web to padded batches: downloads, tokenizer, dialogues, (query, response) pairs, batches.

Text format: one dialogue per line, its turns separated by `__eou__`; one more at the end of the line is allowed.

    Hi, how are you? __eou__ Fine, thanks. __eou__ Coming along? __eou__ I'd love to.

Files are UTF-8, with or without a byte order mark; lines end in LF or CRLF, and in nothing else. Turns lose the white
space around them and are otherwise kept verbatim: emoji, NUL, or a `<|endoftext|>` that somebody typed are plain text
like any other. Blank lines and empty turns are passed over; a dialogue of one turn is kept, though it makes no pair.
"""
import contextlib
import hashlib
import json
import os
import random
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import requests
import tiktoken
import torch
from requests.adapters import HTTPAdapter, Retry
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

TINY = Path(__file__).resolve().parent / "tiny"
TIMEOUT = 20                    # seconds without a byte before a download counts as stalled
REPOSITORIES = {"gpt2": "gpt2", "gpt2-medium": "gpt2-medium", "gpt2-large": "gpt2-large", "gpt2-xl": "gpt2-xl",
                "dialogpt-small": "microsoft/DialoGPT-small", "dialogpt-medium": "microsoft/DialoGPT-medium",
                "dialogpt-large": "microsoft/DialoGPT-large"}
MULTIWOZ = "https://raw.githubusercontent.com/budzianowski/multiwoz/master/data/MultiWOZ_2.2"
MULTIWOZ_FILES = {"train": 17, "dev": 2, "test": 2}
DAILYDIALOG_SHA256 = {"train": "c5179ab5a9a86a77b9d29114087c6b82cc4cb366abea25a43a0c24be761133f7"}


# --------------------------------------------------------------------------------------------------------- downloads

def cache_folder():
    """Where downloads are kept; the environment variable DYNAMIC_PROMPT_CACHE moves it."""
    try:
        return Path(os.environ.get("DYNAMIC_PROMPT_CACHE") or Path.home() / ".cache" / "dynamic-prompt")
    except RuntimeError:
        raise OSError("there is no home directory to keep downloads in: set the environment variable "
                      "DYNAMIC_PROMPT_CACHE to a folder") from None


def hub(path):
    return f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{path}"


@contextlib.contextmanager
def locked(path):
    """Let one process in at a time. The system releases the lock when its owner ends, however it ends."""
    with open(path, "a") as file:
        if os.name == "nt":
            import msvcrt
            while True:
                with contextlib.suppress(OSError):      # it gives up after ten seconds
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download(url, path, sha256=None):
    """Fetch url to path unless it is there already -> path. What an interrupted download left behind is continued.

    Raises FileNotFoundError if the server has no such file, OSError (with the way to do it by hand) for anything else.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    session = requests.Session()
    retry = Retry(total=4, connect=2, read=0, backoff_factor=0.3, status_forcelist=(429, 500, 502, 503, 504),
                  respect_retry_after_header=False, raise_on_status=False)
    session.mount("http://", HTTPAdapter(max_retries=retry))
    session.mount("https://", HTTPAdapter(max_retries=retry))
    session.auth = lambda request: request              # everything is public: no token is sent, not even from ~/.netrc
    session.rebuild_auth = lambda request, response: None
    with locked(path.with_name(path.name + ".lock")):
        tries = 3
        while not path.exists():                        # another process may have fetched it while we waited
            before = part.stat().st_size if part.exists() else 0
            try:
                announced = fetch(session, url, part)
                expected = sha256 or announced          # a sum that was published outranks the server's
                if expected and (found := digest(part)) != expected:
                    part.unlink()
                    raise OSError(f"{url} has SHA-256 {found}, expected {expected}: deleted, please try again")
                os.replace(part, path)
            except requests.RequestException as error:
                if part.exists() and part.stat().st_size > before:
                    tries = 3                           # it went forward: keep going
                tries -= 1
                if tries == 0 or not isinstance(error, (requests.ConnectionError, requests.Timeout,
                                                        requests.exceptions.ChunkedEncodingError)):
                    raise OSError(f"cannot download {url} ({type(error).__name__}: {error}); "
                                  f"fetch it some other way and put it at {path}") from None
    return path


def digest(path):
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


def fetch(session, url, part):
    """Append what is missing of url to the file `part` -> the SHA-256 that the Hub announces, or None."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code in (401, 403, 404):     # the Hub answers 401 for a repository that does not exist
            raise FileNotFoundError(f"{url} does not exist or is not public (status {response.status_code}): "
                                    f"is the name right?")
        if response.status_code == 416:                 # the whole file was there already, or more: begin again
            part.unlink()
            raise requests.ConnectionError("the partial file did not fit the server's")
        response.raise_for_status()
        if not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0                                    # the server ignores Range and sends the whole file
        total = have + int(response.headers.get("Content-Length", 0))
        with open(part, "ab") as file:
            file.truncate(have)
            for chunk in response.iter_content(1 << 16):    # small: a cut loses the chunk it falls in
                file.write(chunk)
                have += len(chunk)
                if sys.stderr.isatty():
                    print(f"\r{part.stem}: {have / 1e6:,.0f} of {total / 1e6:,.0f} MB ", end="", file=sys.stderr)
        print(f"\r{part.stem}: {have / 1e6:,.1f} MB from {url}", file=sys.stderr)
        for answer in (*response.history, response):    # a large file's comes with the redirection to its store
            etag = answer.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
            if re.fullmatch("[0-9a-f]{64}", etag):
                return etag
    return None


# --------------------------------------------------------------------------------------------- checkpoints, tokenizer

def checkpoint_folder(name):
    """A model's name, `owner/name` on the Hub, or a folder -> a local folder in Hugging Face's layout, maybe downloaded.

    Raises ValueError for an unknown name, OSError where a file cannot be had.
    """
    if name in ("tiny-gpt2", "tiny-dialogpt"):
        return TINY / name
    if name not in REPOSITORIES and Path(name).is_dir():
        return Path(name)
    repository = REPOSITORIES.get(name, name)
    if name not in REPOSITORIES and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(f"unknown model {name!r}: expected tiny-gpt2, tiny-dialogpt, {', '.join(REPOSITORIES)}, "
                         f"owner/name on the Hugging Face Hub, or a local folder")
    folder = cache_folder() / "models" / repository.replace("/", "--")
    for file in ("config.json", "vocab.json", "merges.txt"):
        download(hub(f"{repository}/resolve/main/{file}"), folder / file)
    if not (folder / "pytorch_model.bin").exists():
        try:
            download(hub(f"{repository}/resolve/main/model.safetensors"), folder / "model.safetensors")
        except FileNotFoundError:                       # older repositories have the pickled weights alone
            download(hub(f"{repository}/resolve/main/pytorch_model.bin"), folder / "pytorch_model.bin")
    return folder


def load_tokenizer(folder):
    """A checkpoint's vocab.json and merges.txt -> tiktoken.Encoding. Raises OSError or ValueError for missing or bad ones."""
    vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
    for file in (vocab, merges):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: the tokenizer is made of vocab.json and merges.txt")
    try:
        with mock.patch.dict(os.environ, {"TIKTOKEN_CACHE_DIR": ""}):   # its cache goes by path: it could be stale
            ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(vocab))
        eot = json.loads(vocab.read_text(encoding="utf-8"))["<|endoftext|>"]
        # GPT-2's split into words, with possessive quantifiers, as tiktoken itself spells it
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        return tiktoken.Encoding(str(folder), pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": eot}, explicit_n_vocab=len(ranks) + 1)
    except (AssertionError, KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{vocab} and {merges} do not make a GPT-2 tokenizer ending in <|endoftext|>: "
                         f"{str(error) or 'the vocabulary is not the 256 bytes and the merges in order'}") from None


# --------------------------------------------------------------------------------------------------------- dialogues

def read_dialogues(name):
    """`sample`, `dailydialog`, `multiwoz` or a folder -> {"train": [[turn, ...], ...], "validation": ..., "test": ...}.

    A folder holds train.txt, validation.txt and test.txt, or DailyDialog's or MultiWOZ's own layout.
    Raises ValueError with file and line for what cannot be read, OSError for a missing file.
    """
    splits = {"train": "train", "validation": "validation", "test": "test"}
    if name == "dailydialog":
        folder = cache_folder() / "dailydialog"
        files = [download(hub(f"datasets/roskoN/dailydialog/resolve/main/{s}.zip"), folder / f"{s}.zip",
                          DAILYDIALOG_SHA256.get(s)) for s in splits]
        return {s: parse_text(read_zip(file, f"{s}/dialogues_{s}.txt"), file) for s, file in zip(splits, files)}
    folder = TINY / "dialogues" if name == "sample" else Path(name)
    if name == "multiwoz":
        folder = cache_folder() / "multiwoz"
        for s, n in MULTIWOZ_FILES.items():
            for file in (f"{s}/dialogues_{i:03}.json" for i in range(1, n + 1)):
                download(f"{MULTIWOZ}/{file}", folder / file)
    if not folder.is_dir():
        raise FileNotFoundError(f"unknown data {name!r}: expected sample, dailydialog, multiwoz, or a folder")
    if sorted(folder.glob("train/dialogues_*.json")):
        return {s: parse_multiwoz(sorted((folder / part).glob("dialogues_*.json")), folder / part)
                for s, part in zip(splits, MULTIWOZ_FILES)}
    layout = "{0}/dialogues_{0}.txt" if (folder / "train").is_dir() else "{0}.txt"
    return {s: parse_text((folder / layout.format(s)).read_bytes(), folder / layout.format(s)) for s in splits}


def read_zip(path, member):
    """One member of a zip file, by name; nothing is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except Exception as error:                          # zipfile raises a dozen kinds for damaged files
        raise ValueError(f"{path} is broken or lacks {member}: {error}; delete it to fetch it again") from None


def parse_text(data, path):
    """Bytes in the text format above -> dialogues, each a list of turns."""
    dialogues = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            turns = [turn.strip() for turn in line.decode("utf-8").split("__eou__")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: byte {error.start + 1} is not UTF-8 ({error.reason})") from None
        if any(turns):
            dialogues.append([turn for turn in turns if turn])
    return with_pairs(dialogues, path)


def parse_multiwoz(paths, folder):
    """Files in MultiWOZ 2.2's schema -> dialogues that begin with the user and alternate with the system."""
    dialogues = []
    for path in paths:
        try:
            contents = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:   # the latter: brackets nested by the thousand
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(contents, list):
            raise ValueError(f"{path} holds {type(contents).__name__}, expected MultiWOZ 2.2's list of dialogues")
        for number, dialogue in enumerate(contents, 1):
            try:
                speech = [(turn["speaker"], turn["utterance"].strip()) for turn in dialogue["turns"]]
                "".join(text for _, text in speech).encode()        # half an emoji could never be written again
                if not {speaker for speaker, _ in speech} <= {"USER", "SYSTEM"}:
                    raise ValueError("a speaker is neither USER nor SYSTEM")
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                name = dialogue.get("dialogue_id") if isinstance(dialogue, dict) else None
                raise ValueError(f"{path}, dialogue {number} ({name}) does not follow MultiWOZ 2.2's schema "
                                 f"(turns with speaker and utterance): {type(error).__name__} {error}") from None
            turns, last = [], "SYSTEM"
            for speaker, text in speech:
                if text and speaker != last:
                    turns.append(text)
                    last = speaker
                elif text and turns:                    # the same speaker goes on
                    turns[-1] += " " + text
            dialogues.append(turns)
    return with_pairs(dialogues, folder)


def with_pairs(dialogues, path):
    if not any(len(turns) > 1 for turns in dialogues):
        raise ValueError(f"{path} holds no (query, response) pair, expected a dialogue of two turns or more")
    return dialogues


def take_fraction(dialogues, fraction, seed):
    """A seeded subset, in the file's order. Subsets are nested: with one seed, the 10% are among the 20%."""
    order = random.Random(seed).sample(range(len(dialogues)), len(dialogues))
    return [dialogues[i] for i in sorted(order[:max(1, round(fraction * len(dialogues)))])]


def make_pairs(dialogues, turns=1, sliding=False):
    """Dialogues -> [([turn, ...], response), ...]: each query is the last `turns` turns before the response.

    >>> make_pairs([["a", "b", "c", "d"]])
    [(['a'], 'b'), (['c'], 'd')]
    >>> make_pairs([["a", "b", "c"]], turns=2, sliding=True)
    [(['a'], 'b'), (['a', 'b'], 'c')]
    """
    return [(dialogue[max(0, i - turns):i], dialogue[i])
            for dialogue in dialogues for i in range(1, len(dialogue), 1 if sliding else 2)]


# ----------------------------------------------------------------------------------------------------------- batches

def encode_pairs(pairs, tokenizer, max_query, max_response):
    """Pairs -> [(query ids, response ids), ...]; every turn ends with <eot>.

    A query over max_query tokens keeps its end, a response over max_response its start; a turn many times as long is cut
    before it is tokenized (no token of GPT-2's has more than 128 bytes).
    """
    eot = tokenizer.eot_token

    def query_ids(turns):
        return [t for turn in turns for t in tokenizer.encode_ordinary(turn[-128 * max_query:]) + [eot]][-max_query:]

    return [(query_ids(turns), (tokenizer.encode_ordinary(response[:128 * max_response]) + [eot])[:max_response])
            for turns, response in pairs]


@dataclass
class Batch:
    """Rows of [prompt slots][query][response], contiguous and padded on the right: causal attention needs no mask.

    With 2 slots, query 5 6 and response 7 8 in one row, and 1, 9 and 4 in the other:

        ids      0 0 5 6 7 8        prompt   2 1    (B,) slots for prompt vectors
                 0 9 4 0 0 0        query    2 1    (B,) tokens in the query
        where    3 4 7              flat places in (B * T) from which a response token is to be predicted
        targets  7 8 4              those tokens
    """
    ids: torch.Tensor           # (B, T) int64
    prompt: torch.Tensor        # (B,)
    query: torch.Tensor         # (B,)
    where: torch.Tensor         # (N,)
    targets: torch.Tensor       # (N,)

    def to(self, device):
        """To a GPU from pinned memory: the program goes on while the copy waits for its turn."""
        if torch.device(device).type == "cuda":
            return Batch(*(t.pin_memory().to(device, non_blocking=True) for t in vars(self).values()))
        return Batch(*(t.to(device) for t in vars(self).values()))


def make_batch(examples, slots, responses=True):
    """[(query ids, response ids), ...] -> Batch. slots: m -> number of prompt slots before a query of m tokens."""
    rows = [[0] * slots(len(q)) + q + (r if responses else []) for q, r in examples]
    T = max(map(len, rows))
    prompt = torch.tensor([slots(len(q)) for q, _ in examples])
    query = torch.tensor([len(q) for q, _ in examples])
    where = [b * T + slots(len(q)) + len(q) - 1 + i for b, (q, r) in enumerate(examples) for i in range(len(r))]
    return Batch(torch.tensor([row + [0] * (T - len(row)) for row in rows]), prompt, query,
                 torch.tensor(where if responses else [], dtype=torch.int64),
                 torch.tensor([t for _, r in examples for t in r] if responses else [], dtype=torch.int64))


def group_by_length(examples, batch_size, seed=None, slots=lambda m: 0):
    """Indices of examples in batches of rows of similar length, so that little is padding: longest first, or shuffled by
    seed. slots: as in `make_batch`."""
    order = list(range(len(examples)))
    shuffle = random.Random(seed)
    if seed is not None:
        shuffle.shuffle(order)                          # pairs of equal length meet others in each epoch
    order.sort(key=lambda i: -sum(map(len, examples[i])) - slots(len(examples[i][0])))
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    if seed is not None:
        shuffle.shuffle(batches)
    return batches
