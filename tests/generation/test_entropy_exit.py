from __future__ import annotations

import math

import pytest
import torch
from support.configs import SEQ_LEN, VOCAB, small_sizes, stage_config
from support.trained import make_trained

import muse
from muse.errors import ConfigError
from muse.exits import measure_exits
from muse.generation import GREEDY, Decoder, EntropyExit, continuation
from muse.generation.entropy_exit import entropy
from muse.models import build_model
from muse.training.evaluate import evaluate

MODELS = [
    {"number": "0"},
    {"number": "1", "loops": 2},
    {"number": "2"},
    {"number": "3", "koopman": "add", "mera": "add", "attention_window": 3},
    {"number": "3", "dialectic": "mlp", "dialectic_candidates": 5},
]
TEXT = [(7 * n * n + n) % VOCAB for n in range(SEQ_LEN)]
NEVER = 1e-9


@pytest.fixture(params=MODELS, ids=str)
def model(request):
    built = build_model(stage_config(**request.param), small_sizes(layers=4), VOCAB, seed=3)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(1.7)
    return built.double().eval()


def read(model, exits, tokens=TEXT, prompt=1):
    decoder = Decoder(model, SEQ_LEN, exits)
    first = decoder.read(tokens[:prompt])
    return torch.stack([first, *(decoder.read([token]) for token in tokens[prompt:])])


@torch.no_grad()
def of_definition(model, threshold, after):
    """Logits and blocks passed, where every cache takes in each token at once."""
    blocks = model.loops * list(model.blocks)
    caches, found, passed, met = model.new_caches(SEQ_LEN), [], [], []
    for position, token in enumerate(TEXT):
        state = embedded = model.embedding(torch.tensor([[token]]), position)
        logits = None
        for number, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
            if logits is not None:
                sublayer = block.sublayers(cache)[0]
                sublayer.map(sublayer.norm(state), cache)
                continue
            if number and number % len(model.blocks) == 0:
                state = state + embedded
            state = block(state, cache)
            if number + 1 >= after:
                read_out = model.logits_of(state)[0, 0]
                shares = read_out.softmax(-1)
                met.append(-(shares * shares.log()).sum().item())
                if met[-1] < threshold or number + 1 == len(blocks):
                    logits = read_out
                    passed.append(number + 1)
        found.append(logits.float())
    return torch.stack(found), passed, met


@pytest.mark.parametrize("after", [1, 2])
def test_logits_are_those_of_the_definition(model, after):
    """What is put off is the same, whatever part of the tokens leaves and where."""
    *_, met = of_definition(model, 0.0, after)
    seen = set()
    for share in (0.1, 0.3, 0.5, 0.8):
        threshold = torch.tensor(met).quantile(share).item()
        wanted, passed, _ = of_definition(model, threshold, after)
        exits = EntropyExit(threshold, after)
        torch.testing.assert_close(read(model, exits), wanted, rtol=1e-5, atol=1e-5)
        assert exits.passed == passed
        assert exits.mean_passed == pytest.approx(sum(passed) / len(TEXT))
        seen |= set(passed)
    assert len(seen) > 2


def test_a_token_that_never_leaves_has_the_same_bits(model):
    exits = EntropyExit(NEVER)
    assert torch.equal(read(model, exits), read(model, None))
    assert set(exits.passed) == {model.loops * 4}


def test_what_is_read_at_once_passes_all_blocks_and_finds_those_that_left(model):
    exits = EntropyExit(math.inf)
    found = read(model, exits, prompt=3)
    assert torch.equal(found[0], read(model, None, prompt=3)[0])
    assert exits.passed == [1] * (SEQ_LEN - 3)
    # After tokens that have left, several again.
    decoder, one_by_one = (Decoder(model, SEQ_LEN, EntropyExit(math.inf, 2)) for _ in range(2))
    for own in (decoder, one_by_one):
        own.read(TEXT[:2])
        own.read(TEXT[2:3])
    one_by_one._exits = EntropyExit(NEVER)
    last = decoder.read(TEXT[3:6])
    for token in TEXT[3:6]:
        wanted = one_by_one.read([token])
    torch.testing.assert_close(last, wanted, rtol=1e-5, atol=1e-5)


