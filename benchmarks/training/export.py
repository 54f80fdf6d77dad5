"""The last stage: one folder that a robot can run from, with a card that says how it came to be.

    ship/system1-laptop/   the policy (half precision where that is exact enough), normaliser,
                           configuration, and the spec with System 2's latent
    ship/system2-laptop/   latent.safetensors: <ACT> and projector, what `system2` reads beside
                           its model; language.safetensors or a whole LLaVA folder where the
                           regime trained the language model itself
    ship/README.md, ship/card.json

The policy of the last finished stage is taken: stage 2's pair, else stage 1's, else the
policy alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.training.card import make_card, markdown
from benchmarks.training.config import TrainingConfig
from benchmarks.training.folders import LANGUAGE, LATENT, base_policy_folder
from runtime.config import ConfigError
from system1.checkpoint import CONFIG, WEIGHTS, Network, load_policy, save_policy
from system1.data import Cache
from system1.model import gaussian
from system2.checkpoint import LatentHead
from system2.model import open_checkpoint

SHIP, SYSTEM1, SYSTEM2, CARD = "ship", "system1-laptop", "system2-laptop", "card.json"
# A rounded policy may move a trajectory by this much and no more: a tenth of the error that a
# trained small policy makes (`val_position_m` of its card is several millimetres).
EXACT_M, EXACT_FRAMES = 5e-4, 32


def export(config: TrainingConfig) -> dict[str, Any]:
    """Write the folder to ship; return the card.

    Raises:
        ConfigError: nothing is trained yet.
    """
    source, stage = last_stage(config)
    out = config.folder / SHIP
    if out.exists():
        shutil.rmtree(out)
    policy = load_policy(source)
    if (source / LATENT).is_file():
        policy.config = replace(
            policy.config, latent_model_id=ship_system2(config, source, out / SYSTEM2)
        )
    dtype, moved = ship_policy(policy, Cache(config.frames_folder()), out / SYSTEM1)
    card = make_card(config, stage, source) | {
        "precision": {"dtype": dtype, "moves_a_trajectory_by_m": moved},
        "bytes": {
            str(f.relative_to(out)): f.stat().st_size for f in sorted(out.rglob("*.safetensors"))
        },
    }
    (out / CARD).write_text(json.dumps(card, indent=1, default=str) + "\n")
    (out / "README.md").write_text(markdown(card))
    return {"stage": "export", "folder": str(out), "from": stage, **card["precision"]}


def last_stage(config: TrainingConfig) -> tuple[Path, str]:
    """Return the folder and the name of the last stage that has a checkpoint.

    Raises:
        ConfigError: none has.
    """
    for stage in ("stage2", "stage1"):
        if (config.folder / stage / LATENT).is_file():
            return config.folder / stage, stage
    folder = base_policy_folder(config)
    if folder is None:
        raise ConfigError("export: nothing is trained yet; run `openhelix train all`")
    return folder, "policy"


def ship_system2(config: TrainingConfig, source: Path, out: Path) -> str:
    """Write what System 2 learned; return the identity of its latents."""
    out.mkdir(parents=True)
    head = LatentHead.load(source / LATENT)
    checkpoint = open_checkpoint(config.latent.model, head.config.n_act)
    if (source / LANGUAGE).is_file():
        path = merged(config, source, checkpoint.path, out / "llava")
        checkpoint = open_checkpoint(str(path), head.config.n_act)
    note = {"stage": source.name, "model": config.latent.model}
    head.save(out / LATENT, base=checkpoint.model_id, note=note)
    return LatentHead.load(out / LATENT).model_id(checkpoint, raw=False)


def merged(config: TrainingConfig, source: Path, base: str, out: Path) -> Path:
    """Write a LLaVA folder with the trained language model, adapters merged into it."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from system2.assemble import MANIFEST, rename_tower, write_manifest
    from system2.cache import sha256_file

    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    state, learned = model.model.state_dict(), load_file(source / LANGUAGE)
    for name, tensor in learned.items():
        if ".lora_" not in name:
            state[name] = tensor
        elif ".lora_A." in name:
            other = learned[name.replace(".lora_A.", ".lora_B.")]
            place = name.partition(".lora_A.")[0] + ".weight"
            # alpha / rank is 2, as `System2Learner` sets it.
            state[place] = state[place] + 2.0 * other @ tensor
    model.model.load_state_dict(state)
    model.to(torch.bfloat16).save_pretrained(out)
    for file in out.glob("*.safetensors"):
        rename_tower(file)
    AutoProcessor.from_pretrained(base).save_pretrained(out)
    manifest = Path(base) / MANIFEST
    about = json.loads(manifest.read_text()) if manifest.is_file() else {}
    about["model_id"] = sha256_file(source / LANGUAGE)[:16]
    write_manifest(out, about)
    return out


def ship_policy(policy: Network, cache: Cache, out: Path) -> tuple[str, float]:
    """Write the policy in the smallest precision that moves no trajectory by half a millimetre.

    Returns:
        the precision's name, and by how many metres it moved the most moved row.
    """
    state = {k: v.clone() for k, v in policy.state_dict().items()}
    before = trajectories(policy, cache)
    half = {k: as_dtype(v, torch.float16) for k, v in state.items()}
    policy.load_state_dict({k: v.to(state[k].dtype) for k, v in half.items()})
    moved = float((trajectories(policy, cache) - before)[..., :3].norm(dim=-1).max())
    policy.load_state_dict(state)
    exact = moved <= EXACT_M
    save_policy(out, policy.config, half if exact else state, policy.normalizer)
    return ("float16", moved) if exact else ("float32", 0.0)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights rounded; counters and masks as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def trajectories(policy: Network, cache: Cache) -> Tensor:
    """Return what a policy samples on a few fixed frames, told the task's name."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randperm(len(cache), generator=generator)[:EXACT_FRAMES]
    batch = cache.batch(frames, generator, None, policy.config.rotation)
    policy.eval()
    return policy.sample_inputs(batch.inputs, gaussian(generator, torch.device("cpu")))


def is_policy(folder: Path) -> bool:
    """Whether a folder holds a policy."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
