"""A trained model as a folder that transformers, vLLM and the lm-evaluation-harness load as it is.

A real decoder of stage 0 with SwiGLU is a Llama, with GELU an Arcee (RMS norms, rotary positions, maps
without biases, an MLP of two matrices). So is stage 1 as it is by default, on features [re | im]: a complex
map A + i B is the real one [[A, -B], [B, A]], which has its numbers twice.

- Gains of complex norms turn planes into each other, which a real norm weight does not: they go into the maps
  that follow, and into the head. A norm divides by the root of mean |z|^2 = 2 mean x^2 over the real features
  x, so that its weight is 1 / sqrt(2) and its eps half as large.
- Scores are divided by sqrt(2 d) there, the real width of a head, and by sqrt(d) here: queries are multiplied
  by sqrt(2). The rotary embedding pairs halves of a head, which are its planes.
- Embeddings are divided by their rms on the way in, so head and embedding are two tensors.

Other models of stages 1 to 3 with real scores bring ``modeling_muse.py``, which computes what they do
without MUSE, flows in floating point; it is loaded with ``trust_remote_code=True``.

None of these programs is needed to write it.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kernels.complex_linear.plain import real_form
from muse.dynamics import HamiltonianNeuralODE, MLPPotential
from muse.errors import ConfigError, RunError
from muse.files import write_atomically
from muse.layers import (
    ComplexAttention,
    ComplexEmbedding,
    ComplexLayerNorm,
    ComplexLinear,
    ComplexRMSNorm,
    KoopmanOperator,
    MeraRouter,
)
from muse.models.complex import ComplexBlock
from muse.models.hamiltonian import HamiltonianBlock
from muse.models.integrated import IntegratedBlock, MixerSum
from muse.models.real import RealAttention, RealBlock, RealEmbedding
from muse.trained import Trained

# Files of such a folder; one that holds others is not replaced.
FILES = (
    "config.json",
    "modeling_muse.py",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
ROPE = 10_000.0
OWN = "MuseForCausalLM"
CODE = Path(__file__).with_name("modeling_muse.py")


def export_transformers(trained: Trained, folder: Path, force: bool = False) -> int:
    """Write the folder, which appears or is replaced only when it is complete.

    Args:
        trained: of ``muse.load``.
        folder: to write.
        force: whether a folder with other things in it is replaced, too.

    Returns:
        The number of parameters in it.

    Raises:
        ConfigError: the model cannot be exported, see ``refusal``, has no tokenizer, or the folder is in use.
        RunError: it cannot be written.
    """
    reason = refusal(trained)
    if reason is not None:
        raise ConfigError(reason)
    if trained.tokenizer is None:
        raise ConfigError("the model has no tokenizer, without which nobody can use it elsewhere")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the name of a folder")
    others = [path.name for path in folder.iterdir() if path.name not in FILES] if folder.exists() else []
    if others and not force:
        raise ConfigError(f"{folder} has other things in it ({others[0]}); give another folder, or --force")
    config, tensors = decoder(trained)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})
        end = trained.tokenizer.end_id
        for name, content in (
            ("config.json", {**config, "bos_token_id": None, "eos_token_id": end}),
            ("generation_config.json", {"eos_token_id": end, "do_sample": False}),
            ("tokenizer_config.json", _tokenizer_config(trained)),
        ):
            write_atomically(temporary / name, json.dumps(content, indent=2) + "\n")
        write_atomically(temporary / "tokenizer.json", trained.tokenizer.to_json())
        if architecture(trained) == OWN:
            shutil.copyfile(CODE, temporary / CODE.name)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise RunError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(tensor.numel() for tensor in tensors.values())


def refusal(trained: Trained) -> str | None:
    """Why a model cannot be exported; None where it can."""
    stage = trained.config.stage
    if stage.mixer == "none":
        return "stage.mixer=none mixes no tokens, which no decoder elsewhere does; it cannot be exported"
    if stage.attention_window == 1:
        return (
            "stage.attention_window=1 is a window that caches of transformers do not keep; larger ones and "
            "stage.attention_window=null can be exported"
        )
    if stage.number in ("1", "2", "3") and stage.score != "real":
        return (
            f"stage.score={stage.score} weighs values by complex scores, which attention elsewhere does not "
            "have; only stage.score=real can be exported"
        )
    if stage.number == "3a":
        return "stage=3a is a benchmark's transformer; only stages 0 to 3 can be exported"
    if stage.loops > 1:
        return f"stage.loops={stage.loops} needs a cache for each loop; only stage.loops=1 can be exported"
    if stage.number == "0" and stage.trunk == "reversible":
        return "stage.trunk=reversible of stage 0 cannot be exported; that of stages 1 to 3 can"
    return None


def architecture(trained: Trained) -> str:
    """What transformers calls such a model."""
    stage = trained.config.stage
    if stage.number == "0":
        return "LlamaForCausalLM" if stage.activation == "swiglu" else "ArceeForCausalLM"
    plain = stage.norm == "rms" and stage.activation == "split_gelu" and stage.trunk == "residual"
    return "ArceeForCausalLM" if stage.number == "1" and plain else OWN


def decoder(trained: Trained) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``config.json`` says, and the tensors, float32."""
    model, _, config = trained
    kind, embedding = architecture(trained), model.embedding
    assert isinstance(embedding, RealEmbedding | ComplexEmbedding)
    width, planes = (config.model.real, 1) if config.stage.number == "0" else (config.model.complex, 2)
    with torch.no_grad():
        described, tensors = (_own_decoder if kind == OWN else _known_decoder)(trained)
        tensors["model.embed_tokens.weight"] = embedding.weight.float().flatten(1) / embedding.rms
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    sizes = {
        "architectures": [kind],
        "vocab_size": len(embedding.weight),
        "hidden_size": planes * width.d_model,
        "num_hidden_layers": width.layers,
        "num_attention_heads": width.heads,
        "num_key_value_heads": width.kv_heads,
        "head_dim": planes * width.d_model // width.heads,
        "max_position_embeddings": config.model.seq_len,
        "rope_theta": ROPE,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return {**sizes, **described}, tensors


def _known_decoder(trained: Trained) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a Llama or an Arcee has beside; gains of complex norms are in the maps that follow."""
    model, norm = trained.model, trained.model.norm
    assert isinstance(norm, ComplexRMSNorm | nn.RMSNorm)
    llama = architecture(trained) == "LlamaForCausalLM"
    head = model.head_parameters()[0].float().flatten(1)
    if isinstance(norm, ComplexRMSNorm):
        head = head @ real_form(norm.gain.float().diag_embed())
    tensors = {"model.norm.weight": _norm_weight(norm), "lm_head.weight": head}
    for number, block in enumerate(model.blocks):
        maps = _real_maps(block) if isinstance(block, RealBlock) else _complex_maps(block)
        tensors |= {f"model.layers.{number}.{name}.weight": weight for name, weight in maps.items()}
    described = {
        "model_type": "llama" if llama else "arcee",
        "intermediate_size": len(tensors["model.layers.0.mlp.up_proj.weight"]),
        "hidden_act": "silu" if llama else "gelu",
        "rms_norm_eps": (norm.eps or 0.0) / (2 if isinstance(norm, ComplexRMSNorm) else 1),
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }
    return described, tensors


def _own_decoder(trained: Trained) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``modeling_muse.py`` has beside: complex maps as real ones, all else as it is."""
    model, stage, norm = trained.model, trained.config.stage, trained.model.norm
    assert isinstance(norm, ComplexRMSNorm | ComplexLayerNorm)
    kicks: tuple[float, ...] = ()
    drifts: tuple[float, ...] = ()
    flows = units = 0
    tensors = {"lm_head.weight": model.head_parameters()[0].float().flatten(1), **_named("model.norm", norm)}
    mixers = []
    for number, block in enumerate(model.blocks):
        assert isinstance(block, ComplexBlock | HamiltonianBlock | IntegratedBlock)
        place = f"model.layers.{number}"
        tensors |= _named(f"{place}.attention_norm", getattr(block, f"{block.mixer_name}_norm"))
        own = _mixers(block)
        mixers.append(list(own))
        for mixer in own.values():
            if isinstance(mixer, ComplexAttention):
                maps = _attention_maps(mixer, mixer.projection.weight.float())
                tensors |= {f"{place}.{name}.weight": weight for name, weight in maps.items()}
            else:
                assert isinstance(mixer, KoopmanOperator | MeraRouter)
                tensors |= _mixer_tensors(place, mixer)
        if isinstance(block, HamiltonianBlock | IntegratedBlock):
            tensors |= _named(f"{place}.mlp_norm", block.flow_norm)
            flows = len(block.flow.odes)
            for flow, ode in enumerate(block.flow.odes):
                assert isinstance(ode, HamiltonianNeuralODE)
                kicks, drifts = ode.stages.kicks, ode.stages.drifts
                tensors |= _named(f"{place}.mlp.potentials.{flow}", ode.potential)
                if isinstance(ode.potential, MLPPotential):
                    units = len(ode.potential.b1)
            continue
        tensors |= _named(f"{place}.mlp_norm", block.ffn_norm)
        tensors[f"{place}.mlp.up_proj.weight"] = real_form(block.ffn.up.weight.float())
        tensors[f"{place}.mlp.down_proj.weight"] = real_form(block.ffn.down.weight.float())
        gates = [gate for gate in (block.ffn.activation.bias, block.ffn.activation.slope) if gate is not None]
        if gates:
            tensors[f"{place}.mlp.gates"] = torch.stack([gate.float() for gate in gates])
    if model.antithesis is not None:
        tensors |= _named("antithesis", model.antithesis)
    described = {
        "model_type": "muse",
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.MuseConfig",
            # vLLM builds it, and has a head of its own.
            "AutoModel": f"{CODE.stem}.MuseModel",
            "AutoModelForCausalLM": f"{CODE.stem}.{OWN}",
        },
        "intermediate_size": 2 * trained.config.model.complex.d_ff,
        "norm": stage.norm,
        "norm_eps": norm.eps,
        "activation": stage.activation,
        "potential": stage.potential if flows else "",
        "potential_width": units,
        "phi": stage.phi,
        "flows": flows,
        "context": stage.context,
        "confinement": stage.confinement,
        "kicks": kicks,
        "drifts": drifts,
        "trunk_kicks": model.trunk.kicks if model.trunk is not None else (),
        "trunk_drifts": model.trunk.drifts if model.trunk is not None else (),
        "mixers": [] if all(own == ["attention"] for own in mixers) else mixers,
        "koopman_selective": stage.koopman_selective,
        "mera_levels": stage.mera_levels,
        "sliding_window": stage.attention_window,
        "dialectic": stage.dialectic if model.antithesis is not None else "",
        "dialectic_units": len(model.antithesis.bias) if model.antithesis is not None else 0,
        "dialectic_candidates": stage.dialectic_candidates,
        "dialectic_rounds": stage.dialectic_rounds,
    }
    return described, tensors


