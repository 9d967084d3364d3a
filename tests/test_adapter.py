"""LLaMA-Adapter, versions 1 and 2: what is put into a model, what it computes, what is trained, saved and folded."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config

from lit_swa import GPT
from lit_swa.adapter import (
    AdapterConfig,
    adapter_state,
    add_adapter,
    expected_state,
    fold_scale_and_bias,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from lit_swa.formats.files import LazyTensor, open_safetensors, write_safetensors
from lit_swa.formats.hugging_face import to_lit

# Another order of the sums moves float32 by a few 1e-6 of the logits' scale.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FIELDS = {
    "full": {},
    "rolling": {"attention": "sliding", "sliding_window_size": 5, "rolling_kv_cache": True},
    "mixed": {"attention": "sliding,full", "sliding_window_size": 5},
    "streaming": {"attention": "streaming", "sliding_window_size": 4, "n_sink_tokens": 2},
    "dual_chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 12},
    "linear": {"attention": "linear", "linear_window": 3, "linear_sinks": 2},
    "s2": {"s2_attention": True},
    "norms, biases, softcap": {
        "norm_qk": True,
        "attn_bias": True,
        "attn_proj_bias": True,
        "mlp_bias": True,
        "attention_logit_softcapping": 5.0,
        "post_attention_norm": True,
        "norm_class_name": "LayerNorm",
    },
}
CONFIGS = {version: AdapterConfig(version=version, prompt_length=5, start_layer=1) for version in (1, 2)}


@pytest.fixture
def trained(tiny_model):
    """A model whose adapter has been moved away from its start, as by training."""

    def build(version: int = 1, start_layer: int = 1, **fields) -> GPT:
        model = tiny_model(**{"n_layer": 3} | fields)
        add_adapter(model, AdapterConfig(version, 5, start_layer))
        with torch.no_grad():
            for name, tensor in adapter_state(model).items():
                tensor.add_(torch.randn_like(tensor) * (1.0 if "gate" in name else 0.2))
        return model

    return build


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 97, shape)


# ------------------------------------------------------------------------------------------------------------ injection


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", FIELDS)
def test_a_new_adapter_changes_nothing(tiny_model, version, name):
    """Catches: a gate, bias or scale that does not start neutral, a prompt that joins the softmax of the text."""
    model, idx = tiny_model(**FIELDS[name]), tokens(2, 20)
    before = model(idx)
    add_adapter(model, AdapterConfig(version, 4, 0))
    assert torch.equal(model(idx), before)


@pytest.mark.parametrize("version", [1, 2])
def test_only_the_adapter_and_in_version_2_the_norms_are_trained(tiny_model, version):
    """Catches: a base weight left trainable, a norm or a layer forgotten, names of the base that moved."""
    model = tiny_model(n_layer=3, norm_qk=True)
    base = set(model.state_dict())
    changed = add_adapter(model, CONFIGS[version])
    assert base <= set(model.state_dict())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_state(model)) == set(expected_state(model, CONFIGS[version]))
    blocks = [f"transformer.h.{i}" for i in range(3)]
    expected = {f"{block}.attn.mixer" for block in blocks[1:]}
    if version == 2:
        linears = ("attn.qkv", "attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj")
        norms = ("norm_1", "norm_2", "attn.norm_q", "attn.norm_k")
        expected |= {f"{block}.{name}" for block in blocks for name in linears + norms} | {"transformer.ln_f"}
    assert len(changed) == len(set(changed)) and set(changed) == expected
    per_prompt = 5 * 48 + 6
    extra = 3 * (2 * (80 + 48 + 64 + 64 + 48) + 2 * 48 + 2 * 8) + 48 if version == 2 else 0
    assert sum(t.numel() for t in adapter_state(model).values()) == 2 * per_prompt + extra


def test_every_new_parameter_gets_a_gradient_once_the_gates_are_open(tiny_model):
    """Catches: a parameter cut off from the loss; the prompts' silence behind closed gates is by design."""
    model, idx = tiny_model(n_layer=3).train(), tokens(2, 12)
    add_adapter(model, CONFIGS[2])
    model(idx, targets=idx.roll(-1, 1)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        if p.requires_grad:
            assert (p.grad.abs().sum() > 0) == (not name.endswith("prompt")), name
    with torch.no_grad():
        for block in model.transformer.h[1:]:
            block.attn.mixer.adapter.gate.fill_(0.5)
    model(idx, targets=idx.roll(-1, 1)).backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name.endswith("prompt"))


