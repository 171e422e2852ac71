"""From text on disk or on the Web to token ids: downloads, tokenizer, dialogues, (query, response) pairs, the splits of a run.

Text format: one dialogue per line, its turns separated by `__eou__`; one more at the end of the line is allowed.

    Hi, how are you? __eou__ Fine, thanks. __eou__ Coming along? __eou__ I'd love to.

Files are UTF-8, with or without a byte order mark; lines end in LF or CRLF, and in nothing else. Turns lose the white
space around them and are otherwise kept verbatim: emoji, or a `<|endoftext|>` that somebody typed, are plain text like any
other. Blank lines are passed over. A turn with nothing visible in it is an empty turn: it keeps its place, so that the
speakers still alternate, and makes no pair.
"""
import contextlib
import hashlib
import json
import os
import random
import re
import sys
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tiktoken

TINY = Path(__file__).resolve().parent / "tiny" if "__file__" in globals() else Path("tiny")        # a notebook has no file
TIMEOUT = 20                    # seconds without a byte before a download counts as stalled
REPOSITORIES = {"gpt2": "gpt2", "gpt2-medium": "gpt2-medium", "gpt2-large": "gpt2-large", "gpt2-xl": "gpt2-xl",
                "dialogpt-small": "microsoft/DialoGPT-small", "dialogpt-medium": "microsoft/DialoGPT-medium",
                "dialogpt-large": "microsoft/DialoGPT-large"}
