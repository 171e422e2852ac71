"""The metrics of both papers from scratch; loading, scoring, tabulating, plotting and talking to trained runs.

    python evaluate.py RUN                          score a run on its test set again
    python evaluate.py RUN --chat                   talk to it
    python evaluate.py RUN --export FOLDER          write it for transformers (finetune) or peft (prompt-tuning, p-tuning, prefix)
    python evaluate.py --table RUNS                 every run below a folder, as the papers' tables
    python evaluate.py --plot RUNS                  BLEU4, novelty and diversity over the training fraction
    python evaluate.py --lookup --data DATA         the dictionary that answers seen queries by heart
"""
import argparse
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch

from data import (checkpoint_folder, encode_pairs, group_by_length, load_splits, load_tokenizer, make_pairs, query_key,
                  read_dialogues, read_json)
from model import GPT, evaluation, load_plain, replace, write_safetensors
from prompt_encoder import METHODS, PromptedGPT

# ----------------------------------------------------------------------------------------------------------- metrics
# Lists of strings in, a float out. Down to METRICS the standard library is enough: paste them anywhere.


def tokenize(text):
    """Words and single punctuation marks, case kept.

    >>> tokenize("I don't know.")
    ['I', 'don', "'", 't', 'know', '.']
    """
    return re.findall(r"\w+|[^\w\s]", text)


def as_list(texts):
    """A list of strings as it is. Raises TypeError for a single string, whose characters would be scored one by one."""
    if isinstance(texts, str):
        raise TypeError(f"a single string was given ({texts!r:.60}), expected a list of strings")
    return list(texts)


def ngrams(tokens, n):
    return Counter(zip(*(tokens[i:] for i in range(n))))


def corpus_bleu(outputs, references, n=4):
    """BLEU-n of a whole corpus, one reference each, no smoothing (Papineni et al. 2002, section 2.3).

    The geometric mean of the precisions of orders 1..n, each output's n-grams clipped to its reference's, times the
    brevity penalty; 0 where an order has no match. Here 4/4 words, 3/3 pairs, and the output is 4 words against 5:

    >>> round(corpus_bleu(["the cat sat down"], ["the cat sat down ."], n=2), 4)        # exp(1 - 5/4)
    0.7788
    """
    outputs, references = [[tokenize(text) for text in as_list(texts)] for texts in (outputs, references)]
    logs = 0.0
    for order in range(1, n + 1):
        matches = total = 0
        for output, reference in zip(outputs, references, strict=True):
            counts = ngrams(output, order)
            matches += (counts & ngrams(reference, order)).total()
            total += max(1, counts.total())             # as nltk has it: an output too short still counts 1
        if matches == 0:
            return 0.0
        logs += math.log(matches / total)
    brevity = min(0, 1 - sum(map(len, references)) / sum(map(len, outputs)))
    return math.exp(brevity + logs / n)


def corpus_nist(outputs, references, n=5):
    """NIST-n of a whole corpus, one reference each (Doddington 2002): BLEU's matches, weighted by their information.

    An n-gram's information is log2(count of its first n - 1 words / its own count), over all references.
    """
    outputs, references = [[tokenize(text) for text in as_list(texts)] for texts in (outputs, references)]
    counts = Counter()
    for reference in references:
        for order in range(1, n + 1):
            counts.update(ngrams(reference, order))
    words, length = sum(map(len, references)), sum(map(len, outputs))
    score = 0.0
    for order in range(1, n + 1):
        gain = total = 0
        for output, reference in zip(outputs, references, strict=True):
            found = ngrams(output, order)
            total += found.total()
            gain += sum(count * math.log2((counts[gram[:-1]] if order > 1 else words) / counts[gram])
                        for gram, count in (found & ngrams(reference, order)).items())
        if total == 0:
            return 0.0
        score += gain / total
    if words == 0:
        return 0.0
    ratio = length / words                              # the penalty is 1/2 where outputs are 2/3 as long as references
    return score * (math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2) if ratio < 1 else 1.0)


