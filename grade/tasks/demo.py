"""A built-in task: a small grammar that writes labelled film reviews.

A review is an opening and one to three sentences of opinion. Most openings are neutral (who watched what, and
when), so that a language model trained on these reviews continues them either way and a policy has something
to choose. Opinions may concede a point to the other side, so that one word does not settle a review.

Everything follows from a seed: no download, no files.
"""

from __future__ import annotations

import hashlib
import random
import re

from grade.config import TaskConfig
from grade.errors import GradeError
from grade.tasks.base import Example
from grade.tasks.texts import TextTask, cut_splits

SEED = 0
"""Seed of the reviews themselves. `task.split_seed` shuffles them, as it does a file's rows."""
TEST_REVIEWS = 500
PRETRAINING_REVIEWS = 6000
PARTS = ("train", "test", "pretraining")
"""A text's hash says which part it belongs to, so that no text is in two, whatever the sizes and seeds."""
MIN_WORDS, MAX_WORDS = 15, 45

_NEUTRAL_SHARE, _AGREEING_SHARE = 0.7, 0.25  # of openings; the rest speak against the label
_ATTEMPTS_PER_REVIEW = 200  # a part takes about one text in four, so this is far out of reach until texts run out

# `{name}` is a neutral symbol, `{name+}` speaks for the review's label and `{name-}` against it.
_NEUTRAL = {
    "opening": (
        "I {watched} this {genre} {when} {company}.",
        "I {watched} this {film} {company} {when}.",
        "We {watched} it {place} {when}.",
        "My {friend} and I {watched} this {film} {place}.",
        "My {friend} picked this {genre} for our {day} night.",
        "This is a {genre} about {hero} {plot}.",
        "The {film} follows {hero} {plot}.",
        "It tells the story of {hero} {plot}.",
        "The story is set in {setting} and follows {hero}.",
        "This {genre} takes place in {setting}.",
        "It is a {genre} set in {setting}.",
        "Somewhere in {setting} we meet {hero} {plot}.",
    ),
    "opinion": (
        "The {aspect} was {degree} {adjective+}.",
        "The {aspects} were {degree} {adjective+}.",
        "The {aspect} was {adjective+} and the {aspects} were {adjective+}.",
        "The {actor} gives a {adjective+} performance from start to finish.",
        "I {felt+} the {aspect} and the {aspects}.",
        "I {felt+} how the director {handled} the {aspect}.",
        "Every scene with the {actor} is {adjective+}.",
        "The director {handled} the {aspect} with {manner+}.",
        "Although the {aspect} was {adjective-}, the {aspects} were {adjective+} and the {actor} was "
        "{adjective+}.",
        "By the end I was {state+}.",
        "The second half is even more {adjective+} than the first.",
        "You can tell that the writers worked with {manner+}.",
        "For a {genre} it is {degree} {adjective+}.",
        "In short, this {film} is {adjective+}.",
        "My {friend} thought that the {actor} was {adjective+}, and so did I.",
        "What stayed with me is the {adjective+} {aspect}.",
        "It has {adjective+} {aspects} and a {adjective+} {actor}.",
        "Even the {aspects} are {adjective+} here.",
    ),
    "watched": ("watched", "saw", "caught"),
    "film": ("film", "movie", "picture"),
    "genre": (
        "western", "thriller", "comedy", "crime story", "war film", "love story", "road movie", "mystery",
        "horror film", "family drama", "musical", "spy film",
    ),
    "when": (
        "last night", "on Sunday", "over the weekend", "on a rainy evening", "after dinner", "yesterday",
        "during the holidays", "on Friday", "late at night", "a week ago", "last summer",
    ),
    "company": (
        "with my sister", "with two friends", "with my whole family", "on my own", "with my brother",
        "with an old friend", "with the neighbours", "with my parents", "with my students",
    ),
    "place": (
        "at the local cinema", "at home", "at a small festival", "on television", "on an old screen",
        "in a crowded theatre", "on a long flight", "at school", "in an open air cinema",
    ),
    "friend": ("sister", "brother", "neighbour", "father", "mother", "wife", "husband", "cousin", "teacher"),
    "day": ("Monday", "Friday", "Saturday", "birthday", "movie"),
    "hero": (
        "a young doctor", "a retired teacher", "an old farmer", "a travelling salesman", "a tired detective",
        "a shy student", "an ageing singer", "a small town sheriff", "a widowed father", "a famous thief",
        "a prison guard", "a taxi driver",
    ),
    "plot": (
        "who moves to a new city", "who looks for a missing child", "who inherits an old hotel",
        "who has one week to pay a debt", "who meets a stranger on a train", "who hides a stolen painting",
        "who starts again after a long illness", "who finds a letter in the attic",
        "who must cross the desert",
        "who plans one last robbery", "who returns home after the war", "who sees a murder",
    ),
    "setting": (
        "a fishing village", "Paris after the war", "a mining town", "the deep south", "a boarding school",
        "a space station", "London in winter", "a quiet suburb", "the mountains of Spain", "an empty hotel",
        "a small island", "the near future",
    ),
    "aspect": (
        "plot", "story", "acting", "music", "script", "ending", "pacing", "photography", "editing", "humour",
        "dialogue", "opening scene", "camera work", "lighting",
    ),
    "aspects": (
        "characters", "jokes", "songs", "costumes", "effects", "action scenes", "sets", "twists",
        "supporting actors", "love scenes",
    ),
    "actor": (
        "lead actor", "lead actress", "young star", "villain", "child actor", "main couple", "narrator",
    ),
    "degree": ("really", "simply", "quite", "truly", "very"),
    "handled": ("handles", "treats", "stages"),
    "anyone": (
        "anyone", "my friends", "every fan of the genre", "the whole family", "people who like a {genre}",
    ),
}  # fmt: skip

