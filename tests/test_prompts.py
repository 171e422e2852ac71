"""Every way of prompting: rows worked out by hand, equality with transformers and PEFT, what is seen, what trains."""
import random
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from conftest import ROOT
from model import GPT, GPTConfig
from prompt_encoder import METHODS, DynamicPrompt, PromptedGPT, make_batch

K, WIDTH, VOCAB, LAYERS, EOT = 4, 32, 64, 2, 63
SIZES = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
EXAMPLES = [([5, 6, 7, 8, EOT], [10, 11, EOT]), ([EOT], [12]), ([13, 14, EOT], [15, 16, 17, 18, EOT])]
QUERIES = [query for query, _ in EXAMPLES]
TRAINS = {"finetune": ("gpt",), "soft": ("encoder", "gpt.wte"), "dynamic": ("encoder", "gpt.wte")}     # else: encoder
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


def losses_of(model, examples):
    with torch.no_grad():
        return model(examples)


def logits_of(model, examples):
    with torch.no_grad():
        return model.label_logits(model.batch(examples))


def train(model, steps=3):
    optimizer = torch.optim.AdamW(model.trained().values(), lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(EXAMPLES).mean().backward()
        optimizer.step()
    return model.eval()


def copied(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------------- rows and batches

@pytest.mark.parametrize("length, order, positions, lengths", [
    (lambda m: m, [[0, 1, 2, 3, 4, 5], [0, 2, 4, 0, 0, 0]], [3, 4, 7], [6, 3]),
    (lambda m: 0, [[0, 1, 2, 3], [0, 2, 0, 0]], [1, 2, 4], [4, 2]),
    (lambda m: 3, [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 5, 0, 0]], [4, 5, 10], [7, 5])], ids=["m", "0", "3"])
def test_a_batch_worked_out_by_hand(length, order, positions, lengths):
    """The docstring's two examples, with a prompt as long as the query, with none, and with one of three vectors."""
    batch = make_batch([([5, 6], [7, 8]), ([9], [4])], length)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 0, 4, 0]] and batch.mask.tolist() == [[True, True], [True, False]]
    assert batch.order.tolist() == order and batch.lengths == lengths
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
    assert len(inputs) == 3 and inputs[0][0].shape == (3, 5, WIDTH)
    assert inputs[0][1].sum(dim=1).tolist() == [5, 1, 3]
    assert model.encoder.reads_hidden_states or not inputs[0][0][~inputs[0][1]].any()
    for embeddings, mask in inputs[1:]:
        assert torch.equal(embeddings, inputs[0][0]) and torch.equal(mask, inputs[0][1])


@every_method
def test_impossible_queries_are_refused(folder, method):
    """The error names what is wrong with the query. After an error, too, a model in training is in training."""
    model = prompted(folder, method).train()
    for query, words in ([1] * 17, "17 tokens, expected 1 to 16"), ([], "0 tokens"), ([1] * 16, "positions"):
        for call in (lambda: model([(query, [2] * 50)]), lambda: model.generate([[1], query], 50)):
            with pytest.raises(ValueError, match=words):
                call()
    assert all(module.training for module in model.modules())


def test_a_method_that_writes_another_length_than_it_says_is_refused(folder, monkeypatch):
    """It would train on rows whose prompt stands where the query should be."""
    monkeypatch.setattr(DynamicPrompt, "length", lambda self, m: 0)
    with pytest.raises(ValueError, match="DynamicPrompt wrote 5 prompt embeddings, but its `length` promised 0"):
        prompted(folder, "dynamic")(EXAMPLES)
    with pytest.raises(ValueError, match="unknown method 'Dynamic', expected one of finetune, "):
        prompted(folder, "Dynamic")


# --------------------------------------------------------------------------------------- the same numbers in libraries

