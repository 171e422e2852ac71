"""GPT-2 from scratch, in one file that works alone: the network, text generation, and checkpoints on disk.

The names are those of the published checkpoints (wte, wpe, h, ln_1, attn.c_attn ...), so that loading is one loop.
Shape letters, the same in every file of this project:
    B batch    T tokens    C embedding width    H heads    D = C / H, width of a head    L layers    V vocabulary
    P positions that stand before the row as keys and values: those of a prefix, or of the KV cache

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""
import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The shape of a GPT-2. The defaults are the smallest published one's (124M parameters)."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None              # width of the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | None = None         # <|endoftext|>; None or out of range: the last of the vocabulary
    dropout: float = 0.0                    # in training only: on embeddings, attention and residual branches

    def __post_init__(self):
        if self.eos_token_id not in range(self.vocab_size):
            self.eos_token_id = self.vocab_size - 1


class Attention(nn.Module):
    """Causal self-attention: softmax(q k^T / sqrt(D)) v, where each position reads itself and those before it."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f"n_embd {config.n_embd} does not divide into n_head {config.n_head}"
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)       # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, past=None, mask=None):
        """x (B, T, C) -> y (B, T, C), and the keys and values, each (B, H, P + T, D), of all that could be read.

        past: keys and values, each (B, H, P, D), of what stands before the row: every position may read them.
        mask: True where a position may be read, (B, 1, T, P + T) or what broadcasts to it: elsewhere the score becomes
        -inf, which softmax turns into 0. None: every position reads the past, itself, and what stands before it.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in (q, k, v))    # (B, T, C) -> (B, H, T, D)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)   # (B, H, P + T, D)
            if mask is None:            # P = 2, T = 3: xxx.. / xxxx. / xxxxx, where is_causal has x.... / xx... / xxx..
                P = k.size(2) - T
                mask = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)              # (B, H, T, D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.c_proj = nn.Linear(inner, config.n_embd)

    def forward(self, x):
        # GPT-2 was trained with the tanh form of GELU; PyTorch's default, the exact form, differs by up to 5e-4.
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, past=None, mask=None):
        y, present = self.attn(self.ln_1(x), past, mask)
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.ln_2(x))), present


def init_weights(module):
    """GPT-2's initialisation, for `Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class GPT(nn.Module):
    """GPT-2, with the output layer tied to the word embeddings: wte is its first and its last matrix.

    >>> gpt = GPT.from_pretrained("tiny/tiny-gpt2")
    >>> gpt(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4096])
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):      # 2L branches add up: so their sum does not grow with L
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, ids):
        """Token ids (B, T) int64 -> logits (B, T, V)."""
        hidden, _ = self.hidden_states(self.wte(ids))
        return self.logits(hidden)

    def hidden_states(self, x, past=None, mask=None, positions=None):
        """Input embeddings (B, T, C), without positions -> last hidden states (B, T, C), each layer's keys and values.

        Prompts enter here, as a part of x, or as `past`: for each layer (keys, values), each (B, H, P, D).
        mask: as in `Attention.forward`. positions: position ids (B, T) or (T,); None: P, P + 1, ...
        """
        T, P = x.size(1), (past[0][0].size(2) if past else 0)
        if positions is None:
            if P + T > self.config.n_positions:
                raise ValueError(f"{P + T} positions, but the model's n_positions is {self.config.n_positions}")
            positions = torch.arange(P, P + T, device=x.device)
        x = self.drop(x + self.wpe(positions))
        presents = []
        for layer, block in enumerate(self.h):
            x, present = block(x, past[layer] if past else None, mask)
            presents.append(present)
        return self.ln_f(x), presents

    def logits(self, hidden):
        """Hidden states (..., C) -> float32 logits (..., V). Ask for few positions: V is large."""
        # GPT-2's logits lie near -100, where bfloat16's neighbours are 0.5 apart: many would tie. So never autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.wte.weight.float())

    def generate(self, queries, max_new_tokens=40, eot=None, **options):
        """Continue each query until `eot`, or for max_new_tokens -> a list of token lists, without eot.

        queries: a list of token lists, or a (B, T) tensor. eot: the token that ends an answer; None: the checkpoint's.
        options: suppress_tokens, ids that are never chosen; temperature and top_p of `sample_next_token`.
        Raises ValueError for an empty query or too long ones, FloatingPointError where logits are not finite.
        """
        rows = token_rows(queries)
        if not rows:
            return []
        with evaluation(self):
            x = self.wte(to_device(nn.utils.rnn.pad_sequence(rows, batch_first=True), self.wte.weight.device))
            return self.generate_from(x, [len(row) for row in rows], None, max_new_tokens, eot, **options)

    def generate_from(self, x, lengths, past, max_new_tokens=40, eot=None, suppress_tokens=(), **options):
        """Like `generate`, from input embeddings x (B, T, C), padded on the right, the rows' true lengths (B ints), and
        a `past` as in `hidden_states`, or None. Call it within `evaluation`."""
        (B, T, _), device = x.shape, x.device
        P = past[0][0].size(2) if past else 0
        eot = self.config.eos_token_id if eot is None else eot
        if min(lengths) == 0:
            raise ValueError(f"query {lengths.index(0)} has no tokens, expected at least one")
        if P + max(lengths) + max_new_tokens > self.config.n_positions:
            raise ValueError(f"prompt, query and answer need {P + max(lengths) + max_new_tokens} positions, "
                             f"but the model's n_positions is {self.config.n_positions}")
        suppressed = to_device(torch.tensor(list(suppress_tokens), dtype=torch.int64), device)
        ends = to_device(torch.tensor(lengths), device)
        answers, rows = [[] for _ in lengths], list(range(B))           # rows: those that have not ended
        # Prefill: one pass over the rows. Real tokens never read the padding behind them; new tokens must not either.
        hidden, past = self.hidden_states(x, past)
        hidden = hidden[torch.arange(B, device=device), ends - 1][:, None]                      # (B, 1, C)
        readable = torch.arange(-P, T, device=device) < ends[:, None]       # (B, P + T): all of the past, no padding
        for n in range(1, max_new_tokens + 1):
            logits = self.logits(hidden[:, 0]).index_fill(1, suppressed, -math.inf)             # (B, V)
            finite = logits.amax(dim=1).isfinite()                      # the maximum of a row with NaN is NaN
            tokens = sample_next_token(logits, **options).where(finite, -1)                     # (B,); -1: not finite
            alive = []
            for i, token in enumerate(tokens.tolist()):                 # a GPU is waited for here, and nowhere else
                if token == -1:
                    raise FloatingPointError("the logits are NaN or infinite; float16 overflows early: try float32")
                if token != eot:
                    answers[rows[i]].append(token)
                    alive.append(i)
            if not alive or n == max_new_tokens:
                break
            if len(alive) < len(rows):                                  # rows that have ended leave the batch
                rows, kept = [rows[i] for i in alive], to_device(torch.tensor(alive), device)
                tokens, readable = tokens[kept], readable[kept]
                past = [(k[kept], v[kept]) for k, v in past]
            positions = readable.sum(dim=1, keepdim=True)               # (B, 1): each token follows those it may read
            readable = F.pad(readable, (0, 1), value=True)                                      # (B, P + T + n)
            hidden, past = self.hidden_states(self.wte(tokens)[:, None], past, readable[:, None, None], positions)
        return answers

    @classmethod
    def from_pretrained(cls, folder, dropout=0.0):
        """Load a folder in Hugging Face's layout: config.json, and model.safetensors or pytorch_model.bin, whole or in
        shards -> GPT, float32, in evaluation mode. Raises OSError or ValueError, in a sentence that names the file."""
        folder = Path(folder)
        with reading(folder / "config.json"), torch.device("meta"):     # shapes only: no memory, no random numbers
            gpt = cls(read_config(folder / "config.json", dropout))
        weights = read_weights(folder)
        with reading(folder):
            gpt.load_state_dict(weights, assign=True)
        return gpt.eval()

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write config.json and model.safetensors as `transformers` writes and reads them. Raises OSError."""
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        config = vars(c) | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": c.n_positions,
                            "activation_function": "gelu_new", "bos_token_id": c.eos_token_id}
        write_safetensors(folder / "model.safetensors", {
            f"transformer.{name}": (t.t() if name.endswith(CONV1D) else t).to(dtype)
            for name, t in self.state_dict().items()})
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def token_rows(queries):
    """A list of token lists, or a (B, T) tensor -> a list of B tensors. Raises ValueError for anything else."""
    rows = [torch.as_tensor(query, dtype=torch.int64) for query in queries]
    if any(row.dim() != 1 for row in rows):
        raise ValueError("expected a list of token lists, as [[1, 2, 3]], or a (B, T) tensor")
    return rows