def rouge_l(outputs, references):
    """Mean F1 of the longest common subsequence of words (Lin 2004, section 3).

    >>> rouge_l(["a b c d"], ["a x c"])                 # "a c": 2 of 4 words, 2 of 3
    0.5714285714285715
    """
    def f1(output, reference):
        best = [0] * (len(reference) + 1)               # best[j]: longest match of the words so far with reference[:j]
        for word in output:
            corner = 0
            for j, other in enumerate(reference, 1):
                corner, best[j] = best[j], corner + 1 if word == other else max(best[j], best[j - 1])
        precision, recall = best[-1] / max(1, len(output)), best[-1] / max(1, len(reference))
        return 2 * precision * recall / (precision + recall) if best[-1] else 0.0

    scores = [f1(tokenize(o), tokenize(r)) for o, r in zip(as_list(outputs), as_list(references), strict=True)]
    return statistics.fmean(scores) if scores else 0.0


def novelty(outputs, training_responses):
    """Share of outputs that were no response in training (Valvoda et al. 2022, section 4).

    >>> novelty(["Yes.", "I see a cat."], ["Yes.", "No."])
    0.5
    """
    known = {response.strip() for response in as_list(training_responses)}
    return sum(output.strip() not in known for output in as_list(outputs)) / max(1, len(outputs))


def diversity(outputs):
    """Distinct outputs / outputs (Valvoda et al. 2022, section 4).

    >>> diversity(["Yes.", "No.", "Yes.", "Yes."])
    0.5
    """
    return len({output.strip() for output in as_list(outputs)}) / max(1, len(outputs))


def distinct(outputs, n):
    """Distinct n-grams / n-grams, over all outputs (Li et al. 2016, section 5.3).

    >>> distinct(["so so good"], 1)
    0.6666666666666666
    """
    counts = Counter()
    for output in as_list(outputs):                     # `sum` would copy all that is counted so far for each output
        counts.update(ngrams(tokenize(output), n))
    return len(counts) / max(1, counts.total())


# A new metric is one entry: key in results.json -> column title, digits, and a function of outputs, references, the responses
# trained on, and the mean loss per response token (None where nothing has a loss).
METRICS = {
    "bleu1": ("BLEU1", 3, lambda outputs, references, training, loss: corpus_bleu(outputs, references, 1)),
    "bleu2": ("BLEU2", 3, lambda outputs, references, training, loss: corpus_bleu(outputs, references, 2)),
    "bleu3": ("BLEU3", 3, lambda outputs, references, training, loss: corpus_bleu(outputs, references, 3)),
    "bleu4": ("BLEU4", 3, lambda outputs, references, training, loss: corpus_bleu(outputs, references, 4)),
    "novelty": ("Novelty", 3, lambda outputs, references, training, loss: novelty(outputs, training)),
    "diversity": ("Diversity", 3, lambda outputs, references, training, loss: diversity(outputs)),
    "nist": ("NIST", 2, lambda outputs, references, training, loss: corpus_nist(outputs, references)),
    "rouge_l": ("ROUGE-L", 3, lambda outputs, references, training, loss: rouge_l(outputs, references)),
    "distinct1": ("Dist-1", 3, lambda outputs, references, training, loss: distinct(outputs, 1)),
    "distinct2": ("Dist-2", 3, lambda outputs, references, training, loss: distinct(outputs, 2)),
    "length": ("Length", 1, lambda outputs, references, training, loss: statistics.fmean(len(tokenize(o)) for o in outputs)),
    "perplexity": ("PPL", 1, lambda outputs, references, training, loss: None if loss is None else math.exp(min(loss, 700))),
}


def all_metrics(outputs, references, training_responses, mean_loss):
    """Every metric of results.json; null for all of them where there is no pair."""
    return {"n": len(outputs)} | {
        name: function(outputs, references, training_responses, mean_loss) if outputs else None
        for name, (_, _, function) in METRICS.items()}


# ------------------------------------------------------------------------------------------------------------- a run

MAX_NEW_TOKENS = 40


class UsageError(ValueError):
    """The command line asks for something that cannot be."""


