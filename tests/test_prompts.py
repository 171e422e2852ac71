"""Every way of prompting: against PEFT and transformers with the same numbers, against rows worked out by hand, and what trains."""
import contextlib
from unittest import mock

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings, strategies as st
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

from data import make_batch
from model import GPT
from prompt_encoder import METHODS, PromptedGPT

K, WIDTH, VOCAB, LAYERS, EOT = 4, 32, 64, 2, 63
SIZES = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4}
EXAMPLES = [([5, 6, 7, 8, EOT], [10, 11, EOT]), ([EOT], [12]), ([13, 14, EOT], [15, 16, 17, 18, EOT])]
TRAINS = {"finetune": ["gpt"], "soft": ["encoder", "gpt.wte"], "dynamic": ["encoder", "gpt.wte"], "prompt-tuning": ["encoder"],
          "p-tuning": ["encoder"], "prefix": ["encoder"], "dialogprompt": ["encoder"]}
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)
every_method = pytest.mark.parametrize("method", TRAINS)


def shake(module):
    """Random numbers everywhere, biases and norms included, large enough that a wrong one shows."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return module.eval()


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(1)
    return shake(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, bos_token_id=EOT, eos_token_id=EOT, **SIZES)))


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


def batch_of(model, examples, responses=True):
    return make_batch(examples, model.encoder.slots, responses)


def logits_of(model, examples):
    """Examples -> the logits (N, V) from which `forward` computes its loss, without the padding behind them."""
    batch = batch_of(model, examples)
    with torch.no_grad():
        return model.logits(batch)[:len(batch.targets)].float()


def answers_of(model, queries, eot=EOT, max_new_tokens=6):
    return model.answer([batch_of(model, [(q, []) for q in queries], responses=False)], max_new_tokens, eot)


def train(model, steps=3):
    optimizer = torch.optim.AdamW(model.trained().values(), lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(batch_of(model, EXAMPLES)).backward()
        optimizer.step()
    return model.eval()


def copied(tensors):
    return {name: t.detach().clone() for name, t in tensors.items()}


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------------------------ rows and batches

@pytest.mark.parametrize("method, prompt, positions", [
    ("finetune", [], [0, 1, 2, 3]), ("soft", [0, 1], [0, 1, 2, 3, 4, 5]),
    ("prompt-tuning", [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]), ("prefix", [], [4, 5, 6, 7])])
def test_a_row_is_prompt_query_response(folder, method, prompt, positions):
    """Vectors take the row's first places; pairs take none, but the row's positions begin behind them. Padding fills 8."""
    model, seen = prompted(folder, method), []
    model.gpt.wpe.register_forward_hook(lambda module, args, output: seen.extend(args[0].tolist()))
    batch = batch_of(model, [([5, 6], [7, 8])])
    table = [model.encoder.table[i] for i in prompt]
    row = model.read(batch)[0][0]
    assert len(row) == 8 and torch.equal(row[:len(positions)], torch.stack([*table, *model.gpt.wte.weight[5:9]]))
    model(batch)
    assert seen == [*range(positions[0], positions[0] + 8)]


@every_method
@settings(max_examples=10, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(tokens, tokens), min_size=2, max_size=4))
def test_neighbours_do_not_matter(folder, method, examples):
    """A padded batch gives each row the logits, the loss and the answer that it has alone."""
    model = prompted(folder, method)
    close(logits_of(model, examples), torch.cat([logits_of(model, [e]) for e in examples]))
    with torch.no_grad():
        close(model(batch_of(model, examples)), sum(model(batch_of(model, [e])) for e in examples))
    queries = [q for q, _ in examples]
    assert answers_of(model, queries) == [answers_of(model, [q])[0] for q in queries]


@every_method
def test_the_cache_changes_no_answer(folder, method):
    """Greedy answers are those of reading everything anew for each token, and end where eot comes."""
    model, expected = prompted(folder, method), []
    for query, _ in EXAMPLES:
        answer = []
        for _ in range(6):
            answer.append(int(logits_of(model, [(query, answer + [0])])[-1].argmax()))
        expected.append(answer)
    eot = expected[0][3]
    expected = [answer[:answer.index(eot)] if eot in answer else answer for answer in expected]
    assert answers_of(model, [q for q, _ in EXAMPLES], eot) == expected


@every_method
def test_loss_is_the_cross_entropy_of_response_tokens(folder, method):
    model = prompted(folder, method)
    targets = torch.tensor([t for _, response in EXAMPLES for t in response])
    close(model(batch_of(model, EXAMPLES)), -logits_of(model, EXAMPLES).log_softmax(1)[range(len(targets)), targets].sum())


@every_method
def test_vocabulary_is_touched_twice(folder, method, monkeypatch):
    """One look-up per batch, and one product with wte, of response positions only, padded to 64: these two decide the speed."""
    model, touched = prompted(folder, method), []
    batch = batch_of(model, EXAMPLES)

    def watch(name, function):
        def watched(x, weight, *args, **options):
            if weight.data_ptr() == model.gpt.wte.weight.data_ptr():
                touched.append((name, x.shape))
            return function(x, weight, *args, **options)
        monkeypatch.setattr(F, name, watched)

    watch("embedding", F.embedding)
    watch("linear", F.linear)
    model(batch)
    assert touched == [("embedding", batch.ids.shape), ("linear", (64, WIDTH))]


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_plain_autograd(folder, method, dtype):
    """LookUp and CrossEntropy, which write gradients in place, change none of them."""
    model, batch, found = prompted(folder, method, dtype=dtype), None, []
    batch = batch_of(model, EXAMPLES * 30)                          # 300 response tokens: several parts, and padding
    plain = {"LookUp": lambda wte, ids: (F.embedding(ids, wte), wte),
             "CrossEntropy": lambda logits, targets: F.cross_entropy(logits[:len(targets)].float(), targets, reduction="sum")}
    for patches in ({}, plain):
        with contextlib.ExitStack() as stack:
            for name, function in patches.items():
                stack.enter_context(mock.patch(f"prompt_encoder.{name}.apply", function))
            loss = model(batch)
            (loss / len(batch.targets)).backward()
        found.append([loss.detach(), *(p.grad for p in model.trained().values())])
        model.zero_grad()
    scale = max(t.abs().max() for t in found[1][1:])
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected, rtol=1e-5 if dtype == torch.float32 else 0.02,
                                   atol=(1e-6 if dtype == torch.float32 else 0.02) * scale)


@pytest.mark.parametrize("method", ["finetune", "prefix", "soft"])
def test_padding_never_passes_n_positions(theirs, method, tmp_path):
    """Rows are padded to a multiple of 8, but not beyond the GPT's last position: this one has 27."""
    torch.manual_seed(2)
    short = shake(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=27, bos_token_id=EOT, eos_token_id=EOT, **SIZES)))
    short.save_pretrained(tmp_path)
    model = prompted(tmp_path, method)
    query = list(range(1, {"finetune": 20, "prefix": 16, "soft": 10}[method]))
    example = query, list(range(30, 30 + 27 - {"finetune": 0, "prefix": K, "soft": 9}[method] - len(query)))
    close(logits_of(model, [example]), torch.cat([logits_of(model, [(query, example[1][:i + 1])])[-1:] for i in range(len(example[1]))]))
    assert answers_of(model, [query], eot=-1, max_new_tokens=len(example[1]))[0]


