from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from kernels.symplectic import POTENTIALS
from muse import config
from muse.config import (
    STAGE_3_PARTS,
    BenchConfig,
    BenchmarkConfig,
    DataConfig,
    HardwareConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    WidthConfig,
    build_config,
)
from muse.dynamics import INTEGRATORS
from muse.dynamics.potential import FORCE_DTYPES
from muse.errors import ConfigError
from muse.launch.composition import prepare_hydra
from muse.options import allowed_values, options_of

CONF = Path(__file__).resolve().parents[1] / "conf"
# What is below conf/hydra is about Hydra itself (tests/launch/test_sweep.py).
FILES = sorted(
    path.relative_to(CONF) for path in CONF.rglob("*.yaml") if path.relative_to(CONF).parts[0] != "hydra"
)
GROUPS = sorted({path.parent.name for path in FILES if path.parent.name})


# Class, a value that is refused, and what the message must name.
REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (StageConfig, {"number": "7"}, "stage=7"),
    (StageConfig, {"precision": "fp8"}, "stage.precision"),
    (StageConfig, {"mixer": "conv"}, "stage.mixer"),
    (StageConfig, {"score": "cosine"}, "stage.score"),
    (StageConfig, {"activation": "gelu"}, "stage.activation"),
    (StageConfig, {"number": "0", "activation": "mod_relu"}, "stage.activation"),
    (StageConfig, {"norm": "batch"}, "stage.norm"),
    (StageConfig, {"init": "zero"}, "stage.init"),
    (StageConfig, {"embedding_init": "one"}, "stage.embedding_init"),
    (StageConfig, {"dropout": 1.0}, "stage.dropout"),
    (StageConfig, {"dropout": -0.1}, "stage.dropout"),
    (StageConfig, {"dropout": float("nan")}, "stage.dropout"),
    (StageConfig, {"number": "2", "mixer": "none"}, "stage.mixer"),
    (StageConfig, {"ode_steps": 0}, "stage.ode_steps"),
    (StageConfig, {"dt": 0.0}, "stage.dt"),
    (StageConfig, {"dt": float("inf")}, "stage.dt=inf is not allowed; it must be a finite number"),
    (StageConfig, {"confinement": float("inf")}, "stage.confinement=inf"),
    (StageConfig, {"recon_threshold": float("inf")}, "stage.recon_threshold=inf"),
    (StageConfig, {"potential_width": 0}, "stage.potential_width"),
    (StageConfig, {"flows": 0}, "stage.flows"),
    (StageConfig, {"number": "3a", "activation": "swiglu"}, "stage.activation"),
    (StageConfig, {"fraction_bits": 29}, "stage.fraction_bits"),
    (StageConfig, {"recon_threshold": 0.0}, "stage.recon_threshold"),
    (WidthConfig, {"d_model": 0}, "d_model"),
    (WidthConfig, {"layers": 0}, "layers"),
    (WidthConfig, {"heads": 0}, "heads"),
    (WidthConfig, {"kv_heads": 0}, "kv_heads"),
    (WidthConfig, {"d_ff": 0}, "d_ff"),
    (WidthConfig, {"d_model": 10, "heads": 4}, "d_model=10"),
    (WidthConfig, {"heads": 4, "kv_heads": 3}, "kv_heads=3"),
    (ModelConfig, {"vocab_size": 1}, "model.vocab_size"),
    (ModelConfig, {"seq_len": 0}, "model.seq_len"),
    (ModelConfig, {"lr": 0.0}, "model.lr"),
    (DataConfig, {"name": "web"}, "data=web"),
    (DataConfig, {"variant": "wikitext-103"}, "data.variant"),
    (DataConfig, {"name": "text"}, "data.path"),
    (DataConfig, {"name": "text", "path": ""}, "data.path"),
    (DataConfig, {"name": "files"}, "data.path"),
    (DataConfig, {"name": "text", "path": "x", "skip_bad": True}, "data.skip_bad"),
    (DataConfig, {"valid": "x"}, "data.valid"),
    (DataConfig, {"name": "mix"}, "data=mix needs"),
    (DataConfig, {"name": "mix", "path": "x", "sources": {"a": SourceConfig(path="x")}}, "data=mix needs"),
    (DataConfig, {"name": "mix", "sources": {"a": SourceConfig()}}, "data.sources.a: data=files needs"),
    (DataConfig, {"sources": {"a": SourceConfig(path="x")}}, "data.sources is of data=mix"),
    (DataConfig, {"at_end": "pause"}, "data.at_end=pause"),
    (DataConfig, {"packing": "best"}, "data.packing=best"),
    (TrainConfig, {"eval_sets": {"valid": "x"}}, "train.eval_sets.valid"),
    (TokenizerConfig, {"name": "char"}, "tokenizer=char"),
    (TokenizerConfig, {"vocab_size": 256}, "tokenizer.vocab_size"),
    (TokenizerConfig, {"name": "file"}, "tokenizer=file needs tokenizer.path"),
    (OptimConfig, {"name": "sgd"}, "optim=sgd"),
    (OptimConfig, {"lr": 0.0}, "optim.lr"),
    (OptimConfig, {"lr": float("nan")}, "optim.lr"),
    (OptimConfig, {"muon_lr": -1.0}, "optim.muon_lr"),
    (OptimConfig, {"weight_decay": -0.1}, "optim.weight_decay"),
    (OptimConfig, {"betas": [0.9]}, "optim.betas"),
    (OptimConfig, {"betas": [0.9, 1.0]}, "optim.betas"),
    (OptimConfig, {"eps": 0.0}, "optim.eps"),
    (OptimConfig, {"momentum": 1.0}, "optim.momentum"),
    (OptimConfig, {"second_moment": "both"}, "optim.second_moment"),
    (OptimConfig, {"schedule": "foo"}, "optim.schedule"),
    (OptimConfig, {"warmup": -1}, "optim.warmup"),
    (OptimConfig, {"decay": 1.0}, "optim.decay"),
    (OptimConfig, {"final_lr": 1.5}, "optim.final_lr"),
    (OptimConfig, {"final_lr": -0.5}, "optim.final_lr"),
    (OptimConfig, {"clip": -1.0}, "optim.clip"),
    (OptimConfig, {"accumulation": 0}, "optim.accumulation"),
    (HardwareConfig, {"device": "tpu"}, "hardware.device"),
    (HardwareConfig, {"memory_gb": 0.0}, "hardware.memory_gb"),
    (HardwareConfig, {"threads": 0}, "hardware.threads"),
    (HardwareConfig, {"kernels": "cuda"}, "hardware.kernels"),
    (LoggerConfig, {"mode": "cloud"}, "logger.mode"),
    (LoggerConfig, {"log_every": 0}, "logger.log_every"),
    (LoggerConfig, {"tags": ["fine", ""]}, "logger.tags"),
    (LoggerConfig, {"tags": ["x" * 65]}, "logger.tags"),
    (LoggerConfig, {"group": ""}, "logger.group"),
    (TrainConfig, {"steps": 0}, "train.steps"),
    (TrainConfig, {"batch_size": 0}, "train.batch_size"),
    (TrainConfig, {"eval_every": -1}, "train.eval_every"),
    (TrainConfig, {"eval_tokens": -1}, "train.eval_tokens"),
    (TrainConfig, {"eval_stride": 0}, "train.eval_stride"),
    (TrainConfig, {"checkpoint_every": -1}, "train.checkpoint_every"),
    (TrainConfig, {"sample_tokens": -1}, "train.sample_tokens"),
    (BenchmarkConfig, {"name": "luck"}, "benchmark=luck"),
    (BenchmarkConfig, {"dt": float("inf")}, "benchmark.dt=inf"),
    (BenchmarkConfig, {"batch_size": 0}, "benchmark.batch_size"),
    (BenchmarkConfig, {"seq_len": 0}, "benchmark.seq_len"),
    (BenchmarkConfig, {"train_steps": -1}, "benchmark.train_steps"),
    (BenchmarkConfig, {"repeats": 0}, "benchmark.repeats"),
    (BenchmarkConfig, {"inputs": 0}, "benchmark.inputs"),
    (BenchmarkConfig, {"warmup": -1}, "benchmark.warmup"),
    (BenchmarkConfig, {"dtypes": []}, "benchmark.dtypes"),
    (BenchmarkConfig, {"dtypes": ["bfloat16", "float64"]}, "benchmark.dtypes"),
    (BenchmarkConfig, {"width": 0}, "benchmark.width"),
    (BenchmarkConfig, {"clients": [0]}, "benchmark.clients"),
    (BenchmarkConfig, {"clients": [257]}, "benchmark.clients"),
    (BenchmarkConfig, {"seconds": 0.0}, "benchmark.seconds"),
    (BenchmarkConfig, {"minutes": 0.0}, "benchmark.minutes"),
    (BenchmarkConfig, {"minutes": 60.5}, "benchmark.minutes"),
    (BenchmarkConfig, {"heads": 0}, "benchmark.heads"),
    (BenchmarkConfig, {"head_dim": 0}, "benchmark.head_dim"),
    (BenchmarkConfig, {"hidden": 0}, "benchmark.hidden"),
    (BenchmarkConfig, {"ode_steps": 0}, "benchmark.ode_steps"),
    (RunConfig, {"seed": -1}, "seed=-1"),
    (BenchConfig, {"profile": True}, "profile=true is an option of train.py"),
    (RunConfig, {"train": TrainConfig(eval_stride=129)}, "train.eval_stride=129"),
]