def choose_device(device="auto", dtype="auto"):
    """The flags --device and --dtype -> torch.device, torch.dtype, and why in words. Raises UsageError.

    auto is a GPU that this PyTorch has kernels for, else the CPU; bfloat16 where the device computes in it natively,
    float16 on a GPU that does not, else float32.
    """
    why = []
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            kernels = [(kind, int(re.match(r"\d+", number)[0])) for kind, number in
                       (name.split("_") for name in torch.cuda.get_arch_list())]        # sm_75, sm_90a, compute_120 ...
            if kernels and not any(n // 10 == major and n % 10 <= minor if kind == "sm" else n <= 10 * major + minor
                                   for kind, n in kernels):
                why.append(f"this PyTorch has no kernels for the GPU here, of compute capability {major}.{minor}")
                device = "cpu"
    kind, colon, index = device.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}.get(kind, 0)
    if colon and not index.isdecimal() or int(index or 0) >= there:
        raise UsageError(f"--device {device}: PyTorch finds no such device here, expected cpu, cuda, cuda:1 ... or mps")
    device, native = torch.device(device), False
    if kind == "cuda":
        torch.cuda.set_device(device)                   # what follows asks about this GPU
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        # On H100 and newer GPUs cuDNN's attention would be tried first, and makes a plan for every new shape of batch.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif kind == "cpu":
        native = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()      # without AMX, 16 bits are slower than 32
    if dtype == "auto":
        dtype = "bfloat16" if native else "float16" if kind == "cuda" else "float32"
        why.append(f"this {'GPU' if kind == 'cuda' else kind} has {'' if native else 'no '}fast bfloat16")
    else:
        why.append(f"--dtype {dtype}")
    if kind == "cuda":                                  # cuDNN's own default would round p-tuning's LSTM in float32, too
        tf32 = dtype != "float32" and torch.cuda.get_device_capability()[0] >= 8
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        why += ["float32 products, as the output layer's, in TF32"] * tf32
    return device, getattr(torch, dtype), "; ".join(why)


