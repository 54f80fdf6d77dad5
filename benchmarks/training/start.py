"""The projector's initialisation from the policy's task table, without gradients through it.

A policy pretrained alone understands the rows of its table and no latent. `task_anchors`
names, for each task, a latent that its adapter turns into that row. The projector begins as what
best sends each sample's state to its task's anchor: seconds of work where finding it by
gradients through the policy takes hours.

A linear projector is a ridge regression. One with a hidden layer does far better, and is begun in
two ways. For few sentences: Fisher's discriminants (few dozen directions in which a state's task
shows and its picture does not) make its first layer, and a small fit within them the rest. With
1,942 samples of 34 tasks, one sentence each (and a tower that was not trained, which makes it
harder) the regression named 66 % of held-out tasks, the discriminants 87 %; with the trained
tower they name 99 %. For many sentences: both layers are fitted at once, with dropout, so that
no few of the state's channels decide. With 2,309 sentences of 34 tasks, and held-out ones in
other words, the regression names 72 % of them (its penalty chosen by them), this 85 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

from openhelix.benchmarks.calvin.wordings import say_nothing
from openhelix.benchmarks.training.feeds import Source, StateFeed
from openhelix.benchmarks.training.joint import Joint, sample_of
from openhelix.runtime.core.config import ConfigError
from openhelix.system1.latent_adapter import adapter_tokens, nearest_task, task_anchors
from openhelix.system1.model import VisuomotorPolicy
from openhelix.system2.engines.transformers import TransformersEngine
from openhelix.system2.latents import KV
from openhelix.system2.train import encode_states

SAMPLES = 8192
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 5.0, 25.0)  # in units of the states' mean variance
SHRINKAGES = (1e-3, 1e-2)  # of the covariance within tasks towards the identity
NOISE = 0.3  # added to discriminants, in units of the spread within a task
FIT_STEPS, FIT_BATCH, FIT_RATE = 800, 256, 5e-3
NO_TASK = -1
DROPOUT = 0.3  # of the states' channels and of the hidden layer's
HEARD = 2  # frames a task on which a latent to be spoken like is heard
WHOLE_STEPS, WHOLE_BATCH, WHOLE_RATE, WHOLE_DECAY = 800, 128, 1e-3, 0.1


def start_from_table(joint: Joint, source: Source) -> dict[str, float]:
    """Fit the projector; return how often a latent is nearest to its task's row.

    What is to be chosen is chosen by the held-out episodes. Nothing is changed where the
    policy has no table. With `latent.refuse` sentences that name no task are sent to the
    table's row for that.
    """
    anchors = task_anchors(joint.policy)
    if anchors is None:
        return {}
    if joint.learner.head.config.kind == KV:
        stage = joint.stage
        raise ConfigError(f"{stage}.start: read-out 'kv' has no projector to fit; say random")
    held = joint.val_rows if len(joint.val_rows) else joint.train_rows
    if joint.section.start_samples:
        states, filled, tasks = first_drawn(joint, joint.section.start_samples)
        test = gathered(joint, held, joint.config.eval_frames)
    else:
        states, filled, tasks = gathered(joint, joint.train_rows)
        test = gathered(joint, held)
    head = joint.learner.head
    refuse = joint.config.latent.refuse
    for name in ("refuse", "like"):
        if getattr(joint.config.latent, name) and head.neck is None:
            raise ConfigError(f"latent.{name}: needs a hidden layer: latent.projector_width")
    if refuse:
        others = states_of(joint, source, joint.train_rows, say_nothing(refuse, joint.config.seed))
        label = torch.full((len(others[0]),), NO_TASK, device=tasks.device)
        states, filled = (torch.cat(pair) for pair in zip((states, filled), others, strict=True))
        tasks = torch.cat([tasks, label])
    if head.neck is None:
        candidates = linear(states, filled, anchors.to(states.device)[tasks])
    else:
        rows = None
        if joint.config.latent.like is not None:
            rows = heard(joint, source, joint.config.latent.like)
        candidates = discriminating(joint, states, filled, tasks, rows)
    best, kept = -1.0, head.state_dict()
    for candidate in candidates:
        head.load_state_dict(candidate, strict=False)
        right = accuracy(joint, *test)
        if right > best:
            best, kept = right, candidate
    head.load_state_dict(kept, strict=False)
    named = tasks != NO_TASK
    return {
        "samples": float(len(states)),
        "train_top1": accuracy(joint, states[named], filled[named], tasks[named]),
        "held_out_top1": best,
    }


def heard(joint: Joint, source: Source, like: Path) -> Tensor:
    """Return what a policy hears of another System 2's latents (n_tasks + 1, width).

    A policy that was trained with a latent understands what that one says of a task better
    than its table's row. Their mean behind the adapter takes the row's place; the first row, "no
    task named", stays.

    Args:
        joint: whose policy was trained with the other latent.
        source: pictures and the sentences that they were labelled with.
        like: the other one's `latent.safetensors`.
    """
    policy, cache, latent = joint.policy, joint.cache, joint.config.latent
    assert isinstance(policy, VisuomotorPolicy)
    generator = joint.generator(2, 3)
    engine = TransformersEngine(
        latent.model, latent_projector=like, dtype=latent.dtype, device=joint.config.device
    )
    rows = policy.encoder.condition.table.weight.detach().float().clone()
    train, _ = cache.split(joint.config.validation, joint.config.seed)
    try:
        for task in range(len(rows) - 1):
            have = train[cache.task[train] == task]
            if len(have) == 0:
                continue
            frames = have[torch.randperm(len(have), generator=generator)[:HEARD]]
            said = cache.gather("instruction", frames).long()
            shown = [np.asarray(image) for image in source.pictures(frames)]
            z = torch.from_numpy(engine.encode(shown, source.sentences[said])).to(rows.device)
            rows[task + 1] = adapter_tokens(policy, z).mean((0, 1)).detach().float()
    finally:
        engine.close()
    return rows


@torch.no_grad()
def states_of(
    joint: Joint, source: Source, rows: Tensor, sentences: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return read-outs (N, n, hidden) of sentences over pictures of some of the feed's rows."""
    each = next(n for n in (8, 5, 4, 2, 1) if len(sentences) % n == 0)
    texts = [sentences[i : i + each] for i in range(0, len(sentences), each)]
    picks = torch.randint(len(rows), (len(texts),), generator=joint.generator(1, 3))
    frames = joint.feed.frames[rows[picks]]
    states, marks = [], []
    for start in range(0, len(texts), joint.config.latent.encode_batch):
        part = slice(start, start + joint.config.latent.encode_batch)
        shown = source.pictures(frames[part]) if joint.config.latent.vision else []
        state, filled = encode_states(joint.learner, shown, texts[part])
        states.append(state.flatten(0, 1))
        marks.append(filled.flatten(0, 1))
    return torch.cat(states), torch.cat(marks)