@pytest.mark.parametrize(
    ("kind", "values", "named"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_value_that_cannot_be_used_is_named(kind, values, named):
    with pytest.raises(ConfigError) as caught:
        kind(**values)
    message = str(caught.value)
    assert named in message
    assert "\n" not in message


SCHEMAS = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]
GROUPS = [WidthConfig(1, 1, 1, 1, 1) if schema is WidthConfig else schema() for schema in SCHEMAS]
CHOSEN = [
    *((group, field.name) for group in GROUPS for field in dataclasses.fields(group)),
    *((StageConfig(number=number, activation="gelu"), "activation") for number in ("0", "3a")),
]
CHOSEN = [(group, name) for group, name in CHOSEN if allowed_values(group, name)]
BOUNDED = [
    (group, path, option)
    for group in GROUPS
    for path, option in options_of(type(group)).items()
    if option.bounds and "." not in path
]


@pytest.mark.parametrize(("group", "name"), CHOSEN, ids=lambda value: getattr(value, "number", str(value)))
def test_the_allowed_values_are_listed_and_work(group, name):
    allowed, declared = allowed_values(group, name), options_of(type(group))[name]
    is_list = isinstance(getattr(group, name), list)
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(group, **{name: ["x"] if is_list else "x"})
    assert str(caught.value).endswith(f"=x is not known; choose one of {', '.join(allowed)}")
    # What goes with some of them.
    others: dict[Any, Any] = {("data", name): {"path": "somewhere"} for name in ("text", "files")}
    others["tokenizer", "file"] = {"path": "somewhere"}
    others["data", "mix"] = {"sources": {"a": SourceConfig(path="somewhere")}}
    for number in ("0", "3a"):
        others["stage", number] = {"activation": "gelu"}
    for value in allowed:
        own: Any = [value] if is_list else int(value) if declared.type is int else value
        also = {"number": "3"} if name in STAGE_3_PARTS else others.get((declared.given_as, value), {})
        assert getattr(dataclasses.replace(group, **{name: own, **also}), name) == own


@pytest.mark.parametrize(
    ("group", "name", "declared"), BOUNDED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_bound_is_told_and_holds(group, name, declared):
    is_list, whole = isinstance(getattr(group, name), list), declared.type in (int, int | None)

    # What goes with it.
    also = {"number": "3"} if name in STAGE_3_PARTS else {}

    def given(value: float) -> Any:
        return dataclasses.replace(
            group, **also, **{name: [value] * len(getattr(group, name)) if is_list else value}
        )

    for bound, side in (
        *((declared.at_least, -1), (declared.at_most, 1)),
        *((declared.above, -1), (declared.below, 1)),
    ):
        if bound is None:
            continue
        beyond = bound + side if whole else math.nextafter(bound, side * math.inf)
        excluded = bound in (declared.above, declared.below)
        if not excluded:
            given(bound)
        for value in [beyond, *([bound] if excluded else []), *([] if whole else [math.inf, math.nan])]:
            with pytest.raises(ConfigError) as caught:
                given(value)
            told = str(caught.value)
            assert f"{name}={value} " in told
            assert declared.bounds in told


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (StageConfig, {"dropout": 0.0}),
        (WidthConfig, {"d_model": 1, "layers": 1, "heads": 1, "kv_heads": 1, "d_ff": 1}),
        (ModelConfig, {"vocab_size": 2, "seq_len": 1}),
        (TokenizerConfig, {"vocab_size": 257}),
        (TokenizerConfig, {"name": "word", "vocab_size": 1}),
        (OptimConfig, {"betas": [0.0, 0.0], "final_lr": 0.0, "clip": 0.0, "warmup": 0, "weight_decay": 0.0}),
        (OptimConfig, {"final_lr": 1.0}),
        (TrainConfig, {"eval_every": 0, "eval_tokens": 0, "checkpoint_every": 0, "sample_tokens": 0}),
        (RunConfig, {"train": TrainConfig(eval_stride=128)}),
    ],
)
def test_the_smallest_and_largest_values_are_allowed(kind, values):
    assert {name: getattr(kind(**values), name) for name in values} == values


