"""Every way of prompting: rows worked out by hand, equality with transformers and PEFT, what is seen, what trains.
What a method promises is asked of its class, so that a new one is tested by being in METHODS.
"""
import random
import shutil
import subprocess
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from conftest import ROOT
from model import GPT, GPTConfig
from prompt_encoder import METHODS, DynamicPrompt, PromptedGPT, make_batch

K, WIDTH, VOCAB, LAYERS, EOT = 4, 32, 64, 2, 63
SIZES = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
EXAMPLES = [([5, 6, 7, 8, EOT], [10, 11, EOT]), ([EOT], [12]), ([13, 14, EOT], [15, 16, 17, 18, EOT])]
EQUALLY_LONG = [([5, 6, 7], [8, EOT]), ([9, 10, 11], [12]), ([13, 14, EOT], [15, 16, 17, EOT])]
QUERIES = [query for query, _ in EXAMPLES]
every_method = pytest.mark.parametrize("method", METHODS)


def shake(module):
    """Random numbers everywhere, biases and norms included, large enough that a wrong one shows."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return module.eval()


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, bos_token_id=EOT, eos_token_id=EOT, **SIZES)
    return shake(GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt")
    theirs.save_pretrained(folder)
    return folder


def prompted(folder, method, seed=0, dropout=0.0, **options):
    torch.manual_seed(seed)
    model = PromptedGPT(GPT.from_pretrained(folder, dropout), method, prompt_length=K, max_query=16, **options)
    shake(model.encoder)
    return model.eval()


@torch.no_grad()
def losses_of(model, examples, **options):
    return model(examples, **options)


@torch.no_grad()
def logits_of(model, examples):
    return model.label_logits(model.batch(examples))


def train(model, examples=EXAMPLES, steps=3, lr=0.01, enough=0.0):
    optimizer = torch.optim.AdamW(model.trained().values(), lr=lr, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.train()(examples).mean()
        if loss < enough:
            break
        loss.backward()
        optimizer.step()
    return model.eval()


def copied(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------------- rows and batches

@pytest.mark.parametrize("prompt_length, rows, prompts, positions, lengths", [
    (lambda m: m, [[0, 0, 5, 6, 7, 8], [0, 9, 4, 0, 0, 0]], [2, 1], [3, 4, 7], [6, 3]),
    (lambda m: 0, [[5, 6, 7, 8], [9, 4, 0, 0]], [0, 0], [1, 2, 4], [4, 2]),
    (lambda m: 3, [[0, 0, 0, 5, 6, 7, 8], [0, 0, 0, 9, 4, 0, 0]], [3, 3], [4, 5, 10], [7, 5])], ids=["m", "0", "3"])
def test_a_batch_worked_out_by_hand(prompt_length, rows, prompts, positions, lengths):
    """The docstring's two examples, with a prompt as long as the query, with none, and with one of three vectors."""
    batch = make_batch([([5, 6], [7, 8]), ([9], [4])], prompt_length)
    assert batch.queries.tolist() == [[5, 6], [9, 0]] and batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.rows.tolist() == rows and batch.lengths == lengths
    assert batch.is_prompt.tolist() == [[t < n for t in range(len(rows[0]))] for n in prompts]
    assert batch.label_positions.tolist() == positions and batch.labels.tolist() == [7, 8, 4]


@every_method
def test_neither_neighbours_nor_the_cache_matter(folder, method):
    """A padded batch gives each row the losses it has alone, and the answer of reading all anew for each token."""
    model, expected, r = prompted(folder, method), [], random.Random(0)
    examples = EXAMPLES + [([r.randrange(VOCAB) for _ in range(m)], [r.randrange(VOCAB) for _ in range(n)])
                           for m, n in ((16, 1), (2, 9), (7, 7))]
    close(losses_of(model, examples), torch.cat([losses_of(model, [example]) for example in examples]))
    for query, _ in examples:
        answer = []
        for _ in range(6):
            answer.append(logits_of(model, [(query, answer + [0])])[-1].argmax().item())
        expected.append(answer)
    eot = expected[0][3]
    expected = [answer[:answer.index(eot)] if eot in answer else answer for answer in expected]
    assert model.generate([query for query, _ in examples], 6, eot) == expected


