"""Eight ways to prompt a GPT, from the simplest to the richest, and `PromptedGPT`, which joins one of them to a GPT.

A prompt encoder turns the embeddings of a query into a prompt. The prompt reaches the GPT in one of two ways: as
prompt embeddings, which stand in the row before the query's own embeddings, or as keys and values, which every layer
reads before the row (the `past` of model.py).

The story: a table of free vectors (PromptTuning), one as long as the query (SoftPrompt), the same table seen through an
LSTM (PTuning) or turned into keys and values (PrefixTuning); then the prompts that depend on what was just said
(DynamicPrompt, DialogPrompt). Two have no prompt: FineTuning, and EmbeddingTuning, which shows what a prompt adds.

Shape letters as in model.py; m is the number of tokens in a query, M the longest m of a batch, k a fixed prompt length.
A mask here is (B, M), True on a query's own tokens.
"""
import random
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import Block, evaluation, init_weights, to_device, token_rows


# ------------------------------------------------------------------------------------------------ the prompt encoders

class PromptEncoder(nn.Module):
    """What all methods have in common; by itself, no prompt. A new method overrides `forward`, the settings below that
    differ, and `prompt_length` if it writes neither k prompt embeddings nor a past; and it is listed in METHODS."""

    trains_gpt = False              # whether the GPT's blocks are trained, too
    trains_embeddings = False       # whether the GPT's word embeddings wte, tied to the output layer, are trained, too
    writes_past = False             # the prompt is keys and values before the row, not embeddings in it
    reads_hidden_states = False     # `forward` gets the GPT's last hidden states of the queries, not word embeddings
    default_length = None           # k, where --prompt-length is not given; None: the method has no k
    learning_rate = 1e-3            # this and all below: defaults of train.py's flags; None: the flag has no use
    dropout = None
    controller_layers = None
    controller_init = None

    def __init__(self, config, word_embeddings, prompt_length=None, max_query=128, layers=2):
        """config: a GPTConfig. word_embeddings: wte's weight (V, C), to start from; it is not kept. prompt_length: k
        (None: the default). max_query: the longest query, in tokens. layers: depth of `DynamicPrompt`."""
        super().__init__()
        self.k, self.max_query = prompt_length or self.default_length, max_query

    def prompt_length(self, m):
        """How many prompt embeddings stand before a query of m tokens: k; 0 without a prompt, or with a past."""
        return self.k if self.default_length and not self.writes_past else 0

    def forward(self, queries, mask):
        """Query embeddings (B, M, C), 0 on padding (hidden states are not), and mask (B, M), True on the query's own
        tokens -> prompt embeddings (B, prompt_length(M), C), of which a query of m tokens gets the first
        prompt_length(m). Where `writes_past`: -> for each layer a pair of keys and values, each (B, H, k, D).

        What is written for a query must depend neither on the padding behind it nor on its neighbours in the batch:
        read nothing where `mask` is False. Padding stands on the right; padded on the left, a query's prompt is wrong.
        """
        return queries[:, :0]                                                       # (B, 0, C)


class FineTuning(PromptEncoder):
    """No prompt at all: the whole GPT is trained (Valvoda et al. 2022, section 3).

        row = [x1, ..., xm, response]           where x = wte(query)
    """
    trains_gpt, trains_embeddings, learning_rate, dropout = True, True, 3e-4, 0.1


class EmbeddingTuning(PromptEncoder):
    """No prompt either: wte alone is trained. By how much `soft` and `dynamic` are better, their prompts have added."""
    trains_embeddings, learning_rate = True, 5e-4


class PromptTuning(PromptEncoder):
    """k free vectors before every query; they alone are trained (Lester et al. 2021, section 2).

        row = [p1, ..., pk, x1, ..., xm, response]
    """
    default_length, learning_rate = 20, 3e-2

    def __init__(self, config, word_embeddings, prompt_length=None, max_query=128, layers=2):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        self.table = nn.Parameter(torch.randn(self.k, config.n_embd) * 0.02)

    def forward(self, queries, mask):
        return self.table.expand(len(queries), -1, -1)                              # (B, k, C)