@pytest.mark.parametrize("version", [1, 2])
def test_training_lowers_the_loss(tiny_model, version):
    """Catches: an adapter that an optimiser cannot move, or that moves the base."""
    model, idx = tiny_model(n_layer=3).train(), tokens(2, 16)
    base = {name: p.clone() for name, p in model.named_parameters()}
    add_adapter(model, CONFIGS[version])
    state = adapter_state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(idx, targets=idx.roll(-1, 1)) / idx.numel()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - (0.02 if version == 1 else 1.0)
    for name, p in model.named_parameters():
        assert name in state or torch.equal(p, base[name]), name


@pytest.mark.parametrize("version", [1, 2])
def test_a_copy_has_an_adapter_of_its_own(trained, version):
    """Catches: a hook or a layer's reference that still leads to the model that was copied."""
    model, idx = trained(version), tokens(1, 9)
    twin, before = copy.deepcopy(model), model(idx)
    assert torch.equal(twin(idx), before)
    with torch.no_grad():
        for p in twin.parameters():  # weights, gates and all
            p.zero_()
        assert torch.equal(model(idx), before)
        model.transformer.h[2].attn.qkv.weight.add_(0.3)
        assert twin.transformer.h[2].attn.mixer.adapter.layer[0] is twin.transformer.h[2].attn
        assert not torch.equal(model(idx), before) and twin(idx).abs().max() == 0


def test_what_cannot_be_put_in_is_refused(tiny_model):
    """Catches: values that do not fit, a second adapter on the first, and a start behind the last layer."""
    for values, match in (
        ({"version": 3}, "version=3 .* choose from 1, 2"),
        ({"version": True}, "version=True"),
        ({"prompt_length": 0}, "prompt_length=0 .* whole number from 1"),
        ({"prompt_length": 2.5}, "prompt_length=2.5"),
        ({"start_layer": -1}, "start_layer=-1 .* whole number from 0"),
    ):
        with pytest.raises(ValueError, match=match):
            AdapterConfig(**values)
    model = tiny_model()
    with pytest.raises(ValueError, match="start_layer=2 leaves no layer .* 0 to 1"):
        add_adapter(model, AdapterConfig())
    assert all(p.requires_grad for p in model.parameters())  # nothing was done
    for f in (adapter_state, fold_scale_and_bias):
        with pytest.raises(ValueError, match="has no adapter"):
            f(model)
    add_adapter(model, CONFIGS[1])
    with pytest.raises(ValueError, match="already"):
        add_adapter(model, CONFIGS[1])
    with pytest.raises(ValueError, match="no adapter of version 2"):
        fold_scale_and_bias(model)


# ---------------------------------------------------------------------------------------------------- what it computes


