"""Seven ways to prompt a GPT, from the simplest to the richest, and `PromptedGPT`, which joins one of them to a GPT.

A prompt encoder turns the embeddings of a query into a prompt. The prompt reaches the GPT in one of two ways: as prompt
embeddings, which stand in the row before the query's own embeddings, or as keys and values, which every layer reads before
the row (the `past` of model.py).

The story: a table of free vectors (PromptTuning), one as long as the query (SoftPrompt), the same table seen through an
LSTM (PTuning) or turned into keys and values (PrefixTuning); then the prompts that depend on what was just said
(DynamicPrompt, DialogPrompt).

Shape letters as in model.py; m is the number of tokens in a query, M the longest m of a batch, k a fixed prompt length.
A mask here is (B, M), True on a query's own tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import Block, evaluation, init_weights, to_device


# ------------------------------------------------------------------------------------------------ the prompt encoders

class PromptEncoder(nn.Module):
    """What the seven have in common. A new method overrides what differs, and enters METHODS below."""

    trains_gpt = False              # whether the GPT's blocks are trained, too
    trains_embeddings = False       # whether the GPT's word embeddings wte, tied to the output layer, are trained, too
    default_length = None           # k, for methods that have one
    learning_rate = 1e-3            # train.py's default --lr
    writes_past = False             # the prompt is keys and values before the row, not embeddings in it
    reads_hidden_states = False     # `forward` gets the GPT's last hidden states of the queries, not their word embeddings

    def __init__(self, config, word_embeddings, prompt_length, max_query, layers):
        """config: a GPTConfig. word_embeddings: wte's weight (V, C), to start from; it is not kept. prompt_length: k, or
        None. max_query: the longest query, in tokens. layers: the controller's depth, for `DynamicPrompt`."""
        super().__init__()
        self.max_query = max_query

    def length(self, m):
        """How many prompt embeddings stand before a query of m tokens: to be overridden where there are any."""
        return 0

    def forward(self, queries, mask):
        """Query embeddings (B, M, C), zero behind each query's end, and mask (B, M), True up to there -> prompt embeddings
        (B, length(M), C), of which a query of m tokens gets the first length(m). Hidden states are not zero there.

        Where `writes_past`: -> for each layer a pair of keys and values, each (B, H, k, D).
        """
        raise NotImplementedError


class FineTuning(PromptEncoder):
    """No prompt at all: the whole GPT is trained (Valvoda et al. 2022, section 3).

        row = [x1, ..., xm, response]           where x = wte(query)
    """
    trains_gpt, trains_embeddings, learning_rate = True, True, 3e-4

    def forward(self, queries, mask):
        return queries[:, :0]                                                       # (B, 0, C)


class PromptTuning(PromptEncoder):
    """k free vectors before every query; they alone are trained (Lester et al. 2021, section 2).

        row = [p1, ..., pk, x1, ..., xm, response]
    """
    default_length, learning_rate = 20, 3e-2

    def __init__(self, config, word_embeddings, prompt_length, max_query, layers):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        self.table = nn.Parameter(torch.randn(prompt_length, config.n_embd) * 0.02)

    def length(self, m):
        return len(self.table)

    def forward(self, queries, mask):
        return self.table.expand(len(queries), -1, -1)                              # (B, k, C)


class SoftPrompt(PromptEncoder):
    """Unlike prompt tuning's, the prompt is as long as the query, and wte is trained (Valvoda et al. 2022, equation 2).

        row = [p1, ..., pm, x1, ..., xm, response]
    """
    trains_embeddings = True

    def __init__(self, config, word_embeddings, prompt_length, max_query, layers):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        self.table = nn.Parameter(torch.randn(max_query, config.n_embd) * 0.02)

    def length(self, m):
        return m

    def forward(self, queries, mask):
        return self.table[:queries.size(1)].expand(len(queries), -1, -1)            # (B, M, C)