@every_method
def test_the_encoder_never_receives_a_response(folder, method):
    """Other responses, of other lengths, leave every bit of its input as it was. Behind short queries stand zeros."""
    model, inputs = prompted(folder, method), []
    model.encoder.register_forward_pre_hook(lambda module, given: inputs.append(given))
    model(EXAMPLES)
    model([(query, [20 + i, 30, 31, 32, 33, 34][i:]) for i, (query, _) in enumerate(EXAMPLES)])
    model.generate(QUERIES, 3)
    assert len(inputs) == 3
    for queries, mask in inputs:
        assert queries.shape == (3, 5, WIDTH) and torch.equal(queries, inputs[0][0])
        assert mask.sum(dim=1).tolist() == [5, 1, 3]
        assert model.encoder.reads_hidden_states or not queries[~mask].any()


@every_method
def test_what_cannot_be_is_refused(folder, method):
    """The error names what is wrong with the query. After an error, too, a model in training is in training."""
    model = prompted(folder, method).train()
    modes = [module.training for module in model.modules()]
    for query, words in ([1] * 17, "17 tokens, expected 1 to 16"), ([], "0 tokens"), ([1] * 16, "positions"):
        for call in (lambda: model([(query, [2] * 50)]), lambda: model.generate([[1], query], 50)):
            with pytest.raises(ValueError, match=words):
                call()
    with pytest.raises(ValueError, match="list of token lists"):
        model.generate([1, 2, 3])
    assert modes == [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=f"unknown method '{method}s', expected one of finetune, "):
        prompted(folder, f"{method}s")


# --------------------------------------------------------------------------------------- the same numbers in libraries

def prompt_of(encoder, gpt, ids):
    """The prompt of one query, from the word embeddings or hidden states of transformers' GPT-2."""
    ids = torch.tensor([ids])
    queries = gpt(ids).last_hidden_state if encoder.reads_hidden_states else gpt.wte(ids)
    return encoder(queries, torch.ones_like(ids, dtype=torch.bool))


@every_method
@pytest.mark.parametrize("swapped", [False, True], ids=["own", "swapped"])
def test_numbers_equal_transformers(folder, theirs, method, swapped):
    """Our encoder beside transformers' GPT: its prompt, or, swapped, that of the row before (the first row gets the
    last one's), enters by inputs_embeds or past_key_values."""
    model, examples, losses, tokens = prompted(folder, method), EQUALLY_LONG if swapped else EXAMPLES, [], []
    with torch.no_grad():
        prompts = [prompt_of(model.encoder, theirs.transformer, query) for query, _ in examples]
        for b, (query, response) in enumerate(examples):
            prompt, words = prompts[b - swapped], theirs.transformer.wte(torch.tensor([query + response]))
            past = DynamicCache(prompt) if model.encoder.writes_past else None
            x = words if past else torch.cat((prompt, words), dim=1)
            logits = theirs(inputs_embeds=x, past_key_values=past).logits[0, -len(response) - 1:-1]
            losses.append(F.cross_entropy(logits, torch.tensor(response), reduction="none"))
            tokens.append([logits[0].argmax().item()])
    found = losses_of(model, examples, swapped=swapped)
    close(found, torch.cat(losses))
    assert model.generate([query for query, _ in examples], 1, eot=-1, swapped=swapped) == tokens
    if swapped:                     # a prompt that is the same for all costs nothing, to the bit
        difference = (found - losses_of(model, examples)).abs().mean()
        assert difference == 0 if alike(*prompts[:2]) else difference > 0.01


def flat(prompt):
    return [prompt] if torch.is_tensor(prompt) else [t for layer in prompt for t in layer]


def alike(one, two):
    return all(map(torch.equal, flat(one), flat(two)))


