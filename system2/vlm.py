"""A LLaVA that learns to answer questions about pictures, and how right its answers are.

One sequence holds a picture and several questions about it: each question sees the picture and
itself and no other question, so the picture's tokens are paid for once. Only answers are
scored, and only at their places is the vocabulary's output layer computed.

An answer counts as right when every one of its tokens, the closing one too, is the most
probable: exactly what greedy generation would have written, without generating it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openhelix.system2.latents import LatentConfig, LatentHead
from openhelix.system2.model import Checkpoint
from openhelix.system2.prompt import words_of_robot
from openhelix.system2.understanding import PlainSentences
from openhelix.system2.vlm_data import GOAL_KINDS, Question

CELLS = 64  # a read-out without language sees at most so many image tokens, pooled
IGNORED = -100
LORA_SCALE = 2.0  # of the low-rank parts
NOTHING = "do nothing"  # the plain sentence of an instruction that names nothing to be done


@dataclass(frozen=True, slots=True)
class Packed:
    """Pictures with their questions, as sequences of one length.

    B pictures, N positions; everything before `image` is the prompt's head.

    Attributes:
        ids: (B, N) token ids; the places of the image hold 0.
        mask: (B, 1, N, N) bool, who sees whom.
        positions: (B, N): each question follows the picture directly.
        wanted: (B, N) the token that is to come next, or `IGNORED`.
        owner: (B, N) the question's number, -1 outside of questions.
        said: (B, N) bool, a robot's instruction without the question around it.
        act: (B, N) which `<ACT>` stands there, -1 for none. It follows an instruction, before the
            answer.
        image: (start, stop) of the image tokens; equal without vision.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    wanted: Tensor
    owner: Tensor
    said: Tensor
    act: Tensor
    image: tuple[int, int]

    def to(self, device: torch.device) -> Packed:
        """Return it on a device."""
        return Packed(
            self.ids.to(device),
            self.mask.to(device),
            self.positions.to(device),
            self.wanted.to(device),
            self.owner.to(device),
            self.said.to(device),
            self.act.to(device),
            self.image,
        )


class Packer:
    """Makes sequences of questions for one checkpoint.

    Args:
        checkpoint: whose tokenizer and template.
        vision: False leaves the picture out: what words alone can answer.
    """

    def __init__(self, checkpoint: Checkpoint, vision: bool = True) -> None:
        from openhelix.system2.model import load_tokenizer

        builder = checkpoint.prompts(1)
        self._spans = builder.tokenize
        self._tokenize: Callable[[str], list[int]] = lambda text: builder.tokenize(text)[0]
        self._template = builder.template
        head = [] if builder.bos is None else [builder.bos]
        self._head = head + (self._tokenize(self._template.head) if self._template.head else [])
        self._n_image = checkpoint.n_image if vision else 0
        self._body = self._template.body if vision else ""
        self._end = int(load_tokenizer(checkpoint.path).eos_token_id)
        self._act = list(checkpoint.act_ids[:1])
        self._known: dict[tuple[str, str, bool], tuple[list[int], int]] = {}

    def tokens(self, question: Question) -> tuple[list[int], int]:
        """Return the ids of question and answer, and how many of them come before the answer."""
        key = (question.text, question.answer, question.kind in GOAL_KINDS)
        if key not in self._known:
            asked = self._tokenize(self._body + question.text + self._template.tail)
            asked = asked + self._act if question.kind in GOAL_KINDS else asked
            self._known[key] = ([*asked, *self._tokenize(question.answer), self._end], len(asked))
        return self._known[key]

    def said(self, question: str) -> list[int]:
        """Return which tokens of `tokens` are the instruction's own words."""
        first, last = (len(self._body) + at for at in words_of_robot(question))
        _, spans = self._spans(self._body + question + self._template.tail)
        return [i for i, (a, b) in enumerate(spans) if b > first and a < last]

    def __call__(self, asked: Sequence[Sequence[Question]]) -> Packed:
        """Return one sequence a picture."""
        start = len(self._head) + self._n_image
        rows = [[self.tokens(q) for q in questions] for questions in asked]
        longest = start + max(sum(len(ids) for ids, _ in row) for row in rows)
        longest = -(-longest // 8) * 8
        shape = (len(rows), longest)
        ids = torch.zeros(shape, dtype=torch.long)
        wanted = torch.full(shape, IGNORED)
        owner = torch.full(shape, -2)  # padding
        owner[:, :start] = -1
        said = torch.zeros(shape, dtype=torch.bool)
        act = torch.full(shape, -1)
        positions = torch.zeros(shape, dtype=torch.long)
        positions[:, :start] = torch.arange(start)
        ids[:, : len(self._head)] = torch.tensor(self._head, dtype=torch.long)
        for b, row in enumerate(rows):
            at = start
            for number, (tokens, before) in enumerate(row):
                stop = at + len(tokens)
                ids[b, at:stop] = torch.tensor(tokens)
                owner[b, at:stop] = number
                positions[b, at:stop] = torch.arange(start, start + len(tokens))
                wanted[b, at + before - 1 : stop - 1] = ids[b, at + before : stop]
                if asked[b][number].kind in GOAL_KINDS:
                    said[b, [at + i for i in self.said(asked[b][number].text)]] = True
                    first = at + before - len(self._act)
                    act[b, first : at + before] = torch.arange(len(self._act))
                at = stop
        same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == -1)
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        mask = (same & causal)[:, None]
        return Packed(ids, mask, positions, wanted, owner, said, act, (len(self._head), start))