# ------------------------------------------------------------------------------------------- the same numbers in libraries

def renamed(model, names):
    """The encoder's tensors under other names: each begins with one of `names`."""
    return {new + name.removeprefix(old): t for name, t in model.encoder.state_dict().items()
            for old, new in names.items() if name.startswith(old)}


PEFT = {
    "prompt-tuning": ("prompt-tuning", peft.PromptTuningConfig, {}, lambda model: renamed(model, {"table": "embedding.weight"})),
    "p-tuning": ("p-tuning", peft.PromptEncoderConfig, {"encoder_hidden_size": WIDTH // 2, "encoder_reparameterization_type": "LSTM"},
                 lambda model: renamed(model, {"table": "embedding.weight", "lstm": "lstm_head", "mlp": "mlp_head"})),
    "prefix": ("prefix", peft.PrefixTuningConfig, {"encoder_hidden_size": 512, "prefix_projection": True},
               lambda model: renamed(model, {"table": "embedding.weight", "mlp": "transform"})),
    "prefix, free pairs": ("prefix", peft.PrefixTuningConfig, {},
                           lambda model: {"embedding.weight": model.encoder.mlp(model.encoder.table)}),
}


@pytest.mark.parametrize("case", PEFT)
def test_logits_equal_peft(folder, case):
    method, config, options, tensors = PEFT[case]
    model = prompted(folder, method)
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


def test_dynamic_prompts_equal_transformers(folder):
    """The controller is a GPT-2 that reads the GPT's own word embeddings: m tokens in, m vectors out."""
    model = prompted(folder, "dynamic", controller_layers=3)
    other = copy_into(GPT2Model(GPT2Config(vocab_size=1, n_positions=16, **SIZES | {"n_layer": 3})), model.encoder.state_dict())
    query = model.gpt.wte(torch.tensor([[5, 6, 7, 8, 9]]))
    vectors = model.encoder.vectors(query)
    assert vectors.shape == (1, 5, WIDTH)
    close(vectors, other(inputs_embeds=query).last_hidden_state)
    close(model.read(batch_of(model, [([5, 6, 7, 8, 9], [10])]))[0][0, :5], vectors[0])


def test_dynamic_prompts_are_causal(folder):
    """Another token j changes h_j, h_j+1, ... and nothing before."""
    model = prompted(folder, "dynamic")
    ids = torch.tensor([5, 6, 7, 8, 9]).repeat(5, 1)
    before = model.encoder.vectors(model.gpt.wte(ids))
    after = model.encoder.vectors(model.gpt.wte(ids + torch.eye(5, dtype=torch.int64)))        # row j has another token j
    changed = ((before - after).abs() > 1e-4).any(dim=2)
    assert torch.equal(changed, torch.ones(5, 5).triu().bool())


def test_dialogprompt_equals_transformers(folder, theirs):
    """k tokens through a GPT-2 with cross-attention; what it caches is the past of the GPT. Its last block need not be whole."""
    model = prompted(folder, "dialogprompt")
    tensors, last = dict(model.encoder.state_dict()), f"h.{LAYERS - 1}"
    for end in ("weight", "bias"):
        tensors[f"{last}.ln_1.{end}"] = tensors.pop(f"ln_last.{end}")
        pairs = tensors.pop(f"c_last.{end}")
        tensors[f"{last}.attn.c_attn.{end}"] = torch.cat((torch.zeros_like(pairs[:WIDTH]), pairs))      # no queries
    other = copy_into(GPT2Model(GPT2Config(vocab_size=K, n_positions=K, add_cross_attention=True, **SIZES)), tensors)

    longest = max(len(q) for q, _ in EXAMPLES)
    queries = torch.tensor([q + [0] * (longest - len(q)) for q, _ in EXAMPLES])
    mask = torch.tensor([[1] * len(q) + [0] * (longest - len(q)) for q, _ in EXAMPLES])
    batch = batch_of(model, EXAMPLES)
    with torch.no_grad():
        cache = other(input_ids=torch.arange(K).repeat(3, 1), encoder_attention_mask=mask, use_cache=True,
                      encoder_hidden_states=theirs.transformer(queries).last_hidden_state).past_key_values.self_attention_cache
        pairs = model.read(batch)[1]
        close(pairs, torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers]))
        past = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        expected = theirs(input_ids=batch.ids, past_key_values=past).logits.flatten(0, 1)[batch.where]
    close(logits_of(model, EXAMPLES), expected)