MULTIWOZ = "https://raw.githubusercontent.com/budzianowski/multiwoz/master/data/MultiWOZ_2.2"
MULTIWOZ_FILES = {"train": 17, "dev": 2, "test": 2}
DAILYDIALOG_SHA256 = {"train": "c5179ab5a9a86a77b9d29114087c6b82cc4cb366abea25a43a0c24be761133f7"}
SPLITS = ("train", "validation", "test")


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
    import requests                                     # here alone: everything else works without it
    from requests.adapters import HTTPAdapter, Retry
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
            except (requests.RequestException, ConnectionResetError) as error:
                if part.exists() and part.stat().st_size > before:
                    tries = 3                           # it went forward: keep going
                tries -= 1
                if tries == 0 or not isinstance(error, (ConnectionResetError, requests.ConnectionError, requests.Timeout,
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
            raise ConnectionResetError("the partial file did not fit the server's")
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
    name = str(name)
    if name in ("tiny-gpt2", "tiny-dialogpt"):
        return TINY / name
    if name not in REPOSITORIES and Path(name).is_dir():
        return Path(name)
    repository = REPOSITORIES.get(name, name)
    if name not in REPOSITORIES and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(f"unknown model {name!r}: expected tiny-gpt2, tiny-dialogpt, {', '.join(REPOSITORIES)}, "
                         f"owner/name on the Hugging Face Hub, or a local folder")
    folder = cache_folder() / "models" / repository.replace("/", "--")

    def get(*files):
        """The first of these files that is here already, or else that the repository has."""
        for file in sorted(files, key=lambda file: not (folder / file).exists()):
            with contextlib.suppress(FileNotFoundError if file != files[-1] else ()):
                return download(hub(f"{repository}/resolve/main/{file}"), folder / file)

    get("config.json")
    if not any((folder / file).exists() for file in ("vocab.json", "tokenizer.json")):
        for file in ("added_tokens.json", "tokenizer_config.json"):         # not every repository has them
            with contextlib.suppress(FileNotFoundError):
                get(file)
    if get("vocab.json", "tokenizer.json").name == "vocab.json":
        get("merges.txt")
    weights = get("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
    if weights.suffix == ".json":                       # in shards
        for shard in sorted(set(read_json(weights).get("weight_map", {}).values())):
            get(Path(shard).name)
    return folder


def read_json(path):
    """A file that holds a JSON object -> dict. Raises OSError, ValueError."""
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:       # the latter: brackets nested by the thousand
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds {type(contents).__name__}, expected an object")
    return contents


def load_tokenizer(folder):
    """A checkpoint's vocab.json and merges.txt, or its tokenizer.json -> tiktoken.Encoding, with GPT-2's splitting of words.

    Ids of the 256 bytes and of the merges are the vocabulary's own; what is neither is a special token, and typed in a text
    it is plain text. Raises OSError for a missing file, ValueError for one that makes no such tokenizer.
    """
    folder = Path(folder)
    vocab, merges, added, settings = read_vocabulary(folder)
    for name, value, expected in settings:
        if value != expected:
            raise ValueError(f"{folder}: the tokenizer's {name} is {value!r:.100}, expected GPT-2's {expected!r}: "
                             f"its token ids would be others")
    # GPT-2 writes bytes as printable characters: those that are printable as themselves, the others from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    try:
        words = list(byte) + [a + b for a, b in merges]
        ids, known = [vocab[word] for word in words], set(words)
        if ids[256:] != sorted(set(ids[256:])):         # tiktoken merges in the order of ids, GPT-2 in that of merges.txt
            raise ValueError("the merges' ids do not rise in the order of the merges")
        special = {word: i for word, i in (vocab | added).items() if word not in known}
        if "<|endoftext|>" not in special:
            raise ValueError("the vocabulary has no <|endoftext|>")
        # GPT-2's split into words, with possessive quantifiers, as tiktoken itself spells it
        pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        return tiktoken.Encoding(str(folder), pat_str=pattern, special_tokens=special,
                                 mergeable_ranks={bytes(byte[c] for c in word): i for word, i in zip(words, ids)})
    except KeyError as error:
        raise ValueError(f"{folder} does not make a GPT-2 tokenizer: the vocabulary has no {error.args[0]!a:.100}, "
                         f"expected the 256 bytes and every merge") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{folder} does not make a GPT-2 tokenizer: {error}") from None


def read_vocabulary(folder):
    """-> vocabulary {word: id}, merges [(a, b), ...], added tokens {word: id}, settings [(name, value, GPT-2's), ...]."""
    optional = {name: read_json(folder / name) if (folder / name).exists() else {}
                for name in ("added_tokens.json", "tokenizer_config.json")}
    settings = [(name, optional["tokenizer_config.json"].get(name, False), False)
                for name in ("add_prefix_space", "add_bos_token", "add_eos_token", "do_lower_case")]
    try:
        if (folder / "vocab.json").exists():
            vocab, added = read_json(folder / "vocab.json"), optional["added_tokens.json"]
            source = folder / "merges.txt"
            merges = source.read_text(encoding="utf-8-sig").splitlines()
            merges = [line for line in merges[merges[:1] != [] and merges[0].startswith("#version"):] if line]
        elif (folder / "tokenizer.json").exists():
            source = folder / "tokenizer.json"
            whole = read_json(source)
            model, split = whole["model"], whole["pre_tokenizer"] or {}
            vocab, merges = dict(model["vocab"]), list(model["merges"])
            added = optional["added_tokens.json"] | {token["content"]: token["id"] for token in whole["added_tokens"]}
            settings += [("normalizer", whole.get("normalizer"), None), ("model type", model.get("type", "BPE"), "BPE"),
                         ("dropout", model.get("dropout") or None, None),
                         ("ignore_merges", model.get("ignore_merges", False), False),
                         ("continuing_subword_prefix", model.get("continuing_subword_prefix") or "", ""),
                         ("end_of_word_suffix", model.get("end_of_word_suffix") or "", ""),
                         ("pre_tokenizer", split.get("type"), "ByteLevel"),
                         ("use_regex", split.get("use_regex", True), True),
                         ("add_prefix_space", split.get("add_prefix_space", True), False),
                         ("post_processor", bool(re.search("SpecialToken|(Bert|Roberta)Processing",
                                                           json.dumps(whole.get("post_processor")))), False)]
        else:
            raise FileNotFoundError(f"{folder} has no tokenizer: expected vocab.json and merges.txt, or tokenizer.json")
        merges = [line.split(" ") if isinstance(line, str) else line for line in merges]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing" if error.filename else str(error)) from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not a GPT-2 tokenizer's: {type(error).__name__} {error}") from None
    for number, merge in enumerate(merges, 1):
        if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(part, str) and part for part in merge):
            raise ValueError(f"{source}: merge {number} is {merge!a:.100}, expected two words with a space between them")
    wrong = [word for word, i in (vocab | added).items() if type(i) is not int or not 0 <= i < 2**31]
    if wrong or len(set((vocab | added).values())) < len(vocab | added):
        raise ValueError(f"{folder}: the vocabulary gives {wrong[0]!a:.100} no id" if wrong else
                         f"{folder}: the vocabulary gives two words the same id")
    return vocab, merges, added, settings


# --------------------------------------------------------------------------------------------------------- dialogues

def read_dialogues(name, seed=0):
    """`sample`, `dailydialog`, `multiwoz`, a folder, or a text file -> {"train": [[turn, ...], ...], "validation": ..., "test": ...}.

    A folder holds train.txt, validation.txt and test.txt, or DailyDialog's or MultiWOZ's own layout. The dialogues of a
    single file are split 80/10/10, shuffled by the seed.
    Raises ValueError with file and line for what cannot be read, OSError for a missing file.
    """
    name = str(name)
    if name == "dailydialog":
        folder = cache_folder() / "dailydialog"
        files = [download(hub(f"datasets/roskoN/dailydialog/resolve/main/{s}.zip"), folder / f"{s}.zip",
                          DAILYDIALOG_SHA256.get(s)) for s in SPLITS]
        return {s: with_pairs(parse_text(read_zip(file, f"{s}/dialogues_{s}.txt"), file), file)
                for s, file in zip(SPLITS, files)}
    folder = TINY / "dialogues" if name == "sample" else Path(name)
    if name == "multiwoz":
        folder = cache_folder() / "multiwoz"
        for s, n in MULTIWOZ_FILES.items():
            for file in (f"{s}/dialogues_{i:03}.json" for i in range(1, n + 1)):
                download(f"{MULTIWOZ}/{file}", folder / file)
    if folder.is_file():
        dialogues = parse_text(folder.read_bytes(), folder)
        random.Random(seed).shuffle(dialogues)
        n = max(1, len(dialogues) // 10)
        parts = dialogues[2 * n:], dialogues[n:2 * n], dialogues[:n]
        return {s: with_pairs(part, f"{folder} ({len(dialogues)} dialogues, split 80/10/10; of these, {s},)")
                for s, part in zip(SPLITS, parts)}
    if not folder.is_dir():
        raise FileNotFoundError(f"unknown data {name!r}: expected sample, dailydialog, multiwoz, a folder, or a text file")
    if sorted(folder.glob("train/dialogues_*.json")):
        return {s: with_pairs(parse_multiwoz(sorted((folder / part).glob("dialogues_*.json"))), folder / part)
                for s, part in zip(SPLITS, MULTIWOZ_FILES)}
    layout = "{0}/dialogues_{0}.txt" if (folder / "train").is_dir() else "{0}.txt"
    files = {s: folder / layout.format(s) for s in SPLITS}
    return {s: with_pairs(parse_text(file.read_bytes(), file), file) for s, file in files.items()}


def read_zip(path, member):
    """One member of a zip file, by name; nothing is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except Exception as error:                          # zipfile raises a dozen kinds for damaged files
        raise ValueError(f"{path} is broken or lacks {member}: {error}; delete it to fetch it again") from None


def visible(turn):
    """The turn without white space around it, or "" if there is nothing to see in it: zero-width characters, marks alone."""
    def shows(c):                                       # some letters and a symbol are blank, too: fillers
        return unicodedata.category(c)[0] not in "ZM" and unicodedata.category(c) not in ("Cc", "Cf") and \
            c not in "\u115f\u1160\u2800\u3164\uffa0"
    return turn.strip() if any(map(shows, turn)) else ""


def parse_text(data, path):
    """Bytes in the text format above -> dialogues, each a list of turns."""
    if b"__eou__" not in data:
        raise ValueError(f"{path} has no __eou__, expected one dialogue per line, its turns separated by __eou__, as in "
                         f"'Hi, how are you? __eou__ Fine, thanks. __eou__ Coming along?'")
    dialogues = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            turns = [visible(turn) for turn in line.decode("utf-8").split("__eou__")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: byte {error.start + 1} is not UTF-8 ({error.reason})") from None
        if any(turns):
            dialogues.append(turns if turns[-1] else turns[:-1])        # __eou__ may end the line
    return dialogues


def parse_multiwoz(paths):
    """Files in MultiWOZ 2.2's schema -> dialogues that begin with the user and alternate with the system."""
    dialogues = []
    for path in paths:
        try:
            contents = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(contents, list):
            raise ValueError(f"{path} holds {type(contents).__name__}, expected MultiWOZ 2.2's list of dialogues")
        for number, dialogue in enumerate(contents, 1):
            try:
                speech = [(turn["speaker"], visible(turn["utterance"])) for turn in dialogue["turns"]]
                "".join(text for _, text in speech).encode()        # half an emoji could never be written again
                if not {speaker for speaker, _ in speech} <= {"USER", "SYSTEM"}:
                    raise ValueError("a speaker is neither USER nor SYSTEM")
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                name = dialogue.get("dialogue_id") if isinstance(dialogue, dict) else None
                raise ValueError(f"{path}, dialogue {number} ({name}) does not follow MultiWOZ 2.2's schema "
                                 f"(turns with speaker and utterance): {type(error).__name__} {error}") from None
            turns, last = [], "SYSTEM"
            for speaker, text in speech:
                if speaker != last:
                    turns.append(text)
                    last = speaker
                elif turns:                             # the same speaker goes on
                    turns[-1] = f"{turns[-1]} {text}".strip()
            dialogues.append(turns)
    return dialogues


def with_pairs(dialogues, path):
    if not make_pairs(dialogues, sliding=True):
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

    An empty turn is nobody's response, and nobody responds to it:

    >>> make_pairs([["a", "", "c", "d"]], sliding=True)
    [(['c'], 'd')]
    """
    return [(dialogue[max(0, i - turns):i], dialogue[i])
            for dialogue in dialogues for i in range(1, len(dialogue), 1 if sliding else 2)
            if dialogue[i - 1] and dialogue[i]]


# --------------------------------------------------------------------------------------------- token ids, and the splits

def encode_pairs(pairs, tokenizer, max_query=128, max_response=128):
    """Pairs -> [(query ids, response ids), ...]; every turn ends with <eot>.

    A query is a list of turns, or one string. One over max_query tokens keeps its end, a response over max_response its
    start; a turn many times as long is cut before it is tokenized (no token of GPT-2's has more than 128 bytes).

    >>> encode_pairs([("Hi!", "Hello.")], load_tokenizer(TINY / "tiny-gpt2"))
    [([2647, 0, 4095], [3087, 13, 4095])]
    """
    eot = tokenizer.eot_token

    def query_ids(turns):
        turns = [turns] if isinstance(turns, str) else turns
        return [t for turn in turns for t in tokenizer.encode_ordinary(turn[-128 * max_query:]) + [eot]][-max_query:]

    return [(query_ids(turns), (tokenizer.encode_ordinary(response[:128 * max_response]) + [eot])[:max_response])
            for turns, response in pairs]


def query_key(query):
    """What makes two queries the same: their words. Case, spacing and punctuation do not count.

    >>> query_key(["How are you?"]) == query_key(["how are  you"])
    True
    """
    return tuple(tuple(re.findall(r"\w+", turn.lower())) for turn in query)


@dataclass
class Splits:
    """What a run trains and is tested on: its pairs as text and as token ids, and which test queries the training set has."""
    pairs: dict                 # split -> [([turn, ...], response), ...]
    examples: dict              # split -> [(query ids, response ids), ...]
    seen: list                  # for each test pair: is its query, by `query_key`, a query of the *full* training split?
    fingerprint: str            # of all dialogues and token ids: with another one, a run's figures are of other data


def load_splits(config, tokenizer):
    """A run's settings -> Splits. Raises ValueError where nothing is left to train on, or where the dialogues are not those
    that the run began with."""
    dialogues = read_dialogues(config["data"], config["seed"])
    options = config["turns"], config["pairs"] == "sliding"
    known = {query_key(query) for query, _ in make_pairs(dialogues["train"], *options)}
    chosen = dialogues | {"train": take_fraction(dialogues["train"], config["fraction"], config["seed"])}
    pairs = {split: make_pairs(d, *options) for split, d in chosen.items()}
    for split in ("train", "validation"):
        if not pairs[split]:
            raise ValueError(f"{config['data']}: no pair is left in {split} (--fraction {config['fraction']}, "
                             f"--pairs {config['pairs']})")
    examples = {split: encode_pairs(p, tokenizer, config["max_query"], config["max_response"]) for split, p in pairs.items()}
    fingerprint = hashlib.sha256(json.dumps([dialogues, examples]).encode()).hexdigest()
    if config.get("dialogues", fingerprint) != fingerprint:
        raise ValueError(f"{config['data']}: the dialogues or the tokenizer have changed since this run began, so its results "
                         f"would be of other data; put the old ones back, or train again")
    return Splits(pairs, examples, [query_key(query) in known for query, _ in pairs["test"]], fingerprint)


def group_by_length(examples, batch_size, row_length, seed=None):
    """Indices of examples in batches of rows of similar length, so that little is padding: longest first, or, with a seed,
    shuffled. row_length: a function, example -> positions in its row."""
    order = list(range(len(examples)))
    shuffle = random.Random(seed)
    if seed is not None:
        shuffle.shuffle(order)                          # pairs of equal length meet others in each epoch
    order.sort(key=lambda i: -row_length(examples[i]))
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    if seed is not None:
        shuffle.shuffle(batches)
    return batches