def accuracy(joint: Joint, states: Tensor, filled: Tensor, tasks: Tensor) -> float:
    """Return the share of states whose latent comes nearest to its task's row."""
    with torch.no_grad():
        latent = joint.learner.head.project(states, filled)
    guess = nearest_task(joint.policy, latent)
    return 0.0 if guess is None else float((guess == tasks).float().mean())


def first_drawn(joint: Joint, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, filled rows and tasks, as `gathered`, of the samples of the first steps."""
    steps = min(max(1, most // joint.section.batch), joint.section.steps)
    drawn = [joint.drawn(number) for number in range(steps)]
    parts = zip(*((s.state, s.filled, task) for s, task in drawn), strict=True)
    states, filled, tasks = (torch.cat(part) for part in parts)
    return states, filled, tasks


def gathered(joint: Joint, rows: Tensor, most: int = SAMPLES) -> tuple[Tensor, Tensor, Tensor]:
    """Return states (N, n, hidden), filled rows (N, n) and tasks (N,) of at most `most` samples.

    A row that has several sentences is drawn as often.
    """
    generator = joint.generator(0, 3)
    often = joint.config.latent.phrasings if isinstance(joint.feed, StateFeed) else 1
    order = torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(often)])
    order = order[:most]
    states, filled, tasks = [], [], []
    for chosen in order.split(joint.section.batch):
        sample, task = sample_of(joint, chosen, generator)
        states.append(sample.state)
        filled.append(sample.filled)
        tasks.append(task)
    return torch.cat(states), torch.cat(filled), torch.cat(tasks)


def linear(states: Tensor, filled: Tensor, wanted: Tensor) -> list[dict[str, Tensor]]:
    """Return the weights of linear projectors, one a penalty."""
    found = []
    for penalty in PENALTIES:
        weight, bias = ridge(states[filled], wanted[filled], penalty)
        found.append({"projector.weight": weight, "projector.bias": bias})
    return found


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Return weight (dim, hidden) and bias (dim,) of the penalised linear map from x to y.

    A language model's final states have a few huge channels, so each is scaled to its own
    spread first; the scale then goes into the weight.
    """
    x, y = x.double(), y.double()
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    z, middle = (x - mean) / spread, y.mean(0)
    gram = z.T @ z
    gram += penalty * len(z) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, z.T @ (y - middle)).T / spread
    return weight.float(), (middle - weight @ mean).float()


