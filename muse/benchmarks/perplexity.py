"""``benchmark=perplexity``: of a model and its baselines on the same text."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muse.benchmarks.baseline import baseline_of
from muse.benchmarks.benchmark import Benchmark, Models
from muse.benchmarks.checkpoint import tokens_seen
from muse.benchmarks.criteria import ratio
from muse.benchmarks.model import benchmark_model, train_briefly
from muse.benchmarks.results import Results, Unmeasured, name_of
from muse.benchmarks.workload import Workload, batch_shape, flow_of, refuse_flow
from muse.config import BenchConfig
from muse.data import Counts, TokenData, load_tokens
from muse.data.evaluation_sets import tokens_of_files
from muse.errors import ConfigError
from muse.hardware import autocast_dtype
from muse.models import LanguageModel, build_model, count_parameters
from muse.options import changed
from muse.report.plots import draw_lines, subtracted
from muse.report.sweep_plot import Metric
from muse.report.wandb_tables import model_tables
from muse.training.evaluate import Evaluation, evaluate

# Of stage 0, and by the stage of the one before it.
DECODER_TARGET = 1.03
FLOW_TARGETS = {"2": 1.02, "3": 1.0}
PARAMETERS_APART = 0.03
# Of the stage before, on each text that an option of its name gives.
CORPUS_TARGET = 1.05
CORPORA = ("wikitext2", "ptb", "c4")


def measure_perplexity(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Evaluate a model on the validation split: a checkpoint's, or one trained here.

    Without ``benchmark.checkpoint`` the model is trained for ``benchmark.train_steps`` steps; a baseline
    measured with the same configuration sees the same tokens in the same order.

    Returns:
        ``ppl``, ``loss``, ``word_ppl``, ``bits_per_byte`` and ``tokens`` of the evaluation,
        ``word_ppl_reason`` where there is no perplexity per word, ``trained``, which says how the weights
        came about, ``parameters``, their number, ``corpora``, perplexities on other texts by name, and
        ``curve``, the training loss of each step, no mean over some.

    Raises:
        ConfigError: for data without text.
    """
    if config.data.name == "synthetic":
        raise ConfigError("benchmark=perplexity needs text; choose data=stdlib, wikitext2, text or files")
    data = load_tokens(config.data, config.tokenizer, config.model.vocab_size)
    config = changed(config, model={"vocab_size": data.vocab_size})
    curve: list[tuple[int, float]] = []
    if config.benchmark.checkpoint is not None or config.benchmark.train_steps == 0:
        checkpoint = config.benchmark.checkpoint
        model = benchmark_model(config, device)
        valid = _evaluate(config, model, data.valid, data.counts.get("valid"))
        trained = f"checkpoint {checkpoint}" if checkpoint else "untrained"
    else:
        with tempfile.TemporaryDirectory() as folder:
            model, valid = train_briefly(config, data, device, Path(folder), curve)
        trained = f"{config.benchmark.train_steps} steps in this run"
    parameters = count_parameters(build_model(config.stage, config.model, data.vocab_size))
    figures = dataclasses.asdict(valid)
    if valid.word_ppl_reason is None:
        del figures["word_ppl_reason"]
    return {
        **flow_of(config),
        **figures,
        "trained": trained,
        "parameters": parameters,
        "corpora": _on_corpora(config, model, data),
        "curve": curve,
    }


def _evaluate(
    config: BenchConfig, model: LanguageModel, tokens: np.ndarray, counts: Counts | None
) -> Evaluation:
    batch, length = batch_shape(config)
    stride, precision = config.train.eval_stride, autocast_dtype(config.stage.precision)
    return evaluate(model, tokens, counts, length, batch, stride, 0, precision)


def _corpora(config: BenchConfig) -> dict[str, str]:
    """The files of other text that are given, by name."""
    given = {name: getattr(config.benchmark, name) for name in CORPORA}
    return {name: file for name, file in given.items() if file is not None}


def _on_corpora(config: BenchConfig, model: LanguageModel, data: TokenData) -> dict[str, float]:
    """Perplexities on them, and on the test split of the text itself if that is one of them."""
    found, files = {}, _corpora(config)
    if (own := config.data.name) in CORPORA and own not in files:
        found[own] = _evaluate(config, model, data.test, data.counts.get("test")).ppl
    for name, file in files.items():
        assert data.tokenizer is not None
        tokens, counts = tokens_of_files(data.tokenizer, [Path(file)], f"benchmark.{name}")
        found[name] = _evaluate(config, model, tokens, counts).ppl
    return found


def judge(config: BenchConfig, results: Results) -> None:
    """Perplexity beside stage 0, of stage 2 beside stage 1, and of stage 3 beside stage 2."""
    (_judge_flow if config.stage.flowing else _judge_decoder)(config, results)


def _judge_decoder(config: BenchConfig, results: Results) -> None:
    """Perplexity beside stage 0."""
    measured = results.measure("perplexity", name_of(config), config)
    values = results.values
    values |= {"ppl": measured["ppl"], "ppl_trained": measured["trained"]}
    if config.stage.number == "0":
        values |= {"ppl_ratio": None, "ppl_pass": None}
        return
    baseline = baseline_of(config, results.stage_of("0"))
    other = _measure_baseline(config, baseline, results)
    share = None if "ppl_pass" in results.unjudged else ratio(measured["ppl"], other["ppl"])
    values |= {
        "ppl_ratio": share,
        "ppl_pass": results.at_most(f"perplexity / stage 0 ({measured['trained']})", share, DECODER_TARGET),
        "ppl_baseline": other["ppl"],
        "ppl_baseline_trained": other["trained"],
    }


