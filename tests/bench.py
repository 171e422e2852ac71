"""Ours against transformers and peft on the same work, side by side in one run, as a Markdown table.

    python tests/bench.py                                # all rows, 20 minutes on two cores
    python tests/bench.py --only soft generate-16        # some rows
    python tests/bench.py --quick                        # a smoke run: two layers, one batch, numbers mean nothing

The work: GPT-2 small's shape with random weights, dropout 0, real DailyDialog pairs, queries and responses up to 128 tokens.

    ours        as train.py and evaluate.py do it: bfloat16 where it is fast, batches of similar length, fused AdamW;
                answers leave and queries enter while others are under way, never more than a batch at once
    as written  transformers as its users write it: float32, batches in shuffled order, labels=, torch.optim.AdamW as it comes
    at best     the same code with bfloat16 autocast and batches of similar length

All clip gradients at norm 1, as train.py does, and transformers' Trainer unless told otherwise.

Before timing, both sides must compute the same loss (float32, 1e-3) or the same tokens. Every round draws new batches, one from
each stretch of the epoch's batches in order of length, so that few stand for all; then the sides, each in a process of its own, take
turns, and the median over rounds counts.
"""
import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
from data import checkpoint_folder, encode_pairs, group_by_length, load_tokenizer, make_batch, make_pairs, read_dialogues  # noqa: E402
from evaluate import choose_device  # noqa: E402
from model import GPT, read_config  # noqa: E402
from prompt_encoder import PromptedGPT  # noqa: E402
from train import clip, keep_memory  # noqa: E402

LIMIT, EOT = 128, 50256
GOALS = {"soft": (6, 3), "dynamic": (6, 3), "finetune": (5, 2.5), "prefix": (5, 2.5), "dialogprompt": (5, 2.5),    # as written, at best
         "generate-16": (5, 2.5), "generate-64": (5, 2.5), "memory": (0.5, 0.6)}
SIDES = {"ours": choose_device("cpu", "auto")[1], "as written": torch.float32, "at best": torch.bfloat16}


# ------------------------------------------------------------------------------------------------------ the two sides

class Ours(nn.Module):
    def __init__(self, folder, method, dtype):
        super().__init__()
        self.model = PromptedGPT(GPT.from_pretrained(folder), method, max_query=LIMIT, dtype=dtype)

    def forward(self, examples):
        """[(query ids, response ids), ...] -> mean loss per response token."""
        return self.model(make_batch(examples, self.model.encoder.slots)) / sum(len(r) for _, r in examples)

    def answer(self, examples, size):
        """Greedy answers, size at a time, each as long as its reference: no token is -1, so none ends early."""
        groups = group_by_length([(q, []) for q, _ in examples], size // 4)
        order = [i for indices in groups for i in indices]
        batches = (make_batch([examples[i] for i in indices], self.model.encoder.slots, responses=False) for indices in groups)
        found = self.model.answer(batches, [len(examples[i][1]) for i in order], eot=-1, batch_size=size)
        return [answer for _, answer in sorted(zip(order, found))]


def pad(rows, value=0):
    return pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=value)


class Theirs(nn.Module):
    """Fine-tuning with transformers, and what the other methods share. It is imported here, as our process has no need of it."""

    frozen = None               # what of the GPT is not trained: "blocks", "all" or None

    def __init__(self, folder, dtype):
        super().__init__()
        from transformers import GPT2LMHeadModel, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.gpt, self.dtype = GPT2LMHeadModel.from_pretrained(folder).train(), dtype
        self.gpt.requires_grad_(self.frozen is None)
        self.gpt.transformer.wte.requires_grad_(self.frozen != "all")

    def forward(self, examples):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.loss(examples)

    def inputs(self, examples, prompts=None):
        """What GPT2LMHeadModel reads: mask and labels (-100 where there is no loss), with room for prompts (m of them, or none)."""
        m = [len(q) if prompts else 0 for q, _ in examples]
        return {"attention_mask": pad([[1] * (m + len(q) + len(r)) for m, (q, r) in zip(m, examples)]),
                "labels": pad([[-100] * (m + len(q)) + r for m, (q, r) in zip(m, examples)], -100)}

    def loss(self, examples):
        return self.gpt(pad([q + r for q, r in examples]), **self.inputs(examples)).loss

    def answer(self, examples):
        from transformers import StoppingCriteria, StoppingCriteriaList
        rows, limits = [q for q, _ in examples], torch.tensor([len(r) for _, r in examples])
        T = max(map(len, rows))

        class AtReference(StoppingCriteria):
            def __call__(self, ids, scores, **others):
                return ids.size(1) - T >= limits                                        # row by row

        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            ids = self.gpt.eval().generate(
                torch.tensor([[EOT] * (T - len(row)) + row for row in rows]),
                attention_mask=torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows]), do_sample=False,
                max_new_tokens=int(limits.max()), pad_token_id=EOT, stopping_criteria=StoppingCriteriaList([AtReference()]))
        return [row[:limit] for row, limit in zip(ids[:, T:].tolist(), limits)]


