"""The exported folder, by a decoder that is written down here, and by transformers where it is there."""

import json
import math
import os
import tempfile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.commands import run_here
from support.trained import make_trained

import muse
from muse.errors import ConfigError
from muse.generation import GREEDY, continuation
from muse.transformers_folder import FILES, decoder, export_transformers

# Where transformers keeps the code of a folder; of each process for itself, and not the user's.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp())
TOKENS = torch.arange(32).reshape(2, 16) * 7 % 257
DECODERS = [
    {"stage": "0"},
    {"stage": "0", "activation": "swiglu"},
    {"stage": "0", "tied": False},
    {"stage": "1"},
    {"stage": "1", "tied": False, "dropout": 0.1},
    {"stage": "1", "precision": "bf16"},
]


OWN = [
    {"stage": "2"},
    {"stage": "2", "ode_steps": 2, "dt": 0.3, "integrator": "blanes_moan_rkn4", "flows": 3, "context": False},
    {"stage": "2", "potential": "duffing", "integrator": "position_verlet", "tied": False},
    {"stage": "2", "trunk": "reversible", "norm": "layer", "phi": "silu", "confinement": 0.0},
    {"stage": "1", "trunk": "reversible"},
    {"stage": "1", "norm": "layer"},
    *({"stage": "1", "activation": name} for name in ("mod_relu", "mod_swish", "cardioid", "z_relu")),
]

STATES = [
    {"stage": "3"},
    {"stage": "3", "koopman": "add", "koopman_angles": False, "koopman_selective": False, "tied": False},
    {"stage": "3", "koopman_every": 1, "trunk": "reversible", "norm": "layer"},
    {"stage": "3", "koopman": "none", "mera": "replace", "mera_every": 1},
    {"stage": "3", "mera": "add", "mera_every": 1, "mera_levels": 3, "attention_window": 4},
]
CORRECTED = [
    {"stage": "3", "dialectic": "mlp", "dialectic_rounds": 2},
    {"stage": "3", "koopman": "none", "dialectic": "hamiltonian", "dialectic_candidates": 5},
    {"stage": "3", "koopman": "none", "attention_window": 4},
]


def trained(folder, stage, **options):
    """A model none of whose gains is 1, in float32."""
    run, *_ = make_trained(folder, stage, **options)
    found = muse.load(run)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return found._replace(model=found.model.float())


