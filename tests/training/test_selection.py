"""Which tokens a step learns from, and what it learns from them."""

import pytest
import torch
from support.commands import WITHOUT_LOG, run_here
from support.configs import SEQ_LEN, VOCAB, run_options, stage_config, write_text
from support.configs import run_config as config_of
from support.runs import CrashError, contents, crash_at, same, stored
from support.trained import make_trained
from support.training import Recorder, prepare_model, run_config, run_train

from muse.config import OptimConfig
from muse.errors import ConfigError
from muse.models import build_model
from muse.models.loss import linear_cross_entropy, linear_losses
from muse.runs.checkpoints import find_checkpoint
from muse.trained import load
from muse.training.parallel import ParallelLoss
from muse.training.selection import Reference, Selection, highest
from muse.training.step import training_step

WINDOWS = 6
KINDS = ("high", "reducible", "entropy", "random")


def batch(seed: int = 0, windows: int = WINDOWS) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCAB, (windows, SEQ_LEN + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def options(kind: str, **changes) -> OptimConfig:
    return OptimConfig(selection=kind, **{"selection_share": 0.5, "selection_guard": 0.0, **changes})


def model_of(seed: int = 0, **stage):
    config = config_of(stage_config("1", **stage))
    model = build_model(config.stage, config.model, VOCAB, seed).double()
    # As it begins, all its losses are nearly alike.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def selected(model, kind: str, step: int = 0, piece: int = 0, reference=None, seed: int = 0, **changes):
    """The step's loss, and which tokens have a gradient at the features of the model."""
    kept = []
    loss_of = ParallelLoss(model, "none")

    def noting(tokens, targets, select=None):
        def note(*arguments):
            kept.append(select(*arguments))
            return kept[-1]

        return loss_of(tokens, targets, note if select is not None else None)

    selection = Selection(options(kind, **changes), seed, noting, reference)
    found = selection.loss(*batch(), step, piece)
    return found, kept[0] if kept else None


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 1.0])
def test_the_highest_scores_are_kept(share):
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    kept = highest(scores, share, 0.0)
    count = max(1, round(share * scores.numel()))
    assert kept.tolist() == sorted(scores.flatten().topk(count).indices.tolist())


def test_of_equal_scores_the_earlier_token_is_kept():
    assert highest(torch.zeros(3, 4), 0.5, 0.0).tolist() == list(range(6))
    assert highest(torch.zeros(3, 4), 0.5, 1.0).tolist() == [0, 1, 4, 5, 8, 9]


@pytest.mark.parametrize(("guard", "least"), [(0.0, 0), (0.01, 1), (0.5, 2), (1.0, 5)])
def test_every_window_keeps_what_the_guard_says_and_it_is_the_window_s_highest(guard, least):
    scores = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    scores[2] -= 100
    scores[3] += 100
    kept = highest(scores, 0.5, guard)
    assert len(kept) == 30
    counts = torch.bincount(kept // 10, minlength=6)
    assert counts.min() == least
    for window, count in enumerate(counts.tolist()):
        best = scores[window].topk(count).indices + 10 * window
        assert set(best.tolist()) == {token for token in kept.tolist() if token // 10 == window}


def test_a_guard_of_one_token_a_window_keeps_no_more_than_the_share():
    assert len(highest(torch.randn(8, 4), 0.1, 1.0)) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_and_entropies_are_those_of_the_distributions(dtype, monkeypatch):
    # Several chunks.
    monkeypatch.setattr("muse.models.loss.SOFTMAX_ELEMENTS", 40)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 6, generator=generator).to(dtype) for n in (11, 9))
    bias, targets = torch.randn(9, generator=generator).to(dtype), torch.arange(11) % 9
    losses, entropies = linear_losses(x, weight, targets, bias, entropy=True)
    exact = torch.distributions.Categorical(logits=x.double() @ weight.double().t() + bias.double())
    near = {"rtol": 0, "atol": {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.1)}
    torch.testing.assert_close(losses.double(), -exact.log_prob(targets), **near)
    torch.testing.assert_close(entropies.double(), exact.entropy(), **near)
    mean = linear_cross_entropy(x, weight, targets, bias)
    torch.testing.assert_close(losses.mean(), mean, rtol=1e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_learns_from_the_mean_loss_of_the_kept_tokens_alone(kind):
    model = model_of()
    reference = Reference(model_of(1).eval(), None)
    found, kept = selected(model, kind, reference=reference)
    inputs, targets = batch()
    logits = model(inputs).flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="none")
    assert len(kept) == targets.numel() // 2
    torch.testing.assert_close(found.loss, each[kept].mean())
    torch.testing.assert_close(found.of_all, each.mean().detach())
    mine = torch.autograd.grad(found.loss, list(model.parameters()))
    theirs = torch.autograd.grad(each[kept].mean(), list(model.parameters()))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_each_kind_keeps_the_highest_of_its_score():
    model, other = model_of(), model_of(1)
    inputs, targets = batch()
    reference = Reference(other.eval(), None)
    exact = torch.distributions.Categorical(logits=model(inputs).detach())
    losses = -exact.log_prob(targets)
    reducible = losses + torch.distributions.Categorical(logits=other(inputs).detach()).log_prob(targets)
    for kind, scores in (("high", losses), ("entropy", exact.entropy()), ("reducible", reducible)):
        _, kept = selected(model, kind, reference=reference)
        assert kept.tolist() == sorted(scores.flatten().topk(len(kept)).indices.tolist()), kind


