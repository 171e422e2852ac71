"""GPT against transformers' GPT-2: logits, gradients, keys and values, answers. Tokens that are drawn; the device."""
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import SHARED
from model import GPT, GPTConfig, UsageError, choose_device, sample_next_token


def random_gpt2(seed=0, **given):
    """A transformers GPT-2 of random shape, all its parameters random, biases too: none can be forgotten unseen."""
    r = random.Random(seed)
    heads = given.get("n_head", r.choice([1, 2, 3, 5, 7]))
    shape = {"vocab_size": r.randint(20, 60), "n_positions": r.randint(20, 60), "n_head": heads,
             "n_embd": heads * r.randint(3, 9), "n_layer": r.randint(1, 3), "layer_norm_epsilon": 1e-3,
             "n_inner": r.choice([None, r.randint(1, 90)]), "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**shape | given)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.5)
    return model


def random_ids(model, rows=3):
    return torch.randint(model.config.vocab_size, (rows, model.config.n_positions))


def loaded(model, folder):
    model.save_pretrained(folder)
    return GPT.from_pretrained(folder)


def close(ours, theirs, tolerance=0.0):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=tolerance)


def assert_same_logits(gpt, model):
    ids = random_ids(model)
    with torch.no_grad():
        close(gpt(ids), model(ids).logits)


# ------------------------------------------------------------------------------------------------------- the network

@pytest.mark.parametrize("n_head, epsilon, n_inner", [(1, 1e-5, None), (3, 1e-3, 50), (5, 0.3, None)])
def test_logits(n_head, epsilon, n_inner, tmp_path):
    model = random_gpt2(seed=n_head, n_head=n_head, n_inner=n_inner, layer_norm_epsilon=epsilon)
    assert_same_logits(loaded(model, tmp_path), model)