def discriminants(x: Tensor, label: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """Return weight (r, hidden) and bias (r,) of Fisher's discriminants.

    In their space the spread within a class is one in every direction, and r, at most one
    less than there are classes, directions hold all that the classes' means differ in.

    Args:
        x: (N, hidden).
        label: (N,) class of each.
        shrink: of the covariance towards the identity, 0 to 1.
    """
    x = x.double()
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    z = (x - mean) / spread
    classes, which = label.unique(return_inverse=True)
    means = torch.stack([z[which == k].mean(0) for k in range(len(classes))])
    inner = z - means[which]
    identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    within = (1 - shrink) * (inner.T @ inner / len(z)) + shrink * identity
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors @ torch.diag(values.clamp_min(1e-9).rsqrt()) @ vectors.T
    apart = (means - means.mean(0)) @ whiten
    rank = max(1, min(len(classes) - 1, z.shape[1]))
    main = torch.linalg.svd(apart, full_matrices=False).Vh[:rank]
    weight = main @ whiten / spread
    return weight.float(), (-(weight @ mean)).float()


def discriminating(
    joint: Joint, states: Tensor, filled: Tensor, tasks: Tensor, rows: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """Return the weights of projectors with a hidden layer: one a shrinkage, one of `whole`."""
    head, policy = joint.learner.head, joint.policy
    if head.neck is None or not isinstance(policy, VisuomotorPolicy):
        return []
    x = states[filled]
    label = tasks.unsqueeze(1).expand(filled.shape)[filled]
    found = []
    plain = rows is None and bool((tasks != NO_TASK).all())
    rows = policy.encoder.condition.table.weight.detach().float() if rows is None else rows
    for shrink in SHRINKAGES if plain else ():
        weight, bias = discriminants(x, label, shrink)
        seen = x @ weight.T + bias
        inner, last = fitted(joint, policy, seen, label)
        found.append(
            {
                "neck.weight": inner.weight.detach() @ weight,
                "neck.bias": inner.weight.detach() @ bias + inner.bias.detach(),
                "projector.weight": last.weight.detach(),
                "projector.bias": last.bias.detach(),
            }
        )
    return [*found, whole(joint, policy, x, label, rows)]


def whole(
    joint: Joint, policy: VisuomotorPolicy, x: Tensor, label: Tensor, rows: Tensor
) -> dict[str, Tensor]:
    """Return the weights of a projector fitted to states (N, hidden) and their tasks (N,).

    Args:
        joint: whose projector's shape it has.
        policy: whose table it is to speak for.
        x, label: the samples; `NO_TASK` where a sentence names none.
        rows: (n_tasks + 1, width), what latents are to become behind the policy's adapter; the
            first for "no task named".
    """
    projector, generator = joint.learner.head.projector, joint.generator(0, 1)
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-6)
    table = rows
    if bool((label != NO_TASK).all()):
        table = table[1:]
    else:
        label = label + 1
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(joint.config.seed)
        inner = torch.nn.Linear(x.shape[1], projector.in_features)
        last = torch.nn.Linear(projector.in_features, projector.out_features)
        net = torch.nn.Sequential(
            torch.nn.Dropout(DROPOUT), inner, torch.nn.GELU(), torch.nn.Dropout(DROPOUT), last
        ).to(x.device)
        optimizer = torch.optim.AdamW(net.parameters(), WHOLE_RATE, weight_decay=WHOLE_DECAY)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, WHOLE_STEPS)
        for _ in range(WHOLE_STEPS):
            picks = torch.randint(len(x), (WHOLE_BATCH,), generator=generator).to(x.device)
            latent = net((x[picks] - mean) / spread)
            loss = table_loss(policy, latent.unsqueeze(1), table, label[picks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    weight = inner.weight.detach() / spread
    return {
        "neck.weight": weight,
        "neck.bias": inner.bias.detach() - weight @ mean,
        "projector.weight": last.weight.detach(),
        "projector.bias": last.bias.detach(),
    }


def fitted(
    joint: Joint, policy: VisuomotorPolicy, seen: Tensor, label: Tensor
) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """Return the two layers that send discriminants (N, r) to their tasks' rows of the table."""
    head, threads = joint.learner.head, torch.get_num_threads()
    generator = joint.generator(0, 2)
    torch.set_num_threads(1)  # matrices so small that threads would wait for each other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(joint.config.seed)
        inner = torch.nn.Linear(seen.shape[1], head.projector.in_features).to(seen.device)
        last = torch.nn.Linear(head.projector.in_features, head.projector.out_features)
    last = last.to(seen.device)
    table = policy.encoder.condition.table.weight[1:].detach().float()
    optimizer = torch.optim.Adam([*inner.parameters(), *last.parameters()], FIT_RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    for _ in range(FIT_STEPS):
        picks = torch.randint(len(seen), (FIT_BATCH,), generator=generator).to(seen.device)
        moved = NOISE * torch.randn(FIT_BATCH, seen.shape[1], generator=generator)
        latent = last(gelu(inner(seen[picks] + moved.to(seen.device))))
        loss = table_loss(policy, latent.unsqueeze(1), table, label[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    torch.set_num_threads(threads)
    return inner, last


def table_loss(policy: VisuomotorPolicy, latent: Tensor, table: Tensor, task: Tensor) -> Tensor:
    """Return how far latents are from their tasks' rows, and how near to others.

    Both in units of the distance between neighbouring rows.

    Args:
        policy: whose adapter it is; its weights collect no gradients.
        latent: (B, n, dim).
        table: (n_tasks, width), the rows.
        task: (B,).
    """
    said = adapter_tokens(policy, latent).mean(1).float()
    apart = torch.cdist(table, table) + torch.eye(len(table), device=table.device) * 1e9
    unit = apart.amin(1).square().mean()
    squared = torch.cdist(said, table).square() / unit
    far = squared.gather(1, task.unsqueeze(1)).mean()
    return cross_entropy(-2.0 * squared, task) + 0.5 * far