@every_method
def test_loss_and_logits_equal_transformers(folder, theirs, method):
    """Our encoder beside transformers' GPT: its prompt enters by inputs_embeds or past_key_values."""
    model = prompted(folder, method)
    for query, response in EXAMPLES:
        vectors = {"finetune": 0, "soft": len(query), "dynamic": len(query)}.get(method, K)
        with torch.no_grad():
            words, ids = theirs.transformer.wte(torch.tensor([query + response])), torch.tensor([query])
            mask = torch.ones(ids.shape, dtype=torch.bool)
            if method == "dialogprompt":
                prompt = model.encoder(theirs.transformer(ids).last_hidden_state, mask)
            else:
                prompt = model.encoder(words[:, :len(query)], mask)
            past = DynamicCache(prompt) if method in ("prefix", "dialogprompt") else None
            assert vectors == (past.get_seq_length() if past else prompt.size(1))
            x = words if past else torch.cat((prompt, words), dim=1)
            labels = torch.tensor([[-100] * (x.size(1) - len(response)) + response])
            expected = theirs(inputs_embeds=x, labels=labels, past_key_values=past)
        close(logits_of(model, [(query, response)]), expected.logits[0, -len(response) - 1:-1])
        close(losses_of(model, [(query, response)]).mean(), expected.loss)


def renamed(model, names):
    """The encoder's tensors under other names: each begins with one of `names`."""
    return {new + name.removeprefix(old): t for name, t in model.encoder.state_dict().items()
            for old, new in names.items() if name.startswith(old)}


LSTM = {"encoder_hidden_size": WIDTH // 2, "encoder_reparameterization_type": "LSTM"}
MLP = {"encoder_hidden_size": 512, "prefix_projection": True}
PEFT = {
    "prompt-tuning": (peft.PromptTuningConfig, {}, lambda model: renamed(model, {"table": "embedding.weight"})),
    "p-tuning": (peft.PromptEncoderConfig, LSTM, lambda model: renamed(
        model, {"table": "embedding.weight", "lstm": "lstm_head", "mlp": "mlp_head"})),
    "prefix": (peft.PrefixTuningConfig, MLP, lambda model: renamed(
        model, {"table": "embedding.weight", "mlp": "transform"})),
    "prefix without MLP": (peft.PrefixTuningConfig, {}, lambda model: {
        "embedding.weight": model.encoder.mlp(model.encoder.table)}),
}


@pytest.mark.parametrize("case", PEFT)
def test_logits_equal_peft(folder, case):
    config, options, tensors = PEFT[case]
    model = prompted(folder, case.split()[0])
    config = config(task_type="CAUSAL_LM", num_virtual_tokens=K, **options)
    other = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(folder), config).eval()
    other.prompt_encoder["default"].load_state_dict(tensors(model))
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
    """It is a GPT-2 that reads embeddings, m in, m out. Another embedding j changes h_j, h_j+1, ... and none before."""
    torch.manual_seed(0)
    controller = shake(DynamicPrompt(GPTConfig(**SIZES), torch.randn(VOCAB, WIDTH), max_query=16, layers=3))
    config = GPT2Config(vocab_size=1, n_positions=16, **SIZES | {"n_layer": 3})
    other = copy_into(GPT2Model(config), controller.state_dict())
    queries = torch.randn(5, WIDTH).repeat(5, 1, 1)
    before, after = controller(queries), controller(queries + torch.eye(5)[..., None] * torch.randn(WIDTH))
    close(before, other(inputs_embeds=queries).last_hidden_state)
    assert torch.equal(((before - after).abs() > 1e-4).any(dim=2), torch.ones(5, 5).triu().bool())


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
        context = theirs.transformer(batch.ids[:, :batch.mask.size(1)] * batch.mask).last_hidden_state
        cache = other(input_ids=torch.arange(K).repeat(3, 1), encoder_attention_mask=batch.mask.long(), use_cache=True,
                      encoder_hidden_states=context).past_key_values.self_attention_cache
        for ours, layer in zip(model.embed(batch)[1], cache.layers, strict=True):
            close(ours, (layer.keys, layer.values))


