"""Shapes and questions: small pictures of coloured shapes in a 3 x 3 grid, with questions about them and captions.

Everything is drawn from seeds: the same options give the same files. A drawing task shows that code works and that
answers come from the picture; nothing measured on it says how a model does on photographs.

`basic` has 4 colours and 3 shapes, `compositional` 6 and 4 with questions about left and above. Some pairs of colour
and shape are held out: no picture, question or answer of training has them, and every picture of `comp.jsonl` does.

Writes train.jsonl and captions.jsonl (the same pictures), test.jsonl, comp.jsonl, the pictures, and tokenizer/, whose
tokens are the task's words.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from common import corpus_parser, report, require_output_dir
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from speechkd.data.manifest import write_manifest

Variant = Literal["basic", "compositional"]

IMAGE_PIXELS, OVERSAMPLING, CELL_PIXELS = 36, 3, 36  # of the picture, of the canvas it is reduced from, and its cells
NOISE_LEVELS = 8.0
MAX_OBJECTS, QUESTIONS_PER_IMAGE = 4, 4
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
    "purple": (160, 50, 190),
    "white": (235, 235, 235),
}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
HELD_OUT = (("red", "circle"), ("green", "square"), ("blue", "triangle"), ("yellow", "cross"))
SEEDS = {"train": 1, "test": 2, "comp": 3}
QUESTION_WORDS = "what color is the shape one at where how many objects ones there a describe left of above".split()
SPECIAL_TOKENS = ["<pad>", "<eos>", "<image>"]


class Shape(NamedTuple):
    """One object of a scene."""

    color: str
    shape: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


class Task(NamedTuple):
    """Colours and shapes of a variant, and its pairs that training never has."""

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    held_out: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]

    @property
    def seen_pairs(self) -> list[tuple[str, str]]:
        return [(c, s) for c in self.colors for s in self.shapes if (c, s) not in self.held_out]


KINDS = ("color", "shape", "at", "where", "count", "exist")
TASKS: dict[str, Task] = {
    "basic": Task(tuple(COLORS)[:4], tuple(PLURALS)[:3], HELD_OUT[:3], KINDS),
    "compositional": Task(tuple(COLORS), tuple(PLURALS), HELD_OUT, (*KINDS, "relation")),
}
# A question about objects of a scene, `about`, with its answer; None where it does not apply. Where `about` is not the
# scene itself, no question is about anything else.
Question = tuple[str, str] | None


def draw_scene(draw: random.Random, task: Task, *, held_out: bool) -> list[Shape]:
    """One to four objects in different cells; with `held_out` the first is of such a pair."""
    count = draw.randint(1, MAX_OBJECTS)
    cells = draw.sample(range(len(ROWS) * len(COLUMNS)), count)
    pairs = [draw.choice(task.seen_pairs) for _ in cells]
    if held_out:
        pairs[0] = draw.choice(task.held_out)
    return [Shape(*pair, *divmod(cell, len(COLUMNS))) for pair, cell in zip(pairs, cells, strict=True)]


def render(scene: list[Shape], draw: random.Random, noise: np.random.Generator) -> Image.Image:
    """The picture of a scene, 36 x 36 RGB, with the colours, sizes, places and noise of the two generators."""
    grey = draw.randint(90, 130)
    side = IMAGE_PIXELS * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), (grey, grey, grey))
    pen = ImageDraw.Draw(canvas)
    for item in scene:
        color = tuple(min(255, max(0, level + draw.randint(-25, 25))) for level in COLORS[item.color])
        x, y = (int((i + 0.5) * CELL_PIXELS) + draw.randint(-3, 3) for i in (item.column, item.row))
        r = draw.randint(11, 15)
        if item.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        elif item.shape == "square":
            pen.rectangle((x - r + 2, y - r + 2, x + r - 2, y + r - 2), fill=color)
        elif item.shape == "triangle":
            pen.polygon([(x, y - r), (x - r, y + r - 2), (x + r, y + r - 2)], fill=color)
        else:
            arm = r // 3
            pen.rectangle((x - r, y - arm, x + r, y + arm), fill=color)
            pen.rectangle((x - arm, y - r, x + arm, y + r), fill=color)
    pixels = np.asarray(canvas.resize((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.BILINEAR), dtype=np.float64)
    pixels = pixels + noise.normal(0.0, NOISE_LEVELS, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def ask_color(scene: list[Shape], draw: random.Random, task: Task, about: list[Shape]) -> Question:
    asked = [item for item in about if sum(other.shape == item.shape for other in scene) == 1]
    item = draw.choice(asked) if asked else None
    return item and (f"what color is the {item.shape} ?", item.color)


def ask_shape(scene: list[Shape], draw: random.Random, task: Task, about: list[Shape]) -> Question:
    asked = [item for item in about if sum(other.color == item.color for other in scene) == 1]
    item = draw.choice(asked) if asked else None
    return item and (f"what shape is the {item.color} one ?", item.shape)


def ask_at(scene: list[Shape], draw: random.Random, task: Task, about: list[Shape]) -> Question:
    taken = {(item.row, item.column) for item in scene}
    empty = [(r, c) for r in range(len(ROWS)) for c in range(len(COLUMNS)) if (r, c) not in taken]
    if about is scene and draw.random() < 0.2:
        row, column = draw.choice(empty)
        return f"what is at {ROWS[row]} {COLUMNS[column]} ?", "nothing"
    item = draw.choice(about)
    return f"what is at {item.place} ?", item.name


def unique(scene: list[Shape], about: list[Shape]) -> list[Shape]:
    """Objects of these whose pair of colour and shape comes once in the scene."""
    return [item for item in about if sum(other.name == item.name for other in scene) == 1]


def ask_where(scene: list[Shape], draw: random.Random, task: Task, about: list[Shape]) -> Question:
    asked = unique(scene, about)
    item = draw.choice(asked) if asked else None
    return item and (f"where is the {item.name} ?", item.place)


def ask_count(scene: list[Shape], draw: random.Random, task: Task, about: list[Shape]) -> Question:
    what = draw.choice(("objects", "shape", "color"))
    item = draw.choice(about)
    color, shape = item.color, item.shape
    if about is scene and draw.random() < 0.5:
        color, shape = draw.choice(task.colors), draw.choice(task.shapes)
    if what == "objects":
        return "how many objects ?", str(len(scene))
    if what == "shape":
        return f"how many {PLURALS[shape]} ?", str(sum(other.shape == shape for other in scene))
    return f"how many {color} ones ?", str(sum(other.color == color for other in scene))


def ask_exist(scene: list[Shape], draw: random.Random, task: Task, about: list[Shape]) -> Question:
    present = {(item.color, item.shape) for item in scene}
    if draw.random() < 0.5:
        return f"is there a {draw.choice(about).name} ?", "yes"
    absent = [pair for pair in task.seen_pairs if pair not in present]
    colors, shapes = {item.color for item in scene}, {item.shape for item in scene}
    alike = [pair for pair in absent if pair[0] in colors or pair[1] in shapes]  # harder to tell apart
    color, shape = draw.choice(alike if alike and draw.random() < 0.7 else absent)
    return f"is there a {color} {shape} ?", "no"


def ask_relation(scene: list[Shape], draw: random.Random, task: Task, about: list[Shape]) -> Question:
    is_column = draw.random() < 0.5

    def position(item: Shape) -> int:
        return item.column if is_column else item.row

    single = unique(scene, scene)
    pairs = [(a, b) for a in unique(scene, about) for b in single if position(a) != position(b)]
    if not pairs:
        return None
    a, b = draw.choice(pairs)
    is_yes = draw.random() < 0.5
    if (position(a) < position(b)) != is_yes:
        a, b = b, a
    return f"is the {a.name} {'left of' if is_column else 'above'} the {b.name} ?", "yes" if is_yes else "no"


ASK: dict[str, Callable[[list[Shape], random.Random, Task, list[Shape]], Question]] = {
    "color": ask_color,
    "shape": ask_shape,
    "at": ask_at,
    "where": ask_where,
    "count": ask_count,
    "exist": ask_exist,
    "relation": ask_relation,
}


def ask(scene: list[Shape], draw: random.Random, task: Task, *, held_out: bool) -> list[tuple[str, str, str]]:
    """Four questions about a scene: kind, question and answer. With `held_out` all are about its first object."""
    kinds = [kind for kind in task.kinds if not (held_out and kind == "exist")]  # the answer would always be yes
    about = scene[:1] if held_out else scene  # a new list, also of a scene with one object
    questions: list[tuple[str, str, str]] = []
    while len(questions) < QUESTIONS_PER_IMAGE:
        kind = draw.choice(kinds)
        question = ASK[kind](scene, draw, task, about)
        if question is not None:
            questions.append((kind, *question))
    return questions


def caption(scene: list[Shape]) -> str:
    """All objects in reading order."""
    ordered = sorted(scene, key=lambda item: (item.row, item.column))
    return " ; ".join(f"{item.name} at {item.place}" for item in ordered)


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers as a conversation about one picture."""
    rounds = []
    for number, (question, answer) in enumerate(pairs):
        value = question if number else f"<image>\n{question}"
        rounds += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return rounds


