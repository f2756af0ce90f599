import io
import itertools

import pytest
import torch
from support.commands import run_here
from support.trained import make_trained

import muse
from muse.generation import GREEDY, Sampling

PROMPT = "Line 7 says"


@pytest.fixture(scope="module", params=["0", "1", "2", "3", "3a"])
def any_stage(request, tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"), request.param)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"))[0]


@pytest.fixture
def command(capsys, monkeypatch):
    """Status, standard output and standard error of the command."""

    def generate(*arguments, stdin=io.StringIO):
        monkeypatch.setattr("sys.stdin", stdin())
        status = run_here("muse.generate", list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return generate


def test_a_text_goes_on_as_the_library_says(any_stage, command):
    status, out, err = command(any_stage, "--prompt", PROMPT, "--tokens", 40, "--seed", 3)
    assert status == 0, err
    trained = muse.load(any_stage)
    pieces = list(muse.generate_text(trained, PROMPT, 40, seed=3))
    assert len(pieces) == 40
    assert out == "".join(pieces) + "\n"
    assert "40 tokens in" in err
    assert "tokens/s" in err
    assert f"sees {trained.config.model.seq_len} tokens" in err


def test_greedy_text_is_that_of_the_likeliest_tokens(any_stage, command):
    trained = muse.load(any_stage)
    ids = trained.tokenizer.encode("Line")
    count = trained.config.model.seq_len - len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(trained.model(torch.tensor([ids]))[0, -1].argmax()))
    texts = {
        command(any_stage, "--prompt", "Line", "--tokens", count, *options)[1]
        for options in (["--greedy"], ["--temperature", 0], ["--top-k", 1, "--seed", 5])
    }
    assert texts == {trained.tokenizer.decode(ids[-count:]) + "\n"}


def test_several_texts_have_seeds_one_after_the_other(run, command):
    _, out, _ = command(run, "--prompt", PROMPT, "--tokens", 20, "--count", 3, "--seed", 4)
    singles = [command(run, "--prompt", PROMPT, "--tokens", 20, "--seed", seed)[1] for seed in (4, 5, 6)]
    assert out == "\n---\n".join(text[:-1] for text in singles) + "\n"
    assert len(set(singles)) == 3


def test_the_prompt_may_be_in_a_file_or_come_from_standard_input(run, command, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8-sig")
    _, wanted, _ = command(run, "--prompt", PROMPT, "--tokens", 20)
    assert command(run, "--file", tmp_path / "prompt.txt", "--tokens", 20)[1] == wanted
    assert command(run, "--file", "-", "--tokens", 20, stdin=lambda: io.StringIO(PROMPT))[1] == wanted


def test_a_stop_ends_the_text(run, command):
    _, text, _ = command(run, "--prompt", PROMPT, "--tokens", 40)
    stop = text[10:13]
    status, out, err = command(run, "--prompt", PROMPT, "--tokens", 40, "--stop", stop)
    assert status == 0
    assert out == text.partition(stop)[0] + "\n"
    assert int(err.split(" tokens in")[0].split()[-1]) < 40


def test_a_person_at_a_terminal_goes_on_line_by_line(run, command, monkeypatch):
    lines = itertools.chain([PROMPT, "", PROMPT])

    def typed(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    status, out, _ = command(run, "--tokens", 10, stdin=Terminal)
    assert status == 0
    wanted = "".join(muse.generate_text(muse.load(run), PROMPT, 10))
    assert out == 2 * (wanted + "\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", ""], "the text to go on with is empty"),
        ([], "there is no text to go on with"),
        (["--file", "nowhere.txt"], "--file nowhere.txt cannot be read"),
        (["--prompt", "a", "--seed", "red"], "argument --seed: invalid int value: 'red'"),
        (["--prompt", "a", "--seed", "-1"], "--seed -1 is too small"),
        (["--prompt", "a", "--tokens", "0"], "--tokens 0 is too small"),
        (["--prompt", "a", "--top-p", "2"], "top_p=2 is not allowed"),
        (["--prompt", "a", "--file", "b"], "not allowed with argument"),
        (["--prompt", "a", "--tokns", "3"], "unrecognized arguments: --tokns 3"),
    ],
)
def test_bad_arguments_are_one_sentence(run, command, arguments, told):
    status, out, err = command(run, *arguments)
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1


def test_a_model_that_gives_no_numbers_is_one_sentence(run, monkeypatch):
    trained = muse.load(run)
    with torch.no_grad():
        trained.model.embedding.weight[5] = torch.nan
    with pytest.raises(RuntimeError, match="logits are not finite"):
        list(muse.generate_text(trained, PROMPT, 5, GREEDY))


def test_words_need_one(run):
    with pytest.raises(ValueError, match="no token in it"):
        list(muse.generate_text(muse.load(run), "", 5, Sampling()))