@contextmanager
def evaluation(module):
    """Evaluation mode for a while: no dropout, no gradients."""
    was_training = module.training
    try:
        with torch.no_grad():
            yield module.eval()
    finally:
        module.train(was_training)


def sample_next_token(logits, temperature=0.0, top_p=1.0):
    """Logits (B, V) -> the next token of each row (B,). temperature 0 takes the likeliest; else one is drawn from the
    nucleus: the fewest likeliest tokens that hold top_p of the probability."""
    if not 0 <= temperature < math.inf or not 0 <= top_p <= 1:
        raise UsageError(f"temperature {temperature} and top_p {top_p}, expected 0 or more, and a number from 0 to 1")
    if temperature < 1e-6:                              # 0, or so little that to divide by it would overflow
        return logits.argmax(dim=-1)
    probs = F.softmax(logits / temperature, dim=-1).nan_to_num()        # a GPU stops the whole program at NaN
    probs, ids = probs.sort(dim=-1, descending=True)
    probs[probs.cumsum(dim=-1) - probs >= top_p] = 0            # what stands before a token already fills the nucleus
    probs[:, 0].masked_fill_(probs[:, 0] == 0, 1)               # top_p 0 leaves the likeliest; a row of NaN, anything
    return ids.gather(1, torch.multinomial(probs, 1)).squeeze(1)


