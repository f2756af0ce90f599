import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from support.commands import default_stage, measured_here
from support.configs import write_text

from muse.benchmarks import price, step_costs, suite, trainings
from muse.benchmarks.results import Results
from muse.benchmarks.suite import settled
from muse.config import DataConfig, TokenizerConfig
from muse.data import load_tokens
from muse.errors import ConfigError, RunError
from muse.runs.folder import CHECKPOINTS
from muse.scaling.counts import numbers, potential_shapes, shapes, step_flops
from muse.training.trainer import train

CPU = torch.device("cpu")
PHI = {"0": 0.4, "2": 0.1, "3": 0.1}
# Of a step, beside one of stage 2.
RATIO = {"0": 0.25, "1": 0.5, "2": 1.0, "3": 1.0}
BEST_RATE = {"0": 2.0, "1": 1.0, "2": 0.5, "3": 0.5}


@pytest.fixture
def config(bench_config, tmp_path):
    """Of a benchmark that trains on a small text; keyword arguments replace its options."""
    data = DataConfig(name="text", path=str(write_text(tmp_path, 400)), cache=str(tmp_path / "cache"))

    def build(number=2, **benchmark):
        options = {"name": "price", "train_steps": 40, "batch_size": None, "seq_len": None, "seeds": 3}
        config = bench_config(number, **{**options, **benchmark})
        tokenizer = TokenizerConfig(name="bpe", vocab_size=257)
        return dataclasses.replace(config, data=data, tokenizer=tokenizer, output_root=str(tmp_path / "out"))

    return build


class Law:
    """Answers measurements by a scaling law with an exponent for each stage, and notes what is asked."""

    def __init__(self, noise=0.0, stage_gain=0.0):
        self.noise, self.stage_gain, self.trained = noise, stage_gain, []

    def __call__(self, measurement, config, *others):
        if measurement == "step costs":
            ratios = [RATIO[c.stage.number] * c.stage.loops * c.stage.ode_steps for c in (config, *others)]
            return {
                "vocab_size": 300,
                "step_ms": [10.0 * ratio for ratio in ratios],
                "ratio": [ratio / ratios[0] for ratio in ratios],
            }
        if measurement == "vram":
            return {"peak": 0.1}
        assert measurement == "training"
        self.trained.append(config)
        valid = self.loss(config) + (config.optim.lr / 3e-3 - BEST_RATE[config.stage.number]) ** 2
        return {"valid_loss": valid, "test_loss": self.loss(config)}

    def loss(self, config):
        """Not of the learning rate: what is chosen by one split is told of another."""
        stage, model = config.stage, config.model
        block = numbers(shapes(stage, model, 300).blocks[0])
        repeated = block if stage.number == "0" else numbers(potential_shapes(stage, model))
        layers = len(shapes(stage, model, 300).blocks)
        # The small model's stage 2 takes one step.
        times = stage.loops if stage.number == "0" else stage.ode_steps
        size = layers * (block - repeated + times ** PHI.get(stage.number, 1.0) * repeated)
        seconds = config.train.steps
        gain = self.stage_gain * (stage.number == "2")
        # The same for all models of a seed but for a part.
        seed = 0.1 * config.seed + self.noise * math.sin(37 * config.seed + int(stage.number))
        return 5 - 0.3 * math.log(size) - 0.1 * math.log(seconds) - gain + seed


def judged(config, law, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "measure_isolated", law)
    results = Results(tmp_path / "run", law, default_stage)
    price.judge(settled(config, "price"), results)
    results.judge()
    return results


