"""Acceptance on one NVIDIA GPU: every path that needs CUDA, in ten minutes, from the repository's root.

`--device cpu --tiny` rehearses it. Each check adds rows of check, name, value and verdict; one that fails prints its
error, and the others go on. A row passes only if its verdict begins with ok. The table is printed last and is in
$OUT/gpu_check.json. It needs a bare Python with torch, numpy and scipy, and the wheels that gpu_check.sh collects.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")
sys.path.insert(0, os.getcwd())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cuda:0")
parser.add_argument("--tiny", action="store_true", help="small shapes, to rehearse on a CPU")
parser.add_argument("--only", default="", help="names of checks, comma between")
parser.add_argument("--budget", type=float, default=540.0, help="seconds in all; what would start later is skipped")
parser.add_argument("--card-gb", type=float, default=24.0, help="the card that memory is judged for")
args = parser.parse_args()
DEV = torch.device(args.device)
CUDA = DEV.type == "cuda"
BEGAN = time.monotonic()
ROWS: list[tuple[str, str, str, str]] = []
WORK = Path(tempfile.mkdtemp(prefix="gpu-check-"))
OUT = Path(os.environ.get("OUT", str(WORK)))


def row(check: str, name: str, value: object, verdict: str = "") -> None:
    ROWS.append((check, name, str(value), verdict))
    print(f"[{time.monotonic() - BEGAN:6.1f}s] {check:10s} {name}: {value} {verdict}", flush=True)


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def reset() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> str:
    if not CUDA:
        return "-"
    allocated, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    return f"{allocated:.2f} GB allocated, {reserved:.2f} GB reserved"


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


from cvrunner.config.adaptation import Adaptation  # noqa: E402

FULL = Adaptation("full", start_epoch=1)

# --- encoders ---------------------------------------------------------------------------------------------------------

LARGE = {
    "activation_dropout": 0.0,
    "attention_dropout": 0.1,
    "conv_bias": False,
    "conv_dim": [512] * 7,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "feat_proj_dropout": 0.1,
    "hidden_dropout": 0.1,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layerdrop": 0.1,
    "mask_time_prob": 0.075,
    "max_bucket_distance": 800,
    "num_attention_heads": 16,
    "num_buckets": 320,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "num_hidden_layers": 24,
}
if args.tiny:
    LARGE |= {
        "conv_dim": [32] * 7,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
    }
BASE = LARGE | {
    "do_stable_layer_norm": False,
    "feat_extract_norm": "group",
    "num_hidden_layers": min(12, LARGE["num_hidden_layers"]),
}
if not args.tiny:
    BASE |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}


def wavlm(shape: dict, layers: int | None = None, dropout: float | None = None):
    from transformers import WavLMConfig, WavLMModel

    changes = (
        {}
        if dropout is None
        else dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), dropout)
    )
    torch.manual_seed(0)
    model = WavLMModel(
        WavLMConfig(**(shape | changes | {"layerdrop": 0.0} | ({"num_hidden_layers": layers} if layers else {})))
    )
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "rel_attn_embed" in n or "gru_rel_pos_linear" in n:
                p.normal_(0, 0.5)
            elif "gru_rel_pos_const" in n:
                p.uniform_(0.5, 2)
    return model


# --- checks -----------------------------------------------------------------------------------------------------------


def check_environment() -> None:
    row(
        "env",
        "python, torch, cuda, cudnn",
        f"{sys.version.split()[0]}, {torch.__version__}, {torch.version.cuda}, {torch.backends.cudnn.version()}",
    )
    import transformers

    row(
        "env",
        "transformers",
        transformers.__version__,
        "ok" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "FAIL: below pyproject's 5.24",
    )
    row(
        "env",
        "cuda available",
        torch.cuda.is_available(),
        "ok" if torch.cuda.is_available() or not CUDA else "FAIL: torch and driver do not fit",
    )
    if CUDA:
        p = torch.cuda.get_device_properties(DEV)
        row("env", "device", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 1e9:.1f} GB")
    row("env", "TF32 matmul / conv", f"{torch.backends.cuda.matmul.allow_tf32} / {torch.backends.cudnn.allow_tf32}")
    from cvrunner.orchestration.machine import find_driver, find_gpus
    from cvrunner.orchestration.resources import device_type
    from cvrunner.training.device import choose_precision, find_device

    expected = "cuda" if CUDA else "cpu"
    found = device_type("auto", os.environ)
    row("env", "driver", find_driver())
    row("env", "train.device auto becomes", found, "ok" if found == expected else f"FAIL: must be {expected}")
    row("env", "train.precision auto becomes", choose_precision("auto", DEV))
    row(
        "env",
        "conv features in TF32",
        torch.backends.cudnn.allow_tf32,
        "FAIL" if torch.backends.cudnn.allow_tf32 else "ok",
    )
    for index, gpu in enumerate(find_gpus()):
        row("env", f"GPU {index} of the driver, {gpu.name}", find_device(gpu.uuid) or "torch cannot use it")
    for name in ("mamba_ssm", "causal_conv1d", "kernels", "ray", "mlflow"):
        try:
            module = __import__(name)
            row("env", name, getattr(module, "__version__", "there"))
        except Exception as error:
            row("env", name, f"not importable ({type(error).__name__})")


def check_fresh() -> None:
    """A trial in a process that has not touched CUDA yet, as a Ray actor's or `fold` without --gpu is."""
    code = """
import sys, torch
sys.path.insert(0, '.')
from cvrunner.training.device import start_memory_count, use_deterministic_algorithms
device = torch.device(sys.argv[1])
assert not torch.cuda.is_initialized()
use_deterministic_algorithms(device, False)   # the first lines of Learner
start_memory_count(device)
print('ok on', device)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "cuda:0" if CUDA else "cpu"], capture_output=True, text=True, timeout=120
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    row(
        "fresh",
        "start_memory_count before anything else used CUDA",
        lines[-1][:140] if lines else done.returncode,
        "ok" if done.returncode == 0 else "FAIL: every Ray trial, plan, and fold without --gpu ends here",
    )


def check_sdpa() -> None:
    """Which kernel takes a bias that needs a gradient, by itself and if asked for, and whether gradients are right."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not CUDA:
        return
    for frames in (224, 192, 1699):
        for dropout in (0.1, 0.0):
            torch.manual_seed(0)
            q, k, v = (
                torch.randn(2, 16, frames, 64, device=DEV, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
            )
            m = torch.randn(2, 16, frames, frames, device=DEV, dtype=torch.bfloat16, requires_grad=True)
            choice = torch._fused_sdp_choice(q, k, v, m, dropout, False)
            names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
            try:
                functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=m, dropout_p=dropout
                ).float().square().sum().backward()
                sync()
                good = all(torch.isfinite(x.grad).all() for x in (q, k, v, m))
                note = "ok" if good else "FAIL: gradient not finite"
            except Exception as error:
                note = f"FAIL: {str(error).splitlines()[0][:110]}"
            row(
                "sdpa",
                f"default kernel, {frames} frames, dropout {dropout}, bias needs a gradient",
                names.get(int(choice), choice),
                note,
            )
    q, k, v = (torch.randn(2, 16, 224, 64, device=DEV, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    m = torch.randn(2, 16, 224, 224, device=DEV, dtype=torch.bfloat16, requires_grad=True)
    ref = [x.detach().float().requires_grad_() for x in (q, k, v, m)]
    w = torch.softmax(ref[0] @ ref[1].transpose(-1, -2) / 8 + ref[3], -1) @ ref[2]
    w.square().sum().backward()
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        for x in (q, k, v, m):
            x.grad = None
        try:
            with sdpa_kernel(backend):
                functional.scaled_dot_product_attention(q, k, v, attn_mask=m).float().square().sum().backward()
            errors = [rel(x.grad, r.grad) for x, r in zip((q, k, v, m), ref, strict=True)]
            row(
                "sdpa",
                f"{backend.name} gradients of q, k, v, bias against float32",
                ", ".join(f"{e:.1e}" for e in errors),
                "ok" if max(errors) < 2e-2 else "FAIL",
            )
        except Exception as error:
            row("sdpa", backend.name, str(error).splitlines()[0][:110], "does not take it")


def check_parity() -> None:
    """Hidden states and gradients on the device against transformers' own on the CPU in float32."""
    from cvrunner.encoders.waveform import WaveformEncoder

    seconds = (0.3, 2.0, 1.9, 4.5, 12.0) if not args.tiny else (0.3, 1.0, 0.9)
    for name, shape in (("large", LARGE), ("base", BASE)):
        w = wavlm(shape, layers=min(4, shape["num_hidden_layers"]), dropout=0.0).eval()
        torch.manual_seed(1)
        waves = [torch.randn(int(s * 16000)) * 0.05 for s in seconds]
        normal = [(x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-7) for x in waves]
        expected = []
        with torch.no_grad():
            for x in normal:
                o = w(x[None], output_hidden_states=True)
                expected.append(torch.stack([h[0] for h in o.hidden_states[:-1]] + [o.last_hidden_state[0]], 1))
        lengths = torch.tensor([len(e) for e in expected])
        weights = torch.randn(int(lengths.sum()), expected[0].shape[1], expected[0].shape[2])
        cpu = WaveformEncoder(w, frame_rate_hz=50.0, adaptation=FULL, normalize=True).eval()
        conv = torch.cat([cpu.conv_features(x) for x in waves])
        (cpu(conv, lengths).states * weights).sum().backward()
        grads = {n: p.grad.clone() for n, p in w.named_parameters() if p.grad is not None and "k_proj.bias" not in n}
        w.zero_grad(set_to_none=True)
        w.to(DEV)
        for label, precision, tf32, limit in (
            ("float32", torch.float32, False, 5e-5),
            ("float32, TF32 conv", torch.float32, True, 3e-3),
            ("bfloat16", torch.bfloat16, False, 3e-2),
        ):
            torch.backends.cudnn.allow_tf32 = tf32
            e = WaveformEncoder(w, frame_rate_hz=50.0, adaptation=FULL, normalize=True, precision=precision).eval()
            c = torch.cat([e.conv_features(x.to(DEV)) for x in waves])
            states = e(c, lengths).states
            by_layer = [rel(states[:, i], torch.cat(expected)[:, i]) for i in range(states.shape[1])]
            row("parity", f"{name}, {label}: conv features", f"{rel(c, conv):.1e}")
            row(
                "parity",
                f"{name}, {label}: worst layer",
                f"{max(by_layer):.1e}",
                "ok" if max(by_layer) < limit else "FAIL",
            )
            w.zero_grad(set_to_none=True)
            e.train()  # the path that trains; dropout is 0
            with e.casts.kept():
                (e(c, lengths).states * weights.to(DEV)).sum().backward()
            worst = max(((rel(p.grad, grads[n]), n) for n, p in w.named_parameters() if n in grads), default=(0, ""))
            row(
                "parity",
                f"{name}, {label}: worst gradient",
                f"{worst[0]:.1e} {worst[1]}",
                "ok" if worst[0] < 20 * limit else "FAIL",
            )
        torch.backends.cudnn.allow_tf32 = False


@dataclass
class Micro:
    features: torch.Tensor
    lengths: torch.Tensor
    positions: tuple[int, ...]


def one_update(model: Any, schedule: Any, optimizer: torch.optim.Optimizer, batches: list[Micro]) -> None:
    """Take an update of random labels, with the steps of `Learner.update`."""
    from cvrunner.training.accumulation import exact_backward

    count = sum(len(batch.lengths) for batch in batches)
    optimizer.zero_grad()
    with model.encoder.casts.kept():
        loss = exact_backward(model, batches, torch.rand(count, 2, device=DEV), [1] * count, list(range(count)))
    loss, *norms = torch.stack([loss, *schedule.gradient_norms().values()]).tolist()
    total = torch.tensor(sum(norm**2 for norm in norms) ** 0.5).to(DEV, non_blocking=True)
    weights = [p for group in schedule.groups for p in schedule.members[group].values()]
    torch.nn.utils.clip_grads_with_norm_(weights, 1.0, total)
    schedule.set_learning_rates(optimizer, 10, 100)
    optimizer.step()


def check_syncs() -> None:
    """How often a real update of a trial waits for the GPU; at most 3."""
    from cvrunner.training.checkpoint import Position
    from cvrunner.training.learner import Learner

    for condition in ("frozen", "unfrozen"):
        trial = next(t for t in trials_of(demo_data()) if t.condition == condition)
        learner = Learner(trial, WORK / f"cache-{DEV.type}", DEV)
        list(learner.inputs.fill_cache())
        learner.begin_epoch(1)
        updates = learner.updates(1)
        learner.update(updates[0], Position(1, 0, 0))
        if not CUDA:
            continue
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waited:
                warnings.simplefilter("always")
                learner.update(updates[1], Position(1, 1, 1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        count = sum("synchroniz" in str(one.message) for one in waited)
        where = ", ".join(sorted({f"{Path(one.filename).name}:{one.lineno}" for one in waited}))
        row("syncs", f"{condition}, 4 x 2: waits for the GPU", f"{count} ({where})", "ok" if count <= 3 else "FAIL")


def check_steps() -> None:
    """Time and memory of real updates in the shape of WavLM-large."""
    from cvrunner.config.sections import ModelConfig, TrainConfig
    from cvrunner.encoders.waveform import WaveformEncoder
    from cvrunner.model.mamba_ema import MambaEMAModel
    from cvrunner.training.device import choose_precision
    from cvrunner.training.freezing import Schedule

    def build(checkpointing: bool = False):
        e = WaveformEncoder(
            wavlm(LARGE), adaptation=FULL, precision=choose_precision("auto", DEV), gradient_checkpointing=checkpointing
        )
        model = MambaEMAModel(e, ModelConfig(), 2).to(DEV).train()
        schedule = Schedule(model, TrainConfig())
        schedule.begin_epoch(1)
        return model, schedule, schedule.optimizer()

    def micro(seconds, first: int) -> Micro:
        frames = [int(s * 50) - 1 for s in sorted(seconds)]
        return Micro(
            torch.randn(sum(frames), LARGE["conv_dim"][-1], device=DEV) * 0.1,
            torch.tensor(frames),
            tuple(range(first, first + len(frames))),
        )

    typical = [1.8, 2.4, 3.0, 3.6, 4.4, 5.2, 6.6, 9.6]
    cases = {
        "4 x 2 typical": [micro(typical[:4], 0), micro(typical[4:], 4)],
        "8 x 1 typical": [micro(typical, 0)],
        "4 x 2 of 15 s": [micro([15.0] * 4, 0), micro([15.0] * 4, 4)],
        "4 x 2 of 34 s": [micro([34.0] * 4, 0), micro([34.0] * 4, 4)],
        "2 x 4 of 34 s": [micro([34.0] * 2, i) for i in (0, 2, 4, 6)],
        "1 x 8 of 34 s": [micro([34.0], i) for i in range(8)],
    }
    if args.tiny:
        cases = {k: v for k, v in cases.items() if "34" not in k}
    for checkpointing in (False, True):
        model, schedule, optimizer = build(checkpointing)
        update = partial(one_update, model, schedule, optimizer)
        name = " + gradient_checkpointing" if checkpointing else ""
        for case, batches in cases.items():
            if checkpointing and "typical" in case and "8" in case:
                continue
            reset()
            try:
                update(batches)
                sync()
                times = []
                for _ in range(5 if "typical" in case and not args.tiny else 2):
                    sync()
                    t = time.perf_counter()
                    update(batches)
                    sync()
                    times.append(time.perf_counter() - t)
                fits = ""
                if CUDA:
                    reserved = torch.cuda.max_memory_reserved() / 1e9
                    fits = "ok" if reserved < args.card_gb - 0.7 else f"does not fit {args.card_gb:g} GB"
                row("step", case + name, f"{statistics.median(times) * 1e3:.0f} ms; {peak()}", fits)
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                row("step", case + name, "out of memory on this card")
        if not checkpointing and CUDA:
            from torch.profiler import ProfilerActivity, profile

            for case in ("4 x 2 typical", "8 x 1 typical"):
                with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
                    t = time.perf_counter()
                    update(cases[case])
                    sync()
                    wall = time.perf_counter() - t
                kernels = [e for e in prof.events() if str(e.device_type).endswith("CUDA")]
                busy = sum(e.device_time_total for e in kernels) / 1e6
                syncs = sum(1 for e in prof.events() if "Synchronize" in e.name)
                row(
                    "step",
                    f"{case}: kernels and copies, GPU busy, synchronisations",
                    f"{len(kernels)}, {busy * 1e3:.0f} of {wall * 1e3:.0f} ms (with the profiler on), {syncs}",
                )
                table = prof.key_averages().table(sort_by="self_device_time_total", row_limit=25)
                (OUT / f"profile-{case.replace(' ', '')}.txt").write_text(table)
        del model, schedule, optimizer
        reset()


# --- whole trials -----------------------------------------------------------------------------------------------------


def noise_corpus(folder: Path, per_session: int, seconds) -> Path:
    """A manifest of noise whose loudness and pitch carry the labels. `seconds(i)`: the length of an utterance."""
    import soundfile

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    with (folder / "manifest.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["path", "utterance", "speaker", "session", "dialogue", "turn", "valence", "arousal"])
        for session in range(1, 4):
            for i in range(per_session):
                v, a = random.uniform(1.2, 4.8, 2)
                n = int(seconds(i) * 16000)
                x = 0.02 * a * random.standard_normal(n) + 0.05 * np.sin(
                    2 * np.pi * (100 + 60 * v) * np.arange(n) / 16000
                )
                name = f"s{session}u{i}"
                soundfile.write(folder / f"{name}.wav", np.clip(x, -0.99, 0.99).astype(np.float32), 16000)
                out.writerow(
                    [
                        f"{name}.wav",
                        name,
                        f"speaker{session}",
                        f"session{session}",
                        f"dialogue{session}",
                        i,
                        round(v, 3),
                        round(a, 3),
                    ]
                )
    return folder / "manifest.csv"


def trials_of(data: dict):
    from cvrunner.config.schema import validate
    from cvrunner.data.corpus import load_corpus
    from cvrunner.data.folds import make_folds
    from cvrunner.orchestration.trials import plan_trials

    config = validate(data, "gpu_check")
    corpus = load_corpus(config.corpus, Path(config.corpus.root))
    return plan_trials(config, corpus, make_folds(corpus, config.folds.scheme))


def run_trial(trial, folder: str, device=None, stop_after: int | None = None):
    from cvrunner.orchestration.attempt import attempt
    from cvrunner.records.run_directory import TrialDirectory
    from cvrunner.training.fold_trainer import TrialContext

    asked = iter(range(10**9))
    should_stop = (lambda: next(asked) >= stop_after) if stop_after is not None else (lambda: False)
    context = TrialContext(
        TrialDirectory(WORK / folder / trial.name), WORK / f"cache-{(device or DEV).type}", device or DEV, should_stop
    )
    return list(attempt(trial, context)), context.directory


def demo_data() -> dict:
    root = WORK / "demo-corpus"
    data = {
        "corpus": {"format": "demo", "root": str(root), "demo": {"utterances": 160}},
        "model": {"encoder": "demo", "width": 64},
        "train": {"batch_size": 4, "accumulation_steps": 2, "epochs": 2, "lr": 1e-3, "encoder_lr": 5e-4},
        "conditions": {
            "frozen": {"model": {"freeze_speech_encoder": True}},
            "unfrozen": {"model": {"freeze_speech_encoder": False}},
        },
        "tracking": {"enabled": False},
    }
    try:
        import espeakng_loader  # noqa: F401
    except ImportError:
        manifest = root / "manifest.csv"
        if not manifest.exists():
            noise_corpus(root, 40, lambda i: 1.0 + (i % 10) * 0.5)
        data["corpus"] = {"format": "manifest", "root": str(manifest)}
    return data


def check_trials() -> None:
    """Frozen and unfrozen on the device and on the CPU, a stop and its continuation, and the same twice."""
    from cvrunner.records.results import EpochRecord, TrialResult

    trials = {t.condition: t for t in trials_of(demo_data()) if t.fold.number == 1}
    for condition, trial in trials.items():
        reset()
        t = time.perf_counter()
        events, directory = run_trial(trial, "gpu")
        last = events[-1]
        if not isinstance(last, TrialResult):
            row("trial", condition, getattr(last, "details", "") or last, "FAIL")
            continue
        epochs = [e for e in events if isinstance(e, EpochRecord)]
        row(
            "trial",
            f"{condition} on {last.device} in {last.precision}",
            f"test CCC {last.test_ccc}; epoch {epochs[-1].train_s:.2f} s; {time.perf_counter() - t:.1f} s in all; "
            f"peak {last.peak_memory_mib:.0f} MiB",
            "ok",
        )
        again, other = run_trial(trial, "gpu-again")
        same = directory.predictions.read_bytes() == other.predictions.read_bytes()
        scores = [
            [e for e in these if isinstance(e, EpochRecord)][-1].validation_ccc["avg"] for these in (events, again)
        ]
        close = abs(scores[0] - scores[1]) < 0.02
        verdict = "ok" if same or (CUDA and close) else "FAIL"
        row(
            "trial",
            f"{condition}: the same twice",
            f"predictions {'bit-identical' if same else 'differ'}; validation CCC-Avg {scores[0]} and {scores[1]}",
            verdict,
        )
        exact = {
            t.condition: t
            for t in trials_of(demo_data() | {"train": demo_data()["train"] | {"deterministic": True}})
            if t.fold.number == 1
        }[condition]
        pairs = [run_trial(exact, f"gpu-exact-{i}") for i in (1, 2)]
        same = pairs[0][1].predictions.read_bytes() == pairs[1][1].predictions.read_bytes()
        row(
            "trial",
            f"{condition}: deterministic, twice",
            f"predictions {'bit-identical' if same else 'differ'}",
            "ok" if same else "FAIL",
        )
        updates = len(epochs) and epochs[-1].updates // len(epochs)
        first, _ = run_trial(trial, "gpu-resumed", stop_after=updates + updates // 2)
        more, resumed = run_trial(trial, "gpu-resumed")
        ok = isinstance(more[-1], TrialResult)
        close = ok and abs(more[-1].test_ccc["avg"] - last.test_ccc["avg"])
        same = ok and directory.predictions.read_bytes() == resumed.predictions.read_bytes()
        row(
            "trial",
            f"{condition}: stopped ({getattr(first[-1], 'kind', type(first[-1]).__name__)}) and continued",
            f"test CCC-Avg {more[-1].test_ccc['avg'] if ok else more[-1]}, bit-identical: {same}, differs by {close}",
            "ok" if ok and close < 0.02 else "FAIL",
        )
        if CUDA:
            on_cpu, _ = run_trial(trial, "cpu", torch.device("cpu"))
            row("trial", f"{condition}: CPU, float32", f"test CCC {getattr(on_cpu[-1], 'test_ccc', on_cpu[-1])}")


def check_memory() -> None:
    """Memory runs out in the shape of WavLM-large on a card of --card-gb: those updates are split."""
    from transformers import Wav2Vec2FeatureExtractor

    from cvrunner.records.results import EpochRecord, TrialResult
    from cvrunner.records.run_directory import read_events

    folder = WORK / "wavlm-large"
    wavlm(LARGE).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    long_s = 2.0 if args.tiny else 34.0
    data = {
        "corpus": {
            "format": "manifest",
            "root": str(noise_corpus(WORK / "long", 16, lambda i: long_s if i % 2 else 1.0 + i % 5 * 0.2)),
        },
        "model": {"encoder": str(folder)},
        "train": {"batch_size": 4, "accumulation_steps": 2, "epochs": 1},
        "conditions": {"unfrozen": {"model": {"freeze_speech_encoder": False}}},
        "tracking": {"enabled": False},
    }
    if CUDA:
        total = torch.cuda.get_device_properties(DEV).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (args.card_gb - 1.0) * 1e9 / total), DEV)
    try:
        trial = trials_of(data)[0]
        reset()
        t = time.perf_counter()
        events, directory = run_trial(trial, "oom")
        took, last = time.perf_counter() - t, events[-1]
        split = list(read_events(directory.journal, "memory"))
        done = isinstance(last, TrialResult)
        updates = len({(line["epoch"], line["update"]) for line in split})
        value = f"{last}; {took:.0f} s; {peak()}"
        verdict = "FAIL"
        if done:
            value = f"smallest micro-batch {last.batch_size}; {updates} updates split; {took:.0f} s; {peak()}"
            verdict = "ok" if split or args.tiny else "no out of memory: lower --card-gb"
        row("oom", f"4 x 2 with {long_s:g} s utterances, {args.card_gb:g} GB", value, verdict)
        started = next((e for e in events if hasattr(e, "checkpoint_mib")), None)
        if started:
            row(
                "oom",
                "checkpoint",
                f"{started.checkpoint_mib:.0f} MiB, about {started.checkpoint_s:.1f} s (the program's own estimate)",
            )
        epoch = next((e for e in events if isinstance(e, EpochRecord)), None)
        if epoch:
            row(
                "oom",
                "epoch",
                f"train {epoch.train_s:.1f} s, validation {epoch.validation_s:.1f} s",
            )
    finally:
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0, DEV)


def check_mamba() -> None:
    """Scan beyond 128 steps on the device, with mamba-ssm's kernels if installed, against plain PyTorch on the CPU."""
    from cvrunner.config.sections import ModelConfig
    from cvrunner.encoders.encoder import Encoded
    from cvrunner.encoders.packing import Packing
    from cvrunner.model import mamba
    from cvrunner.model.mamba_ema import Head

    row("mamba", "kernels of mamba-ssm and causal-conv1d", "used on CUDA tensors" if mamba.KERNELS else "not installed")
    torch.manual_seed(0)
    head = Head(ModelConfig(), 2, 5, 64)
    for steps in (100, 129, 425):
        x = torch.randn(steps * 2, 5, 64)
        for mode in (False, True):
            head.train(mode)
            head.dropout.p = 0.0
            try:
                head.cpu()
                lengths = torch.tensor([steps] * 2)
                statistics = Packing([steps] * 2, x.device).statistics(x.unbind(1))
                a = head.encode(Encoded(x, lengths, statistics))
                head.to(DEV)
                b = head.encode(Encoded(x.to(DEV), lengths, statistics.to(DEV)))
                b.square().sum().backward()
                row(
                    "mamba",
                    f"{steps} steps, {'training' if mode else 'evaluation'}: device against CPU",
                    f"{rel(b, a):.1e}",
                    "ok" if rel(b, a) < 1e-3 else "FAIL",
                )
            except Exception as error:
                row(
                    "mamba",
                    f"{steps} steps, {'training' if mode else 'evaluation'}",
                    f"{type(error).__name__}: {str(error)[:100]}",
                    "FAIL",
                )


def check_ray() -> None:
    try:
        import ray
    except ImportError:
        row("ray", "not importable", "skipped")
        return
    from cvrunner.config.schema import validate
    from cvrunner.orchestration.ray_executor import RayExecutor
    from cvrunner.records.results import TrialResult
    from cvrunner.records.run_directory import TrialDirectory

    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    data = demo_data()
    trials = [t for t in trials_of(data) if t.fold.number in (1, 2) and t.condition == "frozen"]
    executor = RayExecutor("gpu-check", validate(data, "gpu_check").cluster, WORK / "cache-ray", len(trials))
    try:
        row("ray", "slots, resources", f"{executor.slots}, {ray.cluster_resources().get('GPU', 0):g} GPU", "ok")
        waiting, done, began = list(trials), 0, time.monotonic()
        while done < len(trials) and time.monotonic() - began < 120:
            while waiting and len(executor.attempts) < executor.slots:
                trial = waiting.pop()
                executor.start(trial, TrialDirectory(WORK / "ray" / trial.name))
            for trial, event in executor.poll(0.5):
                if isinstance(event, TrialResult) or type(event).__name__ == "Failure":
                    done += 1
                    if isinstance(event, TrialResult):
                        right = (event.device != "cpu") == CUDA
                        row("ray", trial.name, f"{event.device}, {event.test_ccc}", "ok" if right else "FAIL")
                    else:
                        row("ray", trial.name, event, "FAIL")
    finally:
        executor.close()


CHECKS = {
    "fresh": check_fresh,
    "env": check_environment,
    "sdpa": check_sdpa,
    "parity": check_parity,
    "mamba": check_mamba,
    "trial": check_trials,
    "syncs": check_syncs,
    "step": check_steps,
    "oom": check_memory,
    "ray": check_ray,
}


def main() -> int:
    for name, check in CHECKS.items():
        if args.only and name not in args.only.split(","):
            continue
        if time.monotonic() - BEGAN > args.budget - 60:
            row(name, "skipped", "no time left")
            continue
        try:
            check()
        except Exception as error:
            traceback.print_exc()
            row(name, type(error).__name__, str(error).splitlines()[0][:160] if str(error) else "", "FAIL")
        reset()
    (OUT / "gpu_check.json").write_text(json.dumps(ROWS, indent=1))
    print("\n" + "\n".join(f"{c:8s} | {n[:74]:74s} | {v[:150]} | {x}" for c, n, v, x in ROWS), flush=True)
    failed = sum(x.startswith("FAIL") for *_, x in ROWS)
    print(f"\n{len(ROWS)} rows, {failed} FAIL, {time.monotonic() - BEGAN:.0f} s", flush=True)
    shutil.rmtree(WORK, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
