"""A synthetic IEMOCAP: five sessions of acted dialogues spoken by espeak-ng, in the layout of the real one.

Every turn has a latent valence and arousal: what its scenario brings, a mood that drifts through the dialogue,
and chance. They choose the words, rate, pitch, pitch range and loudness, all with noise, arousal more audibly
than valence. Three observers then rate the turn, each with a bias, and the header holds their mean. So there is
something to hear, something to guess without listening (the scenario), something that the turns before tell, and
a human ceiling.

Results on it say that the program works, and nothing about people.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from cvrunner.data.iemocap import SYNTHETIC_MARK
from cvrunner.data.speech_synthesis import Timbre, Voice, synthesizer
from cvrunner.data.utterance import SAMPLE_RATE_HZ
from cvrunner.errors import ConfigError
from cvrunner.files import write_folder_atomically

RECIPE: Final = 1
"""Raise it whenever the same seed would give other files."""
SESSIONS: Final = 5
SMALLEST: Final = 40
_SCALE = (1, 2, 3, 4, 5)
_README = (
    "This is not IEMOCAP. It is synthetic speech in IEMOCAP's file layout, made by `cvrunner demo-data` to try the "
    "program; no result on it says anything about people. SYNTHETIC.json has the seed.\n"
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a dialogue is about: the same in every session."""

    name: str
    valence: float
    """Mean of the latent valence, relative to the middle of the scale."""
    arousal: float
    openings: tuple[str, ...]
    """Beginnings of sentences, which tell the scenario but not the mood."""


SCENARIOS: Final = (
    Scenario(
        "impro01",
        -0.55,
        0.30,
        (
            "They sent me to this counter again",
            "You need the other form for that",
            "I have waited in this line since nine",
            "The clerk wants to see my old passport",
            "My number was called an hour ago",
        ),
    ),
    Scenario(
        "impro02",
        -0.70,
        -0.30,
        (
            "The ship leaves early on Thursday",
            "My bags are standing in the hall",
            "I will be gone until the autumn",
            "You can write to me at the base",
            "The children are still asleep upstairs",
        ),
    ),
    Scenario(
        "impro03",
        0.80,
        0.35,
        (
            "We are going to have a wedding in June",
            "I told my sister about the ring",
            "The small church by the lake is free",
            "Your mother has called me three times",
            "We found a house near the school",
        ),
    ),
    Scenario(
        "impro05",
        -0.50,
        0.20,
        (
            "The airline has lost both my suitcases",
            "They put my luggage on another plane",
            "There was a green label on the bag",
            "The man at the desk gave me a voucher",
            "My papers were in the front pocket",
        ),
    ),
    Scenario(
        "impro07",
        0.65,
        0.10,
        (
            "The letter from the university came today",
            "I opened the envelope in the kitchen",
            "The courses begin in the last week of August",
            "They gave me a place for next year",
            "I still have to find a room there",
        ),
    ),
    Scenario(
        "script01_1",
        0.05,
        -0.15,
        (
            "The old apple tree fell in the storm",
            "Your brother slept until nearly noon",
            "The neighbours came over for coffee",
            "I read the whole newspaper this morning",
            "There is a light on in the garage",
        ),
    ),
    Scenario(
        "script02_2",
        -0.10,
        -0.35,
        (
            "The moon comes up behind the pier",
            "We used to walk along this beach",
            "The tide is lower than last night",
            "You brought the same blanket as then",
            "The little fish come in with the waves",
        ),
    ),
    Scenario(
        "script03_2",
        0.30,
        -0.10,
        (
            "You have kept the piano after all",
            "The hotel looks just like it did",
            "I heard you got married in Vienna",
            "The band is playing that same tune",
            "Five years is a long time for us",
        ),
    ),
)