def test_each_model_is_trained_to_as_many_tokens_flops_and_seconds(config, monkeypatch, tmp_path):
    results = judged(config(), Law(), monkeypatch, tmp_path)
    models = results.details["price"]
    assert list(models) == [
        "stage 2", "stage 0", "stage 1", "stage 0, 2 loops", "stage 0, 4 loops", "stage 0, 4 blocks",
        "stage 2, 2 steps", "stage 2, 4 steps", "stage 2, 4 blocks",
    ]  # fmt: skip
    first = models["stage 2"]["budgets"]
    for name, model in models.items():
        budgets = model["budgets"]
        assert list(budgets) == (["tokens"] if "blocks" in name or ", 2 s" in name or ", 4 s" in name else [
            "tokens", "FLOPs", "seconds",
        ])  # fmt: skip
        assert budgets["tokens"]["tokens"] == first["tokens"]["tokens"] == 40 * 16 * 32
        for budget, key in (("FLOPs", "flops"), ("seconds", "seconds")):
            if budget in budgets:
                step = budgets[budget][key] / budgets[budget]["steps"]
                assert abs(budgets[budget][key] - first["tokens"][key]) <= step / 2 * (1 + 1e-9)
    stage = models["stage 0"]
    vocabulary = dataclasses.replace(config().model, vocab_size=300)
    assert stage["flops_per_token"] == step_flops(default_stage("0"), vocabulary, 300, 32).total


def test_the_best_learning_rate_of_the_validation_split_is_kept_and_the_test_split_told(
    config, monkeypatch, tmp_path
):
    law = Law()
    models = judged(config(), law, monkeypatch, tmp_path).details["price"]
    for name, model in models.items():
        number = name.split()[1].rstrip(",")
        assert model["learning_rate"] == pytest.approx(3e-3 * BEST_RATE[number])
        assert model["rate_at_edge"] is (number != "1")
        for budget in model["budgets"].values():
            kept = [
                law.loss(one)
                for one in law.trained
                if (one.stage.number, one.train.steps) == (number, budget["steps"])
                and one.optim.lr == model["learning_rate"]
            ]
            assert set(budget["losses"]) <= set(kept)
    # Three rates of nine models, two more seeds of each, and three seeds of other numbers of steps: of four
    # models for FLOPs, of three for seconds, since a step of four loops takes as long as one of stage 2.
    assert len(law.trained) == 9 * 3 + 9 * 2 + (4 + 3) * 3
    assert len({trainings.training_folder(one) for one in law.trained}) == len(law.trained)


def test_loops_and_steps_are_worth_what_the_law_says(config, monkeypatch, tmp_path):
    values = judged(config(), Law(noise=1e-4), monkeypatch, tmp_path).values
    assert values["price_exponent_loops"] == pytest.approx(PHI["0"], abs=0.02)
    low, high = values["price_exponent_loops_interval"]
    assert low <= values["price_exponent_loops"] <= high
    assert high - low < 0.05
    assert values["price_exponent_flow_steps"] == pytest.approx(PHI["2"], abs=0.02)


def test_without_other_depths_nothing_is_said_of_loops(config, monkeypatch, tmp_path):
    values = judged(config(depths=[]), Law(), monkeypatch, tmp_path).values
    assert values["price_exponent_loops"] is None
    assert values["price_exponent_loops_interval"] is None


@pytest.mark.parametrize(("gain", "passed"), [(1.0, True), (-1.0, False)])
def test_the_stage_is_held_against_stage_0_for_each_budget(config, monkeypatch, tmp_path, gain, passed):
    results = judged(config(loops=[], flow_steps=[]), Law(0.01, gain), monkeypatch, tmp_path)
    assert len(results.criteria) == 3
    for budget in ("tokens", "flops", "seconds"):
        values = results.values
        difference = values[f"price_{budget}_loss"] - values[f"price_{budget}_loss_stage0"]
        assert values[f"price_{budget}_difference"] == pytest.approx(difference)
        low, high = values[f"price_{budget}_interval"]
        assert low <= difference <= high
        # The seeds are shared, so their own scatter, 0.1 a seed, is not in it.
        assert high - low < 0.05
        assert values[f"price_{budget}_pass"] is passed
    assert results.values["all_pass"] is passed