def test_prompts_begin_as_published(folder):
    """Free vectors from N(0, 0.02); DialogPrompt's five tokens from rows 5 .. 9 of the word embedding."""
    torch.manual_seed(0)
    gpt = GPT.from_pretrained(folder)
    table = PromptedGPT(gpt, "soft", max_query=500).encoder.table
    assert table.shape == (500, WIDTH) and abs(table.mean()) < 0.001 and 0.019 < table.std() < 0.021
    assert torch.equal(PromptedGPT(gpt, "dialogprompt").encoder.wte.weight, gpt.wte.weight[5:10])


# ---------------------------------------------------------------------------------------------------- what is trained

@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_tensors_move_and_frozen_ones_do_not(folder, method, dtype):
    """Trained tensors stay float32 and all get a gradient. Frozen ones get none and stay what was loaded, matrices rounded once."""
    assert TRAINS.keys() == METHODS.keys()
    loaded = GPT.from_pretrained(folder).state_dict()
    model = prompted(folder, method, dtype=dtype)
    before = copied(model.trained())
    train(model)
    for name, p in model.named_parameters():
        if name.startswith(tuple(TRAINS[method])):
            assert p.dtype == torch.float32 and p.grad.dtype == torch.float32, name
            assert p.grad.any() and not torch.equal(p, before[name]), name
        else:
            original = loaded[name.removeprefix("gpt.")]
            assert name not in before and p.grad is None, name
            assert torch.equal(p, original.to(dtype) if p.dim() > 1 else original), name