class TheirSoft(Theirs):
    frozen = "blocks"

    def __init__(self, folder, dtype):
        super().__init__(folder, dtype)
        self.prompt = nn.Embedding(LIMIT, self.gpt.config.n_embd)
        nn.init.normal_(self.prompt.weight, std=0.02)

    def prompts(self, words):
        """Embeddings of the queries, padding behind them (B, M, C) -> prompt vectors (B, M, C)."""
        return self.prompt.weight[:words.size(1)].expand(len(words), -1, -1)

    def loss(self, examples):
        words = self.gpt.transformer.wte(pad([q + r for q, r in examples]))             # (B, T, C)
        prompts = self.prompts(words[:, :max(len(q) for q, _ in examples)])             # a response is padding here
        rows = [torch.cat((p[:len(q)], w[:len(q) + len(r)])) for p, w, (q, r) in zip(prompts, words, examples)]
        return self.gpt(inputs_embeds=pad_sequence(rows, batch_first=True), **self.inputs(examples, prompts=True)).loss


class TheirDynamic(TheirSoft):
    def __init__(self, folder, dtype):
        from transformers import GPT2Config, GPT2Model
        super().__init__(folder, dtype)
        self.prompt = GPT2Model(GPT2Config(**self.gpt.config.to_dict() | {"n_layer": 2, "vocab_size": 1, "n_positions": LIMIT}))

    def prompts(self, words):
        return self.prompt(inputs_embeds=words).last_hidden_state                       # causal, so padding needs no mask


class TheirPrefix(Theirs):
    frozen = "all"

    def __init__(self, folder, dtype):
        from peft import PrefixTuningConfig, get_peft_model
        super().__init__(folder, dtype)
        self.gpt = get_peft_model(self.gpt, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10, prefix_projection=True,
                                                               encoder_hidden_size=512))
        self.prompt = self.gpt.prompt_encoder["default"]


class TheirDialogPrompt(Theirs):
    frozen = "all"

    def __init__(self, folder, dtype):
        from transformers import GPT2Config, GPT2Model
        super().__init__(folder, dtype)
        self.prompt = GPT2Model(GPT2Config(**self.gpt.config.to_dict() | {"vocab_size": 5, "n_positions": 5, "add_cross_attention": True}))

    def loss(self, examples):
        query, inputs = pad([q for q, _ in examples]), self.inputs(examples)
        mask = pad([[1] * len(q) for q, _ in examples])
        context = self.gpt.transformer(query, attention_mask=mask, use_cache=False).last_hidden_state
        past = self.prompt(torch.arange(5).expand(len(query), -1), encoder_hidden_states=context, encoder_attention_mask=mask, use_cache=True)
        inputs["attention_mask"] = torch.cat((torch.ones(len(query), 5, dtype=torch.int64), inputs["attention_mask"]), dim=1)
        return self.gpt(pad([q + r for q, r in examples]), past_key_values=past.past_key_values.self_attention_cache, **inputs).loss


THEIRS = {"finetune": Theirs, "soft": TheirSoft, "dynamic": TheirDynamic, "prefix": TheirPrefix, "dialogprompt": TheirDialogPrompt}


@torch.no_grad()
def copy_prompt(ours, theirs):
    """Give their prompt encoder our weights; transformers stores its matrices the other way round."""
    mine = dict(ours.model.encoder.named_parameters())
    for name, p in theirs.prompt.named_parameters():
        name = {"weight": "table", "embedding.weight": "table"}.get(name, name.replace("transform.", "mlp."))
        if name in mine:
            p.copy_(mine[name].t() if name.endswith(("attn.weight", "c_proj.weight", "c_fc.weight")) else mine[name])
    if "c_last.weight" in mine:                                     # of the last layer, DialogPrompt has keys and values alone
        C, last = mine["c_last.weight"].size(1), theirs.prompt.h[-1]
        last.ln_1.load_state_dict(ours.model.encoder.ln_last.state_dict())
        last.attn.c_attn.weight[:, C:] = mine["c_last.weight"].t()
        last.attn.c_attn.bias[C:] = mine["c_last.bias"]