PEFT = {        # its config, and its names for our tensors
    "prompt-tuning": (peft.PromptTuningConfig, {}, {"table": "embedding.weight"}),
    "p-tuning": (peft.PromptEncoderConfig,
                 {"encoder_hidden_size": WIDTH // 2, "encoder_reparameterization_type": "LSTM"},
                 {"table": "embedding.weight", "lstm": "lstm_head", "mlp": "mlp_head"}),
    "prefix": (peft.PrefixTuningConfig, {"encoder_hidden_size": 512, "prefix_projection": True},
               {"table": "embedding.weight", "mlp": "transform"})}


@pytest.mark.parametrize("method", PEFT)
def test_logits_equal_peft(folder, method):
    config, options, names = PEFT[method]
    model = prompted(folder, method)
    config = config(task_type="CAUSAL_LM", num_virtual_tokens=K, **options)
    other = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(folder), config).eval()
    other.prompt_encoder["default"].load_state_dict({
        names[first] + name.removeprefix(first): t for name, t in model.encoder.state_dict().items()
        for first in [name.split(".")[0]]})
    with torch.no_grad():
        expected = [other(input_ids=torch.tensor([q + r])).logits[0, -len(r) - 1:-1] for q, r in EXAMPLES]
    close(logits_of(model, EXAMPLES), torch.cat(expected))


def copy_into(module, tensors):
    """Linear layers' weights into transformers' Conv1D, which keeps them transposed, and all else as it is."""
    with torch.no_grad():
        for name, t in tensors.items():
            transposed = isinstance(module.get_submodule(name.rpartition(".")[0]), Conv1D)
            module.get_parameter(name).copy_(t.t() if transposed and t.dim() == 2 else t)
    return module.eval()


def test_the_controller_alone_equals_transformers():
    """It is a GPT-2 that reads embeddings, m in, m out."""
    torch.manual_seed(0)
    controller = shake(DynamicPrompt(GPTConfig(**SIZES), torch.randn(VOCAB, WIDTH), max_query=16, layers=3))
    config = GPT2Config(vocab_size=1, n_positions=16, **SIZES | {"n_layer": 3})
    other = copy_into(GPT2Model(config), controller.state_dict())
    queries = torch.randn(2, 5, WIDTH)
    close(controller(queries), other(inputs_embeds=queries).last_hidden_state)


def test_dialogprompt_equals_transformers(folder, theirs):
    """k tokens through a GPT-2 with cross-attention: its cache is the GPT's past. Half a last block is enough."""
    model = prompted(folder, "dialogprompt")
    tensors, last = dict(model.encoder.state_dict()), f"h.{LAYERS - 1}"
    for end in ("weight", "bias"):
        tensors[f"{last}.ln_1.{end}"] = tensors.pop(f"ln_last.{end}")
        kv = tensors.pop(f"c_last.{end}")
        tensors[f"{last}.attn.c_attn.{end}"] = torch.cat((torch.zeros_like(kv[:WIDTH]), kv))        # no queries
    other = copy_into(GPT2Model(GPT2Config(vocab_size=K, n_positions=K, add_cross_attention=True, **SIZES)), tensors)
    batch = model.batch(EXAMPLES)
    with torch.no_grad():
        cache = other(input_ids=torch.arange(K).repeat(3, 1), encoder_attention_mask=batch.mask.long(), use_cache=True,
                      encoder_hidden_states=theirs.transformer(batch.queries).last_hidden_state,
                      ).past_key_values.self_attention_cache
        for ours, layer in zip(model.embed(batch)[1], cache.layers, strict=True):
            close(ours, (layer.keys, layer.values))