# The same symbols twice: what a positive review (1) and a negative one (0) fills in.
_POLAR = {
    1: {
        "opening": (
            "What a {adjective+} {film} this turned out to be.",
            "I {felt+} this {film} from the first minute.",
            "Of all the films that I {watched} this year, this is among the best.",
            "This {genre} is {degree} {adjective+}.",
        ),
        "closing": (
            "I would gladly see it again.",
            "I recommend it to {anyone}.",
            "It deserves every prize that it can get.",
            "Treat yourself and see it soon.",
            "It is worth every minute.",
            "Go and see it with {anyone}, it is a gem.",
        ),
        "adjective": (
            "wonderful", "brilliant", "superb", "moving", "funny", "charming", "beautiful", "excellent",
            "delightful", "gripping", "clever", "touching",
        ),
        "felt": ("loved", "enjoyed", "adored", "liked"),
        "manner": (
            "great skill", "real passion", "gentle wit", "quiet grace", "genuine care", "joy and style",
        ),
        "state": (
            "smiling", "crying happy tears", "on the edge of my seat", "cheering", "completely won over",
            "enchanted",
        ),
    },
    0: {
        "opening": (
            "What a {adjective+} {film} this turned out to be.",
            "I {felt+} this {film} from the first minute.",
            "Of all the films that I {watched} this year, this is among the worst.",
            "This {genre} is {degree} {adjective+}.",
        ),
        "closing": (
            "I would not even finish it for money.",
            "I cannot suggest it to {anyone}.",
            "It wastes every idea that it has.",
            "Save yourself the trouble and skip it.",
            "I regret every minute.",
            "Avoid it, and warn {anyone}.",
        ),
        "adjective": (
            "terrible", "boring", "awful", "dull", "clumsy", "ugly", "horrible", "tedious", "stupid",
            "dreadful", "wooden", "messy",
        ),
        "felt": ("hated", "disliked", "despised", "resented"),
        "manner": (
            "little effort", "no talent", "cheap tricks", "a heavy hand", "utter contempt", "lazy shortcuts",
        ),
        "state": (
            "yawning", "half asleep", "looking at my watch", "ready to leave", "angry", "bored to death",
        ),
    },
}  # fmt: skip

_SLOT = re.compile(r"\{(\w+)([+-]?)\}")
_VOWEL_AFTER_A = re.compile(r"\b([Aa]) (?=[aeiou])")
_WORD = re.compile(r"[A-Za-z]+")


def _words(*rules: str) -> set[str]:
    """Lower-case words of rules, without their slots."""
    return {word.lower() for rule in rules for word in _WORD.findall(_SLOT.sub(" ", rule))}


def _lexicon(label: int) -> frozenset[str]:
    """Words that only reviews (or concessions) of one label use."""
    own, other = ({w for rules in _POLAR[side].values() for w in _words(*rules)} for side in (label, 1 - label))
    return frozenset(own - other - {w for rules in _NEUTRAL.values() for w in _words(*rules)})