def by_formula(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one text (T,), in float64 and as the papers put it, of a plain model with prompts in some layers
    and perhaps scales and biases."""
    c, state = model.config, {name: t.double() for name, t in model.state_dict().items()}
    T, H, G, D = len(idx), c.n_head, c.n_query_groups, c.head_size

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * state[f"{name}.weight"]

    def linear(x, name):
        y = x @ state[f"{name}.weight"].T
        y = y + state[f"{name}.bias"] if f"{name}.bias" in state else y
        if f"{name}.adapter.scale" in state:
            y = (y + state[f"{name}.adapter.bias"]) * state[f"{name}.adapter.scale"]
        return y

    angles = torch.arange(T).double()[:, None] * c.rope_base ** -(torch.arange(0, D, 2).double() / D)

    def turned(x):  # (T, D)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    x = state["transformer.wte.weight"][idx]
    for i in range(c.n_layer):
        h = f"transformer.h.{i}"
        qkv, heads = linear(norm(x, f"{h}.norm_1"), f"{h}.attn.qkv").view(T, -1, D), []
        prompt, gate = (state.get(f"{h}.attn.mixer.adapter.{key}") for key in ("prompt", "gate"))
        for n in range(H):
            g = n // (H // G)
            q, k, v = qkv[:, n], qkv[:, H + g], qkv[:, H + G + g]
            if c.norm_qk:
                q, k = norm(q, f"{h}.attn.norm_q"), norm(k, f"{h}.attn.norm_k")
            q = turned(q)
            scores = (q @ turned(k).T / D**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v)
            if prompt is not None:
                own = linear(prompt, f"{h}.attn.qkv").view(len(prompt), -1, D)
                k, v = own[:, H + g], own[:, H + G + g]
                k = norm(k, f"{h}.attn.norm_k") if c.norm_qk else k
                heads[-1] = heads[-1] + torch.tanh(gate[n]) * ((q @ k.T / D**0.5).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"{h}.attn.proj")
        z = norm(x, f"{h}.norm_2")
        x = x + linear(F.silu(linear(z, f"{h}.mlp.fc_1")) * linear(z, f"{h}.mlp.fc_2"), f"{h}.mlp.proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"norm_qk": True, "attn_bias": True}])
def test_logits_are_those_of_the_formula(trained, version, fields):
    """Catches: prompts that are rotated, masked, normed like text or share its softmax; another head's gate or keys."""
    model, idx = trained(version, **fields), tokens(11)
    expected = by_formula(model, idx)
    torch.testing.assert_close(model(idx[None])[0].double(), expected, **CLOSE)
    for block in model.transformer.h[1:]:
        block.attn.mixer.adapter.gate.data.zero_()
    assert (by_formula(model, idx) - expected).abs().max() > 0.1  # the prompts do count


def test_version_1_equals_peft():
    """Catches: a prompt read otherwise than PEFT's AdaptionPrompt, whose one gate has no tanh."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    shape = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "max_position_embeddings": 256}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads, initializer_range=0.2))
    stored = {k: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for k, t in llama.state_dict().items()}
    model = GPT(tiny_config(n_layer=4, norm_eps=llama.config.rms_norm_eps)).eval()
    lit = {name: t.load() for name, t in to_lit(stored, model.config, "the model").items()}
    model.load_state_dict(lit)
    prompts = peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=3, task_type="CAUSAL_LM")
    reference = peft.get_peft_model(llama, prompts).eval()
    add_adapter(model, AdapterConfig(1, 5, start_layer=1))
    with torch.no_grad():
        for i, gate in ((1, 0.7), (2, -0.4), (3, 0.2)):
            theirs, ours = llama.model.layers[i].self_attn, model.transformer.h[i].attn.mixer.adapter
            theirs.adaption_gate.fill_(gate)
            ours.gate.fill_(gate).atanh_()
            ours.prompt.copy_(theirs.adaption_prompt[0])
    idx = tokens(2, 17)
    torch.testing.assert_close(model(idx), reference(idx).logits, **CLOSE)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "s2"])
def test_any_split_into_cached_calls_gives_the_same_logits(trained, version, name):
    """Catches: a prompt that enters the cache, counts as a position, or is seen by some calls only."""
    model, idx = trained(version, **FIELDS[name]), tokens(2, 23)
    expected = model(idx)
    for sizes in ([23], [1] * 23, [9, 1, 1, 12], [3, 7, 13]):
        model.set_kv_cache(2, 32)
        pos = torch.arange(23).split(sizes)
        pieces = [model(part, p) for part, p in zip(idx.split(sizes, dim=1), pos, strict=True)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("name", FIELDS)
def test_documents_and_rows_are_read_as_if_alone(trained, name):
    """Catches: prompts that leak between the texts of a row or the rows of a batch; gradients of the prompts too."""
    model, lengths = trained(1, **FIELDS[name]).train(), [7, 1, 12]
    idx, grads = tokens(2, 20), []
    together = model(idx, documents=lengths)
    rows = [torch.cat([model(text) for text in row.split(lengths, dim=1)], dim=1) for row in idx.split(1)]
    torch.testing.assert_close(together, torch.cat(rows), **CLOSE)
    for logits in (together, torch.cat(rows)):
        model.zero_grad()
        logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("version", [1, 2])
def test_a_bfloat16_base_keeps_its_dtype(trained, version):
    """Catches: float32 parameters that widen the base's activations, or are rounded themselves."""
    model, idx = trained(version), tokens(1, 9)
    exact = model(idx)
    for name, p in model.named_parameters():
        if ".adapter." not in name:
            p.data = p.data.bfloat16()
    logits = model(idx)
    assert logits.dtype == torch.bfloat16
    assert {t.dtype for name, t in adapter_state(model).items() if ".adapter." in name} == {torch.float32}
    # bfloat16 keeps 8 bits; over three layers of random weights the error stays within a few per cent of the scale
    assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()


# -------------------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("name", ["full", "norms, biases, softcap"])
def test_folded_scales_and_biases_give_the_same_logits(trained, name):
    """Catches: a bias folded unscaled, a layer left out, prompts lost, a config that denies the new biases."""
    model, idx = trained(2, **FIELDS[name]), tokens(2, 15)
    expected = model(idx)
    assert fold_scale_and_bias(model) == 3 * 5
    torch.testing.assert_close(model(idx), expected, **CLOSE)
    left = {key for key in model.state_dict() if ".adapter." in key}
    assert left == {f"transformer.h.{i}.attn.mixer.adapter.{key}" for i in (1, 2) for key in ("prompt", "gate")}
    assert set(GPT(model.config).state_dict()) == set(model.state_dict()) - left


# ------------------------------------------------------------------------------------------------------ saving, reading


@pytest.mark.parametrize("version", [1, 2])
def test_a_saved_adapter_gives_the_same_logits_and_goes_on_training(trained, tmp_path, version):
    """Catches: a parameter not saved or put elsewhere, a dtype changed, a loaded adapter that stays frozen."""
    model, idx = trained(version), tokens(2, 11)
    base = copy.deepcopy(model)
    for name in [name for name, _ in base.named_modules() if name.endswith(".adapter")]:
        parent = base.get_submodule(name.removesuffix(".adapter"))
        del parent.adapter
        parent._forward_hooks.clear()
    for name, p in base.named_parameters():
        if "norm" in name or "ln_f" in name:
            p.data.fill_(3.0)  # which version 2 brings its own of
    saved = save_adapter(model, tmp_path / "a", CONFIGS[version])
    assert saved == json.loads((tmp_path / "a" / "lit_adapter.json").read_text())
    assert saved["kind"] == f"adapter_v{version}"
    names = {name.replace(".mixer.", ".meet.") for name in adapter_state(model)}  # as files have always had them
    assert set(open_safetensors(tmp_path / "a" / "lit_adapter.safetensors")) == names
    assert load_adapter(base, tmp_path / "a") == CONFIGS[version] == read_adapter_config(tmp_path / "a")
    if version == 1:
        for name, p in base.named_parameters():
            p.data.copy_(model.get_parameter(name)) if "norm" in name or "ln_f" in name else None
    assert torch.equal(base(idx), model(idx))
    trainable = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (base, model)]
    assert trainable[0] == trainable[1]