def _mixers(block: ComplexBlock | HamiltonianBlock | IntegratedBlock) -> dict[str, nn.Module]:
    """What mixes the tokens in a block, by names."""
    if not isinstance(block, IntegratedBlock):
        return {"attention": block.attention}
    if isinstance(block.mixer, MixerSum):
        return dict(block.mixer.named_children())
    names = {ComplexAttention: "attention", KoopmanOperator: "koopman", MeraRouter: "mera"}
    return {names[type(block.mixer)]: block.mixer}


def _mixer_tensors(place: str, mixer: KoopmanOperator | MeraRouter) -> dict[str, Tensor]:
    """Complex maps as real ones, all else as it is; angles of 0 where an operator has none."""
    inward, gate = mixer.projection.weight.float().chunk(2, 1)
    tensors = {
        "in_proj.weight": real_form(inward),
        "gate_proj.weight": real_form(gate),
        "out_proj.weight": real_form(mixer.output.weight.float()),
    }
    if isinstance(mixer, KoopmanOperator):
        place = f"{place}.koopman"
        own = {"taps": mixer.taps, "nu": mixer.nu, "theta": mixer.theta}
        linear = {} if mixer.rate is None else _named("rate", mixer.rate)
    else:
        place = f"{place}.mera"
        own = {"disentanglers": mixer.disentanglers, "isometries": mixer.isometries}
        linear = _named("router", mixer.router)
    tensors |= {name: tensor.float() for name, tensor in own.items()} | linear
    return {f"{place}.{name}": tensor for name, tensor in tensors.items()}


