"""A trained model with its tokenizer and its options, from the folder of a run or an exported file."""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open

from muse.config import RunConfig
from muse.data import Tokenizer, load_tokens, tokenizer_of
from muse.errors import ConfigError, RunError
from muse.models import LanguageModel, build_model
from muse.runs.checkpoints import find_weights, load_weights, stored_vocabulary
from muse.runs.folder import TOKENIZER_FILE, run_of
from muse.runs.options import stored_options

# What torch.save writes, and others: reading one runs what is in it.
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
# Ending of an exported file.
EXPORTED = ".safetensors"
# Key of the tokenizer among the metadata of an exported file.
TOKENIZER = "tokenizer"


class Trained(NamedTuple):
    """What ``load`` returns.

    Attributes:
        model: with its trained weights, in evaluation mode.
        tokenizer: text to tokens and back, as the model was trained; None of an older version's run or file,
            which holds none, where the text that it was made from is gone.
        config: what the model was trained with.
    """

    model: LanguageModel
    tokenizer: Tokenizer | None
    config: RunConfig


def load(place: str | Path, which: str = "best", device: str | torch.device = "cpu") -> Trained:
    """Load a trained model.

    Args:
        place: folder of a run of train.py, one of its checkpoints, or a file of ``muse.export``.
        which: checkpoint of a run, ``best`` or ``last``; a run without a best one has a last one.
        device: of the model.

    Raises:
        ConfigError: ``place`` is no such thing.
        RunError: it is damaged, or its tokenizer is another model's.
    """
    place = Path(place)
    config = trained_options(place)
    weights = find_weights(place, which)
    if weights is None:
        raise ConfigError(f"{place} has no checkpoint yet; give the folder of a run that has saved one")
    size = stored_vocabulary(weights)
    if size is None:
        raise RunError(f"the weights of {weights} cannot be read, they are damaged")
    model = build_model(config.stage, config.model, size, config.seed)
    load_weights(weights, model)
    return Trained(model.to(device).eval(), tokenizer_for(place, config, size), config)


def trained_options(place: Path) -> RunConfig:
    """What a model was trained with.

    Raises:
        ConfigError: ``place`` does not say it, or says what this version does not know.
        RunError: likewise of an exported file.
    """
    if place.suffix in PICKLES:
        raise ConfigError(
            f"{place} is a pickle, which is never loaded; give the folder of a run or *{EXPORTED}"
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), stored_options(place))
        config = OmegaConf.to_object(merged)
    except (ValueError, OmegaConfBaseException) as error:
        reason = str(error).partition("\n")[0]
        if place.suffix == EXPORTED:
            raise RunError(f"{place} is no model that MUSE exported, or it is damaged: {reason}") from error
        raise ConfigError(
            f"{place} is no run of train.py, or of a version with other options: {reason}"
        ) from error
    assert isinstance(config, RunConfig)
    return config


def tokenizer_for(place: Path, config: RunConfig, size: int) -> Tokenizer | None:
    """The tokenizer that a run or an exported file holds, else made again; None, with a warning, if neither.

    Args:
        place: of the model.
        config: what it was trained with.
        size: entries of its vocabulary.

    Raises:
        RunError: it is damaged, or another model's.
    """
    found = _stored(place)
    if found is not None:
        if found.vocab_size != size:
            raise RunError(
                f"the tokenizer of {place} has {found.vocab_size:,} entries, and its model {size:,}: it is "
                "another model's"
            )
        return found
    try:
        made = load_tokens(config.data, config.tokenizer, config.model.vocab_size).tokenizer
        if made is not None and made.vocab_size == size:
            return made
        reason = "its text has changed since"
    except ConfigError as error:
        reason = str(error)
    warnings.warn(f"{place} holds no tokenizer, and it cannot be made again: {reason}", stacklevel=2)
    return None


def _stored(place: Path) -> Tokenizer | None:
    try:
        if place.suffix == EXPORTED:
            with safe_open(place, "pt") as opened:
                text = (opened.metadata() or {}).get(TOKENIZER)
        else:
            file = run_of(place) / TOKENIZER_FILE
            text = file.read_text(encoding="utf-8") if file.exists() else None
        return None if text is None else tokenizer_of(text)
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"the tokenizer of {place} cannot be read, it is damaged: {error}") from error