@every_method
@pytest.mark.parametrize("wanted", [True, False])
def test_train_embeddings_overrides(folder, method, wanted):
    """The flag decides about wte, the method about everything else."""
    model, default = (prompted(folder, method, train_embeddings=flag) for flag in (wanted, None))
    assert model.trained().keys() - {"gpt.wte.weight"} == default.trained().keys() - {"gpt.wte.weight"}
    before = model.gpt.wte.weight.clone()
    train(model)
    assert torch.equal(model.gpt.wte.weight, before) != wanted
    assert ("gpt.wte.weight" in model.trained()) == wanted


@every_method
def test_reloaded_model_answers_the_same(folder, method):
    """What `trained` gives is all that a fresh model needs."""
    model, fresh = train(prompted(folder, method)), prompted(folder, method, seed=1)
    expected = logits_of(model, EXAMPLES)
    assert not torch.allclose(logits_of(fresh, EXAMPLES), expected, atol=0.01)
    fresh.load_trained(copied(model.trained()))
    assert torch.equal(logits_of(fresh, EXAMPLES), expected)
    queries = [q for q, _ in EXAMPLES]
    assert answers_of(fresh, queries) == answers_of(model, queries)


@pytest.mark.parametrize("change, named", [
    (lambda tensors: tensors.pop("encoder.table"), "encoder.table"),
    (lambda tensors: tensors.update(surplus=torch.zeros(1)), "surplus"),
    (lambda tensors: tensors.update({"encoder.table": torch.zeros(1, WIDTH)}), "encoder.table")], ids=["missing", "surplus", "shape"])
def test_another_models_checkpoint_is_refused(folder, change, named):
    """Nothing is copied from it, and the error names what differs."""
    model = prompted(folder, "p-tuning")
    before, tensors = copied(model.trained()), {name: t + 1 for name, t in copied(model.trained()).items()}
    change(tensors)
    with pytest.raises(ValueError, match=named):
        model.load_trained(tensors)
    assert all(torch.equal(p, before[name]) for name, p in model.trained().items())


@pytest.mark.parametrize("method, door", [("dynamic", lambda model, batch: model.read(batch)[0]),
                                          ("dialogprompt", lambda model, batch: model.read(batch)[1])])
def test_dropout_acts_in_the_encoder_in_training_only(folder, method, door):
    model = prompted(folder, method, dropout=0.5)
    batch = batch_of(model, EXAMPLES)
    assert torch.equal(door(model, batch), door(model, batch))
    model.encoder.train()
    assert not torch.allclose(door(model, batch), door(model, batch))


# ---------------------------------------------------------------------------------------------------------- bfloat16

@every_method
def test_bfloat16_is_close_to_float32(folder, method):
    """Losses agree to 1%, and each greedy token is, in float32 too, within rounding of the best."""
    exact, rough = prompted(folder, method), prompted(folder, method, dtype=torch.bfloat16)
    with torch.no_grad():
        close(rough(batch_of(rough, EXAMPLES)), exact(batch_of(exact, EXAMPLES)), 0.01)
    queries = [q for q, _ in EXAMPLES]
    for query, answer in zip(queries, answers_of(rough, queries, eot=-1)):
        logits = logits_of(exact, [(query, answer)])
        regret = logits.amax(1) - logits[range(6), answer]
        assert regret.max() < 0.1