# -------------------------------------------------------------------------------------------------- device and dtype

class UsageError(ValueError):
    """What was asked for cannot be: the command line ends with status 2."""


def choose_device(device="auto", dtype="auto"):
    """The flags --device and --dtype -> torch.device, torch.dtype, and the reason in words. Raises UsageError.

    auto: a GPU that this PyTorch has kernels for, else the CPU; bfloat16 where the device computes it natively, else
    float16 on a GPU (Colab's T4), float32 on a CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and gpu_has_kernels() else "cpu"
    try:
        device = torch.empty(0, device=device).device                   # cuda becomes cuda:0
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {device}: PyTorch finds no such device here, expected cpu, cuda, cuda:1 ... or "
                         f"mps") from None
    gpu, native = device.type == "cuda", False
    if gpu:
        torch.cuda.set_device(device)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        torch.backends.cuda.enable_cudnn_sdp(False)                     # it makes a plan for every new shape of batch
        # TF32 for the float32 product of `logits`; not, as is cuDNN's default, where float32 is asked for.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "float32"
    elif device.type == "cpu":                                          # without these, 16 bits are slower than 32
        asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # older PyTorch has not all of them
        native = any(getattr(torch.cpu, ask)() for ask in asks if hasattr(torch.cpu, ask))
    if dtype != "auto":
        return device, getattr(torch, dtype), f"--dtype {dtype}"
    dtype = torch.bfloat16 if native else torch.float16 if gpu else torch.float32
    return device, dtype, f"this {'GPU' if gpu else device.type} has {'' if native else 'no '}fast bfloat16"


def gpu_has_kernels():
    """Whether this PyTorch was built for the GPU: what is for sm_86 runs on 8.6 to 8.9, for compute_90 from 9.0 on."""
    gpu = torch.cuda.get_device_capability()
    built = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    return not built or any(                            # none: AMD's names are others (gfx90a)
        (int(major), int(minor)) <= gpu and (kind == "compute" or int(major) == gpu[0])
        for kind, major, minor in built)


def to_device(tensor, device):
    """From pinned memory, the copy to a GPU waits for its turn while the program goes on."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# ------------------------------------------------------------------------------------------------------ files on disk

