import numpy as np
import pytest

from muse.config import TokenizerConfig
from muse.data import Corpus, build_tokenizer, tokenizer_of
from muse.generation import TextStream

TEXT = "the cat sat on a mat — naïve, 你好 😀\nand then it was gone\n\nagain so we went home\n"
CORPUS = Corpus([TEXT], [TEXT], [TEXT])


@pytest.fixture(params=["bpe", "word"])
def tokenizer(request, tmp_path):
    return build_tokenizer(TokenizerConfig(name=request.param, vocab_size=270), CORPUS, tmp_path)


def pieces(stream, tokens):
    return [*(stream.push(token) for token in tokens), stream.end()]


def test_pieces_are_the_text_and_no_part_of_a_character(tokenizer):
    tokens = tokenizer.encode(TEXT)
    found, text = "", tokenizer.decode(tokens)
    stream = TextStream(tokenizer)
    for token in tokens:
        found += stream.push(token)
        assert text.startswith(found)
    assert found + stream.end() == text


def test_pieces_of_any_tokens_are_what_all_of_them_say(tmp_path):
    """Also where their bytes are no text."""
    tokenizer = build_tokenizer(TokenizerConfig(name="bpe", vocab_size=270), CORPUS, tmp_path)
    generator = np.random.default_rng(0)
    for _ in range(50):
        tokens = generator.integers(tokenizer.vocab_size, size=40).tolist()
        assert "".join(pieces(TextStream(tokenizer), tokens)) == tokenizer.decode(tokens)


@pytest.mark.parametrize("stop", ["gone", "it was g", "\n", "home\n", "nowhere", "tt"])
def test_a_stop_ends_the_text_and_is_not_in_it(tokenizer, stop):
    tokens = tokenizer.encode(TEXT)
    text = tokenizer.decode(tokens)
    stream = TextStream(tokenizer, ["never seen", stop, ""])
    found = ""
    for token in tokens:
        found += stream.push(token)
        assert text.startswith(found)
        assert stop not in found
    found += stream.end()
    assert stream.stopped is (stop in text)
    assert found == text.partition(stop)[0]


def test_what_may_become_a_stop_waits(tokenizer):
    stream = TextStream(tokenizer, ["cat sings"])
    shown = [stream.push(token) for token in tokenizer.encode("the cat sat")]
    assert "".join(shown) + stream.end() == "the cat sat"
    stream = TextStream(tokenizer, ["cat sings"])
    assert "cat" not in "".join(stream.push(token) for token in tokenizer.encode("the cat"))


def test_a_tokenizer_is_read_again_as_it_was(tokenizer):
    again = tokenizer_of(tokenizer.to_json())
    assert (again.end, again.cuts_runs, again.digest) == (
        tokenizer.end, tokenizer.cuts_runs, tokenizer.digest,
    )  # fmt: skip
    assert again.encode(TEXT + " <|endoftext|>") == tokenizer.encode(TEXT + " <|endoftext|>")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_refused(text):
    with pytest.raises(ValueError, match="no tokenizer"):
        tokenizer_of(text)
