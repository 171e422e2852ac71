"""From text on disk or on the Web to token ids: dialogues, (query, response) pairs, tokenizer, downloads.

Text format: one dialogue per line, its turns separated by `__eou__`, as in `How are you? __eou__ Fine, thanks.`; one
more may end the line. Turns lose the white space around them and are otherwise kept verbatim: a `<|endoftext|>` that
somebody typed is text. A turn with nothing visible in it keeps its place and makes no pair.
"""
import contextlib
import hashlib
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
import zipfile
from pathlib import Path

import tiktoken

TINY = Path(globals().get("__file__", "data.py")).resolve().parent / "tiny"       # a notebook has no __file__
TIMEOUT = 20                    # seconds without a byte before a download counts as stalled
REPOSITORIES = {"gpt2": "gpt2", "gpt2-medium": "gpt2-medium", "gpt2-large": "gpt2-large", "gpt2-xl": "gpt2-xl",
                "dialogpt-small": "microsoft/DialoGPT-small", "dialogpt-medium": "microsoft/DialoGPT-medium",
                "dialogpt-large": "microsoft/DialoGPT-large"}
MULTIWOZ = "https://raw.githubusercontent.com/budzianowski/multiwoz/master/data/MultiWOZ_2.2"
MULTIWOZ_FILES = {"train": 17, "dev": 2, "test": 2}
DAILYDIALOG_SHA256 = {"train": "c5179ab5a9a86a77b9d29114087c6b82cc4cb366abea25a43a0c24be761133f7"}
SPLITS = ("train", "validation", "test")


@contextlib.contextmanager
def reading(source):
    """Whatever goes wrong while a file is read becomes one sentence that names it, a ValueError; OSErrors pass."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        cure = "; delete it, and it is downloaded again" if Path(source).is_relative_to(cache_folder()) else ""
        kind = "" if type(error) is ValueError else f"{type(error).__name__} "
        raise ValueError(f"{source} is not what was expected: {kind}{error}{cure}") from None


# -------------------------------------------------------------------------------------------- dialogues and pairs

def read_dialogues(data):
    """A data set -> {"train": [[turn, ...], ...], "validation": ..., "test": ...}.

    `sample`, `dailydialog` or `multiwoz`; a folder with train.txt, validation.txt and test.txt, or in DailyDialog's
    layout (its text is detokenized) or MultiWOZ's; one text file, or a list of dialogues, which are split 80/10/10,
    always in the same way, whatever a run's seed; or a dict of three lists.
    """
    source = "the given data"
    if isinstance(data, (str, os.PathLike)):
        source = Path(os.path.expanduser(data))
        if source.is_file():
            data = parse_text(source.read_bytes(), source)
        else:
            data = {split: read_split(str(data), split) for split in SPLITS}
    with reading(source):
        if not isinstance(data, dict):
            dialogues = list(data)
            random.Random(0).shuffle(dialogues)
            n = max(1, len(dialogues) // 10)
            data = {"train": dialogues[2 * n:], "validation": dialogues[n:2 * n], "test": dialogues[:n]}
        if any(isinstance(dialogue, str) for split in SPLITS for dialogue in data[split]):
            raise ValueError("a dialogue is a string, expected a list of turns")
        splits = {split: [[clean_turn(turn) for turn in dialogue] for dialogue in data[split]] for split in SPLITS}
        for split in SPLITS:
            if not make_pairs(splits[split], sliding=True):
                raise ValueError(f"{split} holds no (query, response) pair, expected a dialogue of two turns or more")
    return splits


def read_split(name, split):
    """A data set's name or folder -> its dialogues of one split."""
    folder = TINY / "dialogues" if name == "sample" else Path(os.path.expanduser(name))
    part = "dev" if split == "validation" else split                # MultiWOZ's name
    if name == "dailydialog":
        url = hub_url(f"datasets/roskoN/dailydialog/resolve/main/{split}.zip")
        path = download(url, cache_folder() / name / f"{split}.zip", DAILYDIALOG_SHA256.get(split))
        with reading(path), zipfile.ZipFile(path) as archive:
            return parse_text(archive.read(f"{split}/dialogues_{split}.txt"), path, detokenize)
    if name == "multiwoz":
        folder = cache_folder() / name
        for i in range(1, MULTIWOZ_FILES[part] + 1):
            file = f"{part}/dialogues_{i:03}.json"
            download(f"{MULTIWOZ}/{file}", folder / file)
    if not folder.is_dir():
        raise FileNotFoundError(f"unknown data {name!r}: expected sample, dailydialog, multiwoz, a folder or text file")
    if list(folder.glob("train/dialogues_*.json")):
        return parse_multiwoz(sorted(folder.glob(f"{part}/dialogues_*.json")))
    path, clean = folder / f"{split}.txt", clean_turn
    if (folder / "train").is_dir():                                 # DailyDialog's own layout
        path, clean = folder / split / f"dialogues_{split}.txt", detokenize
    return parse_text(path.read_bytes(), path, clean)


