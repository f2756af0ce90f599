import dataclasses

import pytest
import torch

from muse.benchmarks.perplexity import measure_perplexity
from muse.config import DataConfig, TokenizerConfig


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