def test_blocks_that_are_left_out_are_not_computed(model):
    calls = [0] * 4
    for number, block in enumerate(model.blocks):
        last = block.sublayers()[-1].map

        def count(*_, number=number):
            calls[number] += 1

        last.register_forward_pre_hook(count)
    exits = EntropyExit(math.inf, after=2)
    read(model, exits, prompt=2)
    tokens = SEQ_LEN - 2
    assert calls == [model.loops + tokens, model.loops + tokens, model.loops, model.loops]


def test_texts_go_on_where_the_window_slides(model):
    plain, never = (
        list(continuation(model, TEXT[:3], 3 * SEQ_LEN, SEQ_LEN, GREEDY, exits=exits))
        for exits in (None, EntropyExit(NEVER))
    )
    assert plain == never
    exits = EntropyExit(math.inf)
    assert len(list(continuation(model, TEXT[:3], 3 * SEQ_LEN, SEQ_LEN, GREEDY, exits=exits))) == 3 * SEQ_LEN


def test_entropy_is_between_that_of_one_token_and_of_all():
    logits = torch.tensor([[0.0, 0, 0, 0], [1e4, 0, 0, 0], [0, 0, -1e4, -1e4]])
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(4), 0, math.log(2)]))


@pytest.mark.parametrize(
    ("number", "options"), [("3a", {}), ("1", {"mixer": "none"}), ("2", {"trunk": "reversible"})]
)
def test_models_whose_blocks_cannot_be_left_out_are_refused(number, options):
    built = build_model(stage_config(number, **options), small_sizes(kv_heads=2), VOCAB)
    with pytest.raises(ConfigError, match="needs blocks that add to the state that the head reads"):
        Decoder(built, SEQ_LEN, EntropyExit(1.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"), "2")[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--entropy-exit", 0], "--entropy-exit 0 is not allowed; it must be above 0 nats"),
        (["--entropy-exit", "nan"], "--entropy-exit nan is not allowed"),
        (["--entropy-exit", 1, "--exit-after", 0], "--exit-after 0 is too small"),
        (["--entropy-exit", 1, "--exit-after", 2], "--exit-after 2 leaves out none of the 2 blocks"),
        (["--exit-after", 1], "--exit-after is of --entropy-exit"),
        (["--entropy-exit", 1, "--trajectory", "a.png"], "--trajectory draws all flows of a token"),
    ],
)
def test_bad_options_are_one_sentence(run, told_by, options, told):
    status, out, err = told_by("muse.generate", run, "--prompt", "Line", *options)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert told in err


def test_the_command_tells_how_many_blocks_a_token_passed(run, told_by):
    arguments = ["muse.generate", run, "--prompt", "Line 7", "--tokens", 9, "--greedy"]
    *_, err = told_by(*arguments)
    assert "blocks" not in err
    # The first token comes of the prompt.
    status, _, err = told_by(*arguments, "--entropy-exit", "inf")
    assert (status, err.strip().endswith("1.00 of 2 blocks a token")) == (0, True), err
    text = "".join(muse.generate_text(muse.load(run), "Line 7", 9, GREEDY, exits=EntropyExit(NEVER)))
    assert told_by(*arguments, "--entropy-exit", NEVER)[1] == text + "\n" == told_by(*arguments)[1]


def test_perplexities_are_those_of_the_very_decoding(run, told_by):
    trained = muse.load(run)
    tokens = torch.randint(trained.model.embedding.weight.shape[0], (40,)).numpy()
    ways = [EntropyExit(NEVER), EntropyExit(math.inf)]
    whole, never, always = measure_exits(trained, tokens, ways, limit=0)
    plain = evaluate(trained.model, tokens, None, trained.config.model.seq_len, 4)
    assert whole.ppl == never.ppl == pytest.approx(plain.ppl, rel=1e-3)
    assert always.ppl != whole.ppl
    assert (whole.blocks, never.blocks, always.blocks) == (2, 2, 1)
    assert len(ways[1].passed) == plain.tokens == 39
    status, out, err = told_by("muse.exits", run, "--thresholds", 1, 2, "--tokens", 20)
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["threshold", "-" * 16, "none", "1", "2"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tokens", 0], "--tokens 0 is too small"),
        (["--thresholds", 1, -1], "--entropy-exit -1 is not allowed"),
        (["--exit-after", 3], "--exit-after 3 leaves out none of the 2 blocks"),
    ],
)
def test_bad_measurements_are_one_sentence(run, told_by, options, told):
    status, out, err = told_by("muse.exits", run, *options)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert told in err