def clean_turn(text):
    """A turn without white space around it, or "" if nothing in it can be seen: zero-width characters, marks alone."""
    text.encode()                               # a ValueError for half an emoji, which could never be written again
    if all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf", "Mn", "Me") for c in text):
        return ""
    return text.strip()


def parse_text(data, path, clean=clean_turn):
    """Bytes in the text format above -> dialogues, each a list of turns; clean: a function, text -> turn."""
    with reading(path):
        text = data.decode("utf-8-sig")
    is_table = Path(path).suffix.lower() in (".csv", ".tsv", ".json", ".jsonl")
    if is_table or "__eou__" not in text or re.search('^[{[]"', text, re.M):
        raise ValueError(f"{path} has no __eou__, or is CSV or JSON: expected one dialogue per line, its turns "
                         f"separated by __eou__, as in 'Hi! __eou__ Hello.'; README.md, \"Your own data and models\"")
    dialogues = [[clean(turn) for turn in line.split("__eou__")] for line in re.split(r"\r\n|\r|\n", text)]
    return [turns if turns[-1] else turns[:-1] for turns in dialogues if any(turns)]    # __eou__ may end the line


def detokenize(text):
    """DailyDialog's tokenized text -> as people write it. Only spaces beside punctuation go, so every word stays.

    >>> detokenize("I ' m fine at 3 : 30 , thanks .")
    "I'm fine at 3:30, thanks."
    """
    text = re.sub(r"(?<=\w) (['’]) (?=(s|t|m|d|ll|ve|re|clock)\b)", r"\1", clean_turn(text), flags=re.I)   # I ' m
    text = re.sub(r"(?<=\d) ([:.]) (?=\d)", r"\1", text)                                  # 3 : 30
    text = re.sub(r"\b([a-z]) \. (?=[a-z] \.)", r"\1.", text, flags=re.I)                 # 9 a . m .
    text = re.sub(r" (?=[,.?!;:%)\]”’])|(?<=[(\[“‘]) |(?<=[$£¥]) (?=\d)", "", text)       # what closes or opens
    text = re.sub(r"""(?<!\w)(["']) (.+?) \1(?!\w)""", r"\1\2\1", text)                  # quotes come in pairs,
    return re.sub(r"(?<=s) (?='(?!\w))", "", text)                                       # but for my parents ' house


def parse_multiwoz(paths):
    """Files in MultiWOZ 2.2's schema -> dialogues that begin with the user and alternate with the system."""
    dialogues = []
    for path in paths:
        with reading(path):
            for dialogue in json.loads(path.read_bytes()):
                turns = []
                for turn in dialogue["turns"]:
                    speaker, text = ("USER", "SYSTEM").index(turn["speaker"]), clean_turn(turn["utterance"])
                    if speaker == len(turns) % 2:       # even places are the user's
                        turns.append(text)
                    elif turns:                         # the same speaker goes on
                        turns[-1] = f"{turns[-1]} {text}".strip()
                dialogues.append(turns)
    return dialogues


def take_fraction(dialogues, fraction, seed):
    """A seeded subset, in the file's order. Subsets are nested: with one seed, the 10% are among the 20%."""
    order = random.Random(seed).sample(range(len(dialogues)), len(dialogues))
    return [dialogues[i] for i in sorted(order[:max(1, round(fraction * len(dialogues)))])]


def make_pairs(dialogues, turns=1, sliding=False):
    """Dialogues -> [([turn, ...], response), ...]: each query is the last `turns` turns before the response.

    >>> make_pairs([["a", "b", "c", "d"]])
    [(['a'], 'b'), (['c'], 'd')]
    >>> make_pairs([["a", "b", "c", "", "e"]], turns=2, sliding=True)       # an empty turn is in no pair of its own
    [(['a'], 'b'), (['a', 'b'], 'c')]
    """
    step = 1 if sliding else 2
    return [(dialogue[max(0, i - turns):i], dialogue[i])
            for dialogue in dialogues for i in range(1, len(dialogue), step)
            if dialogue[i - 1] and dialogue[i]]