def test_the_model_itself_as_the_reference_leaves_nothing_to_reduce_and_ties_go_to_the_first():
    model = model_of()
    _, kept = selected(model, "reducible", reference=Reference(model, None))
    assert kept.tolist() == list(range(WINDOWS * SEQ_LEN // 2))


@pytest.mark.parametrize("changes", [{"selection_share": 1.0}, {"selection_warmup": 3}])
def test_all_tokens_are_what_a_step_without_selection_takes_to_the_last_bit(changes):
    model = model_of()
    for kind in KINDS:
        found, kept = selected(model, kind, step=2, **changes)
        assert kept is None
        assert torch.equal(found.loss, model.loss(*batch()))
        assert (found.of_all, found.share, found.windows) == (found.loss, 1, 1)


def test_random_tokens_have_the_gradient_of_all_of_them_on_average():
    model = model_of()
    weight = model.embedding.weight
    (exact,) = torch.autograd.grad(model.loss(*batch()), weight)
    draws = [torch.autograd.grad(selected(model, "random", step=n)[0].loss, weight)[0] for n in range(200)]
    means = torch.stack(draws).mean(0)
    deviation = torch.stack(draws).std(0).norm() / 200**0.5
    # A few directions have most of the variance.
    assert (means - exact).norm() < 3 * deviation
    assert (draws[0] - exact).norm() > 6 * deviation


def test_random_tokens_are_a_function_of_seed_step_and_micro_batch():
    model = model_of()
    draws = [
        selected(model, "random", step, piece, seed=seed, accumulation=3)[1].tolist()
        for step, piece, seed in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert draws[0] == draws[1]
    assert all(draws[0] != other for other in draws[2:])


def test_targets_that_do_not_count_are_kept_last_and_weigh_nothing():
    model = model_of()
    inputs, targets = batch()
    targets = targets.clone()
    targets[:, ::2] = -1
    selection = Selection(options("high"), 0, ParallelLoss(model, "none"))
    found = selection.loss(inputs, targets, 0, 0)
    torch.testing.assert_close(found.loss, model.loss(inputs, targets))
    torch.testing.assert_close(found.of_all, model.loss(inputs, targets).detach())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed", "fp16-mixed"])
@pytest.mark.parametrize("kind", ["high", "entropy"])
def test_a_training_logs_the_loss_of_all_tokens_beside_that_of_the_kept_ones(tmp_path, precision, kind):
    log = Recorder()
    optim = {"selection": kind, "selection_share": 0.5, "selection_warmup": 2, "accumulation": 2}
    run_train(run_config(2, precision, optim, steps=4), tmp_path, log)
    lines = [line for _, line in log.lines if "train/loss" in line]
    for line in lines[:2]:
        assert line["train/selected_loss"] == line["train/loss"]
        assert (line["train/selected_share"], line["train/selected_windows"]) == (1, 1)
    for line in lines[2:]:
        assert line["train/selected_share"] == 0.5
        assert line["train/selected_windows"] == 1
        assert kind != "high" or line["train/selected_loss"] > line["train/loss"]
    plain = Recorder()
    run_train(run_config(2, precision, {"accumulation": 2}, steps=4), tmp_path / "plain", plain)
    assert [plain.losses()[step] for step in (1, 2)] == [log.losses()[step] for step in (1, 2)]
    assert not any(name.startswith("train/selected") for _, line in plain.lines for name in line)


@pytest.mark.parametrize("kind", ["high", "random"])
def test_a_resumed_training_selects_as_an_undisturbed_one(tmp_path, kind):
    optim = {"selection": kind, "selection_share": 0.5, "selection_warmup": 1, "accumulation": 2}
    config = run_config(2, "bf16", optim, steps=6, checkpoint_every=3)
    config.logger.log_every = 2
    whole, rest = Recorder(), Recorder()
    _, undisturbed = run_train(config, tmp_path / "whole", whole)
    with pytest.raises(CrashError):
        run_train(config, tmp_path / "first", Recorder(react=crash_at(4)))
    checkpoint = find_checkpoint(tmp_path / "first")
    assert checkpoint.name == "step_00000003"
    _, resumed = run_train(config, tmp_path / "rest", rest, checkpoint)
    assert same(contents(undisturbed.checkpoint), contents(resumed.checkpoint))

    def told(log):
        names = ("train/loss", "train/selected_loss", "train/selected_share")
        return [[line[name] for name in names] for step, line in log.lines if step > 3 and names[0] in line]

    assert told(rest) == told(whole)[-len(told(rest)) :]
    assert len(told(rest)) == 2


def test_a_step_that_is_taken_again_selects_the_same_tokens():
    config = config_of(
        stage_config("2"), {"selection": "random", "selection_share": 0.5, "accumulation": 2, "lr": 1e-30}
    )
    steps = [training_step(config, build_model(config.stage, config.model, VOCAB)) for _ in range(2)]
    losses = [step.take(3, [batch(0), batch(1)]).selected for step in steps]
    assert losses[0] == losses[1]
    assert steps[0].take(4, [batch(0), batch(1)]).selected != losses[0]


def test_a_loss_that_is_not_finite_is_noticed(tmp_path, monkeypatch):
    def spoil(model):
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    prepare_model(monkeypatch, spoil)
    with pytest.raises(RuntimeError, match="the loss is not finite in step 1"):
        run_train(run_config(1, optim={"selection": "high"}), tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"selection_share": 0.0}, r"optim\.selection_share=0\.0 .* greater than 0 and at most 1"),
        ({"selection_share": 1.1}, r"optim\.selection_share=1\.1 .* greater than 0 and at most 1"),
        ({"selection_guard": 2.0}, r"optim\.selection_guard=2\.0 .* between 0 and 1"),
        ({"selection_warmup": -1}, r"optim\.selection_warmup=-1 .* at least 0"),
        ({"selection": "low"}, r"optim\.selection=low .* none, high, reducible, entropy, random"),
    ],
)
def test_values_that_are_not_allowed_are_one_sentence(changes, told):
    with pytest.raises(ConfigError, match=told):
        OptimConfig(**changes)


