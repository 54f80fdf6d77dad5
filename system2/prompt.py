"""What System 2 is asked, in one place, so that every engine sees the same sequence and image.

The prompt is the paper's (Sec. 5.2, Appendix A.4): image, instruction, and `<ACT>` last.
Ids are made here and handed to the engines as ids: strings with special tokens in them are
read differently by different processors, and then two engines disagree. Images pass one check:
a float image or a grey one would be silently rescaled or broadcast by most processors and come
out as a plausible, wrong latent, so anything but what is promised is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

# Text to ids and to the (start, stop) character range of each, without special tokens added.
Tokenize = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
Around = tuple[tuple[int, ...], tuple[int, ...]]
MIN_SIDE, MAX_SIDE = 16, 4096  # pixels of an image's sides


class BadInstruction(ValueError):
    """An instruction that cannot be encoded; the message says which and why."""


class BadImage(ValueError):
    """An image that cannot be encoded; the message says which and why."""


def with_offsets(tokenizer: Any) -> Tokenize:
    """Return what `PromptBuilder` asks of a fast tokenizer of transformers."""

    def tokenize(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    return tokenize


@dataclass(frozen=True, slots=True)
class Template:
    """The words around the image, the instruction and `<ACT>`."""

    name: str
    head: str  # before the image
    body: str  # between image and instruction
    tail: str  # between instruction and <ACT>
    alone: str | None = None  # before the instruction where no image is shown; None: the head


_VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the human's questions. USER: "
)
TEMPLATES = {
    template.name: template
    for template in (
        # LLaVA 1.5's conversation format, as the paper uses it.
        Template("llava_v1", _VICUNA, "\n", " ASSISTANT: "),
        # The chat format that SmolLM2 was tuned on, without a system message: 9 tokens.
        Template("chatml", "<|im_start|>user\n", "\n", "<|im_end|>\n<|im_start|>assistant\n"),
    )
}
# The two questions of the public training recipe; the first is the one asked at run time.
QUESTIONS = ("Can you {x}?", "Can you control the robot to {x}?")


def asked_of_robot(instruction: str) -> str:
    """Return an instruction in the question that the robot's System 2 is asked."""
    return QUESTIONS[0].format(x=clean_instruction(instruction))


def words_of_robot(text: str) -> tuple[int, int]:
    """Return the range of characters of `asked_of_robot` that are the instruction."""
    before, after = QUESTIONS[0].split("{x}")
    return len(before), len(text) - len(after)


_RESERVED = ("<act", "<image", "<pad>", "<s>", "</s>", "<unk>", "<|")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of one prompt lie in the sequence of the language model.

    Half-open ranges of positions after the image placeholder has been expanded; `act` is
    always the end of the sequence.
    """

    length: int
    image: tuple[int, int]
    text: tuple[int, int]  # the instruction, with the question that it is put into
    act: tuple[int, int]
    words: tuple[int, int] = (0, 0)  # of `text`, the instruction's own words


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with a single image placeholder, and where things lie once it is expanded."""

    ids: tuple[int, ...]
    layout: Layout
    image_at: int  # index of the placeholder in `ids`; -1 without vision
    n_image: int
    around: Around = ((), ())  # what the model's own processor puts before and after the image
    text: str = ""  # what is asked, in words

    def expanded(self, image_token_id: int) -> list[int]:
        """Return the ids with the placeholder repeated once for every image token."""
        if self.image_at < 0:
            return list(self.ids)
        head, tail = self.ids[: self.image_at], self.ids[self.image_at + 1 :]
        before, after = self.around
        return [*head, *before, *([image_token_id] * self.n_image), *after, *tail]


def clean_instruction(text: Any, special: Sequence[str] = ()) -> str:
    """Return the instruction without surrounding white space and closing punctuation.

    Args:
        text: what the user asked for.
        special: every added token of the tokenizer; none may appear in an instruction.

    Raises:
        BadInstruction: not a string, empty, or containing a control token or character.
    """
    if not isinstance(text, str):
        raise BadInstruction(f"instruction: want a string, got {type(text).__name__}")
    clean = text.strip().rstrip(".?! \t\n")
    if not any(character.isalnum() for character in clean):
        raise BadInstruction("instruction: empty; say what the robot is to do")
    lowered = clean.lower()
    for token in (*_RESERVED, *(s.lower() for s in special)):
        if token in lowered:
            raise BadInstruction(f"instruction: contains the control token {token!r}")
    for character in clean:
        if not character.isprintable() and character not in "\t\n":
            raise BadInstruction(f"instruction: contains the control character {character!r}")
    return " ".join(clean.split())