# ------------------------------------------------------------------------------------------------------ what is measured

def trainer(side, method, folder):
    """A function that trains on batches."""
    if side == "ours":
        keep_memory()
    model = Ours(folder, method, SIDES[side]) if side == "ours" else THEIRS[method](folder, SIDES[side])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True if side == "ours" else None)

    def run(batches):
        for examples in batches:
            loss = model(examples)
            loss.backward()
            clip(parameters, optimizer) if side == "ours" else nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
    return run


def answerer(side, folder, size):
    """A function that answers batches: theirs one after the other; ours lets the next queries in as answers are finished."""
    if side == "ours":
        model = Ours(folder, "finetune", SIDES[side])
        return lambda batches: model.answer([example for batch in batches for example in batch], size)
    model = Theirs(folder, SIDES[side])
    return lambda batches: [model.answer(batch) for batch in batches]


def check(row, folder, examples):
    """Both sides compute the same, in float32."""
    if row.startswith("generate"):
        ours, theirs = Ours(folder, "finetune", torch.float32).answer(examples, 4), Theirs(folder, torch.float32).answer(examples)
        assert ours == theirs, f"{row}: ours {ours}, theirs {theirs}"
        return
    ours, theirs = Ours(folder, row, torch.float32), THEIRS[row](folder, torch.float32)
    if row != "finetune":
        copy_prompt(ours, theirs)
    losses = ours(examples).item(), theirs(examples).item()
    assert abs(losses[0] / losses[1] - 1) < 1e-3, f"{row}: ours {losses[0]}, theirs {losses[1]}"