@every_method
def test_an_encoder_can_be_built_and_called_alone(method):
    """From a config and word embeddings; it writes what it says."""
    encoder = METHODS[method](GPTConfig(**SIZES), torch.randn(VOCAB, WIDTH))
    prompt = encoder(torch.randn(2, 7, WIDTH), torch.ones(2, 7, dtype=torch.bool))
    assert encoder.k == encoder.default_length and encoder.max_query == 128
    embeddings, past = [(2, encoder.prompt_length(7), WIDTH)], [(2, 4, encoder.k, WIDTH // 4)] * 2 * LAYERS
    assert [t.shape for t in flat(prompt)] == (past if encoder.writes_past else embeddings)


def test_methods_begin_as_published(folder):
    """What is trained, and how many vectors stand before a query of 7 tokens, as DESIGN.md's table and the papers say.
    Free vectors come from N(0, 0.02), a controller has wte's spread, DialogPrompt's tokens are wte's rows 5, 6 ..."""
    torch.manual_seed(0)
    gpt = GPT.from_pretrained(folder)
    published = {"finetune": (True, True, 0), "embeddings": (False, True, 0), "soft": (False, True, 7),
                 "dynamic": (False, True, 7), "prompt-tuning": (False, False, 20), "p-tuning": (False, False, 20),
                 "prefix": (False, False, 0), "dialogprompt": (False, False, 0)}
    for method, expected in published.items():
        encoder = PromptedGPT(gpt, method, max_query=50).encoder
        assert (gpt.ln_f.weight.requires_grad, gpt.wte.weight.requires_grad, encoder.prompt_length(7)) == expected
    table = PromptedGPT(gpt, "soft", max_query=500).encoder.table
    assert table.shape == (500, WIDTH) and abs(table.mean()) < 0.001 and 0.019 < table.std() < 0.021
    assert torch.equal(encoder.wte.weight, gpt.wte.weight[5:25])
    controller = PromptedGPT(gpt, "dynamic", max_query=50).encoder
    close(controller(torch.randn(1, 50, WIDTH)).std(), gpt.wte.weight.std(), 0.01)


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].controller_init])
@pytest.mark.parametrize("max_query, layers", [(16, 1), (64, 2), (100, 3)])
def test_a_controller_may_start_as_the_gpts_own_layers(folder, method, max_query, layers):
    """They are copies: training them leaves the GPT as it was. What the GPT does not have stays random."""
    torch.manual_seed(0)
    gpt = GPT.from_pretrained(folder)
    before, options = copied(gpt.state_dict()), {"max_query": max_query, "controller_layers": layers}
    other = PromptedGPT(gpt, method, controller_init="random", **options).encoder.state_dict()
    model = PromptedGPT(gpt, method, controller_init="gpt", train_embeddings=False, **options)
    tensors = copied(model.encoder.state_dict())
    blocks = [name for name in tensors if name.startswith(("h.0.", "h.1."))]
    assert len(blocks) == 12 * min(layers, LAYERS) and not torch.equal(other[blocks[0]], before[blocks[0]])
    assert all(torch.equal(tensors[name], before[name]) for name in blocks)
    assert torch.equal(tensors["wpe.weight"][:64], before["wpe.weight"][:max_query])
    train(model)
    assert not any(torch.equal(model.encoder.state_dict()[name], before[name]) for name in blocks)
    assert all(torch.equal(t, before[name]) for name, t in gpt.state_dict().items())


# ------------------------------------------------------------------------------------- what is trained, in which type

@every_method
@pytest.mark.parametrize("dtype, embeddings", [
    (torch.float32, None), (torch.float32, True), (torch.float16, False), (torch.bfloat16, None)], ids=str)
def test_trained_tensors_move_and_frozen_ones_do_not(folder, method, dtype, embeddings):
    """Trained tensors stay float32 and all get a gradient. Frozen ones get none and stay what was loaded, rounded once.
    --train-embeddings decides about wte, the method about everything else."""
    loaded, encoder = GPT.from_pretrained(folder).state_dict(), METHODS[method]
    model = prompted(folder, method, dtype=dtype, train_embeddings=embeddings)
    before = copied(model.trained())
    if before:                              # nothing is left of `embeddings` without embeddings
        train(model)
    for name, p in model.named_parameters():
        asked = encoder.trains_gpt or name.startswith("encoder.")
        if name == "gpt.wte.weight":
            asked = encoder.trains_embeddings if embeddings is None else embeddings
        assert (name in before) == asked, name
        if asked:
            assert p.dtype == p.grad.dtype == torch.float32 and p.grad.any() and not torch.equal(p, before[name]), name
        else:
            linear = ".c_" in name          # c_attn, c_proj, c_fc; embeddings and norms stay float32
            original = loaded[name.removeprefix("gpt.")].to(dtype if linear else torch.float32)
            assert p.grad is None and p.dtype == original.dtype and torch.equal(p, original), name


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_close_to_float32(folder, method, dtype):
    exact = losses_of(prompted(folder, method), EXAMPLES)
    rough = losses_of(prompted(folder, method, dtype=dtype), EXAMPLES)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    close(rough, exact, 0.02)