def test_what_seeds_do_not_tell_is_left_open(config, monkeypatch, tmp_path):
    one = judged(config(seeds=1, loops=[], flow_steps=[]), Law(), monkeypatch, tmp_path)
    assert one.values["price_tokens_pass"] is one.values["all_pass"] is None
    assert "two seeds" in one.unjudged["price_tokens_pass"]
    law = Law()
    law.loss = lambda training: 5 + (training.stage.number == "2") * (-1) ** training.seed
    several = judged(config(loops=[], flow_steps=[]), law, monkeypatch, tmp_path)
    assert several.values["price_tokens_pass"] is None
    assert "more seeds" in several.unjudged["price_tokens_pass"]


def test_a_training_that_failed_leaves_its_model_without_a_loss(config, monkeypatch, tmp_path):
    law = Law()

    def answer(measurement, config, *others):
        if measurement == "training" and config.stage.number == "1" and config.seed == 1:
            raise RunError("it broke")
        return law(measurement, config, *others)

    results = judged(config(loops=[], flow_steps=[]), answer, monkeypatch, tmp_path)
    assert len(results.details["price"]["stage 1"]["budgets"]["tokens"]["losses"]) == 2
    assert results.details["price"]["stage 1"]["budgets"]["tokens"]["interval"] is None
    assert len(results.details["price"]["stage 2"]["budgets"]["tokens"]["losses"]) == 3
    assert results.failures
    assert results.values["all_pass"] is None


def test_costs_that_cannot_be_measured_leave_everything_open(config, monkeypatch, tmp_path):
    def answer(measurement, config, *others):
        raise RunError("it broke")

    results = judged(config(), answer, monkeypatch, tmp_path)
    assert results.values == {
        "price_tokens_loss": None, "price_flops_loss": None, "price_seconds_loss": None, "all_pass": None,
    }  # fmt: skip
    assert "price" not in results.details


@pytest.mark.slow
def test_a_command_given_again_trains_nothing_twice(config, monkeypatch, tmp_path):
    """All of it, small: what is stored is found, and has the losses of the training of train.py."""
    asked, costs = [], []

    def measured(measurement, *configs):
        asked.append(measurement)
        if measurement != "step costs":
            return measured_here(measurement, *configs)
        # The same each time: times decide how long the trainings are.
        if not costs:
            costs.append(measured_here(measurement, *configs))
        return costs[0]

    small = config(
        train_steps=3, seeds=2, loops=[2], flow_steps=[2], learning_rates=[1.0], repeats=1, stages=["0"]
    )
    first = judged(small, measured, monkeypatch, tmp_path)
    assert first.failures == {}
    assert asked.count("step costs") == 1
    count = asked.count("training")
    assert count == len(list((tmp_path / "out" / "trainings").glob("*/training.json")))
    asked.clear()
    again = judged(small, measured, monkeypatch, tmp_path)
    assert asked == []
    assert json.dumps(again.values) == json.dumps(first.values)
    assert json.dumps(again.details["price"]) == json.dumps(first.details["price"])
    judged(dataclasses.replace(small, benchmark=dataclasses.replace(small.benchmark, rerun=True)), measured,
           monkeypatch, tmp_path)  # fmt: skip
    assert asked.count("training") == count
    drawn = price.plot(first.details["price"])
    for axes in drawn.axes:
        assert len(axes.containers) == 3
    assert len(price.text(first.details["price"])) == 2
    drawn_lines = [table for table in price.tables(first.details["price"]) if table.lines and table.rows]
    assert len(drawn_lines) == 3