def draw(side, row, examples, size, n, seed):
    """n batches of an epoch, one from each stretch of its batches in order of their longest row. Both sides that group get the same ones."""
    known, slots = examples, (lambda m: m) if row in ("soft", "dynamic") else (lambda m: 0)
    if row.startswith("generate"):
        known = [(q, []) for q, _ in examples]                              # before it answers, nobody knows how long the answers are
    batches = group_by_length(known, size, seed, slots)
    if side == "as written":
        order = [i for batch in batches for i in batch]
        random.Random(seed).shuffle(order)
        batches = [order[i:i + size] for i in range(0, len(order), size)]
    batches.sort(key=lambda batch: max(slots(len(known[i][0])) + sum(map(len, known[i])) for i in batch))
    chosen = [random.Random(seed + i).choice(batches[len(batches) * i // n:len(batches) * (i + 1) // n]) for i in range(n)]
    return [[examples[i] for i in batch] for batch in chosen]


def flops(row, config, examples):
    """Operations that the work needs: 2 for each parameter a token meets, once forward, once more if a gradient passes through, and
    once more if the parameter is trained. Padding, attention's scores and all that is done twice do not count."""
    C, L, V = config.n_embd, config.n_layer, config.vocab_size
    block, queries, responses = 12 * C * C, sum(len(q) for q, _ in examples), sum(len(r) for _, r in examples)
    tokens = queries + responses
    if row.startswith("generate"):
        return 2 * (L * block * tokens + V * C * responses)
    if row == "finetune":
        return 2 * 3 * (L * block * tokens + V * C * responses)
    if row in ("soft", "dynamic"):
        controller = 3 * 2 * block * queries if row == "dynamic" else 0
        return 2 * (2 * L * block * (tokens + queries) + 3 * V * C * responses + controller)
    k, encoder = 10, 3 * (512 * C + 512 * 2 * L * C)                        # prefix: a table and an MLP, once for the batch
    if row == "dialogprompt":                                               # the context; k tokens a pair; keys and values of the context
        k, encoder = 5 * len(examples), 3 * (L * block + 2 * L * C * C)
    context = L * block * queries + 2 * L * 2 * C * C * queries if row == "dialogprompt" else 0
    return 2 * (2 * L * block * tokens + 2 * V * C * responses + k * encoder + context)


def peak(dtype, n=4096):
    """This machine's matrix multiplications, in operations per second: the best of five."""
    a, b = torch.randn(2, n, n).to(dtype)
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begun)
    return 2 * n ** 3 / min(seconds)


def serve(side, row, folder, examples, batches):
    """One side in a process of its own: for each seed that is asked for, a round of work -> seconds, units and operations."""
    answers, size = row.startswith("generate"), int(row.split("-")[1]) if row.startswith("generate") else 8
    run = answerer(side, folder, size) if answers else trainer(side, row, folder)
    config = read_config(Path(folder) / "config.json")
    if answers:
        batches *= 64 // size                                               # 64 queries or more: the last to end are few among them
    for seed in map(int, sys.stdin):                                        # seed 0 warms up
        drawn = draw(side, row, examples, size, batches, seed)
        begun = time.perf_counter()
        run(drawn)
        seconds, work = time.perf_counter() - begun, [example for batch in drawn for example in batch]
        print(seconds, sum(len(r) for _, r in work) if answers else len(work), flops(row, config, work), flush=True)


def race(row, folder, command, rounds):
    """-> for each side: pairs (or reference tokens) per second, and operations per second, medians over rounds."""
    servers = {side: subprocess.Popen([*command, "--serve", side, row, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for side in SIDES}
    speeds = {side: [] for side in SIDES}
    for seed in range(rounds + 1):
        for side, server in servers.items():
            print(seed, file=server.stdin, flush=True)
            seconds, units, operations = map(float, server.stdout.readline().split())
            if seed > 0:
                speeds[side].append((units / seconds, operations / seconds))
    for server in servers.values():
        server.communicate()
    return {side: [statistics.median(values) for values in zip(*speeds[side])] for side in SIDES}


def peak_memory(side, folder, examples, batches):
    """Train soft on a sample of an epoch and on its longest batch -> GB that were resident at most (Linux), in a process of its own."""
    trainer(side, "soft", folder)(draw(side, "soft", examples, 8, batches, 1) + draw(side, "soft", examples, 8, len(examples) // 8, 1)[-1:])
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6 * 1.024


def load_examples():
    """DailyDialog's training pairs in GPT-2's tokens: both from a folder beside the repository, or downloaded."""
    data, bpe = SHARED / "dailydialog", SHARED / "gpt2-bpe"
    dialogues = read_dialogues(data if data.is_dir() else "dailydialog")["train"]
    return encode_pairs(make_pairs(dialogues), load_tokenizer(bpe if bpe.is_dir() else checkpoint_folder("gpt2")), LIMIT, LIMIT)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GOALS), default=list(GOALS), metavar="ROW", help=f"some of: {', '.join(GOALS)}")
    parser.add_argument("--batches", type=int, default=4, help="batches in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with batches of its own (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: two layers, one batch, one round")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)                    # SIDE FOLDER: these two are for
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)                     # SIDE ROW FOLDER: processes of one side
    args = parser.parse_args()
    examples = load_examples()
    if args.memory:
        print(peak_memory(*args.memory, examples, args.batches))
        return
    if args.serve:
        serve(*args.serve, examples, args.batches)
        return
    from transformers import GPT2Config, GPT2LMHeadModel
    if args.quick:
        args.batches, args.rounds = 1, 1
    command = [sys.executable, __file__, "--batches", str(args.batches)]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = GPT2Config(n_layer=2 if args.quick else 12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        model = GPT2LMHeadModel(config)
        model.generation_config.eos_token_id = None                         # the reference's length alone ends an answer
        model.save_pretrained(folder)
        del model
        peaks = {dtype: peak(dtype) for dtype in (torch.float32, torch.bfloat16)}
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; matrix multiplication: " + ", ".join(
            f"{str(dtype).removeprefix('torch.')} {p / 1e9:,.0f} GFLOP/s" for dtype, p in peaks.items()) +
            f"; {args.rounds} rounds of {args.batches} batches\n")
        print("| Work | ours | theirs, as written | theirs at best | ours / as written (goal) | ours / best (goal) | share of peak: ours, as written, best |\n"
              "|---|---:|---:|---:|---:|---:|---:|")
        for row in args.only:
            if row == "memory":
                values = [float(subprocess.run([*command, "--memory", side, folder], check=True, capture_output=True, text=True).stdout)
                          for side in SIDES]
                name, unit, shares, sign = "peak memory, train soft", "GB", "", "≤"
            else:
                check(row, folder, draw("ours", row, examples, 4, 3, seed=0)[1])
                result = race(row, folder, command, args.rounds)
                values, operations = zip(*result.values())
                shares = ", ".join(f"{o / peaks[dtype]:.0%}" for o, dtype in zip(operations, SIDES.values()))
                name, unit, sign = (row.replace("-", ", batch "), "tokens/s", "≥") if row.startswith("generate") else (f"train {row}", "pairs/s", "≥")
            ours, *theirs = values
            print(f"| {name} | " + " | ".join(f"{v:,.{0 if v >= 100 else 2}f} {unit}" for v in values) + " | " + " | ".join(
                f"{ours / v:.2f} ({sign} {goal})" for v, goal in zip(theirs, GOALS[row])) + f" | {shares} |", flush=True)


if __name__ == "__main__":
    main()
