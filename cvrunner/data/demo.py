"""A synthetic IEMOCAP: five sessions of acted dialogues spoken by espeak-ng, in the layout of the real one.

Every turn has a latent valence and arousal: that of its scenario, plus a mood that drifts through the dialogue, plus
chance. They choose the words, rate, pitch, pitch range and loudness, all with noise, arousal more audibly than valence.
Three observers then rate the turn, each with a bias, and the header holds their mean. So there is something to hear,
something to guess without listening (the scenario), something to learn from the turns before, and a human ceiling.

Results on it show that the program works; they say nothing about people.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import soundfile

from cvrunner.config.sections import DEMO_UTTERANCES, SMALLEST_DEMO
from cvrunner.data.iemocap import SYNTHETIC_MARK
from cvrunner.data.speech_synthesis import Timbre, Voice, synthesizer
from cvrunner.data.utterance import SAMPLE_RATE_HZ
from cvrunner.errors import ConfigError
from cvrunner.files import write_folder_atomically

RECIPE: Final = 1
"""Raise it whenever the same seed gives other files."""
SESSIONS: Final = 5
_README = (
    "This is not IEMOCAP. It is synthetic speech in IEMOCAP's file layout, made by `cvrunner demo-data` to try the "
    "program; no result on it says anything about people. SYNTHETIC.json has the seed.\n"
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """The topic of a dialogue, the same in every session."""

    name: str
    valence: float
    """Mean of the latent valence, relative to the middle of the scale."""
    arousal: float
    """Mean of the latent arousal, relative to the middle of the scale."""
    openings: tuple[str, ...]
    """Beginnings of sentences, which reveal the scenario but not the mood."""


_SCRIPT: Final[dict[str, Any]] = json.loads(Path(__file__).with_name("demo_script.json").read_text())
SCENARIOS: Final = tuple(
    Scenario(s["name"], s["valence"], s["arousal"], tuple(s["openings"])) for s in _SCRIPT["scenarios"]
)
_CLAUSES: Final[tuple[tuple[str, ...], ...]] = tuple(tuple(clauses) for clauses in _SCRIPT["clauses"])
"""Clauses by valence from one to five."""

_TRAILING_LETTERS: Final = {(2, "script03_2"): "a", (3, "impro05"): "a", (5, "script01_1"): "b"}
"""Letters in some names, as in the real corpus, where some dialogues were recorded in parts."""

_OBSERVERS: Final = (
    ("E1", "E2", "E4"),
    ("E1", "E3", "E4"),
    ("E2", "E3", "E4"),
    ("E1", "E2", "E5"),
    ("E2", "E4", "E6"),
)
"""Raters of each session."""


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
"""Speakers by session and gender."""


_CATEGORIES: Final = (
    ("Sadness", "Sadness", "Frustration", "Anger", "Anger"),
    ("Neutral", "Neutral", "Neutral", "Neutral", "Surprise"),
    ("Happiness", "Happiness", "Happiness", "Excited", "Excited"),
)
"""Category of a rating, by valence (below, at and above the middle) and arousal (one to five)."""

_LABELS: Final = {
    "Neutral": "neu",
    "Happiness": "hap",
    "Excited": "exc",
    "Surprise": "sur",
    "Anger": "ang",
    "Frustration": "fru",
    "Sadness": "sad",
}
"""Categories as the header abbreviates them."""


@dataclass(frozen=True, slots=True)
class _Turn:
    id: str
    gender: str
    valence: float
    """Latent value relative to the middle of the scale, like the other two."""
    arousal: float
    dominance: float


@dataclass(frozen=True, slots=True)
class _Rating:
    rater: str
    valence: int
    arousal: int
    dominance: int | None
    """Missing in some lines, as in the real corpus."""


def write_demo_corpus(root: Path, *, seed: int = 0, utterances: int = DEMO_UTTERANCES) -> None:
    """Create the folder `root` with a synthetic IEMOCAP of `utterances` turns, about 2.7 s each.

    Does nothing if `root` is that corpus already. The same seed, number and espeak-ng give the same bytes. Raises
    ConfigError if `root` is anything else (nothing in it is changed), if `utterances` is below 40, and if the extra
    `demo` is not installed.
    """
    if utterances < SMALLEST_DEMO:
        raise ConfigError(f"corpus.demo.utterances: {utterances}, must be {SMALLEST_DEMO} or more")
    marker = {"recipe": RECIPE, "seed": seed, "synthetic": True, "utterances": utterances}
    try:
        if not _exists(root, marker):
            # Fails before a folder is made if the extra is not installed.
            synthesizer()
            write_folder_atomically(root, partial(_fill, marker=marker, seed=seed, utterances=utterances))
            # Another process may have written a different corpus there meanwhile.
            _exists(root, marker)
    except OSError as error:
        raise ConfigError(f"corpus.root: {root}: the demo corpus cannot be written: {error.strerror}") from None


def _exists(root: Path, marker: dict[str, int]) -> bool:
    """Return whether `root` is the corpus of this marker; False if empty. Raises ConfigError for anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / SYNTHETIC_MARK).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("synthetic") is not True:
        raise ConfigError(f"corpus.root: {root} exists and is not a demo corpus: choose a folder that does not exist")
    if found != marker:
        raise ConfigError(
            f"corpus.root: {root} is the demo corpus with {_settings(found)}, but requested is {_settings(marker)}: "
            "choose another folder, or remove this one"
        )
    audio = sum(1 for _ in root.glob("Session*/sentences/wav/*/*.wav"))
    if audio != marker["utterances"]:
        raise ConfigError(
            f"corpus.root: {root} has {audio} of {marker['utterances']} utterances: remove it, and it is made again"
        )
    return True