class PTuning(PromptEncoder):
    """Unlike prompt tuning's, the k vectors know each other: they come out of a bidirectional LSTM and an MLP
    (Liu et al. 2021b, section 3.2; sizes as in its code).

        h1, ..., hk = MLP(LSTM(p1, ..., pk))
        row = [h1, ..., hk, x1, ..., xm, response]
    """
    default_length, learning_rate = 20, 2e-3

    def __init__(self, config, word_embeddings, prompt_length, max_query, layers):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        C = config.n_embd
        self.table = nn.Parameter(torch.randn(prompt_length, C) * 0.02)
        self.lstm = nn.LSTM(C, C // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(C // 2 * 2, C), nn.ReLU(), nn.Linear(C, C))

    def length(self, m):
        return len(self.table)

    def forward(self, queries, mask):
        with torch.autocast(queries.device.type, enabled=False):    # many CPUs have no LSTM in 16 bits, cuDNN takes float16
            h, _ = self.lstm(self.table[None])                                      # (1, k, C)
        return self.mlp(h).expand(len(queries), -1, -1)                             # (B, k, C)


class PrefixTuning(PromptEncoder):
    """Unlike prompt tuning's, the prompt enters every layer, as keys and values. A table and an MLP make them, which trains
    more stably than free ones (Li & Liang 2021, sections 4.2 and 4.3).

        (k_l, v_l) for each layer l = MLP(p1, ..., pk)
        row = [x1, ..., xm, response], read after the keys k_l and values v_l
    """
    default_length, writes_past, learning_rate = 10, True, 3e-3

    def __init__(self, config, word_embeddings, prompt_length, max_query, layers):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        C, L = config.n_embd, config.n_layer
        self.n_layer, self.n_head = L, config.n_head
        self.table = nn.Parameter(torch.randn(prompt_length, C) * 0.02)
        self.mlp = nn.Sequential(nn.Linear(C, 512), nn.Tanh(), nn.Linear(512, L * 2 * C))

    def forward(self, queries, mask):
        kv = self.mlp(self.table).unflatten(1, (self.n_layer, 2, self.n_head, -1))          # (k, L, 2, H, D)
        kv = kv.permute(1, 2, 3, 0, 4)[:, :, None].expand(-1, -1, len(queries), -1, -1, -1)     # (L, 2, B, H, k, D)
        return [(keys, values) for keys, values in kv]


class DynamicPrompt(PromptEncoder):
    """A prompt of its own for every query: the controller, a causal Transformer, reads the query and writes one vector for
    each of its tokens (Valvoda et al. 2022, equation 3 and figure 1).

        h1, ..., hm = Transformer(x1, ..., xm)
        row = [h1, ..., hm, x1, ..., xm, response]

    The controller is built of GPT-2's blocks and has positions of its own. It needs a config and word embeddings, not our
    GPT, and can be called alone:

    >>> from model import GPTConfig
    >>> controller = DynamicPrompt(GPTConfig(n_embd=64, n_head=4), torch.randn(100, 64))
    >>> controller(torch.randn(2, 7, 64)).shape             # two queries of 7 tokens
    torch.Size([2, 7, 64])
    """
    trains_embeddings = True

    def __init__(self, config, word_embeddings, prompt_length=None, max_query=128, layers=2):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        self.wpe = nn.Embedding(max_query, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(layers))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(init_weights)
        nn.init.constant_(self.ln_f.weight, word_embeddings.std().item())       # h starts with the words' standard deviation

    def length(self, m):
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
    """Unlike prefix-tuning's, the keys and values depend on the context; unlike DynamicPrompt's, the prompt enters every
    layer (Gu et al. 2021; after its released code).

        c = GPT(x1, ..., xm)                                    the frozen GPT's last hidden states of the context
        (k_l, v_l) for each layer l = Transformer(p1, ..., pk; c)       keys and values of its own self-attention
        row = [x1, ..., xm, response], read after the keys k_l and values v_l

    The Transformer is as deep as the GPT. Each of its blocks but the last cross-attends to c, the context, which is the query.
    The last is nothing but keys and values: what would follow could get no gradient.
    """
    default_length, writes_past, reads_hidden_states = 5, True, True

    def __init__(self, config, word_embeddings, prompt_length, max_query, layers):
        super().__init__(config, word_embeddings, prompt_length, max_query, layers)
        C = config.n_embd
        self.n_head = config.n_head
        self.wte = nn.Embedding(prompt_length, C)
        self.wpe = nn.Embedding(prompt_length, C)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(DialogBlock(config) for _ in range(config.n_layer - 1))
        self.ln_last = nn.LayerNorm(C, eps=config.layer_norm_epsilon)
        self.c_last = nn.Linear(C, 2 * C)                                           # the last layer's keys and values
        self.apply(init_weights)
        with torch.no_grad():
            rows = word_embeddings[5:5 + prompt_length]                             # as in the released code
            self.wte.weight[:len(rows)] = rows

    def forward(self, hidden_states, mask):
        x = self.drop(self.wte.weight + self.wpe.weight).expand(len(hidden_states), -1, -1)         # (B, k, C)
        past = []
        for block in self.h:
            x, present = block(x, hidden_states, mask)                              # present: 2 of (B, H, k, D)
            past.append(present)
        last = self.c_last(self.ln_last(x)).chunk(2, dim=2)                         # 2 of (B, k, C)
        return past + [tuple(t.unflatten(2, (self.n_head, -1)).transpose(1, 2) for t in last)]


METHODS = {"finetune": FineTuning, "soft": SoftPrompt, "dynamic": DynamicPrompt, "prompt-tuning": PromptTuning,
           "p-tuning": PTuning, "prefix": PrefixTuning, "dialogprompt": DialogPrompt}


# ------------------------------------------------------------------------------------------------------- batch layout

@dataclass
class Batch:
    """Rows of [prompt][query][response]: figure 1 of Valvoda et al. 2022. Rows are contiguous and padded on the right, so
    causal attention needs no mask.

    Two examples, ([5, 6], [7, 8]) and ([9], [4]), under a method whose prompt is as long as the query:

        ids              5 6  7 8           each query and response, padded to the batch's longest ones
                         9 0  4 0
        mask             1 1                True on the query's own tokens
                         1 0
        order            0 1 2 3 4 5        for each place of a row, the column of [prompt prompt | ids] that stands there:
                         0 2 4 0 0 0        row 1 skips 1, 3 and 5, the padding; behind its end stands any column, unread
        label_positions  3 4  7             where response tokens are predicted, counted through all rows (b * T + t)
        labels           7 8  4             those tokens; transformers' labels, without the -100 everywhere else
        lengths          6 3
    """
    ids: torch.Tensor                   # (B, M + R) int64, R: the longest response
    mask: torch.Tensor                  # (B, M) bool
    order: torch.Tensor                 # (B, T) int64
    label_positions: torch.Tensor       # (N,) int64, N: response tokens in the batch
    labels: torch.Tensor                # (N,) int64
    lengths: list                       # B ints: prompt, query and response of each row

    def to(self, device):
        return Batch(*(to_device(value, device) if torch.is_tensor(value) else value for value in vars(self).values()))


def make_batch(examples, prompt_length):
    """[(query ids, response ids), ...] -> Batch, on the CPU. prompt_length: a function, m -> prompt embeddings before it.

    >>> make_batch([([5, 6], [7, 8]), ([9], [4])], lambda m: m).order
    tensor([[0, 1, 2, 3, 4, 5],
            [0, 2, 4, 0, 0, 0]])
    """
    queries, responses = zip(*examples)
    M = max(map(len, queries))
    longest = prompt_length(M)
    order, positions = [], []
    for query, response in examples:
        m = len(query)
        positions.append(torch.arange(len(response)) + prompt_length(m) + m - 1)    # one before each response token
        order.append(torch.cat((torch.arange(prompt_length(m)), longest + torch.arange(m),
                                longest + M + torch.arange(len(response)))))
    lengths, order = [len(row) for row in order], pad_sequence(order, batch_first=True)
    ids = torch.cat([pad_sequence([torch.as_tensor(row, dtype=torch.int64) for row in part], batch_first=True)
                     for part in (queries, responses)], dim=1)
    return Batch(ids=ids, order=order, lengths=lengths,
                 mask=torch.arange(M) < torch.tensor([[len(query)] for query in queries]),
                 label_positions=torch.cat([b * order.size(1) + t for b, t in enumerate(positions)]),
                 labels=torch.tensor([token for response in responses for token in response], dtype=torch.int64))


# -------------------------------------------------------------------------------------------------- GPT and prompt

class PromptedGPT(nn.Module):
    """A GPT and one way of prompting it. The GPT itself is frozen where the method says so: do not share it with another.

    method: a name in METHODS. prompt_length: k, for methods that have one (None: the method's default). max_query: the
    longest query in tokens. train_embeddings: whether wte is trained (None: as the method says). dtype: the type of matrix
    products; trained weights stay float32, and so do embeddings, norms and logits.

    >>> from model import GPT, GPTConfig
    >>> model = PromptedGPT(GPT(GPTConfig(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2)), "dynamic")
    >>> model([([5, 6], [7, 8]), ([9], [4])]).shape         # two examples with three response tokens
    torch.Size([3])
    >>> [len(answer) for answer in model.generate([[5, 6], [9]], max_new_tokens=4, eot=-1)]
    [4, 4]
    """

    def __init__(self, gpt, method, prompt_length=None, controller_layers=2, max_query=128, train_embeddings=None,
                 dtype=torch.float32):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}")
        encoder = METHODS[method]
        self.gpt, self.dtype = gpt, dtype
        self.encoder = encoder(gpt.config, gpt.wte.weight.detach(), prompt_length or encoder.default_length, max_query,
                               controller_layers)
        gpt.requires_grad_(encoder.trains_gpt)
        gpt.wte.requires_grad_(encoder.trains_embeddings if train_embeddings is None else train_embeddings)
        for layer in gpt.h.modules():
            if isinstance(layer, nn.Linear) and not encoder.trains_gpt:
                layer.to(dtype)                 # once, instead of in every step
        self.train(gpt.training)

    @property
    def device(self):
        return self.gpt.wte.weight.device

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, examples):
        """[(query ids, response ids), ...] -> Batch. Raises ValueError for a query without tokens, or with too many."""
        if not examples:
            raise ValueError("there are no examples, expected at least one")
        sizes = [len(query) for query, _ in examples]
        if not 0 < min(sizes) <= max(sizes) <= self.encoder.max_query:
            raise ValueError(f"a query has {min(sizes) and max(sizes)} tokens, expected 1 to {self.encoder.max_query} (max_query)")
        return make_batch(examples, self.encoder.length).to(self.device)

    def embed(self, batch):
        """Batch -> the rows' input embeddings (B, T, C), and the prompt's keys and values, or None."""
        words = self.gpt.wte(batch.ids)                                             # (B, M + R, C)
        queries = words[:, :batch.mask.size(1)] * batch.mask[..., None]             # the encoder never sees a response
        if self.encoder.reads_hidden_states:
            queries, _ = self.gpt.hidden_states(queries)
        prompt = self.encoder(queries, batch.mask)
        past = prompt if self.encoder.writes_past else None
        if not past and prompt.size(1) != self.encoder.length(queries.size(1)):
            raise ValueError(f"{type(self.encoder).__name__} wrote {prompt.size(1)} prompt embeddings, but its `length` "
                             f"promised {self.encoder.length(queries.size(1))}")
        x = words if past else torch.cat((prompt, words), dim=1)                    # [prompt ; query ; response]
        return x.gather(1, batch.order[..., None].expand(-1, -1, x.size(2))), past  # the padding moves to the right

    def label_logits(self, batch):
        """Batch -> float32 logits (N, V) where response tokens are predicted, and nowhere else: V is large."""
        with self.autocast():
            x, past = self.embed(batch)
            hidden, _ = self.gpt.hidden_states(x, past)                             # (B, T, C)
            return self.gpt.logits(hidden.flatten(0, 1)[batch.label_positions])

    def forward(self, examples):
        """[(query ids, response ids), ...] -> the cross-entropy of each response token, in order: (N,)."""
        batch = self.batch(examples)
        return F.cross_entropy(self.label_logits(batch), batch.labels, reduction="none")

    def generate(self, queries, max_new_tokens=40, eot=None, temperature=0.0, top_p=1.0):
        """Answer each of a list of token lists, all in one batch, as `GPT.generate` does, but behind its prompt. (`self.gpt`
        alone would answer without one.)"""
        if len(queries) == 0:
            return []
        batch = self.batch([(query, []) for query in queries])
        with evaluation(self), self.autocast():
            x, past = self.embed(batch)
            return self.gpt.generate_from(x, batch.lengths, past, max_new_tokens, eot, temperature, top_p)

    def trained(self):
        """What is trained, by name: all that a run's checkpoint needs to hold."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load_trained(self, tensors):
        """Put back what `trained` gave. Raises ValueError if names or shapes differ."""
        mine = self.trained()
        wrong = sorted(mine.keys() ^ tensors.keys()) or [
            name for name, p in mine.items() if getattr(tensors[name], "shape", None) != p.shape]
        if wrong:
            raise ValueError(f"the checkpoint is of another model: {', '.join(wrong[:5])} differ")
        with torch.no_grad():
            for name, p in mine.items():
                p.copy_(tensors[name])