@every_method
def test_dropout_acts_where_weights_are_trained(folder, method):
    """A frozen GPT is the same function in training. While a model in training answers, all dropout sleeps."""
    model, sober = prompted(folder, method, dropout=0.5).train(), losses_of(prompted(folder, method), EXAMPLES)
    assert {module.training for module in model.gpt.modules()} == {model.encoder.trains_gpt}
    first, second = losses_of(model, EXAMPLES), losses_of(model, EXAMPLES)
    assert torch.allclose(first, sober) == torch.allclose(first, second) == (METHODS[method].dropout is None)
    modes = [module.training for module in model.modules()]
    assert model.generate(QUERIES, 6) == prompted(folder, method).generate(QUERIES, 6)
    assert modes == [module.training for module in model.modules()]
    close(losses_of(model.eval(), EXAMPLES), sober)


def memorising():
    """(method, controller_init) of each method that gives two queries two prompts."""
    torch.manual_seed(0)
    gpt = GPT2Model(GPT2Config(vocab_size=VOCAB, bos_token_id=EOT, eos_token_id=EOT, **SIZES)).eval()
    for method, encoder in METHODS.items():
        encoder = encoder(GPTConfig(**SIZES), torch.randn(VOCAB, WIDTH)).eval()
        if not alike(prompt_of(encoder, gpt, [1, 2]), prompt_of(encoder, gpt, [3, 4])):
            yield from [(method, "random"), (method, "gpt")][:1 + bool(encoder.controller_init)]


@pytest.mark.parametrize("method, init", list(memorising()))
def test_a_model_that_knows_its_pairs_by_heart_knows_them_by_their_prompts(method, init):
    """With another query's prompt it is lost, of a dozen pairs that it has learnt."""
    torch.manual_seed(0)
    gpt = shake(GPT(GPTConfig(vocab_size=20, n_positions=32, **SIZES)))
    pairs = [(pair[:4], pair[4:]) for pair in torch.randint(20, (12, 6)).tolist()]
    model = train(PromptedGPT(gpt, method, max_query=4, controller_init=init), pairs, steps=200, enough=0.5)
    own, swapped = losses_of(model, pairs).mean(), losses_of(model, pairs, swapped=True).mean()
    assert own < 0.7 and swapped - own > 0.5


@pytest.mark.parametrize("name, tensor", [
    ("table", None), ("surplus", torch.zeros(1)), ("table", torch.zeros(1, WIDTH))])
def test_another_models_checkpoint_is_refused(folder, name, tensor):
    """A missing name (None), one too many, another shape: the error names it."""
    model, name = prompted(folder, "p-tuning"), f"encoder.{name}"
    tensors = copied(model.trained()) | {name: tensor}
    with pytest.raises((ValueError, RuntimeError), match=name):
        model.load_trained({name: t for name, t in tensors.items() if t is not None})


def test_two_files_are_enough(tmp_path):
    """Copied into an empty folder, model.py and prompt_encoder.py need no other file, and no package but torch."""
    for name in ("model.py", "prompt_encoder.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = "import doctest, sys, prompt_encoder; print(*doctest.testmod(prompt_encoder), *sys.modules)"
    failed, tried, *modules = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True).split()
    assert failed == "0" < tried and not {"data", "evaluate", "transformers", "tiktoken", "requests"} & {*modules}
