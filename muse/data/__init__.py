"""Text, tokenizers, tokenised splits and batches."""

from muse.data.batches import (
    document_batch,
    document_targets,
    end_of_training_text,
    evaluation_batches,
    evaluation_windows,
    rolling_batches,
    training_batch,
)
from muse.data.corpus import Corpus, count_words, load_corpus
from muse.data.interleaving import Mix
from muse.data.packing import PackedText, pack
from muse.data.splits import SPLITS
from muse.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_of
from muse.data.tokens import Counts, TokenData, load_tokens, packed_text

__all__ = [
    "SPLITS",
    "Corpus",
    "Counts",
    "Mix",
    "PackedText",
    "TokenData",
    "Tokenizer",
    "build_tokenizer",
    "count_words",
    "document_batch",
    "document_targets",
    "end_of_training_text",
    "evaluation_batches",
    "evaluation_windows",
    "load_corpus",
    "load_tokens",
    "pack",
    "packed_text",
    "rolling_batches",
    "tokenizer_of",
    "training_batch",
]
