"""The sentences a policy is conditioned on: read, encoded once, cached.

A list is a JSON file {task: [sentence, ...]} that names every task of the data; without one it
is the list that demonstrations are labelled with. The language model's encoding is cached
under a name that depends on every sentence, layer and model. Held-out frames use a separate list
if one is named, otherwise a fifth of the sentences, which are then not trained on.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openhelix.benchmarks.calvin.phrases import PhraseError, Phrases, load, training
from openhelix.benchmarks.training.config import PolicyStage, TrainingConfig
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.paths import cache_folder
from openhelix.system1.data import read_index
from openhelix.system1.sentences import Sentences
from openhelix.system2.model import sha256_file
from openhelix.system2.text import FILE, TextCode, TextError, TextReader, fitted_code, text_id

log = logging.getLogger(__name__)
HELD_OUT = 5  # one sentence in so many


@dataclass(frozen=True, slots=True)
class Told:
    """What a policy's training needs to know: files, ready."""

    sentences: Path
    held: Path
    code: Path


def sentences_of(section: PolicyStage) -> tuple[Phrases, Phrases]:
    """Return the sentences to train on and those that held-out frames are told.

    Raises:
        ConfigError: in one line, which list cannot be used.
    """
    try:
        said = training() if section.sentences is None else load(section.sentences.expanduser())
        if section.held_sentences is not None:
            return said, load(section.held_sentences.expanduser())
    except PhraseError as error:
        raise ConfigError(f"policy.sentences: {error}") from None
    few = [task for task, texts in said.items() if len(texts) < 2]
    if few:
        raise ConfigError(
            f"policy.sentences: one sentence for {few[0]} and none to hold out; name "
            "policy.held_sentences"
        )
    held = {t: texts[::HELD_OUT] for t, texts in said.items()}
    return {t: tuple(x for x in texts if x not in held[t]) for t, texts in said.items()}, held


def prepare_told(config: TrainingConfig) -> Told:
    """Encode the sentences, unless that was done before.

    Raises:
        ConfigError: the lists or the read-out cannot be used.
    """
    section = config.policy
    said, held = sentences_of(section)
    tasks: list[str] = read_index(config.frames_folders()[0])["tasks"]
    for name, phrases in (("policy.sentences", said), ("policy.held_sentences", held)):
        missing = [task for task in tasks if task not in phrases]
        if missing:
            raise ConfigError(f"{name}: no sentence for {missing[0]}")
    given = section.encoder_code()
    about: list[Any] = [section.text_model, section.text_layers, section.text_words]
    if given is not None:
        about.append(sha256_file(given))
    flat = [f"{task}: {text}" for task in tasks for text in said[task]]
    rest = [f"{task}: {text}" for task in tasks for text in held[task]]
    folder = cache_folder() / "text" / text_id([*flat, "held", *rest], *about, "1")
    files = Told(folder / "sentences.safetensors", folder / "held.safetensors", folder / FILE)
    if files.held.is_file():  # the last to be written
        return files
    log.info("encoding %d sentences", len(flat) + len(rest))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if given is not None:
            code = TextCode.load(given)
            reader = TextReader(section.text_model, code.layers, config.device)
            shutil.copyfile(given, files.code)
        else:
            reader = TextReader(section.text_model, section.text_layers, config.device)
            texts = [text for task in tasks for text in said[task]]
            code = fitted_code(reader, texts, section.text_words)
            code.save(files.code)
        for path, phrases in ((files.sentences, said), (files.held, held)):
            encode(reader, code, tasks, phrases).save(path)
    except TextError as error:
        raise ConfigError(f"policy.text_layers: {error}") from None
    return files


def encode(reader: TextReader, code: TextCode, tasks: list[str], phrases: Phrases) -> Sentences:
    """Return a list as a policy is told it."""
    texts = [text for task in tasks for text in phrases[task]]
    numbers = [number for number, task in enumerate(tasks) for _ in phrases[task]]
    latent = reader.encode(code, texts)
    return Sentences(latent, torch.tensor(numbers), texts, code.spec, len(tasks))