def _named(place: str, module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module that has the same ones there."""
    return {f"{place}.{name}": parameter.float() for name, parameter in module.named_parameters()}


def _real_maps(block: RealBlock) -> dict[str, Tensor]:
    attention, ffn = block.attention, block.ffn
    q, k, v = attention.projection.weight.float().split(_head_rows(attention))
    maps = {
        "self_attn.q_proj": q,
        "self_attn.k_proj": k,
        "self_attn.v_proj": v,
        "self_attn.o_proj": attention.output.weight.float(),
        "input_layernorm": _norm_weight(block.attention_norm),
        "post_attention_layernorm": _norm_weight(block.ffn_norm),
        "mlp.down_proj": ffn.down.weight.float(),
    }
    if ffn.gated:
        gate, up = ffn.up.weight.float().chunk(2)
        return maps | {"mlp.gate_proj": gate, "mlp.up_proj": up}
    return maps | {"mlp.up_proj": ffn.up.weight.float()}


def _complex_maps(block: nn.Module) -> dict[str, Tensor]:
    assert isinstance(block, ComplexBlock)
    ffn = block.ffn
    # Complex maps of normalised states, with the gains of their norms.
    maps = _attention_maps(block.attention, _after(block.attention_norm, block.attention.projection))
    return maps | {
        "self_attn.q_proj": math.sqrt(2) * maps["self_attn.q_proj"],
        "input_layernorm": _norm_weight(block.attention_norm),
        "post_attention_layernorm": _norm_weight(block.ffn_norm),
        "mlp.up_proj": real_form(_after(block.ffn_norm, ffn.up)),
        "mlp.down_proj": real_form(ffn.down.weight.float()),
    }


def _attention_maps(attention: ComplexAttention, projection: Tensor) -> dict[str, Tensor]:
    """Real maps to and from the heads [re | im], of a planar weight that gives queries, keys and values."""
    d = attention.head_dim
    maps = {
        f"self_attn.{name}_proj": _to_heads(real_form(part), d)
        for name, part in zip("qkv", projection.split(_head_rows(attention), 1), strict=True)
    }
    output = _to_heads(real_form(attention.output.weight.float()).T, d).T
    return maps | {"self_attn.o_proj": output}


def _head_rows(attention: RealAttention | ComplexAttention) -> list[int]:
    """Rows of a projection that give queries, keys and values."""
    return [count * attention.head_dim for count in (attention.heads, *[attention.kv_heads] * 2)]


def _to_heads(weight: Tensor, d: int) -> Tensor:
    """Rows of planes of heads as rows of heads of planes: (2, H, d) becomes (H, 2, d)."""
    return weight.unflatten(0, (2, -1, d)).transpose(0, 1).flatten(0, 2)


def _after(norm: nn.Module, linear: ComplexLinear) -> Tensor:
    """The planar weight of a map that follows a norm, with the norm's gain in it."""
    assert isinstance(norm, ComplexRMSNorm)
    (g_r, g_i), (w_r, w_i) = norm.gain.float(), linear.weight.float()
    return torch.stack((w_r * g_r - w_i * g_i, w_r * g_i + w_i * g_r))


def _norm_weight(norm: nn.Module) -> Tensor:
    """That of a real norm; of a complex one over both planes, without its gain."""
    if isinstance(norm, nn.RMSNorm):
        return norm.weight.float()
    assert isinstance(norm, ComplexRMSNorm)
    return torch.full((2 * norm.gain.shape[1],), 1 / math.sqrt(2))


def _tokenizer_config(trained: Trained) -> dict[str, Any]:
    tokenizer = trained.tokenizer
    assert tokenizer is not None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": trained.config.model.seq_len,
        "eos_token": tokenizer.end,
        "clean_up_tokenization_spaces": False,
    }