def _settings(marker: dict[str, int]) -> str:
    return ", ".join(f"{key} {marker.get(key)}" for key in ("seed", "utterances", "recipe"))


def _fill(root: Path, *, marker: dict[str, int], seed: int, utterances: int) -> None:
    # The order of the random draws below is part of the recipe: the same seed must give the same bytes.
    for session, share in enumerate(_shares(utterances, SESSIONS), start=1):
        for scenario, dialogue, turns in _dialogues(session, share):
            rng = random.Random(f"{seed}/{dialogue}")
            _write_dialogue(root / f"Session{session}", session, dialogue, _act(rng, scenario, dialogue, turns), rng)
    (root / "README.txt").write_text(_README)
    (root / SYNTHETIC_MARK).write_text(json.dumps(marker, indent=2) + "\n")


def _shares(total: int, parts: int) -> list[int]:
    """Split `total` as evenly as whole numbers allow."""
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def _dialogues(session: int, utterances: int) -> Iterator[tuple[Scenario, str, int]]:
    """Yield scenario, name and number of turns of each dialogue."""
    # A large corpus has each scenario twice, once per side, like the real one.
    both = utterances > 16 * len(SCENARIOS)
    turns = _shares(utterances, len(SCENARIOS) * (1 + both))
    for index, scenario in enumerate(SCENARIOS):
        sides = "FM"
        if not both:
            sides = sides[(session + index) % 2]
        letter = _TRAILING_LETTERS.get((session, scenario.name), "")
        for side in sides:
            yield scenario, f"Ses{session:02d}{side}_{scenario.name}{letter}", turns.pop(0)


def _act(rng: random.Random, scenario: Scenario, dialogue: str, turns: int) -> Iterator[tuple[_Turn, str]]:
    """Yield the turns with their text. The speakers alternate; the mood of a turn carries over to the next."""
    said: Counter[str] = Counter()
    mood = (rng.gauss(0, 0.5), rng.gauss(0, 0.5))
    starts = rng.randrange(2)
    for index in range(turns):
        gender = "FM"[(starts + index) % 2]
        mood = (0.75 * mood[0] + rng.gauss(0, 0.35), 0.75 * mood[1] + rng.gauss(0, 0.35))
        # Whoever wears the motion capture, the letter in the dialogue's name, is a little more aroused and dominant.
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
    """Return a voice: arousal is loud, fast, high and lively; valence only adds a little height and melody."""
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
        soundfile.write(audio / f"{turn.id}.wav", samples, SAMPLE_RATE_HZ, subtype="PCM_16")
        end_s = clock_s + len(samples) / SAMPLE_RATE_HZ
        blocks[turn.id] = _block(rng, turn, session, clock_s, end_s)
        clock_s = end_s + rng.uniform(0.2, 1.0)
    evaluation = folder / "dialog" / "EmoEvaluation" / f"{dialogue}.txt"
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    # Sorted by name as in the real files: all turns of one speaker, then all of the other, not by time.
    head = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
    evaluation.write_text(head + "\n".join(blocks[id] for id in sorted(blocks)))


def _block(rng: random.Random, turn: _Turn, session: int, start_s: float, end_s: float) -> str:
    """Return the lines of one turn in a label file: header, categories, ratings."""
    observed = [_rate(rng, turn, rater) for rater in _OBSERVERS[session - 1]]
    ratings = list(observed)
    # Some turns also have the actor's own rating, which is not part of the mean.
    if rng.random() < 0.3:
        ratings.append(_rate(rng, turn, f"{turn.gender}1"))
    categories = {r.rater: _CATEGORIES[1 + (r.valence > 3) - (r.valence < 3)][r.arousal - 1] for r in observed}
    (word, votes), *_ = Counter(categories.values()).most_common(1)
    label = _LABELS[word] if 2 * votes > len(observed) else "xxx"
    means = []
    for scores in zip(*((r.valence, r.arousal, r.dominance) for r in observed), strict=True):
        given = [score for score in scores if score is not None]
        means.append(f"{sum(given) / len(given):.4f}")
    lines = [f"[{start_s:.4f} - {end_s:.4f}]\t{turn.id}\t{label}\t[{', '.join(means)}]"]
    lines += [f"C-{rater}:\t{category};\t()" for rater, category in categories.items()]
    for rating in ratings:
        dominance = "" if rating.dominance is None else rating.dominance
        lines.append(f"A-{rating.rater}:\tval {rating.valence}; act {rating.arousal}; dom  {dominance};\t()")
    return "\n".join(lines) + "\n"


def _rate(rng: random.Random, turn: _Turn, rater: str) -> _Rating:
    """Return the rating by one rater: latent values plus the rater's bias and noise, rounded to the scale."""
    # Drawn from the rater's name, so that the bias is the same in every turn.
    bias = random.Random(f"rater {rater}")
    scores = [
        _on_scale(1.15 * latent + bias.gauss(0, 0.2) + rng.gauss(0, 0.5))
        for latent in (turn.valence, turn.arousal, turn.dominance)
    ]
    rating = _Rating(rater, *scores)
    # The first observer of a session never leaves out the dominance, so that the header has one.
    if rng.random() < 0.04 and all(rater != raters[0] for raters in _OBSERVERS):
        rating = replace(rating, dominance=None)
    return rating


def _on_scale(latent: float) -> int:
    return _within(3 + latent, 1, 5)


def _within(value: float, low: int, high: int) -> int:
    return max(low, min(high, round(value)))