def test_gradients(tmp_path):
    """One training step's gradients, those of the tied word embeddings included."""
    model = random_gpt2(seed=1)
    gpt, ids = loaded(model, tmp_path), random_ids(model)
    model(ids, labels=ids).loss.backward()
    F.cross_entropy(gpt(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(model.transformer.named_parameters())
    assert theirs.keys() == dict(gpt.named_parameters()).keys()
    for name, p in gpt.named_parameters():
        transposed = name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
        close(p.grad, theirs[name].grad.t() if transposed else theirs[name].grad, 1e-3)


def test_dropout_falls_where_it_falls_in_transformers(tmp_path):
    """In training: on embeddings, attention and both branches. By default there is none, whatever config.json says."""
    model = random_gpt2(embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3)
    gpt, ids = loaded(model, tmp_path), random_ids(model)
    assert_same_logits(gpt.train(), model)
    gpt = GPT.from_pretrained(tmp_path, dropout=0.3)
    assert_same_logits(gpt, model)
    torch.manual_seed(1)
    ours = gpt.train()(ids)
    torch.manual_seed(1)
    close(ours, model.train()(ids).logits)


def test_a_row_in_pieces_equals_one_pass(tmp_path):
    """Each piece reads the presents of those before it as its past. Transformers' keys and values serve as well."""
    model = random_gpt2(seed=2)
    gpt, ids = loaded(model, tmp_path), random_ids(model)
    with torch.no_grad():
        whole, presents = gpt.hidden_states(gpt.wte(ids))
        past, pieces = None, []
        for piece in ids.tensor_split([5, 6, 19], dim=1):
            hidden, past = gpt.hidden_states(gpt.wte(piece), past)
            pieces.append(hidden)
        close(torch.cat(pieces, dim=1), whole)
        for mine, other in zip(past, presents, strict=True):
            close(mine, other)
        cache = model(ids[:, :5]).past_key_values
        rest, _ = gpt.hidden_states(gpt.wte(ids[:, 5:]), [(layer.keys, layer.values) for layer in cache.layers])
        close(gpt.logits(rest), model(ids).logits[:, 5:])


def test_a_mask_hides_positions_as_in_transformers(tmp_path):
    """It is True where a position may be read; positions are given, so that hidden ones are not counted."""
    model = random_gpt2(seed=3)
    gpt, ids = loaded(model, tmp_path), random_ids(model)
    real = torch.rand(ids.shape) < 0.6
    real[:, 0] = True
    positions, T = real.cumsum(1) - 1, ids.size(1)
    mask = torch.ones(T, T, dtype=torch.bool).tril() & real[:, None, None]
    with torch.no_grad():
        hidden, _ = gpt.hidden_states(gpt.wte(ids), None, mask, positions)
        close(gpt.logits(hidden), model(ids, attention_mask=real.long(), position_ids=positions).logits)


def test_autocast_rounds_no_logits():
    gpt, hidden = GPT(GPTConfig(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)), torch.randn(3, 5, 16)
    expected = hidden @ gpt.wte.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        assert (hidden @ gpt.wte.weight.T).dtype == torch.bfloat16              # so the next line can fail
        close(gpt.logits(hidden), expected)


# --------------------------------------------------------------------------------------------------- generating text

def greedy(model, query, new, eot, **options):
    """transformers' greedy continuation of one query alone, without eot."""
    ids = model.generate(torch.tensor([query]), attention_mask=torch.ones(1, len(query)), max_new_tokens=new,
                         do_sample=False, eos_token_id=eot, pad_token_id=eot, **options)
    answer = ids[0, len(query):].tolist()
    return answer[:-1] if answer[-1] == eot else answer


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """A transformers model, its folder, the same as GPT, queries of 1 to 60 tokens, a token that ends some answers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("writer")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=84, n_embd=33, n_layer=2, n_head=3,
                                       initializer_range=0.6, bos_token_id=0, eos_token_id=0)).eval()
    gpt, r = loaded(model, folder), random.Random(0)
    queries = [[r.randrange(40) for _ in range(length)] for length in (3, 60, 1, 17, 2, 44, 1, 29, 8, 5, 51, 12)]
    free = gpt.generate(queries, max_new_tokens=24, eot=-1)
    eot = max(range(40), key=lambda token: len({answer.index(token) for answer in free if token in answer}))
    return model, folder, gpt, queries, eot


def test_greedy_answers_equal_transformers(writer):
    """Each query alone there; here company and order change none, and dropout sleeps for the time."""
    model, folder, gpt, queries, eot = writer
    noisy = GPT.from_pretrained(folder, dropout=0.5).train()
    answers = noisy.generate(queries, max_new_tokens=24, eot=eot)
    assert answers == [greedy(model, query, 24, eot) for query in queries] and all(m.training for m in noisy.modules())
    assert answers[::-2] == gpt.generate(queries[::-2], 24, eot) and not gpt.training
    assert answers[3:4] == gpt.generate(torch.tensor(queries[3:4]), 24, eot)        # a tensor is as good as a list
    assert gpt.generate(queries, 24) == gpt.generate(queries, 24, eot=0) != answers         # config.json's own
    lengths = [len(answer) for answer in answers]
    assert max(lengths) == 24 and min(lengths) < 12 and len(set(lengths)) > 3       # rows did end at different times
    never = sorted({answer[0] for answer in answers if answer})
    expected = [greedy(model, query, 24, eot, suppress_tokens=never) for query in queries]
    assert gpt.generate(queries, 24, eot, suppress_tokens=never) == expected != answers


def test_finished_rows_leave_and_each_token_costs_one_position(writer):
    _, _, gpt, queries, eot = writer
    shapes = []
    hook = gpt.h[0].register_forward_hook(lambda module, inputs, output: shapes.append(output[0].shape[:2]))
    answers = gpt.generate(queries, max_new_tokens=24, eot=eot)
    hook.remove()
    assert shapes[0] == (12, 60)
    assert shapes[1:24] == [(sum(len(answer) >= step for answer in answers), 1) for step in range(1, 24)]


def test_the_whole_room_of_n_positions_can_be_used_and_no_more(writer):
    model, _, gpt, queries, _ = writer
    assert gpt.generate(queries[:3], 24, eot=-1) == [greedy(model, query, 24, None) for query in queries[:3]]
    assert gpt.generate(queries[:3], 0) == [[], [], []] and gpt.generate([]) == []
    for wrong, words in ((queries[:3], "n_positions is 84"), ([[1, 2], []], "query 1 has no tokens"),
                         ([1, 2, 3], "list of token lists")):
        with pytest.raises(ValueError, match=words):
            gpt.generate(wrong, 25, eot=-1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_answer_is_made_of_nan(writer, temperature):
    """From the first token on, or where a row comes to a bad position; or where float16 overflows in a sound model."""
    _, folder, gpt, queries, _ = writer
    for name, row in ("h.0.mlp.c_fc.bias", 3), ("wpe.weight", 61), ("wte.weight", 39):
        bad = GPT.from_pretrained(folder)
        bad.get_parameter(name).data[row] = torch.inf if name == "wte.weight" else torch.nan
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            bad.generate(queries, 24, eot=-1, temperature=temperature)
    large = GPT.from_pretrained(folder)
    for block in large.h:               # the values times 2^15, and what follows divided by it: no other numbers
        for p in block.attn.c_attn.parameters():
            p.data[2 * 33:] *= 2.0 ** 15
        block.attn.c_proj.weight.data /= 2.0 ** 15
    assert large.generate(queries, 24) == gpt.generate(queries, 24)
    with torch.autocast("cpu", torch.float16), pytest.raises(FloatingPointError, match="float16"):
        large.generate(queries, 24, temperature=temperature)


@pytest.mark.parametrize("temperature, top_p, shares", [
    (1.0, 1.0, [0.1, 0.5, 0.15, 0.25]), (1.0, 0.7, [0, 2 / 3, 0, 1 / 3]), (1.0, 0.4, [0, 1.0, 0, 0]),
    (0.5, 0.8, [0, 0.8, 0, 0.2]), (1.0, 0.0, [0, 1.0, 0, 0]), (1e-45, 1.0, [0, 1.0, 0, 0])])
def test_draws_come_from_the_nucleus(temperature, top_p, shares):
    """The probabilities are 0.1, 0.5, 0.15 and 0.25; temperature 0.5 squares them."""
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log().expand(20_000, -1)
    found = sample_next_token(logits, temperature, top_p).bincount(minlength=4) / 20_000
    torch.testing.assert_close(found, torch.tensor(shares), atol=0.015, rtol=0)
    assert not found[torch.tensor(shares) == 0].any()


@pytest.mark.parametrize("temperature, top_p", [
    (-1, 1), (torch.nan, 1), (torch.inf, 1), (1, 90), (1, -0.1), (1, torch.nan)])
def test_settings_out_of_range_are_refused(temperature, top_p):
    with pytest.raises(ValueError, match="temperature .* top_p"):
        sample_next_token(torch.zeros(1, 4), temperature, top_p)


# --------------------------------------------------------------------------------------------------- device and type

@pytest.mark.parametrize("device, gpu, expected, words", [
    ("auto", {"capability": (7, 5)}, "cuda:0 float16", "this GPU has no fast bfloat16"),
    ("cuda:1", {"capability": (9, 0), "devices": 2}, "cuda:1 bfloat16", "this GPU has fast bfloat16"),
    ("auto", {"capability": (13, 0)}, "cuda:0 bfloat16", ""),           # from compute_120
    ("auto", {"capability": (7, 0)}, "cpu ", "this cpu"),               # this PyTorch has no kernels for it
    ("auto", {"capability": (9, 4), "architectures": "gfx90a gfx942"}, "cuda:0 bfloat16", "")], ids=str)      # ROCm
def test_a_gpu_is_chosen_with_its_type_and_the_reason(device, gpu, expected, words, monkeypatch):
    """On PyTorch's own Python: only the calls into CUDA are played."""
    monkeypatch.syspath_prepend(SHARED / "tools")
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", int, raising=False)       # a PyTorch that knows of CUDA
    fake, backends = pytest.importorskip("fake_cuda"), torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    try:
        with fake.FakeCuda(**gpu):
            found, dtype, why = choose_device(device)
            assert f"{found} {dtype}".replace("torch.", "").startswith(expected) and words in why
            if found.type == "cuda":
                assert not backends.cuda.cudnn_sdp_enabled() and torch.cuda.current_device() == found.index
                assert choose_device(device, "float32")[1:] == (torch.float32, "--dtype float32")
                assert not backends.cudnn.allow_tf32                    # it would round p-tuning's LSTM in float32
            with pytest.raises(UsageError, match="cuda:99: .* no such device"):
                choose_device("cuda:99")
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before
        backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("amx, avx512", [(False, False), (True, False), (False, True)])
def test_on_a_cpu_bfloat16_is_chosen_where_it_is_fast(amx, avx512, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose_device("cpu")[:2] == (torch.device("cpu"), torch.bfloat16 if amx or avx512 else torch.float32)
    assert choose_device("cpu", "float16")[1:] == (torch.float16, "--dtype float16")
    for device in "cuda:99", "cuda:", "foo", "cuda:-1":
        with pytest.raises(UsageError, match=f"--device {device}"):
            choose_device(device)