def rows_of(split: str, count: int, task: Task, folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Manifest rows of a split with the caption of each; writes the pictures."""
    draw, noise = random.Random(SEEDS[split]), np.random.default_rng(SEEDS[split])
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(count), desc=split, unit="image", disable=None):
        held_out = split == "comp"
        scene = draw_scene(draw, task, held_out=held_out)
        questions = ask(scene, draw, task, held_out=held_out)
        image = f"images/{split}/{number:05d}.png"
        render(scene, draw, noise).save(folder / image)
        yield (
            {
                "id": f"{split}-{number:05d}",
                "image": image,
                "conversation": turns([(question, answer) for _, question, answer in questions]),
                "kinds": [kind for kind, _, _ in questions],
            },
            caption(scene),
        )


def words_of(task: Task) -> list[str]:
    """Every word of questions, answers and captions, once."""
    plurals = [PLURALS[shape] for shape in task.shapes]
    numbers = [str(number) for number in range(MAX_OBJECTS + 1)]
    words = [*QUESTION_WORDS, *task.colors, *task.shapes, *plurals, *ROWS, *COLUMNS, *numbers]
    words += ["nothing", "yes", "no", "?", ";"]
    return list(dict.fromkeys(word for word in words if word not in ("of", "above") or "relation" in task.kinds))


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """One token a word; pad 0, eos 1, image 2."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL_TOKENS, *words_of(task)])}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, eos, image = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, extra_special_tokens={"image_token": image}
    )