_CLAUSES: Final = (
    (
        "and it has ruined absolutely everything",
        "and I hate every single minute of it",
        "and nobody has even said sorry to me",
        "it is a terrible and hopeless mess",
        "and the pain of it will not stop",
        "we have lost it all for good",
    ),
    (
        "and I do not like that at all",
        "it is rather a disappointment to me",
        "and I am getting tired of the trouble",
        "but nothing works the way it should",
        "and that part does worry me a little",
        "I had really hoped for something better",
    ),
    (
        "that is what they have told me",
        "and we will hear more on Monday",
        "so I made a note of the time",
        "it usually takes about an hour or so",
        "and then we continue from that point",
        "as far as I know it is the usual way",
    ),
    (
        "and I think that is quite nice",
        "it looks a bit better than before",
        "and I do not mind it any more",
        "so we may well be in luck there",
        "and it made me smile for a moment",
        "that was kind of you to say",
    ),
    (
        "and I love it, it is wonderful",
        "this is the best day of my life",
        "and we laughed until we could not speak",
        "I am so happy I could dance with you",
        "what a beautiful and lovely surprise",
        "and everyone is full of joy about it",
    ),
)
"""By valence, one to five."""

_TRAILING_LETTERS: Final = {(2, "script03_2"): "a", (3, "impro05"): "a", (5, "script01_1"): "b"}
"""Some dialogues of the real corpus were recorded in parts, named by a letter."""

_OBSERVERS: Final = (
    ("E1", "E2", "E4"),
    ("E1", "E3", "E4"),
    ("E2", "E3", "E4"),
    ("E1", "E2", "E5"),
    ("E2", "E4", "E6"),
)
"""By session."""


@dataclass(frozen=True, slots=True)
class _Speaker:
    timbre: Timbre
    rate_wpm: int


_SPEAKERS: Final = {
    "1F": _Speaker(Timbre(165, 235, (112, 110, 108)), 185),
    "1M": _Speaker(Timbre(82, 125, (98, 100, 100)), 180),
    "2F": _Speaker(Timbre(180, 270, (118, 114, 110)), 195),
    "2M": _Speaker(Timbre(95, 140, (104, 100, 97)), 190),
    "3F": _Speaker(Timbre(150, 210, (108, 112, 104)), 175),
    "3M": _Speaker(Timbre(72, 110, (92, 95, 97)), 170),
    "4F": _Speaker(Timbre(175, 245, (120, 108, 112)), 180),
    "4M": _Speaker(Timbre(105, 155, (100, 104, 104)), 200),
    "5F": _Speaker(Timbre(190, 285, (115, 118, 115)), 190),
    "5M": _Speaker(Timbre(88, 135, (95, 102, 94)), 175),
}
"""By session and gender."""


@dataclass(frozen=True, slots=True)
class _Turn:
    id: str
    gender: str
    valence: float
    """Latent, relative to the middle of the scale; so are the other two."""
    arousal: float
    dominance: float


@dataclass(frozen=True, slots=True)
class _Rating:
    rater: str
    valence: int
    arousal: int
    dominance: int | None
    """Some lines of the real corpus lack it."""


def write_demo_corpus(root: Path, *, seed: int = 0, utterances: int = 320) -> None:
    """Make the folder `root` with a synthetic IEMOCAP of `utterances` turns, about 2.7 s each.

    Does nothing if `root` is that corpus already. Otherwise the same seed, number and espeak-ng give the same bytes.
    Raises ConfigError if `root` is anything else (nothing of it is touched), for fewer than 40 utterances, and
    without the extra `demo`.
    """
    if utterances < SMALLEST:
        raise ConfigError(f"corpus.demo.utterances: {utterances}, must be {SMALLEST} or more")
    marker = {"recipe": RECIPE, "seed": seed, "synthetic": True, "utterances": utterances}
    try:
        if not _is_there(root, marker):
            synthesizer()
            write_folder_atomically(root, partial(_fill, marker=marker, seed=seed, utterances=utterances))
            _is_there(root, marker)
    except OSError as error:
        raise ConfigError(f"corpus.root: {root}: the demo corpus cannot be written: {error.strerror}") from None


def is_demo_corpus(root: Path) -> bool:
    """Whether `root` is a tree that `write_demo_corpus` made, of any seed."""
    return _read_marker(root) is not None