def encode_pairs(pairs, tokenizer, max_query=128, max_response=128):
    """Pairs -> [(query ids, response ids), ...]; every turn ends with <eot>. A query is a list of turns, or one string.
    A query over max_query tokens keeps its end, a response over max_response its start.

    >>> encode_pairs([("Hi!", "Hello.")], load_tokenizer(TINY / "tiny-gpt2"))
    [([2647, 0, 4095], [3087, 13, 4095])]
    """
    def encode(turn):
        return tokenizer.encode_ordinary(clean_turn(turn)) + [tokenizer.eot_token]

    examples = []
    for turns, response in pairs:
        if isinstance(turns, str):
            turns = [turns]
        query = [token for turn in turns for token in encode(turn)]
        examples.append((query[-max_query:], encode(response)[:max_response]))
    return examples


def query_key(query):
    """What makes two queries the same: their words, in lower case. Spacing and punctuation do not count.

    A word is a run of letters, marks, digits and underscores. re's \\w lacks the marks: vowel signs of Hindi or Thai.
    """
    def words(turn):
        letters = [c if c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M" else " " for c in turn.lower()]
        return tuple("".join(letters).split())
    return tuple(words(turn) for turn in query)


# ------------------------------------------------------------------------------------------------------ tokenizer

def read_json(path):
    """A file that holds a JSON object -> dict. Raises OSError, ValueError."""
    with reading(path):
        return dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))


# GPT-2's split into words, with possessive quantifiers, as tiktoken itself spells it
SPLIT_INTO_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# what GPT-2's tokenizer does not do; where one does, its ids are others
UNLIKE_GPT2 = ("normalizer", "add_prefix_space", "add_bos_token", "add_eos_token", "dropout", "ignore_merges",
               "end_of_word_suffix", "lstrip", "rstrip", "single_word")


class Tokenizer(tiktoken.Encoding):
    """GPT-2's tokenizer. `added_words`, {word: id}, are one token each, wherever they stand in a text. `word_ids` are
    those that may be generated: GPT-2's tokens, added words and <eot>, but no other special token."""

    def encode_ordinary(self, text):
        """A text -> its token ids. Special tokens that stand in it are plain text."""
        words = sorted(self.added_words, key=len, reverse=True)         # `New York` is found before `New`
        ids = []
        for piece in re.split(f"({'|'.join(map(re.escape, words))})", text) if words else [text]:
            ids += [self.added_words[piece]] if piece in self.added_words else super().encode_ordinary(piece)
        return ids


def load_tokenizer(folder):
    """A checkpoint's tokenizer.json, or else its vocab.json and merges.txt -> Tokenizer, a tiktoken.Encoding.

    Raises ValueError for a tokenizer whose ids would not be those of transformers.
    """
    settings = read_tokenizer(Path(folder))
    with reading(folder):
        model, split, added = settings["model"], settings["pre_tokenizer"], settings["added_tokens"]
        added_words = [token for token in added if not token["special"] and token["content"] != "<|endoftext|>"]
        unlike = [name for part in (settings, model, split, settings["config"], *added_words)
                  for name in UNLIKE_GPT2 if part.get(name)]
        if split["type"] != "ByteLevel" or split.get("use_regex") is False:
            unlike.append("pre_tokenizer")
        if re.search("SpecialToken|cls", json.dumps(settings.get("post_processor"))):
            unlike.append("post_processor")
        if unlike:
            raise ValueError(f"token ids would be others than GPT-2's: {', '.join(unlike)}")
        vocab = model["vocab"] | {token["content"]: token["id"] for token in added}
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        rank = {pair: vocab["".join(pair)] for pair in merges}
        if merges != sorted(merges, key=rank.get) or len(set(vocab.values())) < len(vocab):
            raise ValueError("two words have one id, or the merges' ids do not rise, and tiktoken joins in their order")
        for first, second in merges:                    # GPT-2 joins listed pairs, tiktoken all that make a token
            parts = list(first + second)
            while len(parts) > 1:
                i = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), math.inf))
                rank[parts[i], parts[i + 1]]            # a KeyError if GPT-2 would not make this token
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
        # GPT-2 writes bytes as printable characters: those that are printable as themselves, the others from 256 on.
        others = [b for b in range(256) if b == ord(" ") or not chr(b).isprintable()]
        byte = {chr(256 + others.index(b) if b in others else b): b for b in range(256)}
        words = {*byte, *map("".join, merges)}          # whatever else stands in the vocabulary is a special token
        tokenizer = Tokenizer(str(folder), pat_str=SPLIT_INTO_WORDS,
                              mergeable_ranks={bytes(byte[c] for c in word): vocab[word] for word in words},
                              special_tokens={word: i for word, i in vocab.items() if word not in words})
        tokenizer.added_words = {token["content"]: token["id"] for token in added_words}
        ids = [vocab[word] for word in words]
        tokenizer.word_ids = {*ids, *tokenizer.added_words.values(), tokenizer.eot_token}       # a KeyError: no <eot>
    return tokenizer


