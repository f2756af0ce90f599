import dataclasses

import pytest
import torch
from support.commands import default_stage

from muse.benchmarks import perplexity
from muse.benchmarks.perplexity import measure_perplexity
from muse.benchmarks.results import Results
from muse.config import DataConfig, TokenizerConfig
from muse.errors import ConfigError


@pytest.mark.parametrize("gap", [" ", ""])
def test_text_without_white_space_has_no_perplexity_per_word(bench_config, tmp_path, gap):
    (tmp_path / "text.txt").write_text(f"ACGT{gap}" * 2000)
    config = dataclasses.replace(
        bench_config(1, name="perplexity", train_steps=0),
        data=DataConfig(name="text", path=str(tmp_path / "text.txt"), cache=str(tmp_path / "cache")),
        tokenizer=TokenizerConfig(name="bpe", vocab_size=257),
    )
    measured = measure_perplexity(config, torch.device("cpu"))
    assert measured["bits_per_byte"] > 0
    if gap:
        assert measured["word_ppl"] > 1
        assert "word_ppl_reason" not in measured
    else:
        assert measured["word_ppl"] is None
        assert measured["word_ppl_reason"] == "words of 200 bytes on average are none"


def test_another_text_has_the_perplexity_that_it_has_as_the_text(bench_config, tmp_path):
    """A model, untrained and of the same tokenizer, on a file; and on the same file as validation split."""
    words = "the cat sat on a mat and the dog ran to it . " * 200
    (tmp_path / "text").mkdir()
    for split, text in (("train", words), ("valid", words[400:2400]), ("test", words[:1000])):
        (tmp_path / "text" / f"{split}.txt").write_text(text)
    config = dataclasses.replace(
        bench_config(2, name="perplexity", train_steps=0, ptb=str(tmp_path / "text" / "valid.txt")),
        data=DataConfig(name="text", path=str(tmp_path / "text"), cache=str(tmp_path / "cache")),
        tokenizer=TokenizerConfig(name="bpe", vocab_size=260),
    )
    measured = measure_perplexity(config, torch.device("cpu"))
    assert measured["corpora"] == {"ptb": measured["ppl"]}


def test_wikitext2_as_the_text_is_one_of_the_other_texts_by_its_test_split(bench_config, tmp_path):
    words = "the cat sat on a mat and the dog ran to it . " * 200
    for split, text in (("train", words), ("valid", words[400:2400]), ("test", words[:1000])):
        (tmp_path / f"{split}.txt").write_text(text)
    data = DataConfig(name="wikitext2", path=str(tmp_path), cache=str(tmp_path / "cache"))

    def corpora(**given):
        config = dataclasses.replace(
            bench_config(3, name="perplexity", train_steps=0, **given),
            data=data,
            tokenizer=TokenizerConfig(name="bpe", vocab_size=260),
        )
        return measure_perplexity(config, torch.device("cpu"))["corpora"]

    found = corpora()
    assert list(found) == ["wikitext2"]
    assert found == corpora(wikitext2=str(tmp_path / "test.txt"))
    assert found != corpora(wikitext2=str(tmp_path / "valid.txt"))


@pytest.mark.parametrize("number", [2, 3])
def test_other_texts_are_held_against_the_stage_before(bench_config, tmp_path, number):
    """By the perplexities on each; what is missing is None with a reason, and what is lost never passes."""
    (tmp_path / "text.txt").write_text("a")
    given = {"ptb": str(tmp_path / "text.txt"), "c4": str(tmp_path / "text.txt")}
    config = bench_config(number, name="perplexity", **given)

    def answer(measurement, config):
        factor = 1.1 if config.stage.number == str(number) else 1.0
        corpora = {"ptb": factor * 50, "c4": 60 / factor}
        return {"ppl": 40.0, "trained": "", "parameters": 100, "corpora": corpora}

    perplexity.check(config)
    results = Results(tmp_path, answer, default_stage)
    perplexity.judge(config, results)
    values = results.values
    before = number - 1
    assert (values["ptb_ppl"], values[f"phase{before}_ptb_ppl"]) == (pytest.approx(55), 50)
    assert (values["ptb_ppl_pass"], values["c4_ppl_pass"]) == (False, True)
    assert values["c4_ppl_ratio"] == pytest.approx(1 / 1.1)
    if number == 3:
        assert values["wikitext2_ppl"] is None
        assert values["wikitext2_ppl_pass"] is None
        assert "benchmark.wikitext2=FILE" in results.unjudged["wikitext2_ppl_pass"]
    else:
        assert "wikitext2_ppl" not in values
    assert len([title for title, *_ in results.criteria if title.endswith((", ptb", ", c4"))]) == 2


def test_a_text_that_is_not_there_is_told_first(bench_config):
    with pytest.raises(ConfigError, match=r"benchmark\.c4=gone\.txt is not there"):
        perplexity.check(bench_config(3, name="perplexity", c4="gone.txt"))
