"""Write the manifest of EmoTale, with all ratings of its three raters (docs/emotale.md).

    python jobs/emotale_manifest.py EmoTale        # writes EmoTale/manifest.csv

EmoTale (https://github.com/snehadas/EmoTale): `wav/<language>_<speaker>_<emotion>_<sentence>.wav`, `annotations.csv`
with `file` and, for raters 1 to 3, `a1_A`, `a1_V`, `a1_D` (arousal, valence, dominance on 1..5), and `speaker_info.csv`
with `speaker` and `gender`. It has no sessions: the sorted speakers are dealt to five groups, 1 to 5 in turn. A
dialogue is what one speaker says in one language, in the order of `annotations.csv`; a scenario is one of the five
sentences.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

GROUPS = 5
RATERS = (1, 2, 3)
DIMENSIONS = {"valence": "V", "arousal": "A", "dominance": "D"}


def main(folder: Path) -> None:
    """Write `manifest.csv` into the folder of the corpus; labels are the means of the ratings, so it has no others."""
    with (folder / "annotations.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with (folder / "speaker_info.csv").open(newline="", encoding="utf-8") as file:
        genders = {row["speaker"]: row["gender"] for row in csv.DictReader(file)}
    group = {speaker: i % GROUPS + 1 for i, speaker in enumerate(sorted({row["file"].split("_")[1] for row in rows}))}
    ratings = {f"{name}_{rater}": f"a{rater}_{letter}" for name, letter in DIMENSIONS.items() for rater in RATERS}
    turns: Counter[str] = Counter()
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ("path", "utterance", "speaker", "session", "dialogue", "turn", "gender", "scenario")
        writer.writerow([*names, *ratings])
        for row in rows:
            name = row["file"].removesuffix(".wav")
            language, speaker, _, sentence = name.split("_")
            dialogue = f"{speaker}_{language}"
            turns[dialogue] += 1
            place = (f"group{group[speaker]}", dialogue, turns[dialogue], genders[speaker], f"sentence{sentence}")
            writer.writerow(
                [f"wav/{row['file']}", name, speaker, *place, *(row[column] for column in ratings.values())]
            )
    print(f"{folder / 'manifest.csv'}: {len(rows)} utterances, {len(group)} speakers in {GROUPS} groups")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]))
    except (OSError, KeyError, ValueError) as error:
        sys.exit(f"{sys.argv[1]}: is not EmoTale as its repository has it: {error!r}")