@pytest.mark.parametrize(
    ("kind", "reference"), [("reducible", None), ("none", "outputs/run"), ("high", "outputs/run")]
)
def test_a_reference_goes_with_the_reducible_loss_alone(kind, reference):
    with pytest.raises(
        ConfigError, match=f"optim.selection={kind} and train.reference={reference or 'null'}"
    ):
        run_config(optim={"selection": kind}, reference=reference)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("reference"), "1")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """train.py with a reference; its status and what it said."""
    write_text(tmp_path, lines=300)
    monkeypatch.chdir(tmp_path)

    def start(place, *given):
        status = run_here(
            "train.py",
            [*run_options(tmp_path, "out"), "optim.selection=reducible", f"train.reference={place}",
             "train.steps=2", "train.sample_tokens=0", *given, *WITHOUT_LOG],
        )  # fmt: skip
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return start


def test_a_reference_is_of_the_tokens_of_the_run_and_is_not_saved_with_it(trained, command, tmp_path):
    status, told = command(trained[0], "stage=2")
    assert status == 1, told
    assert "has another tokenizer than this run" in told
    assert "Traceback" not in told
    # The text that the tokenizer was made from.
    text = f"data.path={trained[1].data.path}"
    status, told = command(trained[0], "stage=2", text, "tokenizer.vocab_size=300")
    assert status == 0, told
    (result,) = (tmp_path / "out").rglob("result.json")
    own = {f"model.{name}" for name in load(result.parent).model.state_dict()}
    assert set(stored(find_checkpoint(result.parent), "model")) == own
    status, told = command(trained[0], text, "tokenizer.vocab_size=300", "model.seq_len=17")
    assert status == 1, told
    assert "was trained on windows of 16 tokens, fewer than model.seq_len=17" in told


@pytest.mark.parametrize("place", ["nowhere", "weights.pt"])
def test_a_reference_that_is_no_run_is_one_sentence(command, tmp_path, place):
    (tmp_path / "weights.pt").write_bytes(b"x")
    status, told = command(place)
    assert status == 1
    assert told.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in told