def _judge_flow(config: BenchConfig, results: Results) -> None:
    """Perplexity beside the stage before, and for show those before that."""
    number = config.stage.number
    before = str(int(number) - 1)
    target = FLOW_TARGETS[number]
    baseline = baseline_of(config, results.stage_of(before))
    own = results.measure("perplexity", name_of(config), config)
    one = _measure_baseline(config, baseline, results)
    trained_here = config.benchmark.checkpoint is None and baseline.benchmark.checkpoint is None
    shown = {}
    for earlier in reversed(range(int(before))):
        other = baseline_of(config, results.stage_of(str(earlier)))
        found = results.measure("perplexity", name_of(other), other) if trained_here else Unmeasured()
        shown[f"stage{earlier}_ppl"] = found["ppl"]
    share = None if "ppl_pass" in results.unjudged else ratio(own["ppl"], one["ppl"])
    size = ratio(own["parameters"], one["parameters"])
    excess = None if size is None else size - 1
    values = results.values
    values |= {
        f"stage{number}_ppl": own["ppl"],
        f"stage{before}_ppl": one["ppl"],
        **shown,
        "ppl_ratio": share,
        "ppl_diff_pct": None if share is None else 100 * (share - 1),
        "ppl_target": target,
        "ppl_pass": results.at_most(f"perplexity / stage {before} ({own['trained']})", share, target),
        "ppl_trained": own["trained"],
        "ppl_baseline_trained": one["trained"],
        "parameters_apart": excess,
    }
    equal = None if excess is None else abs(excess) <= PARAMETERS_APART
    results.criteria.append((f"parameters / stage {before} - 1", excess, f"within {PARAMETERS_APART}", equal))
    _judge_corpora(config, own, one, before, results)


def _judge_corpora(
    config: BenchConfig, own: Mapping[str, Any], one: Mapping[str, Any], before: str, results: Results
) -> None:
    """Perplexity on other texts beside the stage before."""
    given = {config.data.name, *_corpora(config)}
    found, other = own.get("corpora") or {}, one.get("corpora") or {}
    for name in CORPORA:
        if name not in given:
            if config.stage.number != "3":
                continue
            reason = f"no such text is given; benchmark.{name}=FILE gives it"
            results.leave_open(reason, f"{name}_ppl_pass")
        share = None if "ppl_pass" in results.unjudged else ratio(found.get(name), other.get(name))
        passed = results.at_most(f"perplexity / stage {before}, {name}", share, CORPUS_TARGET)
        results.values |= {
            f"{name}_ppl": found.get(name),
            f"phase{before}_{name}_ppl": other.get(name),
            f"{name}_ppl_ratio": share,
            f"{name}_ppl_pass": passed,
        }


def _measure_baseline(config: BenchConfig, baseline: BenchConfig, results: Results) -> dict[str, Any]:
    """Of the baseline, unless it would be that of a few steps; a comparison that says nothing is unjudged."""
    own, other = config.benchmark.checkpoint, baseline.benchmark.checkpoint
    if own is None and other is None:
        if not config.benchmark.train_steps:
            results.unjudged["ppl_pass"] = (
                "both models are untrained; give benchmark.train_steps or checkpoints"
            )
    elif own is None or other is None:
        missing = "benchmark.checkpoint" if own is None else "benchmark.baseline_checkpoint"
        results.unjudged["ppl_pass"] = (
            f"a checkpoint says nothing beside {config.benchmark.train_steps} steps of training; give "
            f"{missing}, too"
        )
        return Unmeasured()
    elif tokens_seen(own) != tokens_seen(other):
        results.unjudged["ppl_pass"] = (
            f"{own} was trained on {tokens_seen(own):,} tokens and {other} on {tokens_seen(other):,}"
        )
    return results.measure("perplexity", name_of(baseline), baseline)


def check(config: BenchConfig) -> None:
    """See that no other flow is given than that of a checkpoint, and that other texts are there.

    Raises:
        ConfigError: it is not so.
    """
    for name, file in _corpora(config).items():
        if not Path(file).is_file():
            raise ConfigError(f"benchmark.{name}={file} is not there; give a file of text in UTF-8")
    if config.benchmark.name == "perplexity" and config.benchmark.checkpoint is not None:
        where = "the perplexity of a checkpoint, which has the flow that it was trained with"
        refuse_flow(config, where, "leave it out")


def workload(config: BenchConfig) -> Workload:
    """The perplexity of a checkpoint is that of the flow it was trained with; stage 3 always has its own."""
    if config.stage.number != "2":
        return Workload()
    return Workload(4, 1024, of_model=config.benchmark.checkpoint is None)


def plot(models: Models) -> Any:
    """The losses of the trainings, and by how much they differ from the last baseline's."""
    curves = {name: values["curve"] for name, values in models.items()}
    *others, baseline = curves
    return draw_lines(
        "training loss on the same tokens",
        "step",
        "loss [nats per token]",
        curves,
        differences=(
            f"difference to {baseline}",
            {name: subtracted(curves[name], curves[baseline]) for name in others},
        ),
    )


BENCHMARK = Benchmark(
    measure={"perplexity": measure_perplexity},
    judge=judge,
    plot=plot,
    shown=(
        Metric("ppl", "perplexity", "", {"ppl_baseline": "stage 0"}, counted=False, key_of_flow="stage2_ppl"),
        Metric(
            "stage3_ppl",
            "perplexity",
            "stage 3",
            {"stage2_ppl": "stage 2", "stage1_ppl": "stage 1", "stage0_ppl": "stage 0"},
            counted=False,
        ),
        Metric(
            "stage2_ppl",
            "perplexity",
            "stage 2",
            {"stage1_ppl": "stage 1", "stage0_ppl": "stage 0"},
            counted=False,
        ),
    ),
    workload=workload,
    check=check,
    tables=partial(model_tables, "perplexity", drawn="ppl"),
)
