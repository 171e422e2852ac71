"""Make the two embedded checkpoints: tiny-gpt2, pre-trained on prose, and tiny-dialogpt, the same trained on with dialogues.

    python tiny/pretrain.py --prose ../shared/pretrain/prose/*.txt --dialogues ../shared/pretrain/dialogues/*.txt

Prose holds one paragraph per line, dialogues one conversation per line, with turns separated by `__eou__`. As DialoGPT
came from GPT-2, so the second model starts from the first one's weights, and turns end with <|endoftext|>. Interrupted,
the same command goes on from the last save. Needs tiny/requirements.txt.
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import load_tokenizer
from model import GPT, GPTConfig

HERE = Path(__file__).resolve().parent
ROWS, LENGTH = 32, 128          # a training step: 32 rows of 128 tokens


def train_vocabulary(files, size, folders):
    """Byte-level BPE in GPT-2's own format: 256 bytes, then the merges in order, <|endoftext|> last."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.pre_tokenizers import ByteLevel
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((line.replace("__eou__", "\n") for f in files for line in open(f, encoding="utf-8")),
                            vocab_size=size - 1, min_frequency=2)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    words = sorted(ByteLevel.alphabet()) + [a + b for a, b in merges] + ["<|endoftext|>"]
    assert len(set(words)) == size
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")


def encode(files, tokenizer):
    """Lines -> two token streams (training, held out): each paragraph or turn ends with <|endoftext|>; every 100th line is held out."""
    streams = [], []
    for file in files:
        for i, line in enumerate(open(file, encoding="utf-8")):
            for turn in line.split("__eou__"):
                streams[i % 100 == 99].extend(tokenizer.encode_ordinary(turn.strip()) + [tokenizer.eot_token])
    return [torch.from_numpy(np.array(s, dtype=np.int64)) for s in streams]


def loss_of(gpt, rows, offsets):
    """Mean loss of rows (B, T + 1), the b-th read at positions offsets[b], offsets[b] + 1, ..."""
    hidden, _ = gpt.hidden_states(gpt.wte(rows[:, :-1]), positions=offsets[:, None] + torch.arange(rows.size(1) - 1))
    return F.cross_entropy(gpt.logits(hidden).flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(gpt, stream):
    """exp of the mean loss per token, over windows of 257 tokens."""
    windows = stream[:len(stream) // 257 * 257].view(-1, 257)[:400]
    losses = [loss_of(gpt, w, torch.zeros(len(w), dtype=torch.int64)).item() * len(w) for w in windows.split(ROWS)]
    return math.exp(sum(losses) / len(windows))


def pretrain(gpt, stream, held_out, tokens, lr, save):
    """AdamW, 200 steps of warm-up, then a cosine to a tenth; half of the rows start at position 0, half anywhere."""
    steps = tokens // (ROWS * LENGTH)
    optimizer = torch.optim.AdamW([{"params": [p for p in gpt.parameters() if p.dim() > 1], "weight_decay": 0.1},
                                   {"params": [p for p in gpt.parameters() if p.dim() == 1], "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.98), fused=True)
    first = 0
    if save.exists():
        state = torch.load(save, weights_only=True)
        first = state["step"]
        gpt.load_state_dict(state["gpt"])
        optimizer.load_state_dict(state["optimizer"])
    far = gpt.config.n_positions - LENGTH
    started = time.time()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)                     # so a resumed run sees the same rows
        starts = torch.randint(len(stream) - LENGTH - 1, (ROWS, 1), generator=generator)
        offsets = torch.randint(far + 1, (ROWS,), generator=generator) * (torch.arange(ROWS) % 2)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 200, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(gpt, stream[starts + torch.arange(LENGTH + 1)], offsets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            speed = (step + 1 - first) * ROWS * LENGTH / (time.time() - started)
            ppl = f"  held-out perplexity {perplexity(gpt, held_out):.1f}" if (step + 1) % 1000 == 0 else ""
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {speed:,.0f} tokens/s{ppl}", flush=True)
            torch.save({"step": step + 1, "gpt": gpt.state_dict(), "optimizer": optimizer.state_dict()}, f"{save}.tmp")
            os.replace(f"{save}.tmp", save)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prose", nargs="+", required=True, help="text files, one paragraph per line")
    parser.add_argument("--dialogues", nargs="+", required=True, help="text files, one conversation per line, turns separated by __eou__")
    parser.add_argument("--tokens", type=int, default=20_500_000, help="training tokens for each of the two models")
    parser.add_argument("--out", type=Path, default=HERE, help="where tiny-gpt2/ and tiny-dialogpt/ are written")
    args = parser.parse_args()
    folders = [args.out / "tiny-gpt2", args.out / "tiny-dialogpt"]
    if not (folders[1] / "merges.txt").exists():
        train_vocabulary(args.prose + args.dialogues, 4096, folders)
    tokenizer = load_tokenizer(folders[0])
    texts = {"prose": encode(args.prose, tokenizer), "dialogues": encode(args.dialogues, tokenizer)}
    for name, (stream, held_out) in texts.items():
        print(f"{name}: {len(stream):,} tokens, {len(held_out):,} held out", flush=True)

    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=4096, n_positions=512, n_embd=192, n_layer=6, n_head=6))
    for folder, name, lr in zip(folders, texts, (2e-3, 1e-3)):
        stream, held_out = texts[name]
        pretrain(gpt, stream, held_out, args.tokens, lr, folder / "training.pt")
        gpt.save_pretrained(folder, dtype=torch.float16)
        for text, (_, held) in texts.items():
            print(f"{folder.name}: perplexity {perplexity(gpt, held):.1f} on held-out {text}")
        for start in ("The old man", "How are you today?"):
            query = tokenizer.encode_ordinary(start) + [tokenizer.eot_token] * start.endswith("?")
            for answer in gpt.generate([query] * 3, 40, tokenizer.eot_token, temperature=0.8, top_p=0.9):
                print(f"    {start!r} -> {tokenizer.decode(answer)!r}")


if __name__ == "__main__":
    main()