class SoftPrompt(PromptEncoder):
    """Unlike prompt tuning's, the prompt is as long as the query, and wte is trained: with the prompt alone, the paper
    found, "the performance suffers considerably" (Valvoda et al. 2022, equation 2).

        row = [p1, ..., pm, x1, ..., xm, response]
    """
    trains_embeddings, learning_rate = True, 5e-4

    def __init__(self, config, word_embeddings, prompt_length=None, max_query=128, layers=2):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        self.table = nn.Parameter(torch.randn(max_query, config.n_embd) * 0.02)

    def prompt_length(self, m):
        return m

    def forward(self, queries, mask):
        return self.table[:queries.size(1)].expand(len(queries), -1, -1)            # (B, M, C)


class PTuning(PromptEncoder):
    """Unlike prompt tuning's, the k vectors know each other: they come out of a bidirectional LSTM and an MLP
    (Liu et al. 2021, "GPT Understands, Too", section 3.2; sizes as in its code).

        h1, ..., hk = MLP(LSTM(p1, ..., pk))
        row = [h1, ..., hk, x1, ..., xm, response]
    """
    default_length, learning_rate = 20, 2e-3

    def __init__(self, config, word_embeddings, prompt_length=None, max_query=128, layers=2):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        C = config.n_embd
        self.table = nn.Parameter(torch.randn(self.k, C) * 0.02)
        self.lstm = nn.LSTM(C, C // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(C // 2 * 2, C), nn.ReLU(), nn.Linear(C, C))

    def forward(self, queries, mask):
        with torch.autocast(queries.device.type, enabled=False):    # many CPUs have no LSTM in 16 bits
            h, _ = self.lstm(self.table[None])                                      # (1, k, C)
        return self.mlp(h).expand(len(queries), -1, -1)                             # (B, k, C)


class PrefixTuning(PromptEncoder):
    """Unlike prompt tuning's, the prompt enters every layer, as keys and values. A table and an MLP make them, which
    trains more stably than free ones (Li & Liang 2021, sections 4.2 and 4.3).

        (k_l, v_l) for each layer l = MLP(p1, ..., pk)
        row = [x1, ..., xm, response], read after the keys k_l and values v_l
    """
    default_length, writes_past, learning_rate = 10, True, 3e-3

    def __init__(self, config, word_embeddings, prompt_length=None, max_query=128, layers=2):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        C, L = config.n_embd, config.n_layer
        self.n_layer, self.n_head = L, config.n_head
        self.table = nn.Parameter(torch.randn(self.k, C) * 0.02)
        self.mlp = nn.Sequential(nn.Linear(C, 512), nn.Tanh(), nn.Linear(512, L * 2 * C))

    def forward(self, queries, mask):
        kv = self.mlp(self.table).unflatten(1, (self.n_layer, 2, self.n_head, -1))          # (k, L, 2, H, D)
        kv = kv.permute(1, 2, 3, 0, 4)[:, :, None].expand(-1, -1, len(queries), -1, -1, -1)     # (L, 2, B, H, k, D)
        return [(keys, values) for keys, values in kv]


class DynamicPrompt(PromptEncoder):
    """A prompt of its own for every query: the controller, a causal Transformer, reads the query and writes one vector
    for each of its tokens (Valvoda et al. 2022, equation 3 and figure 1).

        h1, ..., hm = Transformer(x1, ..., xm)
        row = [h1, ..., hm, x1, ..., xm, response]

    The controller is built of GPT-2's blocks and has positions of its own. It is causal because the paper's is
    "auto-regressive", though the whole query is known. It needs a config and word embeddings, not our GPT, and can be
    called alone, with queries that are padded on the right:

    >>> from model import GPTConfig
    >>> controller = DynamicPrompt(GPTConfig(n_embd=64, n_head=4), torch.randn(100, 64), layers=2)
    >>> controller(torch.randn(2, 7, 64)).shape             # two queries of 7 tokens
    torch.Size([2, 7, 64])
    """
    trains_embeddings, learning_rate, dropout, controller_layers, controller_init = True, 5e-4, 0.0, 2, "random"

    def __init__(self, config, word_embeddings, prompt_length=None, max_query=128, layers=2):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        self.wpe = nn.Embedding(max_query, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(layers))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(init_weights)
        # The prompt stands beside word embeddings, so it starts with their spread: a norm's own 1 would drown them.
        nn.init.constant_(self.ln_f.weight, word_embeddings.std().item())

    @torch.no_grad()
    def start_from(self, gpt):
        """Start as the GPT's own first layers and positions (appendix A: GPT-2's "superior language ability ... allows
        for a better Controller")."""
        for mine, theirs in zip(self.h, gpt.h):
            mine.load_state_dict(theirs.state_dict())
        positions = gpt.wpe.weight[:self.max_query]
        self.wpe.weight[:len(positions)] = positions

    def prompt_length(self, m):
        return m

    def forward(self, queries, mask=None):
        h = self.drop(queries + self.wpe.weight[:queries.size(1)])                  # (B, M, C)
        for block in self.h:
            h, _ = block(h)         # causal: no token reads the padding behind it, so there is nothing to mask
        return self.ln_f(h)


class CrossAttention(nn.Module):
    """Unlike self-attention's, the keys and values come from elsewhere: every position reads the whole context."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.q_attn = nn.Linear(config.n_embd, config.n_embd)
        self.c_attn = nn.Linear(config.n_embd, 2 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, context, mask):
        """x (B, k, C), context (B, M, C), mask (B, M), True where it may be read -> (B, k, C)."""
        q, keys, values = (t.unflatten(2, (self.n_head, -1)).transpose(1, 2)        # (B, H, k, D), 2 of (B, H, M, D)
                           for t in (self.q_attn(x), *self.c_attn(context).chunk(2, dim=2)))
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None],
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).flatten(2))                            # (B, H, k, D) -> (B, k, C)


class DialogBlock(Block):
    """A GPT-2 block that reads the context between its self-attention and its MLP."""

    def __init__(self, config):
        super().__init__(config)
        self.ln_cross_attn = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.crossattention = CrossAttention(config)

    def forward(self, x, context, mask):
        y, present = self.attn(self.ln_1(x))
        x = x + self.drop(y)
        x = x + self.drop(self.crossattention(self.ln_cross_attn(x), context, mask))
        return x + self.drop(self.mlp(self.ln_2(x))), present


class DialogPrompt(PromptEncoder):
    """Unlike prefix-tuning's, the keys and values depend on the context; unlike DynamicPrompt's, the prompt enters
    every layer (Gu et al. 2021; after its released code).

        c = GPT(x1, ..., xm)                                    the frozen GPT's last hidden states of the context
        (k_l, v_l) for each layer l = Transformer(p1, ..., pk; c)       keys and values of its own self-attention
        row = [x1, ..., xm, response], read after the keys k_l and values v_l

    The Transformer is as deep as the GPT. Each of its blocks but the last cross-attends to c, the context, which is
    the query. The last is nothing but keys and values: what would follow could get no gradient.
    """
    default_length, writes_past, reads_hidden_states, dropout = 20, True, True, 0.0

    def __init__(self, config, word_embeddings, prompt_length=None, max_query=128, layers=2):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        C = config.n_embd
        self.n_head = config.n_head
        self.wte = nn.Embedding(self.k, C)
        self.wpe = nn.Embedding(self.k, C)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(DialogBlock(config) for _ in range(config.n_layer - 1))
        self.ln_last = nn.LayerNorm(C, eps=config.layer_norm_epsilon)
        self.c_last = nn.Linear(C, 2 * C)                                           # the last layer's keys and values
        self.apply(init_weights)
        with torch.no_grad():
            rows = word_embeddings[5:5 + self.k]                                    # as in the released code
            self.wte.weight[:len(rows)] = rows

    def forward(self, hidden_states, mask):
        x = self.drop(self.wte.weight + self.wpe.weight).expand(len(hidden_states), -1, -1)         # (B, k, C)
        past = []
        for block in self.h:
            x, present = block(x, hidden_states, mask)                              # present: 2 of (B, H, k, D)
            past.append(present)
        last = self.c_last(self.ln_last(x)).chunk(2, dim=2)                         # 2 of (B, k, C)
        return past + [tuple(t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in last)]


METHODS = {"finetune": FineTuning, "embeddings": EmbeddingTuning, "soft": SoftPrompt, "dynamic": DynamicPrompt,
           "prompt-tuning": PromptTuning, "p-tuning": PTuning, "prefix": PrefixTuning, "dialogprompt": DialogPrompt}


# ------------------------------------------------------------------------------------------------------- batch layout

@dataclass
class Batch:
    """Rows of [prompt ; query ; response], figure 1 of Valvoda et al. 2022, without gaps and padded on the right, so
    that causal attention needs no mask. Two examples, ([5, 6], [7, 8]) and ([9], [4]), behind prompts as long as the
    queries; in the rows, 0 keeps a place for each prompt embedding, and fills the end of what is shorter (it is a
    token's id, too: "!", but nobody reads it here):

        rows  0 0 5 6 7 8       is_prompt  1 1 0 0 0 0      queries  5 6        mask  1 1
              0 9 4 0 0 0                  1 0 0 0 0 0               9 0              1 0

    The token at position t is predicted at t - 1: labels 7, 8, 4 at positions 3, 4 of the first row, 1 of the second.
    """
    rows: torch.Tensor                  # (B, T) int64
    is_prompt: torch.Tensor             # (B, T) bool
    queries: torch.Tensor               # (B, M) int64
    mask: torch.Tensor                  # (B, M) bool: True on a query's own tokens
    label_positions: torch.Tensor       # (N,) int64: where labels are predicted, counted through all rows (b * T + t)
    labels: torch.Tensor                # (N,) int64: the response tokens
    lengths: list                       # B ints, without padding: prompt + query + response of each row


def make_batch(examples, prompt_length):
    """[(query ids, response ids), ...] -> Batch, on the CPU. prompt_length: a function, m -> the prompt's length.

    >>> make_batch([([5, 6], [7, 8]), ([9], [4])], lambda m: m).rows
    tensor([[0, 0, 5, 6, 7, 8],
            [0, 9, 4, 0, 0, 0]])
    """
    def pad(rows):
        return pad_sequence([torch.as_tensor(row, dtype=torch.int64) for row in rows], batch_first=True)

    queries = pad([query for query, _ in examples])                                                 # (B, M)
    rows = pad([[0] * prompt_length(len(query)) + [*query, *response] for query, response in examples])     # (B, T)
    lengths = torch.tensor([(prompt_length(len(query)), len(query), len(response)) for query, response in examples])
    k, m, r = lengths.split(1, dim=1)                                           # (B, 1) each
    t = torch.arange(rows.size(1))
    predicting = (t >= k + m - 1) & (t < k + m - 1 + r)                         # (B, T): one place before its token
    positions = predicting.flatten().nonzero().squeeze(1)                       # (N,)
    return Batch(rows=rows, is_prompt=t < k, queries=queries, mask=t[:queries.size(1)] < m, label_positions=positions,
                 labels=rows.flatten()[positions + 1], lengths=lengths.sum(dim=1).tolist())


def group_by_length(lengths, batch_size, seed=None):
    """Lengths of rows -> batches, lists of their indices, of similar length, so that little is padding: the longest
    first, or, with a seed, shuffled."""
    order = list(range(len(lengths)))
    shuffle = random.Random(seed)
    if seed is not None:
        shuffle.shuffle(order)                          # rows of equal length meet others in each epoch
    order.sort(key=lambda i: -lengths[i])
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    if seed is not None:
        shuffle.shuffle(batches)
    return batches


# -------------------------------------------------------------------------------------------------- GPT and prompt

class PromptedGPT(nn.Module):
    """A GPT and one way of prompting it. It freezes the GPT it is given, as the method says: do not share that.

    method: a name in METHODS. prompt_length: k, for methods that have one. max_query: the longest query in tokens.
    controller_layers, controller_init ("random", or "gpt": start as the GPT's own first layers): of `dynamic`.
    train_embeddings: whether wte is trained (None: as the method says). dtype: the type of matrix products; trained
    weights stay float32, and so do embeddings, norms and logits.

    >>> from model import GPT, GPTConfig
    >>> model = PromptedGPT(GPT(GPTConfig(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2)), "dynamic")
    >>> model([([5, 6], [7, 8]), ([9], [4])]).shape         # two examples with three response tokens
    torch.Size([3])
    >>> [len(answer) for answer in model.generate([[5, 6], [9]], max_new_tokens=4, eot=-1)]
    [4, 4]
    """

    def __init__(self, gpt, method, prompt_length=None, max_query=128, controller_layers=2, controller_init="random",
                 train_embeddings=None, dtype=torch.float32):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}")
        encoder = METHODS[method]
        self.gpt, self.dtype = gpt, dtype
        self.encoder = encoder(gpt.config, gpt.wte.weight.detach(), prompt_length, max_query, controller_layers)
        if controller_init == "gpt":
            self.encoder.start_from(gpt)
        gpt.requires_grad_(encoder.trains_gpt)
        gpt.wte.requires_grad_(encoder.trains_embeddings if train_embeddings is None else train_embeddings)
        for layer in gpt.h.modules():
            if isinstance(layer, nn.Linear) and not encoder.trains_gpt:
                layer.to(dtype)                 # frozen: cast once, not by autocast in every step
        self.train(gpt.training)

    def train(self, mode=True):
        """Dropout acts where weights are trained: a GPT with frozen blocks is a fixed function, in training, too. (With
        dropout in it, training found no use for the prompt: another query's did as well.)"""
        super().train(mode)
        self.gpt.train(mode and self.encoder.trains_gpt)
        return self

    @property
    def device(self):
        return self.gpt.wte.weight.device

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, examples):
        """[(query ids, response ids), ...] -> Batch, on the model's device. It is laid out on the CPU, where lengths
        are known, so that nothing waits for a GPU. Raises ValueError for a query without tokens, or with too many."""
        for query, _ in examples:
            if not 0 < len(query) <= self.encoder.max_query:
                raise ValueError(f"a query has {len(query)} tokens, expected 1 to {self.encoder.max_query} (max_query)")
        batch = make_batch(examples, self.encoder.prompt_length)
        return Batch(*(to_device(t, self.device) if torch.is_tensor(t) else t for t in vars(batch).values()))

    def prompt(self, batch, swapped=False):
        """Batch -> the prompt that the encoder writes from its queries alone; swapped: from the row before's."""
        queries, mask = batch.queries, batch.mask
        if swapped:
            queries, mask = queries.roll(1, dims=0), mask.roll(1, dims=0)
        queries = self.gpt.wte(queries) * mask[..., None]                           # (B, M, C), padding is 0
        if self.encoder.reads_hidden_states:
            queries, _ = self.gpt.hidden_states(queries)
        return self.encoder(queries, mask)

    def embed(self, batch, swapped=False):
        """Batch -> the rows' input embeddings (B, T, C), and the prompt's keys and values, or None."""
        prompt = self.prompt(batch, swapped)
        x = self.gpt.wte(batch.rows)                                                # (B, T, C)
        if self.encoder.writes_past:
            return x, prompt
        prompt = F.pad(prompt, (0, 0, 0, x.size(1) - prompt.size(1)))               # (B, T, C)
        return torch.where(batch.is_prompt[..., None], prompt, x), None             # [prompt ; query ; response]

    def label_logits(self, batch, swapped=False):
        """Batch -> float32 logits (N, V) where response tokens are predicted, and nowhere else: V is large."""
        with self.autocast():
            x, past = self.embed(batch, swapped)
            hidden, _ = self.gpt.hidden_states(x, past)                             # (B, T, C)
            return self.gpt.logits(hidden.flatten(0, 1)[batch.label_positions])

    def forward(self, examples, swapped=False):
        """[(query ids, response ids), ...] -> the cross-entropy of each response token, in order: (N,).

        swapped: each row gets the prompt of the row before it, and the first one that of the last. What this costs,
        among queries of equal length, shows how much the prompt depends on the query: the swap test."""
        batch = self.batch(examples)
        return F.cross_entropy(self.label_logits(batch, swapped), batch.labels, reduction="none")

    def generate(self, queries, max_new_tokens=40, eot=None, swapped=False, **options):
        """Answer each of a list of token lists, all in one batch, as `GPT.generate` does, but behind its prompt, or,
        swapped, behind that of the query before it."""
        if len(queries) == 0:
            return []
        batch = self.batch([(query, []) for query in token_rows(queries)])
        with evaluation(self), self.autocast():
            x, past = self.embed(batch, swapped)
            return self.gpt.generate_from(x, batch.lengths, past, max_new_tokens, eot, **options)

    def trained(self):
        """What is trained, by name: all that a run's checkpoint needs to hold."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load_trained(self, tensors):
        """Put back what `trained` gave. Raises RuntimeError if names or shapes differ."""
        frozen = {name: p for name, p in self.named_parameters() if not p.requires_grad}
        self.load_state_dict(frozen | tensors)
