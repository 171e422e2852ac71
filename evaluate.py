"""The metrics of both papers from scratch; a run with its splits, scores and replies; runs side by side.

    python evaluate.py RUN                      score a run on its test set again: results.json, generations.jsonl
    python evaluate.py RUN --chat               talk to it
    python evaluate.py RUN --explain "Hello."   look inside its prompt
    python evaluate.py RUN --plot               draw its losses and BLEU4 over the epochs: curves.png
    python evaluate.py RUN --export FOLDER      write it for transformers (finetune) or peft (prompt-/p-tuning, prefix)
    python evaluate.py --compare RUN RUN ...    the answers of several runs to the same queries, as a table
    python evaluate.py --table RUNS             every run below a folder, as the papers' tables
    python evaluate.py --plot RUNS              BLEU4, novelty, diversity over the training fraction: figure2.png
    python evaluate.py --lookup --data DATA     what needs no model: the dictionary, and the human references
"""
import argparse
import contextlib
import glob
import hashlib
import json
import math
import re
import shutil
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from data import (cache_folder, checkpoint_folder, clean_turn, encode_pairs, load_tokenizer, make_pairs, query_key,
                  read_dialogues, read_json, take_fraction)
from model import GPT, UsageError, choose_device, evaluation, load_tensors, reading, write_safetensors, write_text
from prompt_encoder import METHODS, PromptedGPT, group_by_length

# ----------------------------------------------------------------------------------------------------------- metrics
# Lists of strings in, a float out. Down to `distinct` the standard library is enough: paste them anywhere.


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


def token_pairs(outputs, references):
    """-> [(tokens of an output, tokens of its reference), ...]. Raises ValueError where there are not as many."""
    return [(tokenize(o), tokenize(r)) for o, r in zip(as_list(outputs), as_list(references), strict=True)]


def ngrams(tokens, n):
    return Counter(zip(*(tokens[i:] for i in range(n))))


def corpus_bleu(outputs, references, n=4):
    """BLEU-n of a whole corpus, one reference each, no smoothing (Papineni et al. 2002, section 2.3).

    The geometric mean of the precisions of orders 1..n, each output's n-grams clipped to its reference's, times the
    brevity penalty; 0 where an order has no match. Here 4/4 words, 3/3 pairs, and the output is 4 words against 5:

    >>> round(corpus_bleu(["the cat sat down"], ["the cat sat down ."], n=2), 4)        # exp(1 - 5/4)
    0.7788
    """
    pairs, logs = token_pairs(outputs, references), 0.0
    for order in range(1, n + 1):
        matches = total = 0
        for output, reference in pairs:
            counts = ngrams(output, order)
            matches += (counts & ngrams(reference, order)).total()      # &: the smaller of the two counts
            total += max(1, counts.total())             # as nltk has it: an output too short still counts 1
        if matches == 0:
            return 0.0
        logs += math.log(matches / total)
    brevity = min(0, 1 - sum(len(reference) for _, reference in pairs) / sum(len(output) for output, _ in pairs))
    return math.exp(brevity + logs / n)


def corpus_nist(outputs, references, n=5):
    """NIST-n of a whole corpus, one reference each (Doddington 2002): BLEU's matches, weighted by their information.

    An n-gram's information is log2(count of its first n - 1 words / its own count), over all references.
    """
    pairs, counts, score = token_pairs(outputs, references), Counter(), 0.0
    words, length = sum(len(reference) for _, reference in pairs), sum(len(output) for output, _ in pairs)
    counts[()] = words                                  # what stands before a single word
    for _, reference in pairs:
        for order in range(1, n + 1):
            counts.update(ngrams(reference, order))
    for order in range(1, n + 1):
        gain = total = 0
        for output, reference in pairs:
            found = ngrams(output, order)
            total += found.total()
            gain += sum(count * math.log2(counts[gram[:-1]] / counts[gram])
                        for gram, count in (found & ngrams(reference, order)).items())
        if total == 0 or words == 0:
            return 0.0
        score += gain / total
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

    scores = [f1(output, reference) for output, reference in token_pairs(outputs, references)]
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
    counts = Counter(gram for output in as_list(outputs) for gram in ngrams(tokenize(output), n).elements())
    return len(counts) / max(1, counts.total())