def read_tokenizer(folder):
    """tokenizer.json, which wins, as in transformers, or else the older files in its form."""
    def optional(name):
        return read_json(folder / name) if (folder / name).exists() else {}

    settings = optional("tokenizer.json")
    if not settings:
        with reading(folder / "merges.txt"):
            lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        special = json.dumps(optional("special_tokens_map.json"))
        added = [{"content": word, "id": i, "special": json.dumps(word) in special}
                 for word, i in optional("added_tokens.json").items()]
        settings = {"model": {"vocab": read_json(folder / "vocab.json"), "merges": merges}, "added_tokens": added,
                    "pre_tokenizer": {"type": "ByteLevel"}}
    return settings | {"config": optional("tokenizer_config.json")}


# --------------------------------------------------------------------------------------- downloads, checkpoints

def cache_folder():
    """Where downloads are kept; the environment variable DYNAMIC_PROMPT_CACHE moves it."""
    return Path(os.environ.get("DYNAMIC_PROMPT_CACHE") or os.path.expanduser("~/.cache/dynamic-prompt"))


def hub_url(path):
    return f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{path}"


def checkpoint_folder(name):
    """A model's name, `owner/name` on the Hub, or a folder -> a local folder, downloaded if need be."""
    name = str(name)
    if name in ("tiny-gpt2", "tiny-dialogpt"):
        return TINY / name
    if name not in REPOSITORIES and os.path.isdir(os.path.expanduser(name)):
        return Path(os.path.expanduser(name))
    if name not in REPOSITORIES and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        known = ", ".join(("tiny-gpt2", "tiny-dialogpt", *REPOSITORIES))
        raise ValueError(f"unknown model {name!r}: expected {known}, owner/name on the Hub, or a local folder")
    repository = REPOSITORIES.get(name, name)
    folder = cache_folder() / "models" / repository.replace("/", "--")

    def get(*files):
        """The first of these files that is here already, or else that the repository has."""
        for file in [file for file in files if (folder / file).exists()] or files:
            with contextlib.suppress(FileNotFoundError):
                return download(hub_url(f"{repository}/resolve/main/{file}"), folder / file)
        raise FileNotFoundError(f"{hub_url(repository)} has no public {' or '.join(files)}: is the name right?")

    if not (folder / "config.json").exists():           # it comes after those that not every repository has
        for file in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
            with contextlib.suppress(FileNotFoundError):
                get(file)
    get("config.json")
    if get("tokenizer.json", "vocab.json").name == "vocab.json":
        get("merges.txt")
    weights = get("model.safetensors", "pytorch_model.bin",
                  "model.safetensors.index.json", "pytorch_model.bin.index.json")
    if weights.suffix == ".json":                       # in shards
        for shard in sorted(set(read_json(weights)["weight_map"].values())):
            get(Path(shard).name)
    return folder


def download(url, path, sha256=None):
    """Fetch url to path unless it is there -> path. What an interrupted download left behind is continued."""
    import requests                                     # here alone: everything else works without it
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    session = requests.Session()                        # all is public: no token is sent, not even from ~/.netrc
    session.auth = session.rebuild_auth = lambda request, response=None: request
    with session, open(part, "r+b") as file:            # two processes write the same bytes
        for tries_left in (4, 3, 2, 1, 0):
            headers = {"Range": f"bytes={file.seek(0, os.SEEK_END)}-", "Accept-Encoding": "identity"}
            try:
                response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
                if response.status_code in (401, 403, 404):         # the Hub's 401: there is no such repository
                    raise FileNotFoundError(f"{url} does not exist or is not public (status {response.status_code})")
                if response.status_code == 416:         # nothing is missing, or too much is there: begin again
                    file.truncate(0)
                response.raise_for_status()
                print(f"downloading {url}", file=sys.stderr)
                if response.status_code == 200:         # the whole file comes, whatever was asked
                    file.seek(0)
                for chunk in response.iter_content(1 << 16):        # small: a cut loses the chunk it falls in
                    file.write(chunk)
                file.truncate()
                break
            except requests.RequestException as error:
                if tries_left == 0:
                    raise OSError(f"cannot download {url} ({error}); put it at {path} by hand") from None
                time.sleep(1)
        file.seek(0)
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    for answer in (*response.history, response):        # the redirection to the store of large files announces it
        etag = answer.headers.get("X-Linked-Etag", "").strip('"')
        sha256 = sha256 or (etag if len(etag) == 64 else None)
    if sha256 and sha256 != digest.hexdigest():
        part.unlink()
        raise OSError(f"{url} has SHA-256 {digest.hexdigest()}, expected {sha256}: deleted, please try again")
    with contextlib.suppress(FileNotFoundError):        # another process was faster
        os.replace(part, path)
    return path