@dataclass(frozen=True, slots=True)
class PromptBuilder:
    """Makes prompts for one checkpoint.

    Attributes:
        tokenize: returns ids without special tokens added.
        bos: prepended when not None.
        image_word: what the tokenizer calls the image: the prompt is then read in one go, as the
            model's own processor reads it (a tokenizer may put a space before the first word of
            what it is given). Empty reads what stands before and after the image apart.
        around: tokens that the model's processor puts around those of the image.
        state_id: stands before `<ACT>` for the robot's own state; None for a System 2 without.
    """

    tokenize: Tokenize
    template: Template
    image_token_id: int
    n_image: int
    act_ids: tuple[int, ...]
    bos: int | None = None
    special: tuple[str, ...] = ()
    max_instruction_tokens: int = 96
    vision: bool = True
    image_word: str = ""
    around: Around = ((), ())
    state_id: int | None = None

    @property
    def max_length(self) -> int:
        """The longest sequence that `__call__` can return, in language-model positions."""
        layout = self("move").layout
        return layout.length - (layout.text[1] - layout.text[0]) + self.max_instruction_tokens

    def __call__(self, instruction: Any, question: str = QUESTIONS[0]) -> Prompt:
        """Return the prompt for one instruction.

        Raises:
            BadInstruction: see `clean_instruction`; or more than `max_instruction_tokens`.
        """
        clean = clean_instruction(instruction, self.special)
        begin = question.index("{x}")
        words = (begin, begin + len(clean))
        state = () if self.state_id is None else (self.state_id,)
        prompt = self.assemble(question.format(x=clean), (*state, *self.act_ids), words)
        if state:
            layout = replace(prompt.layout, act=(prompt.layout.act[0] + 1, prompt.layout.act[1]))
            prompt = replace(prompt, layout=layout)
        n_text = prompt.layout.text[1] - prompt.layout.text[0]
        if n_text > self.max_instruction_tokens:
            raise BadInstruction(
                f"instruction: {n_text} tokens, at most {self.max_instruction_tokens} are allowed"
            )
        return prompt

    def assemble(
        self, text: str, end: Sequence[int], words: tuple[int, int] | None = None
    ) -> Prompt:
        """Join frame, image, `text` and the closing tokens `end` (usually `<ACT>`).

        `words` is the range of characters of `text` that the user said; None takes all.
        """
        begun = [] if self.bos is None else [self.bos]
        before, rest, spans, said_at = self._tokens(text)
        head = begun + before
        inside = _within(spans, said_at, said_at + len(text))
        begin, close = words or (0, len(text))
        said = _within(spans, said_at + begin, said_at + close)
        around = self.around if self.vision else ((), ())
        n_image = self.n_image if self.vision else 0
        first = len(head) + len(around[0])
        offset = first + n_image + len(around[1])
        length = offset + len(rest) + len(end)
        return Prompt(
            ids=(*head, *((self.image_token_id,) if self.vision else ()), *rest, *end),
            layout=Layout(
                length=length,
                image=(first, first + n_image),
                text=(offset + inside[0], offset + inside[-1] + 1),
                act=(length - len(end), length),
                words=(offset + said[0], offset + said[-1] + 1),
            ),
            image_at=len(head) if self.vision else -1,
            n_image=n_image,
            around=around,
            text=text,
        )

    def _tokens(self, text: str) -> tuple[list[int], list[int], list[tuple[int, int]], int]:
        """Return the ids before and after the image, the spans of the latter, and where `text` is.

        Spans and place are in characters of what was tokenized together.
        """
        shape = self.template
        if not self.vision:
            head = shape.head if shape.alone is None else shape.alone
            if shape.alone is None:  # the words before the image, and those after it, are two texts
                before = self.tokenize(head)[0] if head else []
                return before, *self.tokenize(text + shape.tail), 0
            ids, spans = self.tokenize(head + text + shape.tail)
            return [], ids, spans, len(head)
        if not self.image_word:
            before = self.tokenize(shape.head)[0] if shape.head else []
            return before, *self.tokenize(shape.body + text + shape.tail), len(shape.body)
        opening = shape.head + self.image_word + shape.body
        ids, spans = self.tokenize(opening + text + shape.tail)
        at = ids.index(self.image_token_id)
        return ids[:at], ids[at + 1 :], spans[at + 1 :], len(opening)


def _within(spans: Sequence[tuple[int, int]], first: int, last: int) -> list[int]:
    """Return which tokens hold characters of the range."""
    return [i for i, (a, b) in enumerate(spans) if b > first and a < last]


def as_pil(image: Any) -> Image.Image:
    """Return an RGB PIL image from a PIL image or an (H, W, 3) uint8 array.

    Raises:
        BadImage: another type, dtype, shape, colour mode or size.
    """
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise BadImage(f"image: PIL mode {image.mode!r}, want 'RGB'")
        width, height = image.size
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise BadImage(f"image: dtype {image.dtype}, want uint8")
        if image.ndim != 3 or image.shape[2] != 3:
            raise BadImage(f"image: shape {image.shape}, want (height, width, 3)")
        height, width = image.shape[:2]
    else:
        raise BadImage(f"image: {type(image).__name__}, want a PIL image or a uint8 array")
    if not (MIN_SIDE <= height <= MAX_SIDE and MIN_SIDE <= width <= MAX_SIDE):
        raise BadImage(f"image: {height}x{width} pixels, want sides from {MIN_SIDE} to {MAX_SIDE}")
    if isinstance(image, np.ndarray):
        return Image.fromarray(np.ascontiguousarray(image))
    return image


def as_batch(images: Any, instructions: Any) -> tuple[list[Image.Image], list[Any]]:
    """Check a whole request's lengths and images.

    Raises:
        BadImage: lengths differ, the batch is empty, or an image is unusable (its index is named).
    """
    images, instructions = list(images), list(instructions)
    if len(images) != len(instructions):
        raise BadImage(f"images: {len(images)} images for {len(instructions)} instructions")
    if not images:
        raise BadImage("images: none given")
    checked = []
    for index, image in enumerate(images):
        try:
            checked.append(as_pil(image))
        except BadImage as error:
            raise BadImage(f"images[{index}]: {error}") from error
    return checked, instructions