def all_metrics(outputs, references, training_responses, mean_loss=None):
    """Every metric of results.json by name; null where there is no pair. A new metric is one line here.

    mean_loss: per response token; None where nothing has a loss.
    """
    if not outputs:
        return dict.fromkeys(all_metrics(["."], ["."], [])) | {"n": 0}          # the same names, each null
    return {
        "n": len(outputs),
        **{f"bleu{n}": corpus_bleu(outputs, references, n) for n in (1, 2, 3, 4)},
        "novelty": novelty(outputs, training_responses),
        "diversity": diversity(outputs),
        "distinct1": distinct(outputs, 1),
        "distinct2": distinct(outputs, 2),
        "nist": corpus_nist(outputs, references),
        "rouge_l": rouge_l(outputs, references),
        "length": statistics.fmean(len(tokenize(output)) for output in outputs),
        "perplexity": None if mean_loss is None else math.exp(min(mean_loss, 700)),
    }


def score(outputs, pairs, seen, training_responses, losses=None):
    """Outputs for the test pairs, of a run, the dictionary or humans -> {"test": metrics, "test_unseen": metrics}.

    seen: for each pair, whether its query is a training query. losses: as `Run.losses` gives them.
    """
    unseen, results = [i for i, known in enumerate(seen) if not known], {}
    for name, part in ("test", range(len(pairs))), ("test_unseen", unseen):
        loss = sum(losses[i][0] for i in part) / sum(losses[i][1] for i in part) if losses and part else None
        results[name] = all_metrics([outputs[i] for i in part], [pairs[i][1] for i in part], training_responses, loss)
    return results


# ------------------------------------------------------------------------------------------------------------- a run

@dataclass
class Splits:
    """What a run trains and is tested on, as text and as token ids, and which test queries the training set has."""
    pairs: dict                 # split -> [([turn, ...], response), ...]
    examples: dict              # split -> [(query ids, response ids), ...]
    seen: list                  # for each test pair: is its query, by `query_key`, one of the *full* training split?
    fingerprint: str            # SHA-256 of all dialogues and token ids


def load_splits(config, tokenizer):
    """A run's settings -> Splits. Raises ValueError where nothing is left to train on, or where the dialogues are not
    those that the run began with."""
    data, options = config["data"], (config["turns"], config["pairs"] == "sliding")
    dialogues = read_dialogues(data)
    known = {query_key(query) for query, _ in make_pairs(dialogues["train"], *options)}
    chosen = dialogues | {"train": take_fraction(dialogues["train"], config["fraction"], config["seed"])}
    pairs = {split: make_pairs(part, *options) for split, part in chosen.items()}
    for split in ("train", "validation"):
        if not pairs[split]:
            raise ValueError(f"{data}: no pair is left in {split} (--fraction {config['fraction']}, "
                             f"--pairs {config['pairs']})")
    limits = config["max_query"], config["max_response"]
    examples = {split: encode_pairs(part, tokenizer, *limits) for split, part in pairs.items()}
    fingerprint = hashlib.sha256(json.dumps([dialogues, examples]).encode()).hexdigest()
    if config.get("dialogues", fingerprint) != fingerprint:
        raise ValueError(f"{data}: the dialogues or the tokenizer have changed since this run began, so its results "
                         f"would be of other data; put the old ones back, or train again")
    return Splits(pairs, examples, [query_key(query) in known for query, _ in pairs["test"]], fingerprint)