def composed(entry: str, overrides: list[str]) -> Any:
    prepare_hydra()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(entry, overrides)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_of_conf_gives_a_checked_configuration(path):
    group, name = path.parent.name, path.stem
    if not group:
        if name == "common":
            return
        built = build_config(composed(name, []))
        assert type(built) is {"train": RunConfig, "bench": BenchConfig}[name]
        return
    of_bench = group == "benchmark" or "benchmark" in OmegaConf.load(CONF / path)
    entries = ["bench"] if of_bench else ["train", "bench"]
    for entry in entries:
        overrides = [f"{group}={name}"]
        if group == "data" and name in ("text", "files"):
            overrides.append("data.path=somewhere")
        if group == "tokenizer" and name == "file":
            overrides.append("tokenizer.path=somewhere")
        if group == "data" and name == "mix":
            overrides.append("data.sources.a.path=somewhere")
        built = build_config(composed(entry, overrides))
        if group == "experiment":
            # Which is no group of options but sets some of others.
            continue
        chosen = getattr(built, group)
        assert dataclasses.is_dataclass(chosen)
        # What the file says is what comes out.
        written = OmegaConf.load(CONF / path)
        # A stage may also choose options of other groups.
        written = written.get(group, written)
        for key in written:
            if OmegaConf.is_interpolation(written, key):
                continue
            value = getattr(chosen, key)
            plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
            assert plain == OmegaConf.to_container(written)[key], key
        if hasattr(chosen, "name"):
            assert chosen.name == name


