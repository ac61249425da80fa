"""Pretrain the small WavLM of the demo, without labels, on synthetic speech that the demo corpus does not contain.

    python jobs/pretrain_demo_encoder.py --output cvrunner/demo_encoder

espeak-ng speaks invented words in 43 languages other than English, with random voices, rate, pitch, intonation and
loudness. Spans that cover half of the frames are masked, and the transformer predicts the targets of the masked
frames: log-mel spectrum, pitch and voicing of the frame, and prosody of the second around it (mean and standard
deviation of pitch and energy, mean rate of spectral change). All targets are computed from the audio alone.

The same arguments, machine and libraries give the same weights. It takes about 10 minutes on one core.

`B` utterances, `T` samples at 16 kHz, `F` frames of 20 ms, `K` targets.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WavLMConfig, WavLMModel

from cvrunner.data.speech_synthesis import Timbre, Voice, synthesizer
from cvrunner.data.utterance import SAMPLE_RATE_HZ

SEED = 20
LANGUAGES = (
    "af az bs ca cs cy da de eo es et eu fi fr ga hr hu ia id io is it la lb lt lv ms mt nb nl om pap pl pt "
    "ro sk sl sq sv sw tr uz vi"
)
HOP = 320
MELS = 40
PROSODIC = 9
CROPS_S = (1.6, 2.4, 3.6)
BATCH_S = 48
PEAK_LR = 3e-3
WARM_UP = 0.08
HIDDEN_SHARE = 0.5
SPAN_FRAMES = 10
HALF_SECOND = 25
"""Half a second, in frames."""


def configuration(**changes: Any) -> WavLMConfig:
    """Return the configuration of a miniature WavLM-base: 50 frames per second, four layers of width 96."""
    settings: dict[str, Any] = {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "conv_dim": (64, 64, 96, 96),
        "conv_kernel": (40, 8, 6, 4),
        "conv_stride": (10, 4, 4, 2),
        "num_feat_extract_layers": 4,
        "feat_extract_norm": "group",
        "num_conv_pos_embeddings": 32,
        "num_conv_pos_embedding_groups": 16,
        "num_buckets": 64,
        "max_bucket_distance": 200,
        "layerdrop": 0.0,
        "hidden_dropout": 0.05,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "mask_time_prob": 0.0,
    }
    return WavLMConfig(**(settings | changes))


# Speech


def speak_corpus(minutes: float, rng: random.Random) -> list[Tensor]:
    """Synthesise utterances `[T]` of 1.6 s or more, `minutes` in total."""
    samples_needed = minutes * 60 * SAMPLE_RATE_HZ
    spoken: list[Tensor] = []
    while sum(map(len, spoken)) < samples_needed:
        samples = torch.from_numpy(synthesizer().speak(invented_sentence(rng), random_voice(rng)))
        if len(samples) >= CROPS_S[0] * SAMPLE_RATE_HZ:
            spoken.append(samples)
    return spoken


def invented_sentence(rng: random.Random) -> str:
    words = [invented_word(rng) for _ in range(rng.randint(4, 14))]
    if len(words) > 7 and rng.random() < 0.5:
        words[len(words) // 2] += ","
    return " ".join(words).capitalize() + rng.choice("...?!")


def invented_word(rng: random.Random) -> str:
    consonants, vowels, endings = "bcdfghjklmnprstvz", "aeiou", ("", "", "n", "s", "r", "l", "t", "k", "m")
    syllables = rng.choices((1, 2, 3), (3, 4, 1))[0]
    return "".join(rng.choice(consonants) + rng.choice(vowels) + rng.choice(endings) for _ in range(syllables))


def random_voice(rng: random.Random) -> Voice:
    low_hz = round(math.exp(rng.uniform(math.log(65), math.log(210))))
    tract = rng.uniform(90, 120)
    formants = (
        round(tract + rng.gauss(0, 5)),
        round(tract + rng.gauss(0, 5)),
        round(tract + rng.gauss(0, 4)),
    )
    return Voice(
        rng.choice(LANGUAGES.split()),
        Timbre(low_hz, round(low_hz * rng.uniform(1.25, 1.6)), formants),
        rate_wpm=round(math.exp(rng.uniform(math.log(110), math.log(300)))),
        pitch=rng.randint(5, 90),
        pitch_range=rng.randint(0, 99),
        volume=round(math.exp(rng.uniform(math.log(12), math.log(100)))),
    )


# Targets


def frame_count(config: WavLMConfig, samples: int) -> int:
    """Return the number of frames that the front-end produces for `samples` samples."""
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = (samples - kernel) // stride + 1
    return samples


def frame_centre(config: WavLMConfig) -> int:
    """Return the middle sample of the receptive field of the front-end's first frame."""
    field, step = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        field, step = field + (kernel - 1) * step, step * stride
    return field // 2


