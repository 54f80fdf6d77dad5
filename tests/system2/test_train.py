"""Prompt tuning through the prefix is exact; each regime trains what it says and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from openhelix.system2.latents import LatentConfig, LatentHead
from openhelix.system2.model import load_tokenizer, open_checkpoint
from openhelix.system2.prompt import as_pil
from openhelix.system2.train import (
    ActionTarget,
    LossWeights,
    Prefix,
    RegimeError,
    System2Learner,
    action_loss,
    clip_loss,
)
from tests.system2.conftest import TEXTS


def learner(tiny_model: str, regime: Any = "prompt", **config: Any) -> System2Learner:
    checkpoint = open_checkpoint(tiny_model)
    model = LlavaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).model
    table = model.get_input_embeddings().weight[: checkpoint.act_ids[0]]
    head = LatentHead.fresh(LatentConfig(**config), table, seed=3)
    torch.manual_seed(0)
    return System2Learner(model.eval(), checkpoint, head, regime)


def target(batch: int) -> ActionTarget:
    g = torch.Generator().manual_seed(5)
    return ActionTarget(
        torch.randn(batch, 3, generator=g),
        torch.randn(batch, 6, generator=g),
        torch.randint(2, (batch,), generator=g).float(),
    )


def total(made: System2Learner, sample: Any) -> torch.Tensor:
    policy = sample.z.square().mean() * 3
    terms = made.losses(sample, target(len(TEXTS)), lambda z: z.square().mean() * 3)
    assert torch.allclose(terms["policy"], policy)
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize(
    "read_out",
    [
        {},
        {"n_act": 3},
        {"kind": "act_mid", "n_act": 2},
        {"kind": "act_words", "n_act": 2, "layers": (1, 2)},
        {"kind": "act_lang", "text_rows": 12},
        {"kind": "act_words", "vision": False},
    ],
)
def test_gradients_through_the_prefix_are_those_of_full_backpropagation(
    tiny_model: str, images, read_out: dict[str, Any]
) -> None:
    made = learner(tiny_model, **read_out)
    pictures = [as_pil(image) for image in images]
    gradients = []
    for sample in (
        made(pictures, TEXTS),
        made.from_prefix(made.prefix(pictures, TEXTS)),
    ):
        made.zero_grad()
        total(made, sample).backward()
        gradients.append(
            {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
        )
    full, cached = gradients
    assert set(full) == set(cached) >= {"head.act", "head.projector.weight", "aux.position.weight"}
    for name, value in full.items():
        assert (value - cached[name]).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("kind", ["act_last", "act_words"])
def test_prefixes_join_and_split(tiny_model: str, images, kind: str) -> None:
    made = learner(tiny_model, kind=kind)
    pictures = [as_pil(image) for image in images]
    whole = made.from_prefix(made.prefix(pictures, TEXTS)).z
    parts = Prefix.join([made.prefix([p], [t]) for p, t in zip(pictures, TEXTS, strict=True)])
    assert torch.allclose(made.from_prefix(parts).z, whole, atol=1e-5)
    picked = made.from_prefix(parts.rows(torch.tensor([1]))).z
    assert torch.allclose(picked, whole[1:2], atol=1e-5)
    halved = made.from_prefix(parts.to(torch.bfloat16)).z
    assert torch.nn.functional.cosine_similarity(halved, whole, dim=-1).min() > 0.999


def changed(made: System2Learner, images: Any) -> set[str]:
    """Which parts move in one optimiser step."""
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    trained = [p for p in made.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=1.0)
    total(made, made([as_pil(image) for image in images], TEXTS)).backward()
    optimiser.step()
    moved = {n for n, p in made.named_parameters() if not torch.equal(p, before[n])}
    groups = {
        "head.act": "act",
        "head.projector": "projector",
        "aux": "aux",
        "lora_": "lora",
        "multi_modal_projector": "vision projector",
        "vision_tower": "tower",
        "language_model": "language",
    }
    return {next(group for key, group in groups.items() if key in name) for name in moved}


@pytest.mark.parametrize(
    ("regime", "parts"),
    [
        ("frozen", {"projector", "aux"}),
        ("prompt", {"projector", "aux", "act"}),
        ("lora", {"projector", "aux", "act", "lora"}),
        ("full", {"projector", "aux", "act", "language", "vision projector"}),
        ("vocabulary", {"projector", "aux", "act", "language"}),
    ],
)
def test_a_regime_moves_its_parts_alone(
    tiny_model: str, images, regime: str, parts: set[str]
) -> None:
    assert changed(learner(tiny_model, regime), images) == parts


def test_learned_groups_cover_what_trains(tiny_model: str) -> None:
    made = learner(tiny_model, "lora")
    groups = made.learned()
    grouped = {id(p) for p in [*groups.head, *groups.act, *groups.language]}
    assert grouped == {id(p) for p in made.parameters() if p.requires_grad}


def test_no_prefix_where_it_would_be_stale(tiny_model: str, images) -> None:
    for made in (learner(tiny_model, "full"), learner(tiny_model, kind="pool_max")):
        with pytest.raises(RegimeError, match="prefix"):
            made.prefix([as_pil(images[0])], TEXTS[:1])
    with pytest.raises(RegimeError, match="regime"):
        learner(tiny_model, "half")


def test_prompt_tuning_lowers_the_loss(tiny_model: str, images) -> None:
    made = learner(tiny_model)
    prefix = made.prefix([as_pil(image) for image in images], TEXTS)
    optimiser = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = total(made, made.from_prefix(prefix))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_action_loss_is_the_papers_equation() -> None:
    wanted = target(4)
    predicted = (wanted.position + 0.5, wanted.rotation - 0.25, torch.zeros(4))
    terms = action_loss(predicted, wanted, LossWeights())
    assert terms["aux_position"].item() == pytest.approx(6 * 0.5)
    assert terms["aux_rotation"].item() == pytest.approx(2 * 0.25)
    assert terms["aux_gripper"].item() == pytest.approx(0.2 * 0.6931, abs=1e-4)


def test_clip_loss_wants_each_latent_at_its_own_text() -> None:
    text = torch.eye(4)
    labels = torch.arange(4)
    assert clip_loss(text, text, labels) < clip_loss(text.roll(1, 0), text, labels)
    # Two samples of one instruction are no negatives of each other: swapping their texts
    # changes nothing, while as different instructions it would.
    latent, text = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    swapped, same = text[[1, 0, 2, 3]], torch.tensor([0, 0, 1, 2])
    assert torch.allclose(clip_loss(latent, text, same), clip_loss(latent, swapped, same))
    assert not torch.allclose(clip_loss(latent, text, labels), clip_loss(latent, swapped, labels))


def test_the_alignment_loss_reaches_act(tiny_model: str, images) -> None:
    made = learner(tiny_model)
    sample = made([as_pil(image) for image in images], TEXTS)
    text = torch.nn.functional.pad(made.text_embedding(TEXTS), (0, 512 - 64))
    terms = made.losses(sample, text=text, labels=torch.arange(3), weights=LossWeights(clip=1.0))
    terms["clip"].backward()
    assert made.head.act.grad is not None
    assert made.head.act.grad.abs().max() > 0


def answering(tiny_model: str, regime: Any = "lora", **config: Any) -> System2Learner:
    """A learner with its vocabulary layer."""
    checkpoint = open_checkpoint(tiny_model)
    whole = LlavaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()
    table = whole.get_input_embeddings().weight[: checkpoint.act_ids[0]]
    head = LatentHead.fresh(LatentConfig(**config), table, seed=3)
    torch.manual_seed(0)
    words = whole.get_output_embeddings()
    return System2Learner(whole.model, checkpoint, head, regime, words=words)


@pytest.mark.parametrize("read_out", [{}, {"n_act": 3}, {"layers": (1, 4)}])
def test_the_answer_is_that_of_the_whole_model_behind_act(
    tiny_model: str, images, read_out: dict[str, Any]
) -> None:
    made = answering(tiny_model, **read_out)
    pictures = [as_pil(image) for image in images]
    said = ["lift it", "open", "turn on the light bulb now"]
    sample = made(pictures, TEXTS, answers=said)
    assert torch.allclose(sample.z, made(pictures, TEXTS).z, atol=1e-5)  # it attends to no answer

    whole = LlavaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float32).eval()
    act = made.checkpoint.act_ids[: made.head.config.n_act]
    tokenizer = load_tokenizer(tiny_model)
    loss, count, right = 0.0, 0, []
    with torch.no_grad():
        whole.get_input_embeddings().weight[list(act)] = made.head.act
        for image, text, answer in zip(pictures, TEXTS, said, strict=True):
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            ids = [*ids, tokenizer.eos_token_id]
            asked = made.prompts(text).expanded(made.checkpoint.image_token_id)
            pixels = made.checkpoint.image_processor()([image], return_tensors="pt")
            logits = whole(input_ids=torch.tensor([[*asked, *ids]]), **pixels).logits[0]
            wanted, before = torch.tensor(ids), logits[len(asked) - 1 : -1]
            loss += float(torch.nn.functional.cross_entropy(before, wanted, reduction="sum"))
            count += len(ids)
            right.append(float(bool((before.argmax(1) == wanted).all())))
    assert sample.answer is not None and sample.answered is not None
    assert sample.answer.item() == pytest.approx(loss / count, rel=1e-3)
    assert sample.answered.tolist() == right


@pytest.mark.parametrize("regime", ["lora", "full"])
def test_answers_are_learned_beside_the_latent(tiny_model: str, images, regime: str) -> None:
    made = answering(tiny_model, regime)
    tokens = made.image_tokens([as_pil(image) for image in images]).detach()
    said = ["lift it", "open", "turn on the light bulb"]
    optimiser = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        sample = made(tokens, TEXTS, answers=said)
        terms = made.losses(sample, weights=LossWeights(answer=0.5))
        assert sample.answer is not None
        assert torch.allclose(terms["answer"], 0.5 * sample.answer)
        optimiser.zero_grad()
        terms["answer"].backward()
        optimiser.step()
        losses.append(sample.answer.item())
    # A random model's low-rank change cannot say everything through a frozen vocabulary.
    assert losses[-1] < (0.95 if regime == "lora" else 0.1) * losses[0]
    assert sample.answered is not None
    assert regime == "lora" or sample.answered.tolist() == [1.0, 1.0, 1.0]


def test_answers_that_teach_nothing_are_refused(tiny_model: str) -> None:
    with pytest.raises(RegimeError, match="answer: regime 'prompt' leaves the language model"):
        answering(tiny_model, "prompt")
    with pytest.raises(RegimeError, match="answer: words come after layer 4"):
        answering(tiny_model, kind="act_mid")


def test_the_language_modelling_head_is_the_table_of_words_or_reaches_nothing(
    tiny_model: str, images
) -> None:
    made = learner(tiny_model, "vocabulary")
    table = made.model.get_input_embeddings().weight
    assert [p for p in made.model.parameters() if p.requires_grad] == [table]
    assert not made.cacheable
    made([as_pil(images[0])], TEXTS[:1]).z.square().sum().backward()
    assert table.grad is not None
    learned = set(table.grad.abs().sum(1).nonzero()[:, 0].tolist())
    ids = set(made.prompts(TEXTS[0]).ids) - {made.checkpoint.image_token_id}
    assert learned == ids - set(made.checkpoint.act_ids)  # the words that were said, no others
    made.model.config.tie_word_embeddings = False
    with pytest.raises(
        RegimeError, match="regime: 'vocabulary' trains the language-modelling head"
    ):
        System2Learner(made.model, made.checkpoint, made.head, "vocabulary")