class Run:
    """A prompted GPT with what it needs to answer in text: its settings (`config`) and its `tokenizer`.

    Made by `load_run` from a trained run's folder, and by train.py, untrained. Raises ValueError where the checkpoint has
    changed since the run began, UsageError where the settings ask for more positions than the GPT has.
    """

    def __init__(self, config, device, dtype):
        folder = checkpoint_folder(config["model"])
        gpt, self.config, self.tokenizer = GPT.from_pretrained(folder, config["dropout"]), config, load_tokenizer(folder)
        self.weights = fingerprint(gpt)
        if config.get("weights", self.weights) != self.weights:
            raise ValueError(f"{folder}: the weights have changed since this run began, so its results would be another "
                             f"model's; put the old ones back, or train again")
        V, query, response = gpt.config.vocab_size, config["max_query"], max(config["max_response"], MAX_NEW_TOKENS)
        words = {self.tokenizer.encode_single_token(word) for word in self.tokenizer.token_byte_values()}
        if max(words | {self.tokenizer.eot_token}) >= V:
            raise ValueError(f"{folder}: the tokenizer has ids up to {max(words | {self.tokenizer.eot_token})}, "
                             f"but config.json says vocab_size {V}")
        gpt.suppress_tokens = sorted(set(range(V)) - words - {self.tokenizer.eot_token})
        self.model = PromptedGPT(gpt, config["method"], config["prompt_length"], config["controller_layers"], query,
                                 config["train_embeddings"], dtype)
        encoder = self.model.encoder                    # a prompt of keys and values takes positions, too
        prompt = config["prompt_length"] or encoder.default_length or encoder.length(query)
        if prompt + query + response > gpt.config.n_positions:
            raise UsageError(f"a prompt of {prompt}, --max-query {query} and a response of {response} tokens are "
                             f"{prompt + query + response}, but {config['model']} has n_positions {gpt.config.n_positions}")
        self.model.to(device).eval()

    def reply(self, query, temperature=0.0, top_p=1.0):
        """Answer a query, a string or a list of turns, of which the run reads the last ones as it was trained to -> str.

        temperature 0 is greedy; otherwise tokens are drawn from the smallest set that holds top_p of the probability.
        Raises ValueError for an empty query.
        """
        turns = [query] if isinstance(query, str) else list(query)
        if not turns or not turns[-1].strip():
            raise ValueError("the query is empty, expected a string or a list of turns")
        (ids, _), = encode_pairs([(turns[-self.config["turns"]:], "")], self.tokenizer, self.config["max_query"])
        answer, = self.model.generate([ids], MAX_NEW_TOKENS, self.tokenizer.eot_token, temperature, top_p)
        return self.tokenizer.decode(answer).strip()

    def respond(self, examples, batch_size=64):
        """Greedy answers to the examples' queries, as text, in their order."""
        answers = {}
        for indices in group_by_length(examples, batch_size, lambda example: len(example[0])):
            found = self.model.generate([examples[i][0] for i in indices], MAX_NEW_TOKENS, self.tokenizer.eot_token)
            answers |= zip(indices, found)
        return [self.tokenizer.decode(answers[i]).strip() for i in range(len(examples))]

    def mean_losses(self, examples, parts, batch_size=64):
        """Mean cross-entropy per response token over each part, a list of indices -> floats; None for an empty part."""
        groups = group_by_length(examples, batch_size, self.row_length)
        with evaluation(self.model), self.model.autocast():     # around all batches, so that trained weights are cast once
            losses = [self.model([examples[i] for i in indices]) for indices in groups]
        losses, sums, start = torch.cat(losses).tolist() if losses else [], {}, 0
        for i in (i for indices in groups for i in indices):
            sums[i], start = sum(losses[start:start + len(examples[i][1])]), start + len(examples[i][1])
        return [sum(sums[i] for i in part) / sum(len(examples[i][1]) for i in part) if part else None for part in parts]

    def row_length(self, example):
        """Positions that an example takes in a batch."""
        query, response = example
        return self.model.encoder.length(len(query)) + len(query) + len(response)

    def validate(self, splits):
        """-> mean loss per response token and BLEU4 on the validation split."""
        examples, references = splits.examples["validation"], [response for _, response in splits.pairs["validation"]]
        loss, = self.mean_losses(examples, [range(len(examples))])
        return loss, corpus_bleu(self.respond(examples), references)

    def test(self, splits, best):
        """Score the run on the test split -> the contents of results.json, and the lines of generations.jsonl.

        best: what best.pt says of the epoch that is tested."""
        pairs, training = splits.pairs["test"], [response for _, response in splits.pairs["train"]]
        outputs = self.respond(splits.examples["test"])
        parts = list(range(len(pairs))), [i for i, seen in enumerate(splits.seen) if not seen]
        losses = self.mean_losses(splits.examples["test"], parts)
        everything = [all_metrics([outputs[i] for i in part], [pairs[i][1] for i in part], training, loss)
                      for part, loss in zip(parts, losses)]
        results = {k: self.config[k] for k in ("method", "model", "data", "fraction", "seed")} | {
            "lr": best["lr"], "epoch": best["epoch"],
            "trainable_parameters": sum(p.numel() for p in self.model.trained().values()),
            "total_parameters": sum(p.numel() for p in self.model.parameters()),
            "test": everything[0], "test_unseen": everything[1], "val_bleu4": best["val_bleu4"]}
        return results, [{"query": query, "reference": reference, "response": output, "seen": seen}
                         for (query, reference), output, seen in zip(pairs, outputs, splits.seen)]


def fingerprint(gpt):
    """SHA-256 of a GPT's weights."""
    sha256 = hashlib.sha256()
    for tensor in gpt.state_dict().values():
        sha256.update(tensor.numpy())
    return sha256.hexdigest()


def load_checkpoint(path, keys):
    """best.pt or last.pt of a run -> dict. Raises ValueError."""
    state = load_plain(path)
    if not isinstance(state, dict) or not keys <= state.keys() or not isinstance(state["trained"], dict):
        raise ValueError(f"{path} is not a checkpoint of this project, or of another version of it")
    return state


def load_run(folder, device="auto", dtype="auto"):
    """A run's folder -> its Run, with the weights of its best epoch. dtype auto: as the run was trained.

    >>> run = load_run("runs/sample-tiny-dialogpt-dynamic-1.0-s0")      # doctest: +SKIP
    >>> run.reply("Do you like music?")                                 # doctest: +SKIP
    'Yes, I do, but I like to read.'
    """
    path = Path(folder) / "best.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: expected the folder of a run whose first epoch has ended")
    best = load_checkpoint(path, {"trained", "config", "epoch", "val_bleu4", "lr"})
    device, dtype, _ = choose_device(device, best["config"]["dtype"] if dtype == "auto" else dtype)
    run = Run(best["config"], device, dtype)
    run.model.load_trained(best.pop("trained"))
    run.best = best
    return run