def test_the_tokenizer_and_the_optimiser_follow_the_model():
    for size in ("tiny", "small", "seed", "deep"):
        built = build_config(composed("train", [f"model={size}"]))
        assert built.tokenizer.vocab_size == built.model.vocab_size
        assert built.optim.lr == built.model.lr
    built = build_config(composed("train", ["optim.lr=0.5", "tokenizer.vocab_size=300"]))
    assert (built.optim.lr, built.tokenizer.vocab_size) == (0.5, 300)


def test_the_options_of_the_flow_are_those_that_exist():
    stage = StageConfig()
    assert set(allowed_values(stage, "integrator")) == set(INTEGRATORS)
    assert set(allowed_values(stage, "phi")) == set(POTENTIALS)
    assert set(allowed_values(stage, "force_precision")) == set(FORCE_DTYPES)


@pytest.mark.parametrize("stage", ["0", "1", "2", "3", "3a"])
def test_stage_chooses_the_model(stage):
    assert build_config(composed("train", [f"stage={stage}"])).stage.number == stage


@pytest.mark.parametrize("override", ["train.steps=0", "stage.dropout=2", "optim.betas=[0.5]", "seed=-3"])
def test_a_composed_configuration_is_checked(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")) as caught:
        build_config(composed("train", [override]))
    assert "\n" not in str(caught.value)


def test_a_reference_to_an_option_that_does_not_exist_is_one_sentence():
    with pytest.raises(ConfigError, match=r"^optim\.lr cannot be used: .*model\.lrr") as caught:
        build_config(composed("train", ["optim.lr=${model.lrr}"]))
    assert "\n" not in str(caught.value)