def _is_there(root: Path, marker: dict[str, int]) -> bool:
    """False: nothing there. Raises ConfigError if `root` is not the corpus of this marker."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    found = _read_marker(root)
    if found is None:
        raise ConfigError(f"corpus.root: {root} exists and is not a demo corpus: choose a folder that does not exist")
    if found != marker:
        raise ConfigError(
            f"corpus.root: {root} is the demo corpus of {_words(found)}, wanted is {_words(marker)}: "
            "choose another folder, or remove this one"
        )
    audio = sum(1 for _ in root.glob("Session*/sentences/wav/*/*.wav"))
    if audio != marker["utterances"]:
        raise ConfigError(
            f"corpus.root: {root} has {audio} of {marker['utterances']} utterances: remove it, and it is made again"
        )
    return True


def _read_marker(root: Path) -> dict[str, int] | None:
    try:
        marker = json.loads((root / SYNTHETIC_MARK).read_text())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("synthetic") is True else None


def _words(marker: dict[str, int]) -> str:
    return ", ".join(f"{key} {marker.get(key)}" for key in ("seed", "utterances", "recipe"))


def _fill(root: Path, *, marker: dict[str, int], seed: int, utterances: int) -> None:
    for session, share in enumerate(_shares(utterances, SESSIONS), start=1):
        for scenario, dialogue, turns in _dialogues(session, share):
            rng = random.Random(f"{seed}/{dialogue}")
            _write_dialogue(root / f"Session{session}", session, dialogue, _act(rng, scenario, dialogue, turns), rng)
    (root / "README.txt").write_text(_README)
    (root / SYNTHETIC_MARK).write_text(json.dumps(marker, indent=2) + "\n")


def _shares(total: int, parts: int) -> list[int]:
    """`total` split as evenly as whole numbers allow."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def _dialogues(session: int, utterances: int) -> Iterator[tuple[Scenario, str, int]]:
    """Scenario, name and number of turns. A large corpus has each scenario twice, once per side, as the real one."""
    both = utterances > 16 * len(SCENARIOS)
    turns = _shares(utterances, len(SCENARIOS) * (2 if both else 1))
    for index, scenario in enumerate(SCENARIOS):
        sides = "FM" if both else "FM"[(session + index) % 2]
        letter = _TRAILING_LETTERS.get((session, scenario.name), "")
        for side in sides:
            yield scenario, f"Ses{session:02d}{side}_{scenario.name}{letter}", turns.pop(0)


def _act(rng: random.Random, scenario: Scenario, dialogue: str, turns: int) -> Iterator[tuple[_Turn, str]]:
    """The turns with their text. The speakers alternate; the mood of a turn lives on in the next."""
    said: Counter[str] = Counter()
    mood = (rng.gauss(0, 0.5), rng.gauss(0, 0.5))
    starts = rng.randrange(2)
    for index in range(turns):
        gender = "FM"[(starts + index) % 2]
        mood = (0.75 * mood[0] + rng.gauss(0, 0.35), 0.75 * mood[1] + rng.gauss(0, 0.35))
        side = 0.15 if dialogue[5] == gender else -0.15
        valence = scenario.valence + mood[0] + 0.5 * side + rng.gauss(0, 0.4)
        arousal = scenario.arousal + mood[1] + side + rng.gauss(0, 0.4)
        dominance = 0.6 * arousal + 0.2 * valence + side + rng.gauss(0, 0.4)
        id = f"{dialogue}_{gender}{said[gender]:03d}"
        said[gender] += 1
        yield _Turn(id, gender, valence, arousal, dominance), _text(rng, scenario, valence)


def _text(rng: random.Random, scenario: Scenario, valence: float) -> str:
    level = _on_scale(valence * 1.2 + rng.gauss(0, 0.5))
    clause = rng.choice(_CLAUSES[level - 1])
    if rng.random() < 0.4:
        return clause.removeprefix("and ").capitalize() + "."
    return f"{rng.choice(scenario.openings)}, {clause}."


def _voice(rng: random.Random, speaker: _Speaker, turn: _Turn) -> Voice:
    """Arousal is loud, fast, high and lively; valence only makes the melody livelier and a little higher."""
    return Voice(
        "en-us",
        speaker.timbre,
        rate_wpm=_within(speaker.rate_wpm * math.exp(0.17 * turn.arousal + rng.gauss(0, 0.07)), 110, 320),
        pitch=_within(45 + 12 * turn.arousal + 2 * turn.valence + rng.gauss(0, 6), 5, 95),
        pitch_range=_within(50 + 14 * turn.arousal + 10 * turn.valence + rng.gauss(0, 9), 2, 99),
        volume=_within(45 * math.exp(0.25 * turn.arousal + rng.gauss(0, 0.2)), 12, 100),
    )