def test_a_save_notes_the_base_checkpoint(tiny_checkpoint, tmp_path):
    """Catches: a directory that cannot be traced to its base, or that lacks the tokenizer."""
    from lit_swa.checkpoint import load_model

    model = load_model(tiny_checkpoint)
    add_adapter(model, CONFIGS[1])
    fields = save_adapter(model, tmp_path / "a", CONFIGS[1], base_dir=tiny_checkpoint)
    assert (tmp_path / "a" / fields["base_checkpoint_dir"]).resolve() == tiny_checkpoint.resolve()
    assert fields["base_identity"] and (tmp_path / "a" / "tokenizer.json").exists()
    again = load_model(tiny_checkpoint)
    assert load_adapter(again, tmp_path / "a") == CONFIGS[1]


def test_files_that_do_not_fit_are_refused_and_leave_the_model_alone(trained, tiny_model, tmp_path):
    """Catches: another model's adapter, a damaged or missing file, taken half-way; a traceback in place of a reason."""
    save_adapter(trained(2), tmp_path, CONFIGS[2])
    weights, description = tmp_path / "lit_adapter.safetensors", tmp_path / "lit_adapter.json"
    good, fields = weights.read_bytes(), json.loads(description.read_text())

    def refused(match, model=None, error=ValueError):
        model = model or tiny_model(n_layer=3)
        names = set(model.state_dict())
        with pytest.raises(error, match=match):
            load_adapter(model, tmp_path)
        assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())

    refused("made for another model", tiny_model(n_layer=4))
    refused("lit_adapter.safetensors has transformer.h.2", tiny_model(n_layer=2))
    refused(r"as \[5, 48\] and the model asks for \[5, 24\]", tiny_model(n_layer=3, n_embd=24))
    for change, match in (
        ({"kind": "lora"}, "kind 'lora', which is none of adapter_v1, adapter_v2"),
        ({"kind": ["adapter_v1"]}, "is of the kind .* none of adapter_v1, adapter_v2"),
        ({"kind": "adapter_v1"}, "damaged: .*'adapter_v1' and its version is 2"),
        ({"adapter": {"version": 2}}, "must have prompt_length, start_layer, version"),
        ({"adapter": fields["adapter"] | {"prompt_length": "5"}}, "does not describe an adapter: prompt_length='5'"),
        ({"adapter": fields["adapter"] | {"prompt_length": 6}}, r"as \[5, 48\] and the model asks for \[6, 48\]"),
        ({"adapter": fields["adapter"] | {"start_layer": 2}}, "has transformer.h.1.attn.mixer.adapter"),
        ({"adapter": fields["adapter"] | {"start_layer": 9}}, "start_layer=9 leaves no layer"),
    ):
        description.write_text(json.dumps(fields | change))
        refused(match)
    description.write_text(json.dumps(fields))
    weights.write_bytes(good[:-5])
    refused("truncated or damaged")
    tensors = adapter_state(trained(2))
    first = next(iter(tensors))
    tensors[first] = tensors[first].long()
    write_safetensors(weights, {k: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for k, t in tensors.items()})
    refused("int64: it must be of floating point")
    tensors[first] = tensors[first].float() / 0
    write_safetensors(weights, {k: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for k, t in tensors.items()})
    refused(f"holds NaN or infinity in {first}")
    weights.unlink()
    refused("lit_adapter.safetensors is missing", error=FileNotFoundError)
    with pytest.raises(ValueError, match="The model has no transformer.h.0.attn.mixer.adapter.prompt"):
        save_adapter(trained(1), tmp_path / "b", AdapterConfig(1, 5, 0))
    assert not (tmp_path / "b").exists()