def write_test(folder, results, generations):
    """Write results.json and generations.jsonl to a run's folder."""
    write_text(folder / "generations.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in generations))
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")


def write_text(path, text):
    replace(path, lambda file: file.write(text.encode("utf-8")))


# ------------------------------------------------------------------------------------------- tables, figure, and chat

class Lookup:
    """A dictionary for a model: each query of the training set is answered with its most frequent response there, any
    other with the most frequent of all; among equals with the earliest. What a system scores beyond this, it did not
    learn by heart."""

    def __init__(self, training_pairs):
        answers = defaultdict(Counter)
        for query, response in training_pairs:
            answers[query_key(query)][response] += 1
        self.answers = {key: counts.most_common(1)[0][0] for key, counts in answers.items()}    # ties: the earliest
        self.default = Counter(response for _, response in training_pairs).most_common(1)[0][0]

    def answer(self, query):
        return self.answers.get(query_key(query), self.default)


def lookup_results(data, turns=1, sliding=False, seed=0):
    """The dictionary's scores on a data set -> {"test": M, "test_unseen": M}."""
    splits = {split: make_pairs(d, turns, sliding) for split, d in read_dialogues(data, seed).items()}
    lookup, training = Lookup(splits["train"]), [response for _, response in splits["train"]]
    unseen = [pair for pair in splits["test"] if query_key(pair[0]) not in lookup.answers]
    return {name: all_metrics([lookup.answer(q) for q, _ in chosen], [r for _, r in chosen], training, None)
            for name, chosen in (("test", splits["test"]), ("test_unseen", unseen))}


def spread(values, digits):
    """Several seeds' values -> mean ± sample standard deviation; a single one alone."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(rows):
    """[(label, label, [M, ...]), ...] -> a Markdown table, one line for each row, seeds averaged."""
    lines = ["| Data | Method | " + " | ".join(title for title, _, _ in METRICS.values()) + " |",
             "|---|---|" + "---:|" * len(METRICS)]
    for data, method, results in rows:
        cells = [spread([r[name] for r in results], digits) for name, (_, digits, _) in METRICS.items()]
        lines.append(f"| {data} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short(name):
    """For a table: a data set's or a model's name; of a path, its last part."""
    return Path(name).name if os.path.isabs(name) else name


def finished_runs(path):
    """All runs below a folder, as [(settings, results), ...]. Raises OSError, ValueError."""
    files = sorted(Path(path).rglob("results.json"))
    if not files:
        raise FileNotFoundError(f"{path} holds no finished run (no results.json below it)")
    runs = [(read_json(file.parent / "config.json"), read_json(file)) for file in files]
    for file, (config, results) in zip(files, runs):
        if config.get("method") not in METHODS:
            raise ValueError(f"{file.parent / 'config.json'} names the method {config.get('method')!r}, expected one of "
                             f"{', '.join(METHODS)}: was it written by another version of this project?")
        lacking = [name for name in METRICS if any(name not in results.get(part, {}) for part in ("test", "test_unseen"))]
        if lacking:
            raise ValueError(f"{file} lacks the metrics {', '.join(lacking)}: score the run again with "
                             f"python evaluate.py {file.parent}")
    return runs


def ablation(config):
    """What of a method was set otherwise than by default: such a run is another row, not another seed."""
    usual = {"prompt_length": None, "controller_layers": 2, "train_embeddings": None}
    return "".join(f", {k.replace('_', ' ')} {config[k]}" for k in usual if config.get(k, usual[k]) != usual[k])


def context(config):
    """What a query is, if not the turn before the response."""
    return f", {config['turns']} turns" * (config["turns"] > 1) + ", sliding" * (config["pairs"] == "sliding")


def mixed(configs):
    """For a row's label: settings in which its runs differ, the seed aside. Their mean is not one over seeds alone."""
    differ = [k for k in configs[0] if k != "seed" and any(c.get(k) != configs[0][k] for c in configs)]
    return f" (mixed {', '.join(differ)})" if differ else ""


def table(path):
    """Runs below a folder -> Markdown: for each data set and model the papers' table, for all and unseen test pairs."""
    groups = defaultdict(lambda: defaultdict(list))
    for config, results in finished_runs(path):
        group = groups[config["data"], config["turns"], config["pairs"], config["model"]]
        group[config["fraction"], list(METHODS).index(config["method"]), ablation(config)].append((config, results))
    text = []
    for (data, turns, pairs, model), rows in sorted(groups.items()):
        try:
            lookup = lookup_results(data, turns, pairs == "sliding")
        except (OSError, ValueError):                   # the data may have moved since
            lookup = None
        for part, name in (("test", "test pairs"), ("test_unseen", "unseen test pairs")):
            lines = []
            for (fraction, _, more), row in sorted(rows.items()):
                configs, results = zip(*row)
                lines.append((f"{100 * fraction:g}%", configs[0]["method"] + more + mixed(configs), [r[part] for r in results]))
            if lookup:
                lines.append(("100%", "lookup", [lookup[part]]))
            title = f"{short(data)}, {short(model)}{context(configs[0])}: {lines[0][2][0]['n']:,} {name}"
            text += [f"**{title}**", "", markdown(lines), ""]
    return "\n".join(text)


def plot(path):
    """Figure 2 of Valvoda et al.: one panel a metric, one line for each method and model -> the files written."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    lines = defaultdict(lambda: defaultdict(list))
    for config, results in finished_runs(path):
        name = short(config["data"]) + context(config), config["method"] + ablation(config), short(config["model"])
        if results["test"]["n"]:                        # without test pairs, its metrics are null
            lines[name][config["fraction"]].append(results["test"])
    data, methods, models = ({k[i]: None for k in sorted(lines)} for i in range(3))
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for panel, metric in zip(panels, ("bleu4", "novelty", "diversity")):
        for name, points in sorted(lines.items()):
            _, method, model = name
            x = sorted(points)
            label = ", ".join(n for n, many in zip(name, (data, methods, models)) if len(many) > 1 or n == method)
            panel.plot([100 * f for f in x], [statistics.fmean(r[metric] for r in points[f]) for f in x],
                       color=f"C{list(methods).index(method)}", linestyle="--" if "dialogpt" in model.lower() else "-",
                       marker="o", markersize=4, label=label)
        panel.set_title(METRICS[metric][0])
        panel.set_xlabel("training data (%)")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    files = [Path(path) / "figure2.png", Path(path) / "figure2.svg"]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def chat(run, temperature, top_p):
    """Talk to a run: it reads the last N turns, as it was trained to. End of input or Ctrl-C ends."""
    config, turns = run.config, []
    print(f"{config['method']} on {short(config['model'])} reads the last {config['turns']} turn(s). Ctrl-D or Ctrl-C ends.")
    sys.stdin.reconfigure(errors="replace")
    try:
        while True:
            said = input("you: ").strip()
            if said:
                turns.append(said)
                turns.append(run.reply(turns, temperature, top_p))
                print(f"{config['method']}: {turns[-1]}", flush=True)
    except (EOFError, KeyboardInterrupt):
        print()


def export(run, target):
    """Write a finetune run as a checkpoint for transformers, a prompt-tuning, p-tuning or prefix run as an adapter for peft."""
    config, model, source = run.config, run.model, checkpoint_folder(run.config["model"])
    kinds = {"finetune": None, "prompt-tuning": "PROMPT_TUNING", "p-tuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
    if config["method"] not in kinds:
        raise UsageError(f"a {config['method']} prompt has no form that transformers or peft could load; --export takes "
                         f"runs of {', '.join(kinds)}")
    if config["method"] != "finetune" and model.gpt.wte.weight.requires_grad:
        raise UsageError("an adapter holds a prompt alone, but this run trained the word embeddings, too")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty, expected a new folder")
    if config["method"] == "finetune":
        model.gpt.save_pretrained(target)
        for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json", "tokenizer_config.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, target / name)
        print(f"wrote {target}: load it with transformers, or with --model {target}")
        return
    encoder, c = model.encoder, model.gpt.config
    with torch.no_grad():           # as peft saves them: the virtual tokens themselves, not the network that made them
        prompt = encoder.mlp(encoder.table) if config["method"] == "prefix" else encoder(torch.zeros(1, 1, c.n_embd), None)[0]
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(target / "adapter_model.safetensors", {"prompt_embeddings": prompt})
    write_text(target / "adapter_config.json", json.dumps({
        "peft_type": kinds[config["method"]], "task_type": "CAUSAL_LM", "num_virtual_tokens": len(prompt),
        "token_dim": c.n_embd, "num_layers": c.n_layer, "num_attention_heads": c.n_head, "num_transformer_submodules": 1,
        "base_model_name_or_path": str(source), "inference_mode": True}, indent=2) + "\n")
    print(f"wrote {target}: load it with peft.PeftModel.from_pretrained(gpt, '{target}')")


def report(results, examples=()):
    """A run's test table, and some answers."""
    name = f"{results['method']}, {short(results['model'])}"
    rows = [(f"{part.replace('_', ', ')} ({results[part]['n']:,} pairs)", name, [results[part]])
            for part in ("test", "test_unseen")]
    text = [f"\n    query: {' / '.join(e['query'])}\nreference: {e['reference']}\n response: {e['response']}"
            for e in examples]
    return "\n".join([markdown(rows), *text])


# ------------------------------------------------------------------------------------------------------- command line

def run_command(main):
    """Run main(); what a user can cause ends in one sentence: status 2 for usage, 1 for data, checkpoint or folder."""
    sys.stdin, sys.stdout = sys.stdin or open(os.devnull), sys.stdout or open(os.devnull, "w")      # who starts us may close them
    sys.stdout.reconfigure(errors="replace")            # a log file on Windows cannot hold every character
    try:
        main()
    except (ValueError, OSError) as error:
        missing = isinstance(error, FileNotFoundError) and error.filename
        print("error: " + (f"{error.filename} is missing" if missing else " ".join(str(error).split())), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory|CUDA|cuDNN|NCCL", str(error)):
            raise
        memory = "memory" in str(error)
        print("error: " + ("out of memory: lower --batch-size, --max-query or --max-response, or choose a smaller --model"
                           if memory else "the GPU failed: try --device cpu, which says more exactly what is wrong")
              + f" ({str(error).splitlines()[0]:.200})", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, shown = parser.add_argument, " (default: %(default)s)"
    add("path", type=Path, nargs="?", help="a run's folder; for --table and --plot, a folder with runs below it")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--chat", action="store_true", help="talk to the run")
    modes.add_argument("--export", type=Path, metavar="FOLDER", help="write the run as a checkpoint or an adapter")
    modes.add_argument("--table", action="store_true", help="print all runs below the folder, in Markdown")
    modes.add_argument("--plot", action="store_true", help="draw all runs below the folder: figure2.png and .svg there")
    modes.add_argument("--lookup", action="store_true", help="score the dictionary that answers seen queries by heart")
    add("--data", default="sample", help="for --lookup: sample, dailydialog, multiwoz, a folder or a text file" + shown)
    add("--temperature", type=float, default=0.0, help="for --chat: 0 is greedy, 1 samples from the model's own distribution" + shown)
    add("--top-p", type=float, default=1.0, help="for --chat: sample from this share of the probability" + shown)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..." + shown)
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the products; auto: as the run was asked for")
    args = parser.parse_args()
    if args.temperature < 0 or not math.isfinite(args.temperature):
        parser.error(f"--temperature {args.temperature}: expected 0 or more")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p}: expected more than 0 and at most 1")
    if args.path is None and not args.lookup:
        parser.error("a run's folder is expected (or --lookup)")
    if args.lookup:
        results = lookup_results(args.data)
        print(markdown([(f"{args.data}, {part.replace('_', ', ')} ({m['n']:,} pairs)", "lookup", [m])
                        for part, m in results.items()]))
    elif args.table:
        print(table(args.path))
    elif args.plot:
        print("wrote", *plot(args.path))
    elif args.export:
        export(load_run(args.path, "cpu", "float32"), args.export)
    else:
        run = load_run(args.path, args.device, args.dtype)
        splits = load_splits(run.config, run.tokenizer)                 # refuses dialogues that have changed
        if args.chat:
            chat(run, args.temperature, args.top_p)
            return
        results, generations = run.test(splits, run.best)
        finished = (args.path / "results.json").exists()        # a run that can be resumed must not come to look finished
        if finished:
            write_test(args.path, results, generations)
        print(report(results) + "\n\nThe run is unfinished: nothing was written." * (not finished))


if __name__ == "__main__":
    run_command(main)
