import errno
import io
import itertools

import pytest
import torch
from matplotlib.figure import Figure
from support.trained import make_trained

import muse
from muse.dynamics import flows_of
from muse.dynamics.energy import energy
from muse.generation import GREEDY, Sampling

PROMPT = "Line 7 says"


@pytest.fixture(scope="module", params=["0", "1", "2", "3", "3a"])
def any_stage(request, tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"), request.param)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("trained"))[0]


@pytest.fixture
def command(told_by, monkeypatch):
    def generate(*arguments, stdin=io.StringIO):
        monkeypatch.setattr("sys.stdin", stdin())
        return told_by("muse.generate", *arguments)

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


@pytest.fixture(scope="module", params=[{}, {"ode_steps": 2, "loops": 2}, {"trunk": "reversible"}], ids=str)
def flowing(request, tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("flowing"), "2", **request.param)[0]


def test_a_picture_of_the_energies_changes_no_text(flowing, command, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("muse.report.trajectory_plot.plot_trajectories", lambda *given: drawn.append(given))
    arguments = [flowing, "--prompt", PROMPT, "--tokens", 40, "--seed", 3]
    _, wanted, _ = command(*arguments)
    status, out, err = command(*arguments, "--trajectory", tmp_path / "new" / "energy.png")
    assert (status, out) == (0, wanted), err
    ((path, energies, halves, dt, limit, _),) = drawn
    assert path == tmp_path / "new" / "energy.png"
    stage = muse.load(flowing).config.stage
    assert (dt, list(halves), limit[1]) == (stage.dt, ["kick", "drift", "kick"], 5e-5)
    assert len(energies) == 2 * 2 * stage.loops
    for kept in energies.values():
        # A state for each token that was drawn, although the window slides.
        assert kept.shape == (1 + 3 * stage.ode_steps, 40)
        assert (abs(kept - kept[0]) > 0)[1:].any(1).all()
    assert len({kept.tobytes() for kept in energies.values()}) == len(energies)


def test_the_energies_are_those_of_a_full_pass(flowing, command, tmp_path, monkeypatch):
    """The first generated token is drawn from the last state of the prompt."""
    drawn = []
    monkeypatch.setattr("muse.report.trajectory_plot.plot_trajectories", lambda *given: drawn.append(given))
    command(flowing, "--prompt", "Line 7", "--tokens", 3, "--greedy", "--trajectory", tmp_path / "energy.png")
    trained = muse.load(flowing)
    ids = trained.tokenizer.encode("Line 7")
    assert 1 < len(ids) < trained.config.model.seq_len
    flow, starts = flows_of(trained.model)[-1], []
    flow.watch = lambda q, p: starts.append((q, p))
    with torch.no_grad():
        ids += [int(trained.model(torch.tensor([ids]))[0, -1].argmax())]
        starts.clear()
        trained.model(torch.tensor([ids]))
    q, p = (x[0, -2:] for x in starts[-1])
    wanted = energy(flow.potential, q, p, flow.potential.context(q, p))
    *_, last = drawn[0][1].values()
    # Keys and values of a cache are rounded in other places.
    torch.testing.assert_close(torch.from_numpy(last[0, :2]), wanted, rtol=0.02, atol=0.02)


def test_an_old_picture_is_replaced_only_whole(flowing, command, tmp_path, monkeypatch):
    picture = tmp_path / "energy.png"
    picture.write_bytes(b"old")
    arguments = [flowing, "--prompt", PROMPT, "--tokens", 5, "--trajectory", picture]

    def full(figure, file, **options):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", full)
        status, out, err = command(*arguments)
    assert (status, picture.read_bytes(), list(tmp_path.iterdir())) == (1, b"old", [picture])
    assert out
    assert f"error: --trajectory {picture} cannot be written: No space left on device\n" in err
    assert command(*arguments)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trajectory", "energy.jpg"], "energy.jpg is not a name for a picture"),
        (["--trajectory", "energy.png", "--count", "2"], "--trajectory draws one text"),
        (["--trajectory", "file/energy.png"], "--trajectory file/energy.png cannot be written"),
        (["--trajectory", "folder.png"], "--trajectory folder.png cannot be written: it is a folder"),
    ],
)
def test_a_picture_that_cannot_be_is_told_before_there_is_text(
    flowing, command, tmp_path, monkeypatch, options, told
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder.png").mkdir()
    status, out, err = command(flowing, "--prompt", PROMPT, *options)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert told in err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_stage_without_flows_has_no_picture(run, command, tmp_path):
    status, out, err = command(run, "--prompt", PROMPT, "--trajectory", tmp_path / "energy.png")
    assert (status, out) == (1, "")
    assert err.startswith(
        "error: --trajectory draws the energy along Hamiltonian flows, and stage=1 has none"
    )
    assert list(tmp_path.iterdir()) == []