class Run:
    """A prompted GPT with what it needs to answer in text: its settings (`config`) and its `tokenizer`.

    Made by `load_run` from a trained run's folder, and by train.py, untrained. Raises ValueError where the checkpoint
    has changed since the run began, UsageError where the settings ask for more positions than the GPT has.
    """
    version = 3                 # of a run's folder
    batch_size = 64             # pairs that are scored or answered at once

    def __init__(self, config, device, dtype):
        self.config, folder = config, checkpoint_folder(config["model"])
        self.tokenizer, gpt = load_tokenizer(folder), GPT.from_pretrained(folder, config["dropout"] or 0.0)
        words, V = self.tokenizer.word_ids, gpt.config.vocab_size
        vocabulary = repr([self.tokenizer.decode_single_token_bytes(i) for i in sorted(words)])
        digest = hashlib.sha256(vocabulary.encode())
        for tensor in gpt.state_dict().values():
            digest.update(tensor.numpy())
        self.weights = digest.hexdigest()
        if config.get("weights", self.weights) != self.weights:
            raise ValueError(f"{folder}: the weights or the vocabulary have changed since this run began, so its "
                             f"results would be of another model; put the old ones back, or train again")
        code = [Path(__file__).with_name(file).read_bytes() for file in ("model.py", "prompt_encoder.py")]
        self.code = hashlib.sha256(b"".join(code)).hexdigest()      # if it changes, so may an old run's scores
        gpt.config.eos_token_id = self.tokenizer.eot_token
        if max(words) >= V:
            raise ValueError(f"{folder}: the tokenizer has ids up to {max(words)}, but config.json says vocab_size {V}")
        self.suppress_tokens = [i for i in range(V) if i not in words]          # rows of wte that stand for no word
        query, response = config["max_query"], max(config["max_response"], config["max_new_tokens"])
        self.model = PromptedGPT(gpt, config["method"], config["prompt_length"], query, config["controller_layers"],
                                 config["controller_init"], config["train_embeddings"], dtype)
        encoder = self.model.encoder
        prompt = encoder.k if encoder.writes_past else encoder.prompt_length(query)     # keys take positions, too
        if prompt + query + response > gpt.config.n_positions:
            raise UsageError(f"a prompt of {prompt}, --max-query {query} and a response of {response} tokens are "
                             f"{prompt + query + response}, but {folder.name} has n_positions {gpt.config.n_positions}")
        self.model.to(device).eval()

    def answer(self, queries, **options):
        """Token lists -> answers as text, all in one batch; options as in `PromptedGPT.generate`."""
        answers = self.model.generate(queries, self.config["max_new_tokens"], self.tokenizer.eot_token,
                                      suppress_tokens=self.suppress_tokens, **options)
        return [self.tokenizer.decode(answer).strip() for answer in answers]

    def encode_query(self, query):
        """A string or a list of turns -> token ids of the last turns, as many as the run was trained to read."""
        turns = [query] if isinstance(query, str) else list(query)
        if not turns or not clean_turn(turns[-1]):
            raise ValueError("the query is empty, expected a string or a list of turns")
        [(ids, _)] = encode_pairs([(turns[-self.config["turns"]:], "")], self.tokenizer, self.config["max_query"])
        return ids

    def reply(self, query, temperature=0.0, top_p=1.0):
        """Answer a query, a string or a list of turns -> str. White space around a turn counts for nothing.

        temperature 0 is greedy; otherwise tokens are drawn from the smallest set that holds top_p of the probability.
        Raises ValueError for an empty query.
        """
        return self.answer([self.encode_query(query)], temperature=temperature, top_p=top_p)[0]

    def respond(self, examples):
        """Greedy answers to the examples' queries, as text, in their order."""
        answers = {}
        for indices in group_by_length([len(query) for query, _ in examples], self.batch_size):
            answers.update(zip(indices, self.answer([examples[i][0] for i in indices])))
        return [answers[i] for i in range(len(examples))]

    def row_length(self, example):
        """Positions that an example takes in a batch."""
        query, response = example
        return self.model.encoder.prompt_length(len(query)) + len(query) + len(response)

    def losses(self, examples):
        """For each example, in order, the summed cross-entropy of its response, and the response's number of tokens.
        Raises FloatingPointError for a loss that is NaN or infinite."""
        losses, groups = {}, group_by_length(list(map(self.row_length, examples)), self.batch_size)
        with evaluation(self.model), self.model.autocast():     # around all batches: trained weights are cast once
            found = [self.model([examples[i] for i in indices]) for indices in groups]
        for indices, batch in zip(groups, found):
            for i, part in zip(indices, batch.split([len(examples[i][1]) for i in indices])):
                losses[i] = sum(part.tolist()), len(part)
        if not all(math.isfinite(loss) for loss, _ in losses.values()):
            raise FloatingPointError("a loss is NaN or infinite, so nothing is scored; in float16 large numbers "
                                     "overflow: try --dtype float32")
        return [losses[i] for i in range(len(examples))]

    def swap(self, examples):
        """The swap test: mean loss per response token with another query's prompt minus that with its own, among
        queries of equal length; exactly 0 where the prompt does not depend on the query. None where no two are equally
        long."""
        groups, size = defaultdict(list), self.batch_size
        for example in examples:
            groups[len(example[0])].append(example)
        batches = [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]
        batches = [batch for batch in batches if len(batch) > 1]
        if not batches:
            return None
        with evaluation(self.model), self.model.autocast():
            own, others = (torch.cat([self.model(batch, swapped) for batch in batches]) for swapped in (False, True))
        return (others.mean() - own.mean()).item()

    def validate(self, splits):
        """-> mean loss per response token and BLEU4 on the validation split."""
        examples, references = splits.examples["validation"], [response for _, response in splits.pairs["validation"]]
        sums, tokens = zip(*self.losses(examples))
        return sum(sums) / sum(tokens), corpus_bleu(self.respond(examples), references)

    def test(self, splits, best):
        """Score the run on the test split -> the contents of results.json, and the lines of generations.jsonl.

        best: what best.pt says of the epoch that is tested.
        """
        pairs, examples = splits.pairs["test"], splits.examples["test"]
        outputs, training = self.respond(examples), [response for _, response in splits.pairs["train"]]
        results = {key: self.config[key] for key in ("method", "model", "data", "fraction", "seed")} | {
            "lr": best["lr"], "epoch": best["epoch"],
            "trainable_parameters": sum(p.numel() for p in self.model.trained().values()),
            "total_parameters": sum(p.numel() for p in self.model.parameters()),
            **score(outputs, pairs, splits.seen, training, self.losses(examples)),
            "swap": self.swap(examples), "val_bleu4": best["val_bleu4"]}
        return results, [{"query": query, "reference": reference, "response": output, "seen": seen}
                         for (query, reference), output, seen in zip(pairs, outputs, splits.seen)]

    def write_results(self, folder, results, generations):
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in generations]
        write_text(folder / "generations.jsonl", "".join(lines))
        write_text(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")


def load_run(folder, device="auto", dtype="auto", model=None, data=None):
    """A run's folder -> its Run, with the weights of its best epoch. dtype auto: as the run was trained. model, data:
    where these are now, if they have moved."""
    path = Path(folder) / "best.pt"                     # there once the first epoch has ended
    best = load_tensors(path)
    with reading(path):
        trained, config = best.pop("trained"), best["config"]
        if config.get("version") != Run.version:
            raise ValueError("it was written by another version of this project")
    device, dtype, _ = choose_device(device, config["dtype"] if dtype == "auto" else dtype)
    run = Run(config | {"model": model or config["model"], "data": data or config["data"]}, device, dtype)
    with reading(path):
        run.model.load_trained(trained)
    run.best = best
    return run


# --------------------------------------------------------------------------------------------- baselines, and tables

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


def baselines(data, turns=1, sliding=False):
    """Scores of what needs no model -> {"lookup": the dictionary's, "human": the references', as if put out}."""
    splits = {split: make_pairs(dialogues, turns, sliding) for split, dialogues in read_dialogues(data).items()}
    lookup, training = Lookup(splits["train"]), [response for _, response in splits["train"]]
    seen = [query_key(query) in lookup.answers for query, _ in splits["test"]]
    outputs = {"lookup": [lookup.answer(query) for query, _ in splits["test"]], "human": [r for _, r in splits["test"]]}
    return {name: score(texts, splits["test"], seen, training) for name, texts in outputs.items()}


COLUMNS = {"bleu1": ("BLEU1", 3), "bleu2": ("BLEU2", 3), "bleu3": ("BLEU3", 3), "bleu4": ("BLEU4", 3),
           "novelty": ("Novelty", 3), "diversity": ("Diversity", 3), "distinct1": ("Dist-1", 3),
           "distinct2": ("Dist-2", 3), "nist": ("NIST", 2), "rouge_l": ("ROUGE-L", 3), "length": ("Length", 1),
           "perplexity": ("PPL", 1)}                    # a metric's title, and how many digits are shown


def mean_std(values, digits):
    """Several seeds' values -> mean ± sample standard deviation; a single one alone."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def metric_cells(seeds):
    """The metrics of each seed -> {title: cell}."""
    titles = {name: COLUMNS.get(name, (name, 3)) for name in seeds[0] if name != "n"}
    return {title: mean_std([m[name] for m in seeds], digits) for name, (title, digits) in titles.items()}


def markdown(rows, words=2):
    """[{column: cell}, ...] -> a Markdown table, whose first columns hold words, the others numbers."""
    lines = [list(rows[0]), ["---"] * words + ["---:"] * (len(rows[0]) - words), *(row.values() for row in rows)]
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(*runs, examples=()):
    """Contents of results.json -> a table, a row for all test pairs and one for the unseen ones; and some answers."""
    rows = [{"Test pairs": f"{part.replace('_', ', ')} ({results[part]['n']:,} pairs)", "Method": results["method"],
             "Swap": mean_std([results.get("swap")], 3), **metric_cells([results[part]])}
            for results in runs for part in ("test", "test_unseen")]
    text = [f"\n    query: {' / '.join(e['query'])}\nreference: {e['reference']}\n response: {e['response']}"
            for e in examples]
    return "\n".join([markdown(rows), *text])


def grouped_runs(path):
    """Finished runs below a folder, links followed -> {(data, title): [(config, label, [results of each seed]), ...]}.
    Runs that differ in the seed alone are one group; its label says in what it differs from others of its method, data
    and model."""
    files = glob.glob(f"{glob.escape(str(path))}/**/results.json", recursive=True)
    if not files:
        raise FileNotFoundError(f"{path} holds no finished run (no results.json below it)")
    groups = {}
    for file in sorted({Path(file).resolve() for file in files}):
        config = read_json(file.parent / "config.json")
        if config.get("version") != Run.version:
            raise ValueError(f"{file.parent} was written by another version of this project")
        key = json.dumps({k: v for k, v in config.items() if k not in ("seed", "dialogues")}, sort_keys=True)
        _, seeds = groups.setdefault(key, (config, {}))
        seeds.setdefault(config["seed"], read_json(file))               # a copy of a run is no new seed
    order, tables = ("data", "model", "turns", "pairs", "fraction"), defaultdict(list)
    for config, seeds in sorted(groups.values(), key=lambda group: (
            *(group[0][k] for k in order), list(METHODS).index(group[0]["method"]))):
        others = [c for c, _ in groups.values() if all(c[k] == config[k] for k in ("method", "data", "model"))]
        differing = [k for k in config if k not in ("seed", "dialogues", "fraction", "turns", "pairs")
                     and any(c.get(k) != config[k] for c in others)]
        label = ", ".join([config["method"], *(f"{k.replace('_', ' ')} {str(config[k])[:12]}" for k in differing)])
        tables[config["data"], data_and_model(config)].append((config, label, list(seeds.values())))
    return tables


def data_and_model(config):
    """What a run was tested on: data and model, and what a query is, if not the turn before the response."""
    turns = f", {config['turns']} turns" if config["turns"] > 1 else ""
    sliding = ", sliding" if config["pairs"] == "sliding" else ""
    return f"{Path(config['data']).name}, {Path(config['model']).name}{turns}{sliding}"


def table(path):
    """Runs below a folder -> Markdown, a table for each data set and model: the loss per token, the swap test, the
    metrics on all test pairs, and BLEU4 on the unseen ones; mean ± standard deviation over seeds. Then what needs no
    model."""
    def row(fraction, label, n, results):
        cells = metric_cells([r["test"] for r in results])
        del cells["PPL"]                                    # the loss says the same, in the swap test's unit
        losses = [math.log(r["test"]["perplexity"]) for r in results if r["test"]["perplexity"]]
        return {"Data": fraction, "Method": label, "Seeds": n, "Loss": mean_std(losses, 3),
                "Swap": mean_std([r.get("swap") for r in results], 3), **cells,
                "BLEU4 unseen": mean_std([r["test_unseen"]["bleu4"] for r in results], 3)}

    tables, text = grouped_runs(path), []
    for (data, name), groups in tables.items():
        rows = [row(f"{100 * config['fraction']:g}%", label, len(seeds), seeds) for config, label, seeds in groups]
        config, _, (counts, *_) = groups[0]
        with contextlib.suppress(OSError, ValueError):                  # the data may have moved since
            for system, results in baselines(data, config["turns"], config["pairs"] == "sliding").items():
                rows.append(row("100%", system, "-", [results]))
        if sum(name == other for _, other in tables) > 1:
            name = f"{Path(data).parent}/{name}"
        text.append(f"**{name}: {counts['test']['n']:,} test pairs, {counts['test_unseen']['n']:,} of them unseen**\n\n"
                    f"{markdown(rows)}\n")
    return "\n".join(text)


def read_lines(path):
    """A file of JSON lines -> list of dicts."""
    with reading(path), open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def compare(paths, queries=None, device="auto", dtype="auto"):
    """The answers of several runs side by side, as a Markdown table: to ten of their common test queries, evenly
    spaced, or to the lines of a file. Raises UsageError where the runs' test pairs differ."""
    if queries:
        asked = list(filter(None, map(clean_turn, Path(queries).read_text(encoding="utf-8-sig").split("\n"))))
        if not asked:
            raise ValueError(f"{queries} has no query in it, expected one in each line")
        answers = [list(map(load_run(path, device, dtype).reply, asked)) for path in paths]
    else:
        tests, answers = [read_lines(path / "generations.jsonl") for path in paths], []
        step = math.ceil(len(tests[0]) / 10) or 1
        for path, lines in zip(paths, tests):
            if [(e["query"], e["reference"]) for e in lines] != [(e["query"], e["reference"]) for e in tests[0]]:
                raise UsageError(f"{path} was not tested on the same pairs as {paths[0]}: ask them the lines of a "
                                 f"file, --queries FILE")
            answers.append([line["response"] for line in lines[::step]])
        asked = [" / ".join(line["query"]) for line in tests[0][::step]]
    rows = [dict(zip(["query", *map(str, paths)], row)) for row in zip(asked, *answers)]
    return markdown(rows, words=1 + len(paths))


@torch.no_grad()
def explain(folder, query, **options):
    """Look inside a prompt -> text: the words nearest to each of its vectors (`dynamic`, say), the reply, and the reply
    behind the prompts of three other queries of the test set that are at least as long. options: of `load_run`."""
    run, lines = load_run(folder, **options), []
    model, decode, ids = run.model, run.tokenizer.decode, run.encode_query(query)
    queries = [run.encode_query(line["query"]) for line in read_lines(folder / "generations.jsonl")]
    if not model.encoder.writes_past:
        prompt = model.prompt(model.batch([(ids, [])]))[0]                                      # (k, C)
        words = torch.nn.functional.normalize(model.gpt.wte.weight, dim=-1)                     # by angle
        for i, nearest in enumerate((prompt @ words.T).topk(5).indices.tolist()):
            token = decode([ids[i]]) if len(prompt) == len(ids) else str(i)
            lines.append(f"{token!r:>16}  ->  " + "  ".join(repr(decode([word])) for word in nearest))
    own = run.tokenizer.encode_ordinary(run.answer([ids])[0]) + [run.tokenizer.eot_token]
    own = own[:run.config["max_new_tokens"]]
    others = sorted((other for other in queries if len(other) >= len(ids) and other != ids), key=len)[:3]
    for other in [ids, *others]:                        # swapped, the first row gets the prompt of the last
        loss = model([(ids, own), (other, own)], swapped=True)[:len(own)].mean().item()
        answer = run.answer([ids, other], swapped=True)[0]
        lines.append(f"behind the prompt of {decode(other[:-1])!r}: {answer!r}  (loss of the first reply: {loss:.2f})")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ figures, chat, and export

COLORS = {method: f"C{i}" for i, method in enumerate(METHODS)}          # a method's colour is the same in every figure


def new_figure(width, height):
    try:
        from matplotlib.figure import Figure            # without pyplot: no window, and a notebook's settings stay
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def plot_curves(folder):
    """A run's losses and its validation BLEU4 over the epochs, the tested one marked -> curves.png."""
    config, log = read_json(folder / "config.json"), read_lines(folder / "log.jsonl")
    figure, epochs, color = new_figure(10, 4), [line["epoch"] for line in log], COLORS[config["method"]]
    figure.suptitle(f"{config['method']} on {data_and_model(config)}, seed {config['seed']}", parse_math=False)
    losses, bleu = figure.subplots(1, 2)
    losses.plot(epochs[1:], [line["train_loss"] for line in log[1:]], "--o", color="gray", label="training")
    for panel, title, key in (losses, "loss per response token (nats)", "val_loss"), (bleu, "BLEU4", "val_bleu4"):
        panel.plot(epochs, [line[key] for line in log], "-o", color=color, label="validation")
        if (folder / "results.json").exists():
            tested = read_json(folder / "results.json")["epoch"]
            panel.axvline(tested, color="black", linewidth=1, linestyle=":", label="tested")
        panel.set(xlabel="epoch", title=title, xticks=epochs[::len(epochs) // 10 + 1])
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(folder / "curves.png", dpi=150)
    return folder / "curves.png"


def plot_runs(path):
    """Figure 2 of Valvoda et al.: BLEU4, novelty and diversity over the training fraction, a row of panels for each
    data set and model, a line for each method -> figure2.png. Bars are standard deviations over seeds."""
    tables = [(title, groups) for (_, title), groups in grouped_runs(path).items()
              if groups[0][2][0]["test_unseen"]["n"]]   # without unseen pairs, their metrics are null
    if not tables:
        raise ValueError(f"{path} has no run with unseen test pairs, so there is nothing to draw")
    figure = new_figure(13, 4 * len(tables))
    for (title, groups), part in zip(tables, figure.subfigures(len(tables), squeeze=False)[:, 0]):
        n, unseen = (groups[0][2][0][test]["n"] for test in ("test", "test_unseen"))
        part.suptitle(f"{title}: {n:,} test pairs (solid), {unseen:,} of them unseen (dotted); "
                      f"bars: standard deviation over seeds", parse_math=False)
        lines, panels = defaultdict(list), part.subplots(1, 3)
        for config, label, results in groups:
            lines[label, COLORS[config["method"]]].append((100 * config["fraction"], results))
        for panel, metric in zip(panels, ("bleu4", "novelty", "diversity")):
            for marker, ((label, color), points) in zip("osD^vPX*<>" * len(lines), sorted(lines.items())):
                for test, style, fill, name in ("test", "-", "full", label), ("test_unseen", ":", "none", None):
                    values = [[r[test][metric] for r in results] for _, results in points]
                    spread = [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in values]
                    panel.errorbar([x for x, _ in points], list(map(statistics.fmean, values)), spread, label=name,
                                   color=color, linestyle=style, marker=marker, fillstyle=fill, markersize=5, capsize=3)
            panel.set(title=COLUMNS[metric][0], xlabel="training data (%)", xlim=(0, 105), ylim=(0, None))
            panel.grid(alpha=0.3)
        panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(Path(path) / "figure2.png", dpi=150)
    return Path(path) / "figure2.png"


def chat(folder, temperature=0.0, top_p=1.0, **options):
    """Talk to a run: it reads the last N turns, as it was trained to. An empty line begins a new dialogue."""
    with contextlib.suppress(ImportError):
        import readline                                 # noqa: F401: it gives `input` arrow keys and a history
    run, turns = load_run(folder, **options), []
    method = run.config["method"]
    print(f"{method} reads the last {run.config['turns']} turn(s). An empty line begins a new dialogue, Ctrl-D ends.")
    sys.stdin.reconfigure(errors="replace")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            said = clean_turn(input("you: "))
            turns = [*turns, said] if said else []
            if said:
                turns.append(run.reply(turns, temperature, top_p))
                print(f"{method}: {turns[-1]}", flush=True)
    print()


def export(folder, target, **options):
    """Write a finetune run as a checkpoint for transformers, one of prompt-tuning, p-tuning or prefix for peft."""
    run = load_run(folder, "cpu", "float32", **options)
    method, model, source = run.config["method"], run.model, checkpoint_folder(run.config["model"])
    kinds = {"finetune": None, "prompt-tuning": "PROMPT_TUNING", "p-tuning": "P_TUNING", "prefix": "PREFIX_TUNING"}
    if method not in kinds or method != "finetune" and model.gpt.wte.weight.requires_grad:
        raise UsageError(f"this {method} run has no form that transformers or peft could load: --export takes runs of "
                         f"{', '.join(kinds)}, and an adapter for peft cannot hold word embeddings that were trained")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty, expected a new folder")
    target.mkdir(parents=True, exist_ok=True)
    if method == "finetune":
        model.gpt.save_pretrained(target)
        for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json", "tokenizer_config.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, target / name)
        print(f"wrote {target}: load it with transformers, or with --model {target}")
        return
    encoder, c = model.encoder, model.gpt.config
    with torch.no_grad():           # as peft saves them: the virtual tokens themselves, not the network that made them
        prompt = encoder.mlp(encoder.table) if encoder.writes_past else encoder(torch.zeros(1, 1, c.n_embd), None)[0]
    write_safetensors(target / "adapter_model.safetensors", {"prompt_embeddings": prompt})
    write_text(target / "adapter_config.json", json.dumps({
        "peft_type": kinds[method], "task_type": "CAUSAL_LM", "num_virtual_tokens": len(prompt), "token_dim": c.n_embd,
        "num_layers": c.n_layer, "num_attention_heads": c.n_head, "num_transformer_submodules": 1,
        "base_model_name_or_path": str(source), "inference_mode": True}, indent=2) + "\n")
    print(f"wrote {target}: load it with peft.PeftModel.from_pretrained(gpt, '{target}')")


# ------------------------------------------------------------------------------------------------------- command line

class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"{message} (--help lists the flags)")


def run_command(main):
    """Run main(); what a user can cause ends in one sentence: status 2 for usage, 1 for data, checkpoint or folder."""
    with contextlib.suppress(AttributeError):           # a notebook's stdout has no such method
        sys.stdout.reconfigure(errors="replace")        # a log file on Windows cannot hold every character
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if str(cache_folder()) in text and "delete it" not in text:
            text += "; if it is a broken file, delete it, and it is downloaded again"
        if isinstance(error, FileNotFoundError) and error.filename:
            text = f"{error.filename} is missing"
        if isinstance(error, RuntimeError):
            if not re.search("memory|CUDA|cuDNN|NCCL", text):
                raise                                   # a bug
            text = f"out of memory, or a GPU that failed: a smaller --batch-size or --device cpu may help ({text:.200})"
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                            argument_default=argparse.SUPPRESS)         # so that `given` holds what was given alone
    add, modes = parser.add_argument, parser.add_mutually_exclusive_group()
    add("paths", type=Path, nargs="*", metavar="RUN", default=[], help="a run's folder, or (--table, --plot) one above")
    modes.add_argument("--chat", action="store_true", help="talk to the run")
    modes.add_argument("--explain", metavar="QUERY", help="what the prompt for this query looks like, and does")
    modes.add_argument("--export", type=Path, metavar="FOLDER", help="write the run as a checkpoint or an adapter")
    modes.add_argument("--compare", action="store_true", help="print the runs' answers side by side, in Markdown")
    modes.add_argument("--table", action="store_true", help="print all runs below the folder, in Markdown")
    modes.add_argument("--plot", action="store_true", help="draw the run's curves, or figure 2 of all runs below")
    modes.add_argument("--lookup", action="store_true", help="score the dictionary and the human references")
    add("--data", help="with --lookup: as in train.py (default: sample); else where a run's dialogues are now")
    add("--model", help="where a run's model is now, if it has moved")
    add("--queries", type=Path, metavar="FILE", help="with --compare: ask the runs the lines of this file")
    add("--overwrite", action="store_true", help="replace results.json though the code has changed")
    add("--temperature", type=float, help="with --chat: 0 is greedy (default), 1 samples from the model's distribution")
    add("--top-p", type=float, help="with --chat: sample from this share of the probability (default: 1)")
    add("--device", help="auto (default), cpu, cuda, cuda:1 ... or mps")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of matrix products (default: the run's)")
    given = vars(parser.parse_args())
    useful = {"chat": ("model", "device", "dtype", "temperature", "top_p"), "explain": ("model", "device", "dtype"),
              "export": ("model",), "compare": ("device", "dtype", "queries"), "table": (), "plot": (),
              "lookup": ("data",), "scoring": ("model", "device", "dtype", "data", "overwrite")}
    paths, mode = given.pop("paths"), next((name for name in useful if name in given), "scoring")
    value = given.pop(mode, None)
    for flag in given.keys() - useful[mode]:
        parser.error(f"--{flag.replace('_', '-')} has no use in {mode}")
    expected = {"lookup": 0, "compare": max(1, len(paths))}.get(mode, 1)
    if len(paths) != expected:
        parser.error(f"{len(paths)} folders are given, expected {expected}")
    if mode == "chat":
        chat(*paths, **given)
    elif mode == "explain":
        print(explain(*paths, value, **given))
    elif mode == "export":
        export(*paths, value, **given)
    elif mode == "compare":
        print(compare(paths, **given))
    elif mode == "table":
        print(table(*paths))
    elif mode == "plot":
        print("wrote", plot_curves(*paths) if (paths[0] / "best.pt").exists() else plot_runs(*paths))
    elif mode == "lookup":
        found = baselines(given.get("data", "sample"))
        print(report(*({"method": name, **results} for name, results in found.items())))
    else:
        rescore(*paths, **given)


def rescore(folder, overwrite=False, **options):
    """Score a run on its test set again, print the table, and only then replace what it wrote before."""
    run = load_run(folder, **options)
    results, generations = run.test(load_splits(run.config, run.tokenizer), run.best)
    print(report(results))
    if not (folder / "results.json").exists():          # a run that can be resumed must not come to look finished
        print("\nThe run is unfinished: nothing was written.")
    elif read_json(folder / "config.json").get("code") != run.code and not overwrite:
        print("\nmodel.py or prompt_encoder.py has changed since this run began, so these may be another model's "
              "scores: nothing was written (--overwrite replaces results.json).")
    else:
        run.write_results(folder, results, generations)


if __name__ == "__main__":
    run_command(main)