def _write_dialogue(
    folder: Path, session: int, dialogue: str, turns: Iterator[tuple[_Turn, str]], rng: random.Random
) -> None:
    audio = folder / "sentences" / "wav" / dialogue
    audio.mkdir(parents=True)
    blocks: dict[str, str] = {}
    clock_s = rng.uniform(1, 8)
    for turn, text in turns:
        samples = synthesizer().speak(text, _voice(rng, _SPEAKERS[f"{session}{turn.gender}"], turn))
        _write_wav(audio / f"{turn.id}.wav", samples)
        end_s = clock_s + len(samples) / SAMPLE_RATE_HZ
        blocks[turn.id] = _block(rng, turn, session, clock_s, end_s)
        clock_s = end_s + rng.uniform(0.2, 1.0)
    evaluation = folder / "dialog" / "EmoEvaluation" / f"{dialogue}.txt"
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    # Sorted by name, so first one speaker and then the other: the order of the real files, which is not that of time.
    head = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    evaluation.write_text(head + "\n".join(blocks[id] for id in sorted(blocks)))


def _write_wav(path: Path, samples: npt.NDArray[np.float32]) -> None:
    import soundfile

    soundfile.write(path, samples, SAMPLE_RATE_HZ, subtype="PCM_16")


def _block(rng: random.Random, turn: _Turn, session: int, start_s: float, end_s: float) -> str:
    """One utterance of an evaluation file: header, categories, ratings."""
    observed = [_rate(rng, turn, rater) for rater in _OBSERVERS[session - 1]]
    own = [_rate(rng, turn, f"{turn.gender}1")] if rng.random() < 0.3 else []
    label, categories = _categories(observed)
    means = ", ".join(f"{mean:.4f}" for mean in _means(observed))
    lines = [
        f"[{start_s:.4f} - {end_s:.4f}]\t{turn.id}\t{label}\t[{means}]",
        *(f"C-{rater}:\t{category};\t()" for rater, category in categories.items()),
        *(_rating_line(rating) for rating in [*observed, *own]),
    ]
    return "\n".join(lines) + "\n"


def _rate(rng: random.Random, turn: _Turn, rater: str) -> _Rating:
    """What one rater hears: a habit of the rater's own, and noise, on whole numbers."""
    habit = random.Random(f"rater {rater}")
    scores = [
        _on_scale(1.15 * latent + habit.gauss(0, 0.2) + rng.gauss(0, 0.5))
        for latent in (turn.valence, turn.arousal, turn.dominance)
    ]
    # The first observer of a session never forgets the dominance, so the header has one.
    forgets = rng.random() < 0.04 and all(rater != raters[0] for raters in _OBSERVERS)
    return _Rating(rater, scores[0], scores[1], None if forgets else scores[2])


def _means(ratings: list[_Rating]) -> tuple[float, float, float]:
    dominance = [rating.dominance for rating in ratings if rating.dominance is not None]
    valence, arousal = [rating.valence for rating in ratings], [rating.arousal for rating in ratings]
    return (
        sum(valence) / len(valence),
        sum(arousal) / len(arousal),
        sum(dominance) / len(dominance),
    )


def _rating_line(rating: _Rating) -> str:
    dominance = "" if rating.dominance is None else rating.dominance
    return f"A-{rating.rater}:\tval {rating.valence}; act {rating.arousal}; dom  {dominance};\t()"


def _categories(ratings: list[_Rating]) -> tuple[str, dict[str, str]]:
    """The header's label (`xxx` without a majority) and each rater's category."""
    words = {rating.rater: _category(rating.valence, rating.arousal) for rating in ratings}
    (word, votes), *_ = Counter(words.values()).most_common(1)
    return (_LABELS[word] if 2 * votes > len(ratings) else "xxx"), words


_LABELS: Final = {
    "Neutral": "neu",
    "Happiness": "hap",
    "Excited": "exc",
    "Surprise": "sur",
    "Anger": "ang",
    "Frustration": "fru",
    "Sadness": "sad",
}


def _category(valence: int, arousal: int) -> str:
    if valence == 3:
        return "Surprise" if arousal == 5 else "Neutral"
    if valence > 3:
        return "Excited" if arousal > 3 else "Happiness"
    return "Anger" if arousal > 3 else "Frustration" if arousal == 3 else "Sadness"


def _on_scale(latent: float) -> int:
    return _within(3 + latent, _SCALE[0], _SCALE[-1])


def _within(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))