def turned(x, theta):
    """Rotary positions of (B, H, S, d) by halves, as Llama has them."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def normalised(x, weight, eps):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def logits_of(config, tensors, tokens):
    """A decoder of the kind of Llama, from its definition."""
    d, heads, groups = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    act = {"silu": F.silu, "gelu": F.gelu}[config["hidden_act"]]
    x = tensors["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):

        def weight(name, layer=layer):
            return tensors[f"model.layers.{layer}.{name}.weight"]

        normal = normalised(x, weight("input_layernorm"), config["rms_norm_eps"])
        q, k, v = (
            (normal @ weight(f"self_attn.{name}_proj").T).unflatten(-1, (-1, d)).transpose(1, 2)
            for name in "qkv"
        )
        q, k = turned(q, config["rope_theta"]), turned(k, config["rope_theta"])
        k, v = (y.repeat_interleave(heads // groups, 1) for y in (k, v))
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(d)).masked_fill(later, -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ weight("self_attn.o_proj").T
        normal = normalised(x, weight("post_attention_layernorm"), config["rms_norm_eps"])
        hidden = normal @ weight("mlp.up_proj").T
        hidden = (
            act(normal @ weight("mlp.gate_proj").T) * hidden
            if config["model_type"] == "llama"
            else act(hidden)
        )
        x = x + hidden @ weight("mlp.down_proj").T
    return normalised(x, tensors["model.norm.weight"], config["rms_norm_eps"]) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("options", DECODERS, ids=str)
def test_the_folder_is_a_decoder_with_the_logits_of_the_model(tmp_path, options):
    found = trained(tmp_path, **options)
    written = export_transformers(found, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES} - {"modeling_muse.py"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert written == sum(tensor.numel() for tensor in tensors.values())
    with torch.no_grad():
        expected = found.model(TOKENS)
        # The model turns by angles in float64, and rounds differently; the next test is about what is exact.
        assert (logits_of(config, tensors, TOKENS) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("options", DECODERS[:5], ids=str)
def test_the_maps_are_exact_in_float64(tmp_path, options):
    """So what float32 leaves is rounding: a wrong gain or factor would be seen in the eighth digit."""
    found = trained(tmp_path, **options)
    config, tensors = decoder(found)
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    with torch.no_grad():
        found.model.double()
        expected, logits = found.model(TOKENS), logits_of(config, tensors, TOKENS)
    assert (logits - expected).norm() < 2e-7 * expected.norm()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stage": "1", "score": "phase"}, "stage.score=phase"),
        ({"stage": "1", "score": "magnitude"}, "stage.score=magnitude"),
        ({"stage": "1", "mixer": "none"}, "stage.mixer=none"),
        ({"stage": "1", "loops": 2}, "stage.loops=2"),
        ({"stage": "0", "trunk": "reversible"}, "stage.trunk=reversible of stage 0"),
        ({"stage": "3", "score": "phase"}, "stage.score=phase"),
        ({"stage": "3", "loops": 2}, "stage.loops=2"),
        ({"stage": "3", "attention_window": 1}, "stage.attention_window=1"),
        ({"stage": "3a"}, "stage=3a"),
    ],
    ids=str,
)
def test_what_is_no_such_decoder_is_refused_in_one_sentence(tmp_path, options, told, capsys):
    run, *_ = make_trained(tmp_path, **options)
    status = run_here("muse.export", [str(run), str(tmp_path / "out"), "--format", "transformers"])
    captured = capsys.readouterr()
    assert status == 1
    assert told in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_is_replaced_whole_and_never_one_with_other_things(tmp_path, capsys):
    run, *_ = make_trained(tmp_path)
    arguments = [str(run), str(tmp_path / "out"), "--format", "transformers"]
    assert run_here("muse.export", arguments) == 0
    told = capsys.readouterr().out
    assert "ArceeForCausalLM with" in told
    assert "twice its numbers" in told
    (tmp_path / "out" / "model.safetensors").write_bytes(b"old")
    assert run_here("muse.export", arguments) == 0
    load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "thesis.tex").write_text("years")
    assert run_here("muse.export", arguments) == 1
    assert "has other things in it (thesis.tex)" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").exists()
    assert run_here("muse.export", [*arguments, "--force"]) == 0
    assert not (tmp_path / "out" / "thesis.tex").exists()
    assert not list(tmp_path.glob(".out.*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        export_transformers(muse.load(run), tmp_path / "file")


@pytest.mark.parametrize("options", [*DECODERS, *OWN, *STATES, *CORRECTED], ids=str)
def test_transformers_loads_it_and_goes_on_with_the_same_tokens(tmp_path, options):
    transformers = pytest.importorskip("transformers", reason="the extra interop is not installed")
    found = trained(tmp_path, **options)
    export_transformers(found, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ours = found.model(TOKENS)
        # Float32 angles there, and another order of sums; the logits of these weights go up to 6 or so.
        assert (model(TOKENS).logits - ours).abs().max() < 2e-5 * ours.abs().max()
    prompt = TOKENS[:1, :4]
    made = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
    ours = list(continuation(found.model, prompt[0].tolist(), 12, 16, GREEDY))
    assert made == prompt[0].tolist() + ours
    text = "Line 7 says\n    that naïve 你好 <|endoftext|>"
    assert tokenizer.decode(found.tokenizer.encode(text)) == text
    plain = text.replace(" <|endoftext|>", "")
    assert tokenizer(plain)["input_ids"] == found.tokenizer.encode(plain)


def loaded(folder, found):
    """The folder's model by transformers."""
    transformers = pytest.importorskip("transformers", reason="the extra interop is not installed")
    export_transformers(found, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("options", [OWN[0], *STATES], ids=str)
def test_a_long_text_in_a_padded_batch_goes_on_as_alone(tmp_path, options):
    found = trained(tmp_path, seq_len=80, **options)
    model = loaded(tmp_path / "out", found)
    padded, mask = TOKENS[:, :7].clone(), torch.ones(2, 7, dtype=torch.int64)
    padded[0, :3], mask[0, :3] = 5, 0
    told = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(padded, max_new_tokens=64, **told)[:, 7:]
    for row, prompt in enumerate((padded[0, 3:], padded[1])):
        assert made[row].tolist() == list(continuation(found.model, prompt.tolist(), 64, 80, GREEDY))
    # Beams change places, and what is kept of them with them.
    told = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    beams = [model.generate(TOKENS[:, :7], use_cache=cached, **told) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("options", STATES, ids=str)
def test_a_text_that_is_read_in_pieces_has_the_same_logits(tmp_path, options):
    found = trained(tmp_path, **options)
    model = loaded(tmp_path / "out", found)
    cache, logits = None, []
    with torch.no_grad():
        for piece in TOKENS.split([5, 1, 7, 1, 2], 1):
            out = model(piece, use_cache=True, **({} if cache is None else {"past_key_values": cache}))
            cache = out.get("cache", out.get("past_key_values"))
            logits.append(out.logits)
        ours = found.model(TOKENS)
    assert cache.get_seq_length() == 16
    assert (torch.cat(logits, 1) - ours).abs().max() < 2e-5 * ours.abs().max()


@pytest.mark.parametrize("options", STATES, ids=str)
def test_padding_on_either_side_changes_no_logits(tmp_path, options):
    found = trained(tmp_path, **options)
    model = loaded(tmp_path / "out", found)
    padded, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    mask[0, :5], mask[1, 9:] = 0, 0
    padded[mask == 0] = 3
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=positions).logits
        for row in (0, 1):
            ours = found.model(padded[row][mask[row] == 1][None])[0]
            assert (logits[row][mask[row] == 1] - ours).abs().max() < 2e-5 * ours.abs().max()


def test_what_a_state_cannot_do_is_refused(tmp_path):
    model = loaded(tmp_path / "out", trained(tmp_path, "3"))
    told = {"max_new_tokens": 4, "do_sample": False}
    # Before transformers 5 the mask of such a cache is told of first.
    with pytest.raises(ValueError, match=r"dynamic caches only|attention mask of"):
        model.generate(TOKENS, cache_implementation="static", **told)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(TOKENS[:1], prompt_lookup_num_tokens=2, **told)
    with pytest.raises(ValueError, match="attention mask of"):
        model(TOKENS, attention_mask=torch.ones(2, 1, 16, 16, dtype=torch.bool))


@pytest.mark.parametrize("options", [STATES[0], *CORRECTED], ids=str)
def test_vllm_is_told_that_it_cannot_run_stage_3(tmp_path, options):
    model = loaded(tmp_path / "out", trained(tmp_path, **options))
    with pytest.raises(ValueError, match="vLLM"):
        model.model(TOKENS, attention_instances={})


@pytest.mark.parametrize("options", OWN, ids=str)
def test_vllm_can_build_and_compile_the_decoder(tmp_path, options):
    """By what vLLM's Transformers backend does with a model, its attention played by torch's."""
    transformers = pytest.importorskip("transformers", reason="the extra interop is not installed")
    found = trained(tmp_path, **options)
    export_transformers(found, tmp_path / "out")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert whole.is_backend_compatible()

    def attend(module, query, key, value, mask, scaling=None, attention_instances=None, **others):
        assert mask is None
        assert attention_instances[module.layer_idx] == module.layer_idx
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)[0], None

    name = "torch_as_vllm"
    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register(name, attend)
    config = whole.config
    config._attn_implementation = name
    decoder = transformers.AutoModel.from_config(config, trust_remote_code=True).get_decoder()
    decoder.load_state_dict(whole.model.state_dict())
    told = {
        "input_ids": TOKENS[:1],
        "inputs_embeds": None,
        "use_cache": False,
        "position_ids": torch.arange(TOKENS.shape[1])[None],
        "attention_instances": dict(enumerate(range(config.num_hidden_layers))),
        "return_dict": False,
    }
    torch._dynamo.reset()
    with torch.no_grad():
        ours = found.model(TOKENS[:1])[0]
        for call in (decoder, torch.compile(decoder, fullgraph=True, backend="eager")):
            logits = whole.lm_head(call(**told)[0][0])
            assert (logits - ours).abs().max() < 2e-5 * ours.abs().max()
