"""Read-outs of many sentences about one picture, for a language model that does not learn.

Image before text and causal attention: the image's keys and values are the same for every
sentence about it. They are computed once, and each sentence costs its own tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from system2.latents import NEEDS_VISION, read_out
from system2.prefix import Prefix, compute_prefix, embed, states_after
from system2.prompt import Layout, Prompt
from system2.train import System2Learner


@torch.no_grad()
def encode_states(
    learner: System2Learner, images: Sequence[Image.Image] | Tensor, texts: Sequence[Sequence[str]]
) -> tuple[Tensor, Tensor]:
    """Return raw read-outs and which of their rows are filled.

    Args:
        learner: with the `<ACT>` to read at.
        images: B pictures, or their projected tokens (B, n_image, hidden); not looked at by a
            read-out without vision.
        texts: for each picture P instructions.

    Returns:
        states (B, P, n_tokens, hidden) float32 and (B, P, n_tokens) bool.
    """
    config, each = learner.head.config, len(texts[0])
    flat = [text for row in texts for text in row]
    if not config.vision or config.kind in NEEDS_VISION or config.kind == "act_mid":
        pictures: Sequence[Image.Image] | Tensor = images
        if config.vision:
            tokens = images if isinstance(images, Tensor) else learner.image_tokens(images)
            pictures = tokens.repeat_interleave(each, 0)
        sample = learner(pictures, flat)
        return sample.state.unflatten(0, (-1, each)), sample.filled.unflatten(0, (-1, each))
    prompts = [learner.prompts(text) for text in flat]
    prefix = image_prefix(learner, images, prompts[::each])
    tail = sentence_tail(learner, prompts)
    repeated = prefix.rows(torch.arange(len(texts)).repeat_interleave(each))
    states = states_after(learner.model.language_model, repeated, tail).float()
    raw, marks = [], []
    for row, prompt in enumerate(prompts):
        layout = shifted(prompt.layout)
        state, mark = read_out(config, states[row, : layout.length], layout, learner.head.pool)
        raw.append(state)
        marks.append(mark)
    return torch.stack(raw).unflatten(0, (-1, each)), torch.stack(marks).unflatten(0, (-1, each))


def image_prefix(
    learner: System2Learner, images: Sequence[Image.Image] | Tensor, prompts: Sequence[Prompt]
) -> Prefix:
    """Return keys and values of the prompts' words before the image and of the image (B)."""
    features = images if isinstance(images, Tensor) else learner.image_tokens(images)
    model = learner.model
    embeddings, _ = embed(model, prompts, learner.checkpoint.image_token_id, features)
    stop = prompts[0].layout.image[1]
    lengths = torch.full((len(prompts),), stop, device=embeddings.device)
    return compute_prefix(model.language_model, embeddings[:, :stop], lengths)


def sentence_tail(learner: System2Learner, prompts: Sequence[Prompt]) -> Tensor:
    """Return the embeddings (B, T, hidden) of what follows the image, padded on the right."""
    table = learner.model.get_input_embeddings()
    act = learner.head.act.to(table.weight)
    longest = max(p.layout.length - p.layout.image[1] for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        rest = prompt.ids[prompt.image_at + 1 :]
        ids[row, : len(rest)] = torch.tensor(rest)
    tail = table(ids.to(table.weight.device))
    for row, prompt in enumerate(prompts):
        start, stop = shifted(prompt.layout).act
        tail[row, start:stop] = act
    return tail


def shifted(layout: Layout) -> Layout:
    """Return the layout of what follows the image, counted from there."""
    by = layout.image[1]
    return replace(
        layout,
        length=layout.length - by,
        image=(0, 0),
        text=(layout.text[0] - by, layout.text[1] - by),
        act=(layout.act[0] - by, layout.act[1] - by),
    )