def test_prompts_begin_as_published(folder):
    """Free vectors from N(0, 0.02), a controller with wte's spread, DialogPrompt's tokens from wte's rows 5 .. 9."""
    torch.manual_seed(0)
    gpt = GPT.from_pretrained(folder)
    table = PromptedGPT(gpt, "soft", max_query=500).encoder.table
    assert table.shape == (500, WIDTH) and abs(table.mean()) < 0.001 and 0.019 < table.std() < 0.021
    assert torch.equal(PromptedGPT(gpt, "dialogprompt").encoder.wte.weight, gpt.wte.weight[5:10])
    close(PromptedGPT(gpt, "dynamic").encoder(torch.randn(1, 50, WIDTH)).std(), gpt.wte.weight.std(), 0.01)


# ------------------------------------------------------------------------------------- what is trained, in which type

@every_method
@pytest.mark.parametrize("dtype, embeddings", [
    (torch.float32, None), (torch.float32, True), (torch.float16, False), (torch.bfloat16, None)], ids=str)
def test_trained_tensors_move_and_frozen_ones_do_not(folder, method, dtype, embeddings):
    """Trained tensors stay float32 and all get a gradient. Frozen ones get none and stay what was loaded, rounded once.
    --train-embeddings decides about wte, the method about everything else."""
    loaded = GPT.from_pretrained(folder).state_dict()
    model = prompted(folder, method, dtype=dtype, train_embeddings=embeddings)
    before = copied(model.trained())
    train(model)
    for name, p in model.named_parameters():
        asked = name.startswith(TRAINS.get(method, "encoder"))
        if name == "gpt.wte.weight" and embeddings is not None:
            asked = embeddings
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
    """Losses are float32 and agree to 2%; each greedy token is, in float32 too, within rounding of the best."""
    exact, rough = prompted(folder, method), prompted(folder, method, dtype=dtype)
    assert logits_of(rough, EXAMPLES).dtype == torch.float32
    close(losses_of(rough, EXAMPLES), losses_of(exact, EXAMPLES), 0.02)
    for query, answer in zip(QUERIES, rough.generate(QUERIES, 6, eot=-1)):
        logits = logits_of(exact, [(query, answer)])
        assert (logits.amax(1) - logits[range(6), answer]).max() < 0.1


@pytest.mark.parametrize("change", [
    {"encoder.table": None}, {"encoder.surplus": torch.zeros(1)}, {"encoder.table": torch.zeros(1, WIDTH)}], ids=str)
def test_another_models_checkpoint_is_refused(folder, change):
    """A missing name (None), one too many, another shape: the error names it, and nothing is copied."""
    model = prompted(folder, "p-tuning")
    before, tensors = copied(model.trained()), {name: t + 1 for name, t in model.trained().items()} | change
    with pytest.raises(ValueError, match=next(iter(change))):
        model.load_trained({name: t for name, t in tensors.items() if t is not None})
    assert all(torch.equal(p, before[name]) for name, p in model.trained().items())


@pytest.mark.parametrize("method", ["dynamic", "dialogprompt"])
def test_dropout_acts_in_training_only(folder, method):
    """In the encoder itself, and not while a model in training answers; afterwards it is in training again."""
    model, sober = prompted(folder, method, dropout=0.5), prompted(folder, method)
    model.encoder.train()
    assert not torch.allclose(losses_of(model, EXAMPLES), losses_of(model, EXAMPLES))
    model.train()
    assert model.generate(QUERIES, 6) == sober.generate(QUERIES, 6)
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(losses_of(model, EXAMPLES), losses_of(sober, EXAMPLES))


def test_two_files_are_enough(tmp_path):
    """Copied into an empty folder, model.py and prompt_encoder.py need no other file, and no package but torch."""
    for name in ("model.py", "prompt_encoder.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = "import doctest, sys, prompt_encoder; print(*doctest.testmod(prompt_encoder), *sys.modules)"
    failed, tried, *modules = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, text=True).split()
    assert failed == "0" < tried and not {"data", "evaluate", "transformers", "tiktoken", "requests"} & {*modules}