def windows(samples: Tensor, width: int, centre: int) -> Tensor:
    """Cut `[T]` into `[F, width]`, with frame f around sample `HOP * f + centre` and F = T // HOP."""
    left = width // 2 - centre
    return functional.pad(samples, (max(left, 0), width))[max(-left, 0) :].unfold(0, width, HOP)[: len(samples) // HOP]


def mel_filters(width: int) -> Tensor:
    """Return triangular mel filters `[width // 2 + 1, MELS]` from 60 to 7600 Hz."""
    mels = torch.linspace(2595 * math.log10(1 + 60 / 700), 2595 * math.log10(1 + 7600 / 700), MELS + 2)
    edges_hz = 700 * (10 ** (mels / 2595) - 1)
    bins_hz = torch.linspace(0, SAMPLE_RATE_HZ / 2, width // 2 + 1)[:, None]
    rising = (bins_hz - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def pitch_and_voicing(samples: Tensor, centre: int) -> tuple[Tensor, Tensor]:
    """Return log2 of the pitch in Hz (60 to 480 Hz) and the height of its autocorrelation peak, both `[F]`."""
    width, shortest, longest = 1024, SAMPLE_RATE_HZ // 480, SAMPLE_RATE_HZ // 60
    window = torch.hann_window(width)
    power = torch.fft.rfft(windows(samples, width, centre) * window, 2 * width).abs().square()
    own = torch.fft.irfft(torch.fft.rfft(window, 2 * width).abs().square())
    correlation = torch.fft.irfft(power)[:, : longest + 1] / (own / own[0])[: longest + 1]
    correlation = correlation / (correlation[:, :1] + 1e-4)
    # The slope avoids octave errors: of two equally high peaks, the one with the shorter period wins.
    slope = torch.linspace(0, 0.1, longest - shortest)
    height, lag = (correlation[:, shortest:longest] - slope).max(1)
    return torch.log2(SAMPLE_RATE_HZ / (lag + shortest).float()), height


def around(track: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return weighted mean and standard deviation of `[F]` over one second around each frame."""
    kernel = torch.ones(1, 1, 2 * HALF_SECOND + 1)

    def total(values: Tensor) -> Tensor:
        return functional.conv1d(values[None, None], kernel, padding=HALF_SECOND)[0, 0]

    share = total(weight) + 1e-3
    mean = total(track * weight) / share
    return mean, (total(track.square() * weight) / share - mean.square()).clamp(min=0).sqrt()


def targets(samples: Tensor, centre: int) -> Tensor:
    """Compute `[F, K]` from `[T]`: log-mel spectrum, pitch, voicing, and prosody of the second around each frame.

    Levels are relative to the utterance, because the front-end's group norm removes its loudness.
    """
    frames = windows(samples, 512, centre) * torch.hann_window(512)
    mel = torch.log(torch.fft.rfft(frames).abs().square() @ mel_filters(512) + 1e-5)
    energy = mel.mean(1)
    energy = energy - energy.mean()
    pitch, voicing = pitch_and_voicing(samples, centre)
    voiced = (voicing > 0.55).float()
    usual = (pitch * voiced).sum() / (voiced.sum() + 1e-3)
    pitch = torch.where(voiced > 0, pitch, usual)
    flux = functional.pad((mel[1:] - mel[:-1]).abs().mean(1), (1, 0))
    prosody = [
        *around(pitch, voiced),
        *around(energy, torch.ones_like(energy)),
        around(flux, torch.ones_like(flux))[0],
    ]
    return torch.stack([*(mel - mel.mean()).T, energy, pitch, voicing, flux, *prosody], dim=1)


def standardised(tracks: list[Tensor]) -> list[Tensor]:
    everything = torch.cat(tracks)
    mean, deviation = everything.mean(0), everything.std(0)
    return [(track - mean) / deviation for track in tracks]


def target_weights() -> Tensor:
    """Return the weights of the targets, `[K]`: the spectrum counts as much as the nine prosodic tracks together."""
    return torch.cat([torch.full((MELS,), 0.5 / MELS), torch.full((PROSODIC,), 0.5 / PROSODIC)])


# Training


def epoch_crops(lengths: list[int], rng: np.random.Generator) -> list[list[tuple[int, int, int]]]:
    """Return the batches of one epoch: random crops as (utterance, first frame, frames), with one length per batch."""
    order = rng.permutation(len(lengths))
    crops: list[list[tuple[int, int, int]]] = []
    while len(order):
        crop_s = float(rng.choice(CROPS_S))
        frames, count = int(crop_s * SAMPLE_RATE_HZ) // HOP, round(BATCH_S / crop_s)
        chosen, order = [int(i) for i in order[:count] if lengths[i] >= frames], order[count:]
        if len(chosen) > 1:
            crops.append([(i, int(rng.integers(0, lengths[i] - frames + 1)), frames) for i in chosen])
    return crops


def hidden_spans(batch: int, frames: int, rng: np.random.Generator) -> Tensor:
    """Draw a mask `[B, F]` that is True in spans that cover about half of the frames."""
    starts = rng.random((batch, frames)) < -math.log(1 - HIDDEN_SHARE) / SPAN_FRAMES
    hidden = np.zeros((batch, frames), dtype=bool)
    for shift in range(SPAN_FRAMES):
        hidden[:, shift:] |= starts[:, : frames - shift]
    return torch.from_numpy(hidden)


def learning_rate(progress: float) -> float:
    """Return the learning rate at a share of the training, 0..1: linear warm-up, then a cosine decay to zero."""
    if progress < WARM_UP:
        return PEAK_LR * progress / WARM_UP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def train(
    wavlm: WavLMModel, spoken: list[Tensor], tracks: list[Tensor], epochs: int, say: Callable[[str], None]
) -> None:
    """Train the masked prediction of `tracks` `[F, K]` from `spoken` `[T]`."""
    head = nn.Linear(wavlm.config.hidden_size, len(target_weights()))
    parameters = [*wavlm.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    rng = np.random.default_rng(SEED)
    started = time.monotonic()
    for epoch in range(epochs):
        crops = epoch_crops([len(track) for track in tracks], rng)
        losses: list[float] = []
        for number, batch in enumerate(crops):
            optimizer.param_groups[0]["lr"] = learning_rate((epoch + (number + 1) / len(crops)) / epochs)
            audio = torch.stack([spoken[i][first * HOP : (first + frames) * HOP] for i, first, frames in batch])
            target = torch.stack([tracks[i][first : first + frames] for i, first, frames in batch])
            hidden_loss, loss = losses_of(wavlm, head, audio, target, rng)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(float(hidden_loss.detach()))
        say(f"epoch {epoch + 1}/{epochs}  loss {np.mean(losses):.4f}  {time.monotonic() - started:.0f} s")


def losses_of(
    wavlm: WavLMModel, head: nn.Module, audio: Tensor, target: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return the Huber loss on masked frames, and the training loss, which adds a tenth of that on visible frames."""
    frames = frame_count(wavlm.config, audio.shape[1])
    hidden = hidden_spans(len(audio), frames, rng)
    predicted = head(wavlm(audio, mask_time_indices=hidden).last_hidden_state)
    error = functional.smooth_l1_loss(predicted, target[:, :frames], reduction="none") @ target_weights()
    loss = error[hidden].mean()
    return loss, loss + 0.1 * error[~hidden].mean()


# Output


def save(wavlm: WavLMModel, folder: Path) -> None:
    """Write a folder for `from_pretrained`, without the weights that only pretraining needs."""
    clean = WavLMModel(configuration())
    weights = {name: value for name, value in wavlm.state_dict().items() if name != "masked_spec_embed"}
    clean.load_state_dict(weights)
    clean.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    preprocessing = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "sampling_rate": SAMPLE_RATE_HZ,
        "feature_size": 1,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": False,
        "return_attention_mask": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def pretrain(folder: Path, minutes: float, epochs: int) -> None:
    """Synthesise, train and save; the log goes to `folder/pretraining.log` and to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    # A second thread hardly speeds up matrices this small, and slows them down tenfold if its core is busy.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    with (folder / "pretraining.log").open("w") as log:

        def say(line: str) -> None:
            print(line, file=log, flush=True)
            print(line, file=sys.stderr, flush=True)

        started = time.monotonic()
        # The mask embedding exists only if the probability is positive; its value is not used.
        wavlm = WavLMModel(configuration(mask_time_prob=0.5, hidden_dropout=0.0)).train()
        spoken = speak_corpus(minutes, random.Random(SEED))
        tracks = standardised([targets(samples, frame_centre(wavlm.config)) for samples in spoken])
        say(f"torch {torch.__version__}, {torch.get_num_threads()} thread, seed {SEED}")
        say(f"{sum(p.numel() for p in wavlm.parameters())} parameters")
        total_min = sum(map(len, spoken)) / SAMPLE_RATE_HZ / 60
        say(f"{len(spoken)} utterances, {total_min:.1f} minutes, {len(LANGUAGES.split())} languages")
        say(f"speech and targets made in {time.monotonic() - started:.0f} s")
        train(wavlm, spoken, tracks, epochs, say)
        save(wavlm, folder)
        say(f"saved after {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the encoder")
    parser.add_argument("--minutes", type=float, default=50, help="minutes of speech to pretrain on")
    parser.add_argument("--epochs", type=int, default=44, help="passes over it")
    arguments = parser.parse_args()
    pretrain(arguments.output, arguments.minutes, arguments.epochs)
