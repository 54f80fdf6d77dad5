"""The last stage: one folder that a robot can run from, with a card on how it was trained.

    ship/system1-laptop/   the policy (half precision where that is exact enough), normaliser,
                           configuration, and the spec with System 2's latent
    ship/system2-laptop/   latent.safetensors: <ACT> and projector, what `system2` reads beside
                           its model (half precision where that turns no latent); the base
                           model's own few megabytes where `latent.model` is a folder of them; a
                           whole LLaVA folder where the regime trained the language model itself
    ship/text-laptop/      text.safetensors, half precision: what told the policy sentences before
                           System 2 did, where it was trained so; studies begin with it
    ship/README.md, ship/card.json

The policy of the last finished stage is taken: stage 2's pair, else stage 1's, else the policy
alone; with `latent.init`, a base model's own latents in the policy's code beside it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import platform
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openhelix.benchmarks.calvin.phrases import training
from openhelix.benchmarks.training.config import (
    LANGUAGE,
    LATENT,
    SETTINGS,
    TrainingConfig,
    base_policy_folder,
)
from openhelix.benchmarks.training.told import prepare_told
from openhelix.runtime.core.config import ConfigError
from openhelix.runtime.core.files import load_tensors, read_json, replace_file
from openhelix.runtime.core.interfaces import LatentSpec
from openhelix.system1.cache import frames_digest
from openhelix.system1.checkpoint import Network, load_policy, save_policy
from openhelix.system1.data import Cache, read_index
from openhelix.system1.latent_adapter import name_by_sentences, with_latent
from openhelix.system1.model import gaussian
from openhelix.system1.sentences import Sentences
from openhelix.system1.train_loop import LOG
from openhelix.system2.latents import LatentHead
from openhelix.system2.model import VISION, is_small, open_checkpoint
from openhelix.system2.text import FILE, TextCode
from openhelix.system2.understanding import FILE as UNDERSTANDING
from openhelix.system2.understanding import PlainSentences, beside

# -- The card: data, command, seed, hours and losses, for people and for checks --------

VLM_LOG = "log.jsonl"  # of `openhelix.system2.vlm_train`
KEPT = ("collection", "moments")


def make_card(config: TrainingConfig, stage: str, source: Path) -> dict[str, Any]:
    """Return what is to be known about a training, from what its stages left.

    Args:
        config: of the training.
        stage: whose weights are shipped.
        source: that stage's folder.
    """
    first, *others = config.frames_folders()
    folders = {"policy": config.policy.checkpoint or config.folder / "policy"}
    folders |= {name: config.folder / name for name in ("stage1", "stage2")}
    stages = {
        name: stage_card(folder) for name, folder in folders.items() if (folder / LOG).is_file()
    }
    model = Path(config.latent.model).expanduser()
    if (model / VLM_LOG).is_file():
        stages["vlm"] = vlm_card(model)
    return {
        "what": "a System 1 policy and the trained tensors of its System 2",
        "weights_of": stage,
        "data": data_card(first) | ({"also": [data_card(f) for f in others]} if others else {}),
        "command": command(config, "export" if stage == "vlm" else "all"),
        "seed": config.seed,
        "device": config.device,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "hours": round(sum(s["hours"] for s in stages.values()), 5),
        "stages": stages,
        "settings": {
            k: v for k, v in shown(config.model_dump(mode="json")).items() if k not in OWN
        },
    }


def stage_card(folder: Path) -> dict[str, Any]:
    """Return steps, hours and last figures of a stage."""
    log = read_json(folder / LOG)
    history = log["history"]
    losses = [row for row in history if "loss" in row]
    held = [row for row in history if "val_loss" in row]
    skipped = ("seconds", "lr", "grad_norm")
    card = {
        "steps": log["step"],
        "hours": round(history[-1]["seconds"] / 3600, 5) if history else 0.0,
        "first": {k: v for k, v in (losses or [{}])[0].items() if k not in skipped},
        "last": {k: v for k, v in (losses or [{}])[-1].items() if k not in skipped},
        "held_out": {k: v for k, v in (held or [{}])[-1].items() if k.startswith("val_")},
    }
    if (folder / LATENT).is_file() and "act" in (note := LatentHead.load(folder / LATENT).note):
        card["act"] = note["act"]
    settings = folder / SETTINGS
    if settings.is_file():
        card["settings"] = shown(read_json(settings))
    return card


def vlm_card(folder: Path) -> dict[str, Any]:
    """Return steps, hours and last figures of a base model's training."""
    rows = [json.loads(line) for line in (folder / VLM_LOG).read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    examined = [row for row in rows if "accuracy_image" in row]
    return {
        "steps": rows[-1]["step"],
        "hours": round(rows[-1]["seconds"] / 3600, 5),
        "first": {"loss": losses[0]} if losses else {},
        "last": {"loss": losses[-1]} if losses else {},
        "held_out": {"questions": examined[-1]["accuracy_image"]} if examined else {},
    }


def data_card(frames: Path) -> dict[str, Any]:
    """Return what the collection's own card says, and a digest of the frames trained on."""
    meta = read_index(frames)
    out = {
        "frames": sum(int(shard["frames"]) for shard in meta["shards"]),
        "frames_sha256": frames_digest(frames, meta["shards"]),
        **{k: v for k, v in meta["notes"].items() if k in KEPT},
    }
    card = frames.parent / "card.json"
    if card.is_file():
        about = read_json(card)
        keys = ("demonstrations", "hours_of_play", "expert_success", "sha256")
        out |= {k: about[k] for k in keys if k in about}
        out["collection_settings"] = shown(about.get("settings", {}))
    return out


def command(config: TrainingConfig, stage: str = "all") -> str:
    """Return the command that makes the same again: all settings that are not the defaults."""
    words = ["openhelix", "train", stage]
    values = shown(config.model_dump(mode="json"))
    words += changed(values, TrainingConfig().model_dump(mode="json"), "")
    return shlex.join(words)


def shown(value: Any) -> Any:
    """Return settings with folders as another user would name them: `~` for the home folder."""
    if isinstance(value, dict):
        return {k: shown(v) for k, v in value.items()}
    if isinstance(value, list):
        return [shown(v) for v in value]
    home = re.escape(str(Path.home()))
    if isinstance(value, str):  # a list of folders is one string too
        return re.sub(rf"(?<![^,=]){home}(?=/)", "~", value)
    return value


# Where and how long it ran, and what it showed meanwhile: nothing of the result.
OWN = (
    "out", "time_limit_s", "threads", "tracker", "workers", "ray_address", "restarts", "accumulate",
)  # fmt: skip


def changed(values: dict[str, Any], defaults: dict[str, Any], prefix: str) -> list[str]:
    """Return `a.b=value` for every value that is not the default."""
    out = []
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(defaults.get(name), dict) and defaults[name]:
            out += changed(value, defaults[name], f"{prefix}{name}.")
        elif value != defaults.get(name) and name not in OWN:
            text = json.dumps(value) if isinstance(value, (dict, list, bool)) else str(value)
            out.append(f"{prefix}{name}={text}")
    return out


def _data_line(data: Mapping[str, Any]) -> str:
    of = f" of {data['demonstrations']} demonstrations" if "demonstrations" in data else ""
    name = data.get("collection", "frames")
    return f"Data: {name}, {data['frames']} frames{of}, SHA-256 `{data['frames_sha256']}`."


def markdown(card: dict[str, Any]) -> str:
    """Return the card as a page."""
    data = card["data"]
    lines = [
        "# A trained pair",
        "",
        f"Weights of `{card['weights_of']}`, in {card['precision']['dtype']} (rounding moves a "
        f"sampled trajectory by at most {1e6 * card['precision']['moves_a_trajectory_by_m']:.1f} um).",
        "",
        "    " + card["command"],
        "",
        f"Seed {card['seed']}, {card['device']} ({card['machine']}), torch {card['torch']}, "
        f"{card['hours']:.2f} hours of training.",
        "",
        *(_data_line(one) for one in (data, *data.get("also", ()))),
        "",
        "| stage | steps | hours | first loss | last loss | held out |",
        "|---|---|---|---|---|---|",
    ]
    for name, stage in card["stages"].items():
        first, last = stage["first"].get("loss"), stage["last"].get("loss")
        held = ", ".join(f"{k.removeprefix('val_')} {v:.4g}" for k, v in stage["held_out"].items())
        losses = " | ".join("-" if x is None else f"{x:.3f}" for x in (first, last))
        lines.append(f"| {name} | {stage['steps']} | {stage['hours']:.2f} | {losses} | {held} |")
    for name, stage in card["stages"].items():
        if "act" in stage:
            act = stage["act"]
            lines += [
                "",
                f"`<ACT>` after {name}: cosine to its seed {act['cosine_to_seed']:.3f}, moved by "
                f"{act['moved']:.2f} of its length; nearest words "
                + "; ".join(", ".join(words[:5]) for words in act["nearest"])
                + ".",
            ]
    return "\n".join([*lines, ""])


SHIP, SYSTEM1, SYSTEM2, CARD = "ship", "system1-laptop", "system2-laptop", "card.json"
TEXT = "text-laptop"
# A rounded policy may move a trajectory by this much and no more: a tenth of the error that a
# trained small policy makes (`val_position_m` of its card is several millimetres).
EXACT_M, EXACT_FRAMES = 5e-4, 32
EXACT_TURN = 1e-5  # of a latent: 1 less the cosine


# -- The folder ------------------------------------------------------------------------


def export(config: TrainingConfig) -> dict[str, Any]:
    """Write the folder to ship; return the card. What was shipped before stays until it is whole.

    Raises:
        ConfigError: nothing is trained yet, or the latents of `latent.init` do not fit.
    """
    source, stage = last_stage(config)
    shipped, out = config.folder / SHIP, config.folder / f".{SHIP}.part"
    shutil.rmtree(out, ignore_errors=True)
    policy = load_policy(source)
    head = source / LATENT
    if not head.is_file() and config.latent.init is not None:
        head = config.latent.init.expanduser()
    if stage == "policy" and config.policy.told == "sentence":
        name_tasks(policy, Sentences.load(prepare_told(config).sentences))
    if head.is_file():
        spec = ship_system2(config, head, source, out / SYSTEM2)
        have = (policy.config.latent_tokens, policy.config.latent_dim)
        if (spec.n_tokens, spec.dim) != have:
            raise ConfigError(
                f"latent.init: its latents have {spec.n_tokens} tokens of {spec.dim} numbers, the "
                f"policy reads {have[0]} of {have[1]}"
            )
        policy.config = with_latent(policy.config, spec)
        stage = "vlm" if stage == "policy" else stage
    elif config.latent.init is not None:
        raise ConfigError(f"latent.init: there is no file {head}")
    dtype, moved = ship_policy(policy, Cache(config.frames_folders()), out / SYSTEM1)
    if stage == "policy" and (source / FILE).is_file():
        shutil.copyfile(source / FILE, out / SYSTEM1 / FILE)
    elif stage == "vlm" and (source / FILE).is_file():
        (out / TEXT).mkdir()
        TextCode.load(source / FILE).save(out / TEXT / FILE, torch.float16)
    card = make_card(config, stage, source) | {
        "precision": {"dtype": dtype, "moves_a_trajectory_by_m": moved},
        "bytes": {
            str(f.relative_to(out)): f.stat().st_size for f in sorted(out.rglob("*.safetensors"))
        },
    }
    replace_file(out / CARD, (json.dumps(card, indent=1, default=str) + "\n").encode())
    replace_file(out / "README.md", markdown(card).encode())
    shutil.rmtree(shipped, ignore_errors=True)
    out.rename(shipped)
    return {"stage": "export", "folder": str(shipped), "from": stage, **card["precision"]}


def name_tasks(policy: Network, said: Sentences) -> None:
    """Name a policy's tasks by its sentences: those of demonstrations, where they are among them.

    The means of these name more of the development list (90 %, by the latents of a base model
    that had not seen it) than the means of all sentences of a grammar do (87 %).
    """
    labels = {text for texts in training().values() for text in texts}
    own = torch.tensor([text in labels for text in said.texts])
    if len(said.task[own].unique()) < len(said.task.unique()):
        own[:] = True
    name_by_sentences(policy, said.latent[own], said.task[own])


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


def ship_system2(config: TrainingConfig, file: Path, source: Path, out: Path) -> LatentSpec:
    """Write what System 2 learned; return the spec of its latents.

    Args:
        config: of the training.
        file: the head.
        source: folder of the stage whose language model is shipped.
        out: where it goes.
    """
    out.mkdir(parents=True)
    head = LatentHead.load(file)
    model = Path(config.latent.model).expanduser()
    asked = (config.latent.prompt, config.latent.image_side)
    if is_small(model):
        for part in (VISION, LANGUAGE):
            if (model / part).is_file():
                shutil.copyfile(model / part, out / part)
        checkpoint = open_checkpoint(str(out), head.config.rows, *asked)
    else:
        checkpoint = open_checkpoint(config.latent.model, head.config.rows, *asked)
    if (source / LANGUAGE).is_file():
        path = merged(config, source, checkpoint.path, out / "llava")
        checkpoint = open_checkpoint(str(path), head.config.rows, *asked)
    note = {"stage": source.name, "model": shown(config.latent.model)}
    exact = turned_by_half(head) <= EXACT_TURN
    dtype = torch.float16 if exact else torch.float32
    head.save(out / LATENT, base=checkpoint.model_id, note=note, dtype=dtype)
    judge = beside(file, None)
    if isinstance(judge, PlainSentences):  # a base model's own; what it is called has changed
        dataclasses.replace(judge, model=checkpoint.model_id).save(out / UNDERSTANDING)
    return LatentHead.load(out / LATENT).spec(checkpoint, raw=False)


def turned_by_half(head: LatentHead) -> float:
    """Return by how much half precision turns a latent, 1 less the cosine; the worst of many."""
    rounded = copy.deepcopy(head).half().float()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(256, 1, head.hidden * head.config.width, generator=generator)
    states *= torch.logspace(-1, 2, 256)[:, None, None]  # layers differ in size by that much
    there = torch.ones(256, 1, dtype=torch.bool)
    with torch.no_grad():
        a, b = (h.project(states, there)[:, 0] for h in (head, rounded))
    return float(1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).min())


def merged(config: TrainingConfig, source: Path, base: str, out: Path) -> Path:
    """Write a LLaVA folder with the trained language model, adapters merged into it."""

    from openhelix.system2.families import FAMILIES
    from openhelix.system2.model import (
        MANIFEST,
        load_model,
        sha256_file,
        write_manifest,
        write_model,
    )

    model = load_model(base, torch.float32)
    core = FAMILIES[model.config.model_type].core(model)
    state, learned = core.state_dict(), load_tensors(source / LANGUAGE)[0]
    for name, tensor in learned.items():
        if ".lora_" not in name:
            state[name] = tensor
        elif ".lora_A." in name:
            other = learned[name.replace(".lora_A.", ".lora_B.")]
            place = name.partition(".lora_A.")[0] + ".weight"
            # alpha / rank is 2, as `System2Learner` sets it.
            state[place] = state[place] + 2.0 * other @ tensor
    core.load_state_dict(state)
    out.mkdir(parents=True, exist_ok=True)
    write_model(model.to(torch.bfloat16), base, out)
    manifest = Path(base) / MANIFEST
    about = read_json(manifest) if manifest.is_file() else {}
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
