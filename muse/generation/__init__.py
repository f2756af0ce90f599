"""Text that a model goes on with: which token comes next, and how tokens become text as they come."""

from muse.generation.continuation import continuation
from muse.generation.decoder import Decoder
from muse.generation.entropy_exit import EntropyExit
from muse.generation.sampling import GREEDY, Sampling, next_token
from muse.generation.text_stream import TextStream

__all__ = ["GREEDY", "Decoder", "EntropyExit", "Sampling", "TextStream", "continuation", "next_token"]