class Sight(nn.Module):
    """What image tokens show, read without language: names by linear maps, and numbers.

    Trained beside the answers, it keeps places in the tokens; trained before them, it teaches
    a fresh tower to see at a fraction of the price of a language model's steps.

    Beside the linear maps, image token k can be told to *say* label k: to be the sum of the
    input embeddings of its name and its word ("drawer open"). A language model reads such
    tokens much sooner than any others that hold the same.

    Args:
        n_image, hidden: shape of the image tokens.
        words: by label, its words in order.
        numbers: how many numbers; `shift` and `spread` are their mean and deviation.
        saying: (labels, most words, hidden) what token k is to be for each word of label k,
            zeros where there are fewer words; None where tokens say nothing.
    """

    shift: Tensor
    spread: Tensor
    saying: Tensor

    def __init__(
        self,
        n_image: int,
        hidden: int,
        words: dict[str, tuple[str, ...]],
        numbers: int,
        saying: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.words = words
        side = isqrt(n_image)
        self._side = side if side * side == n_image else 0
        self._pooled = n_image > CELLS
        cells = min(n_image, CELLS)
        self.sizes = [len(options) for options in words.values()]
        self.norm = nn.LayerNorm(hidden)
        self.read = nn.Linear(cells * hidden, sum(self.sizes) + numbers)
        self.register_buffer("shift", torch.zeros(numbers))
        self.register_buffer("spread", torch.ones(numbers))
        none = torch.zeros(0, 0, hidden)
        self.register_buffer(
            "saying", none if saying is None else saying[:n_image], persistent=False
        )

    def speech(self, tokens: Tensor, target: Tensor, whole: Tensor | None = None) -> Tensor:
        """Return how far image tokens are from saying their labels; arguments as of `loss`."""
        terms, labels = [], 0
        counts = ((target if whole is None else whole) != IGNORED).sum(0).tolist()
        for column, size in enumerate(self.sizes[: len(self.saying)]):
            if size < 2 or not counts[column]:
                continue
            labels += 1
            known = target[:, column] != IGNORED
            if not known.any():
                continue
            share = known.sum() / counts[column]
            wanted, said = target[known, column], tokens[known, column].float()
            options = self.saying[column, :size]
            middle = options.mean(dim=0)
            scores = F.normalize(said - middle, dim=1) @ F.normalize(options - middle, dim=1).T
            spread = options.var(dim=0).mean()
            far = F.mse_loss(said, options[wanted]) / spread
            terms.append(share * (F.cross_entropy(scores / 0.1, wanted) + 0.2 * far))
        return torch.stack(terms).sum() / labels if terms else tokens.sum() * 0

    def forward(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Image tokens (B, n_image, hidden) to scores (B, words) a label, and numbers (B, n)."""
        tokens = self.norm(tokens.float())
        if self._pooled:
            if self._side:
                grid = tokens.transpose(1, 2).unflatten(2, (self._side, self._side))
                tokens = F.adaptive_avg_pool2d(grid, isqrt(CELLS)).flatten(2).transpose(1, 2)
            else:
                tokens = F.adaptive_avg_pool1d(tokens.transpose(1, 2), CELLS).transpose(1, 2)
        out = self.read(tokens.flatten(1))
        *scores, numbers = out.split([*self.sizes, out.shape[1] - sum(self.sizes)], dim=1)
        return scores, numbers

    def loss(
        self,
        tokens: Tensor,
        target: Tensor,
        numbers: Tensor,
        whole: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, and which labels were right (B, labels): 1, 0, or NaN where unknown.

        Args:
            tokens: (B, n_image, hidden).
            target: (B, labels) index of the word, `IGNORED` where unknown.
            numbers: (B, n) with NaN where unknown.
            whole: target and numbers of the whole batch that this is a part of; the losses of
                its parts then add up to its own.
        """
        scores, guess = self(tokens)
        all_target, all_numbers = (target, numbers) if whole is None else whole
        counts = (all_target != IGNORED).sum(0).tolist()
        labels = sum(count > 0 for count in counts)
        terms, right = [], []
        for column, score in enumerate(scores):
            wanted = target[:, column]
            known = wanted != IGNORED
            if known.any():
                summed = F.cross_entropy(score[known], wanted[known], reduction="sum")
                terms.append(summed / counts[column])
            hit = (score.argmax(1) == wanted).float()
            right.append(hit.masked_fill(~known, float("nan")))
        loss = torch.stack(terms).sum() / labels if terms else tokens.sum() * 0
        if numbers.shape[1]:
            scaled = (numbers - self.shift) / self.spread
            told = ~scaled.isnan()
            if told.any():
                most = (~all_numbers.isnan()).sum()
                loss = loss + F.smooth_l1_loss(guess[told], scaled[told], reduction="sum") / most
        hits = torch.stack(right, dim=1) if right else tokens.new_zeros(len(tokens), 0)
        return loss, hits


class Adapted(nn.Module):
    """A linear layer with a low-rank part beside it (LoRA), which can be folded in.

    Args:
        base: the layer, left as it is.
        rank: of the part.
        scale: of its output.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        device = base.weight.device
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        part = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return self.base(x) + self.scale * part

    def folded(self) -> Tensor:
        """Return the weight (out, in) with the part added."""
        return self.base.weight + (self.scale * self.up @ self.down).to(self.base.weight)


def adapt(language: nn.Module, rank: int) -> list[nn.Parameter]:
    """Put a low-rank part beside every linear layer of a language model; return the new weights."""
    new: list[nn.Parameter] = []
    for module in list(language.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, Adapted):
                adapted = Adapted(child, rank, LORA_SCALE)
                setattr(module, name, adapted)
                new += [adapted.down, adapted.up]
    return new


def folded_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's weights under their own names, low-rank parts folded in."""
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}
    state = {}
    for key, value in model.state_dict().items():
        owner = next(
            (n for n in (key.rsplit(".", 1)[0], key.rsplit(".", 2)[0]) if n in adapted), ""
        )
        if not owner:
            state[key] = value
        elif key == f"{owner}.base.weight":
            state[f"{owner}.weight"] = adapted[owner].folded()
        elif key.startswith(f"{owner}.base."):
            state[f"{owner}.{key.rsplit('.', 1)[1]}"] = value
    return {key: value.detach() for key, value in state.items()}


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of a batch of questions.

    Attributes:
        loss: mean over the answers' tokens.
        right: (B, questions) 1 where the whole answer is right, 0 where not, NaN for none.
        states: (B, N, hidden) after each of the layers that were asked for.
    """

    loss: Tensor
    right: Tensor
    states: tuple[Tensor, ...] = ()


class Goals(nn.Module):
    """System 2's latent of an instruction, taught to be the plain sentence's.

    The read-out is `act_words`: the states at `<ACT>` and the mean over the instruction's words
    after some layers, with the picture before them. A projector with a hidden layer turns it into what a frozen
    reader makes of the plain sentence that is meant (as LCB aligns its latent with CLIP's text),
    so that a policy which was told by that reader understands it. No task is numbered anywhere.

    Args:
        layers: of the language model, ascending.
        table: (V, hidden), its words' embeddings, among which `<ACT>` begins.
        sentences: every plain sentence.
        codes: (sentences, dim) what the reader makes of them.
        seed: of the projector.
        reading: (width, dim) of the policy that is to understand the latents, see `TextCode`. A
            latent may be nearest to its own sentence, and still look to the policy like another:
            what the policy hardly reads makes up most of the distance.
    """

    codes: Tensor
    reading: Tensor | None
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        layers: tuple[int, ...],
        table: Tensor,
        sentences: Sequence[str],
        codes: Tensor,
        seed: int = 0,
        reading: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layers, self._index = layers, {text: i for i, text in enumerate(sentences)}
        self.config = LatentConfig("act_words", layers=layers)
        dim = codes.shape[1]
        self.head = LatentHead.fresh(self.config, table, dim, seed, width=dim)
        self.began = self.head.act.detach().clone()
        read = table.shape[1] * self.config.width
        self.register_buffer("codes", codes.float(), persistent=False)
        self.register_buffer("shift", torch.zeros(read))
        self.register_buffer("scale", torch.ones(read))
        self.register_buffer("reading", reading, persistent=False)
        self._unit = self._neighbours(self.codes)
        self._read_unit = 1.0 if reading is None else self._neighbours(self._as_read(self.codes))

    @staticmethod
    def _neighbours(codes: Tensor) -> float:
        """Return the mean squared distance to the nearest other one."""
        apart = torch.cdist(codes, codes) + torch.eye(len(codes)) * 1e9
        return float(apart.amin(1).square().mean())

    def _as_read(self, latent: Tensor) -> Tensor:
        """Return (..., width) what the policy reads, but for a shift."""
        assert self.reading is not None
        return F.linear(F.layer_norm(latent, latent.shape[-1:]), self.reading.to(latent))

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` was called."""
        return bool((self.scale != 1).any())

    def index(self, answers: Sequence[str]) -> Tensor:
        """Return which plain sentences these are."""
        return torch.tensor([self._index[answer] for answer in answers])

    def read(self, states: Sequence[Tensor], packed: Packed) -> Tensor:
        """Return every instruction's read-out (n, read), in the order of pictures and questions.

        Args:
            states: (B, N, hidden) after each of `layers`.
            packed: the questions.
        """
        wide = torch.cat([s.float() for s in states], dim=-1)
        batch, most = packed.owner.shape[0], int(packed.owner.max()) + 1
        row = torch.arange(batch, device=wide.device)[:, None] * most + packed.owner
        places = packed.said
        acts = wide[packed.act >= 0].view(-1, self.config.n_act * wide.shape[-1])
        sums = wide.new_zeros(batch * most, wide.shape[-1]).index_add(0, row[places], wide[places])
        counts = wide.new_zeros(batch * most).index_add(
            0, row[places], torch.ones_like(row[places], dtype=wide.dtype)
        )
        asked = counts > 0
        return torch.cat([acts, sums[asked] / counts[asked, None]], dim=1)

    @property
    def moved(self) -> float:
        """The cosine between `<ACT>` and where it began."""
        now = self.head.act.detach().flatten()
        return float(F.cosine_similarity(now, self.began.flatten().to(now), dim=0))

    def latent(self, read: Tensor) -> Tensor:
        """Return (n, dim) of read-outs (n, read)."""
        scaled = (read - self.shift) / self.scale
        return self.head.project(scaled, torch.ones_like(scaled[..., 0], dtype=torch.bool))

    def calibrate(self, read: Tensor) -> None:
        """Take mean and spread of the read-out's channels, of which a few are huge."""
        self.shift.copy_(read.mean(0))
        self.scale.copy_(read.std(0).clamp_min(1e-3))

    def loss(self, read: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far latents are from their sentences and how near to others; which are right.

        Args:
            read: (n, read).
            wanted: (n,) index of the plain sentence.
        """
        latent = self.latent(read)
        squared = torch.cdist(latent, self.codes).square() / self._unit
        far = squared.gather(1, wanted[:, None]).mean()
        loss = F.cross_entropy(-2.0 * squared, wanted) + 0.5 * far
        if self.reading is not None:
            squared = torch.cdist(self._as_read(latent), self._as_read(self.codes)).square()
            squared = squared / self._read_unit
            loss = loss + F.cross_entropy(-2.0 * squared, wanted)
        return loss, (squared.argmin(1) == wanted).float()

    def judge(self, model: str) -> PlainSentences | None:
        """Return what refuses instructions; None where no plain sentence says `NOTHING`."""
        sentences = tuple(sorted(self._index, key=self._index.__getitem__))
        if NOTHING not in self._index:
            return None
        codes = self.codes.detach().cpu()
        return PlainSentences(codes, self._index[NOTHING], self._unit, model, sentences)

    def folded(self) -> LatentHead:
        """Return the head with `shift` and `scale` in its first layer."""
        dim = self.codes.shape[1]
        whole = LatentHead(self.config, self.head.hidden, dim, width=dim)
        state = {k: v.detach().clone() for k, v in self.head.state_dict().items()}
        weight = state["neck.weight"] / self.scale
        state["neck.bias"] = state["neck.bias"] - weight @ self.shift
        state["neck.weight"] = weight
        whole.load_state_dict(state)
        return whole


class Learner(nn.Module):
    """A LLaVA with its read-out.

    Args:
        model: transformers' `LlavaForConditionalGeneration`.
        checkpoint: what it was loaded from.
        sight: the read-out without language.
        mean, std: of the processor's normalisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        sight: Sight,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.model, self.sight = model.requires_grad_(False), sight
        self.image_token_id = checkpoint.image_token_id
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] to projected image tokens (B, n_image, hidden)."""
        weight = self.model.model.multi_modal_projector.linear_1.weight
        output = self.model.model.get_image_features(
            pixel_values=((pixels - self.mean) / self.std).to(weight.dtype), return_dict=True
        )
        return torch.stack(list(output.pooler_output))

    def answers(
        self,
        tokens: Tensor | None,
        packed: Packed,
        layers: Sequence[int] = (),
        act: Tensor | None = None,
    ) -> Answers:
        """Ask.

        Args:
            tokens: (B, n_image, hidden), or None without vision.
            packed: the questions.
            layers: of the language model, whose states are wanted.
            act: (n, hidden), `<ACT>`; None takes the model's own rows for it.
        """
        embeddings = self.model.get_input_embeddings()(packed.ids)
        if act is not None:
            rows, places = act[packed.act.clamp_min(0)], (packed.act >= 0).unsqueeze(-1)
            embeddings = torch.where(places, rows.to(embeddings.dtype), embeddings)
        start, stop = packed.image
        if tokens is not None:
            head, rest = embeddings[:, :start], embeddings[:, stop:]
            embeddings = torch.cat([head, tokens.to(embeddings.dtype), rest], dim=1)
        # Added to the scores: the one form that every attention of transformers takes.
        hidden = torch.zeros(packed.mask.shape, dtype=embeddings.dtype, device=embeddings.device)
        hidden.masked_fill_(~packed.mask, torch.finfo(embeddings.dtype).min)
        output = self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=hidden,
            position_ids=packed.positions,
            use_cache=False,
            output_hidden_states=bool(layers),
        )
        states = output.last_hidden_state
        places = packed.wanted != IGNORED
        wanted = packed.wanted[places]
        logits = self.model.lm_head(states[places]).float()
        loss = F.cross_entropy(logits, wanted)
        right = _whole(logits.argmax(1) == wanted, packed, places)
        return Answers(loss, right, tuple(output.hidden_states[layer] for layer in layers))


def _whole(hit: Tensor, packed: Packed, places: Tensor) -> Tensor:
    """Which answers are right in all of their tokens: (B, questions), NaN where there is none."""
    batch = packed.owner.shape[0]
    most = int(packed.owner.max()) + 1
    key = torch.arange(batch, device=hit.device)[:, None] * most + packed.owner
    key = key[places]
    asked = torch.zeros(batch * most, device=hit.device).index_add_(
        0, key, torch.ones_like(key).float()
    )
    missed = torch.zeros(batch * most, device=hit.device).index_add_(0, key, (~hit).float())
    right = (missed == 0).float().masked_fill(asked == 0, float("nan"))
    return right.view(batch, most)