@contextmanager
def reading(path):
    """Whatever goes wrong while a file is read becomes one sentence that names it: an OSError, or else a ValueError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:
            raise
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise ValueError(f"{path} is not what was expected: {reason}"[:600]) from error


def read_config(path, dropout=0.0):
    """config.json -> GPTConfig. What is no plain GPT-2 is refused: loaded silently, its logits would be wrong."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    plain = {"model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True,
             "scale_attn_weights": True, "add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False,
             "reorder_and_upcast_attn": False}
    for key, value in plain.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{key} is {raw[key]!r}, expected plain GPT-2's {value!r}")
    config = GPTConfig(**{key: raw[key] for key in vars(GPTConfig()) if key in raw} | {"dropout": dropout})
    if config.n_layer > 1000:                           # building them would take all memory
        raise ValueError(f"n_layer is {config.n_layer}, expected at most 1,000")
    return config


def read_weights(folder):
    """A checkpoint's weights by this model's names, float32, Conv1D's transposed."""
    weights = {}
    for path in weight_files(folder):
        tensors = read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
        with reading(path):
            for name in list(tensors):
                tensor = tensors.pop(name)                                  # so memory holds each weight once
                name = re.sub(r"^.*?\b(wte|wpe|ln_f|lm_head|h\.\d+)\.", r"\1.", name)     # transformer.h.0. -> h.0.
                name = re.sub(r"^lm_head\.(decoder\.)?", "wte.", name)      # tied: it is the word embeddings
                if name.endswith((".attn.bias", ".attn.masked_bias")):      # old files hold the causal mask, too
                    continue
                if tensor.untyped_storage().nbytes() < tensor.nbytes:
                    raise ValueError(f"{name} has fewer numbers than its shape")
                tensor = (tensor.t() if name.endswith(CONV1D) else tensor).float().contiguous()
                if not tensor.sum().isfinite():
                    raise ValueError(f"{name} holds NaN or infinite numbers")
                if not torch.equal(weights.setdefault(name, tensor), tensor):
                    raise ValueError(f"two different tensors for {name}; GPT-2's lm_head is tied to wte")
    return weights


def weight_files(folder):
    """The files that hold a checkpoint's weights. Where they are in shards, the index says which ones count."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            with reading(index):
                return sorted({folder / shard for shard in json.loads(index.read_text())["weight_map"].values()})
    raise FileNotFoundError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin")


def load_tensors(path):
    """torch.load of tensors, numbers and text alone: any other pickle could run a stranger's code, and is refused."""
    with open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:              # of many kinds; torch's own text advises to switch the check off
            raise ValueError(f"{path} is broken or holds more than plain tensors ({type(error).__name__})") from None


# GPT-2's attention and MLP layers are `Conv1D`: stored (in, out), where nn.Linear keeps (out, in).
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# safetensors: 8 bytes N, little-endian; N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}; raw bytes.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """A safetensors file -> {name: tensor}. No more bytes are asked for than the file has; too few fill no shape."""
    tensors, size = {}, os.path.getsize(path)
    with reading(path), open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(n, size)))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            file.seek(8 + n + begin)
            data = bytearray(file.read(min(end - begin, size)))
            tensors[name] = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def write_safetensors(path, tensors):
    """{name: tensor} -> a safetensors file. Raises OSError."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, data, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, t in tensors.items():
        data.append(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                     # so that the data is aligned
    write_atomically(path, lambda file: file.writelines([len(text).to_bytes(8, "little"), text, *data]))


def write_atomically(path, write):
    """Let write(file) fill a temporary file, then rename it: whoever looks finds the old one or the new, never half."""
    temporary = Path(f"{path}.tmp")                     # if a kill leaves it behind, the next save takes it away
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:            # torch.save makes a RuntimeError of a full disk, and of Ctrl-C
        cause = error.__context__ or error
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        raise OSError(f"cannot write {path}: {cause}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))