def test_a_training_that_was_stopped_goes_on(config, monkeypatch):
    wanted = settled(config(1, train_steps=4), "price")
    training = trainings.training_of(wanted, 4, 2.0, 1)
    assert (training.seed, training.optim.lr) == (1, 6e-3)
    data = load_tokens(training.data, training.tokenizer, training.model.vocab_size)
    folder = trainings.training_folder(training)
    halfway = dataclasses.replace(training, train=dataclasses.replace(training.train, checkpoint_every=2))
    _, undisturbed = train(halfway, data, CPU, folder, lambda *_: None, progress=False)
    steps = sorted((folder / CHECKPOINTS).glob("step_*"))
    assert len(steps) > 1
    for path in (folder / CHECKPOINTS).iterdir():
        if path.is_dir() and path != steps[0]:
            shutil.rmtree(path)
        elif not path.is_dir():
            path.unlink()
    began = []

    def noted(*arguments):
        began.append(arguments[5][0])
        return train(*arguments, progress=False)

    monkeypatch.setattr(trainings, "train", noted)
    found = trainings.measure_training(training, CPU)
    assert began == [steps[0]]
    assert found["test_loss"] == undisturbed.test.loss
    assert found["valid_loss"] == undisturbed.valid.loss
    assert found["steps"] == 4
    assert not (folder / CHECKPOINTS).exists()


def test_times_are_beside_those_of_the_first_model(config):
    wanted = settled(config(2, repeats=2), "price")
    results = Results(None, None, default_stage)
    configs = [variant.config for variant in price.variants_of(wanted, results)][:3]
    measured = step_costs.measure_costs(*configs, CPU)
    assert measured["vocab_size"] == 257
    assert len(measured["step_ms"]) == len(measured["ratio"]) == 3
    assert measured["ratio"][0] == 1.0
    assert np.min(measured["step_ms"]) > 0


def test_stage_3_stands_beside_all_others_and_is_held_against_stages_0_and_2(config, monkeypatch, tmp_path):
    results = judged(config(3, depths=[]), Law(0.01), monkeypatch, tmp_path)
    assert list(results.details["price"]) == [
        "stage 3", "stage 0", "stage 1", "stage 2", "stage 0, 2 loops", "stage 0, 4 loops",
        "stage 2, 2 steps", "stage 2, 4 steps",
    ]  # fmt: skip
    values = results.values
    for budget in ("tokens", "flops", "seconds"):
        for number, key in (("0", f"price_{budget}"), ("2", f"price_{budget}_stage2")):
            difference = values[f"price_{budget}_loss"] - values[f"price_{budget}_loss_stage{number}"]
            assert values[f"{key}_difference"] == pytest.approx(difference)
            low, high = values[f"{key}_interval"]
            assert low <= difference <= high
            assert f"{key}_pass" in values
    assert len(results.criteria) == 6
    alone = judged(
        config(3, depths=[], loops=[], flow_steps=[], stages=["2"]), Law(0.01), monkeypatch, tmp_path
    )
    assert [title for title, *_ in alone.criteria] == [
        f"loss less that of stage 2, equal {budget}" for budget in ("tokens", "FLOPs", "seconds")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stages": ["1"], "flow_steps": [2, 4], "loops": [3]},
            r"benchmark.loops=\[3\] changes nothing without",
        ),
        (
            {"depths": [3.0], "loops": [], "flow_steps": []},
            r"benchmark.depths=\[3.0\] changes nothing without loops",
        ),
        (
            {"number": 3, "stages": ["1"], "depths": [3.0]},
            r"benchmark.depths=\[3.0\] changes nothing without loops",
        ),
        ({"train_steps": 0}, "benchmark.train_steps=0 trains nothing"),
        ({"learning_rates": []}, "benchmark.learning_rates=.. leaves none"),
        ({"dt": 0.5}, "benchmark.dt changes nothing .* give stage.dt"),
        ({"checkpoint": "somewhere"}, "benchmark.checkpoint changes nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        suite.check_benchmark(config(**options), [])


def test_flows_of_more_steps_need_stage_2(config):
    with pytest.raises(ConfigError, match=r"benchmark.flow_steps=\[3\] .* add 2 to benchmark.stages"):
        suite.check_benchmark(config(3, stages=["0"], flow_steps=[3]), [])
    suite.check_benchmark(config(3, stages=["0"], flow_steps=[]), [])
    suite.check_benchmark(config(3), [])


def test_random_tokens_have_no_price(config):
    with pytest.raises(ConfigError, match="needs text"):
        suite.check_benchmark(dataclasses.replace(config(), data=DataConfig(name="synthetic")), [])