def prepare_shapes_vqa(
    output_dir: str | Path, *, variant: Variant = "basic", num_train: int = 12_000, num_test: int = 600
) -> dict[str, int]:
    """Draw the pictures and write manifests and tokenizer.

    Args:
        output_dir: folder for all of it.
        variant: `basic` or `compositional`.
        num_train: pictures to train on, each with four questions and one caption.
        num_test: pictures of test.jsonl, and as many of comp.jsonl.

    Returns:
        Number of pictures of each split, and of tokens.

    Raises:
        ValueError: the variant is unknown, a number is below 1, or the folder cannot be made.
    """
    if variant not in TASKS:
        raise ValueError(f"variant must be one of {', '.join(TASKS)}, got {variant!r}")
    if num_train < 1 or num_test < 1:
        raise ValueError(f"num_train and num_test must be 1 or more, got {num_train} and {num_test}")
    folder, task = require_output_dir(output_dir), TASKS[variant]
    captions = []

    def train_rows() -> Iterator[dict[str, Any]]:
        for row, text in rows_of("train", num_train, task, folder):
            captions.append({**row, "conversation": turns([("describe ?", text)]), "kinds": ["caption"]})
            yield row

    make_tokenizer(task).save_pretrained(folder / "tokenizer")
    counts = {"train": write_manifest(folder / "train.jsonl", train_rows())}
    write_manifest(folder / "captions.jsonl", captions)
    for split in ("test", "comp"):
        rows = (row for row, _ in rows_of(split, num_test, task, folder))
        counts[split] = write_manifest(folder / f"{split}.jsonl", rows)
    return {**counts, "tokens": len(SPECIAL_TOKENS) + len(words_of(task))}


def main() -> None:
    parser = corpus_parser(__doc__)
    parser.add_argument("--variant", choices=tuple(TASKS), default="basic")
    parser.add_argument("--num-train", type=int, default=12_000, help="pictures to train on")
    parser.add_argument("--num-test", type=int, default=600, help="pictures of test.jsonl, and of comp.jsonl")
    options = parser.parse_args()

    def prepare() -> dict[str, int]:
        return prepare_shapes_vqa(
            options.output_dir, variant=options.variant, num_train=options.num_train, num_test=options.num_test
        )

    report(prepare, options.json)


if __name__ == "__main__":
    main()