POSITIVE_WORDS = _lexicon(1)
NEGATIVE_WORDS = _lexicon(0)


def lexicon_score(text: str) -> int:
    """Positive minus negative words of `text`: above 0 in every positive review, below 0 in every negative
    one.

    A judge that has nothing to do with the trained reward.
    """
    words = [word.lower() for word in _WORD.findall(text)]
    return sum(word in POSITIVE_WORDS for word in words) - sum(word in NEGATIVE_WORDS for word in words)


class _Writer:
    """Expands symbols for one review; a symbol does not come out the same way twice while there is another
    way."""

    def __init__(self, label: int, generator: random.Random):
        self.label = label
        self.generator = generator
        self.used: set[str] = set()

    def write(self, symbol: str, sign: str = "") -> str:
        """Text of `symbol`: neutral, for the label ('+') or against it ('-')."""
        if sign:
            rules = _POLAR[self.label if sign == "+" else 1 - self.label][symbol]
        else:
            rules = _NEUTRAL[symbol]
        rule = self.generator.choice([rule for rule in rules if rule not in self.used] or list(rules))
        self.used.add(rule)

        # Inside the other side's rules '+' means that side.
        turn = {"+": sign or "+", "-": {"": "-", "+": "-", "-": "+"}[sign], "": ""}
        return _SLOT.sub(lambda slot: self.write(slot[1], turn[slot[2]]), rule)

    def review(self) -> str:
        """A whole review, whose length and balance are still to be checked."""
        share = self.generator.random()
        sign = "" if share < _NEUTRAL_SHARE else "+" if share < _NEUTRAL_SHARE + _AGREEING_SHARE else "-"
        sentences = [self.write("opening", sign)]
        closing = self.generator.random() < 0.4
        opinions = self.generator.choice((1, 2, 2) if closing else (2, 2, 3))
        sentences += [self.write("opinion") for _ in range(opinions)]
        if closing:
            sentences.append(self.write("closing", "+"))
        return _VOWEL_AFTER_A.sub(r"\1n ", " ".join(sentences))


def write_reviews(n: int, seed: int = SEED, part: str = "train") -> list[Example]:
    """`n` distinct reviews, negative and positive in turn; the first m of them are `write_reviews(m, seed,
    part)`.

    Args:
        n: how many.
        seed: of the generator; another seed gives other reviews, with some in common.
        part: one of `PARTS`. Texts of different parts never coincide.

    Returns:
        Examples with ids `<part>/<number>`, of 2 to 4 sentences and 15 to 45 words.

    Raises:
        GradeError: the grammar has not that many.
        ValueError: unknown part.
    """
    if part not in PARTS:
        raise ValueError(f"no part {part!r}: there are {', '.join(PARTS)}")
    generator = random.Random(f"{seed} {part}")
    seen: set[str] = set()
    reviews: list[Example] = []
    while len(reviews) < n:
        label = len(reviews) % 2
        for _ in range(_ATTEMPTS_PER_REVIEW):
            text = _Writer(label, generator).review()
            # An opening against the label may outweigh a single opinion: such a review has no clear label.
            clear = (lexicon_score(text) > 0) if label else (lexicon_score(text) < 0)
            if clear and text not in seen and MIN_WORDS <= len(text.split()) <= MAX_WORDS and _part(text) == part:
                break
        else:
            raise GradeError(f"The demo's grammar cannot write {n} distinct reviews: lower task.policy_examples.")
        seen.add(text)
        reviews.append(Example(f"{part}/{len(reviews)}", text, label))
    return reviews


def pretraining_reviews() -> list[Example]:
    """The reviews that `grade.built_in.demo_model` trains the language model on; none of them is in the task."""
    return write_reviews(PRETRAINING_REVIEWS, part="pretraining")


def load(settings: TaskConfig) -> TextTask:
    """The demo task: as many training reviews as the split settings ask for, and `TEST_REVIEWS` for the test.

    Raises:
        GradeError: more reviews are asked for than the grammar can write.
    """
    rows = settings.reward_examples + settings.policy_examples + settings.validation_examples + settings.judge_examples
    return cut_splits(
        write_reviews(rows), write_reviews(TEST_REVIEWS, part="test"), settings, source="built-in grammar"
    )


def _part(text: str) -> str:
    return PARTS[hashlib.sha256(text.encode()).digest()[0] % len(PARTS)]
