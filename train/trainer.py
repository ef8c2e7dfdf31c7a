"""The training loop: one fused step of the head and one AdamW step of the encoder for each batch."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from tqdm import tqdm

from models import kernels
from models.encoder import Encoder
from models.head import Head
from models.kernels import Optimizer, Positives, rounding_key
from train import checkpoint
from train.batches import batches_by_length, training_batches
from train.checkpoint import Progress, State
from train.inputs import INTERMEDIATE, Inputs
from train.metrics import RANKED, Meter
from train.runs import Log
from train.settings import Settings

_EVAL_BATCH = 128


class DivergedError(RuntimeError):
    """Loss, gradient or scores are no longer finite; the message says at which step."""


class StoppedError(Exception):
    """Ctrl-C or SIGTERM: the state is saved. `signum` is the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Trainer:
    """Trains an encoder and a head on `inputs`; `evaluations` are held-out splits by name.

    The first of them is evaluated after each epoch, the others after the last one only.
    """

    def __init__(
        self,
        settings: Settings,
        encoder: Encoder,
        head: Head,
        inputs: Inputs,
        evaluations: dict[str, Inputs],
        propensity_weights: np.ndarray,
        checkpoints: Path,
        log: Log,
    ) -> None:
        self._settings = settings
        self._inputs = inputs
        self._evaluations = evaluations
        self._weights = propensity_weights
        self._checkpoints = checkpoints
        self._log = log
        self._located = head.slots()
        self._optimizer = Optimizer(settings.head_optimizer, settings.head_lr)
        moments = [self._optimizer.moments(block) for block in head.blocks]
        self._state = State(encoder, head, adamw(encoder, settings), moments, Progress())
        self._steps_per_epoch = -(-len(inputs.split) // settings.batch_size)
        self._steps = settings.epochs * self._steps_per_epoch
        self._stop_signal: int | None = None
        self._clock = 0.0
        torch.manual_seed(settings.seed)

    @property
    def moment_bytes(self) -> int:
        """Memory of the head's optimizer moments."""
        return sum(moments.nbytes for moments in self._state.moments)

    def restore(self, folder: Path, progress: Progress) -> None:
        """Goes on from a checkpoint whose encoder and head this trainer was made with. CheckpointError."""
        self._state = replace(self._state, progress=progress)
        checkpoint.restore(self._state, folder)

    def run(self) -> None:
        """Trains to the end, with a checkpoint and an evaluation after each epoch. StoppedError, DivergedError."""
        progress = self._state.progress
        self._clock = time.monotonic() - progress.seconds
        with self._catching_signals():
            while progress.epoch < self._settings.epochs:
                self._train_epoch()
                self._save()
                self._evaluate_epoch()
                progress.epoch, progress.batch = progress.epoch + 1, 0
                checkpoint.save_progress(progress, self._checkpoints)

    def _train_epoch(self) -> None:
        settings, progress, inputs = self._settings, self._state.progress, self._inputs
        batches = training_batches(inputs.lengths, settings.batch_size, seed=settings.seed, epoch=progress.epoch)
        done = sum(map(len, batches[: progress.batch]))
        self._state.encoder.train()
        started, texts = time.monotonic(), 0
        title = f"epoch {progress.epoch + 1}/{settings.epochs}"
        with tqdm(total=len(inputs.split), initial=done, desc=title, unit=" texts", disable=None) as bar:
            for rows in batches[progress.batch :]:
                loss, scale = self._step(rows)
                texts += len(rows)
                bar.set_postfix(loss=f"{loss:.4g}", lr=f"{scale * settings.head_lr:.2g}", refresh=False)
                bar.update(len(rows))
                if progress.step % settings.log_every == 0 or progress.batch == len(batches):
                    now = time.monotonic()
                    self._log_training(scale, texts / (now - started))
                    started, texts = now, 0
                if self._stop_signal is not None:
                    self._save()
                    raise StoppedError(self._stop_signal)
                if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0:
                    self._save()

    def _step(self, rows: np.ndarray) -> tuple[float, float]:
        """One step on the texts `rows`: returns the loss, a sum over labels and mean over texts, and the schedule's factor."""
        settings, state, progress = self._settings, self._state, self._state.progress
        scale = schedule(progress.step, self._steps, settings.warmup, settings.schedule)
        embedding = self._inputs.embed(rows)
        x = embedding.detach().numpy()
        if not np.isfinite(x).all():
            raise self._diverged("the encoder's output is not finite")
        positives = Positives.of_batch(self._inputs.split.labels_of(rows), self._located, state.head)
        optimizer = replace(self._optimizer, lr=scale * settings.head_lr)
        loss, grad_x = 0.0, np.zeros_like(x)
        for i, block in enumerate(state.head.blocks):
            block_loss, block_grad = kernels.train_step(
                x, positives[i], block, state.moments[i], loss=settings.loss, optimizer=optimizer,
                step=progress.step + 1, key=rounding_key(settings.seed, progress.step, i),
            )  # fmt: skip
            loss += block_loss
            grad_x += block_grad
        if not (math.isfinite(loss) and np.isfinite(grad_x).all()):
            raise self._diverged(f"the loss is {loss}")
        if state.optimizer is not None:
            embedding.backward(torch.from_numpy(grad_x))
            self._step_encoder(state.optimizer, scale)
        progress.step += 1
        progress.batch += 1
        progress.loss_sum += loss
        progress.loss_steps += 1
        return loss, scale

    def _step_encoder(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._settings.clip_norm or math.inf)
        if not torch.isfinite(norm):
            raise self._diverged("the encoder's gradient is not finite")
        for group in optimizer.param_groups:
            group["lr"] = scale * group["peak_lr"]
        optimizer.step()
        optimizer.zero_grad()

    def _evaluate_epoch(self) -> None:
        settings, progress = self._settings, self._state.progress
        last = progress.epoch + 1 == settings.epochs
        if not last and (progress.epoch + 1) % settings.eval_every:
            return
        names = list(self._evaluations)
        for name in names if last else names[:1]:
            started = time.monotonic()
            metrics = self._evaluate(name)
            seconds = time.monotonic() - started
            where = {"step": progress.step, "epoch": progress.epoch + 1}
            self._log.write({"kind": "eval", "split": name, **where, **metrics, "seconds": round(seconds, 3)})
            tqdm.write(
                f"epoch {progress.epoch + 1}/{settings.epochs} {name}: " + "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
            )
            if name == names[0] and metrics["P@1"] > progress.best.get("P@1", -1):
                progress.best = where | metrics

    def _evaluate(self, name: str) -> dict[str, float]:
        inputs = self._evaluations[name]
        chosen = sample(len(inputs.split), self._settings.limit_eval)
        meter = Meter(self._weights)
        self._state.encoder.eval()
        with (
            torch.inference_mode(),
            tqdm(total=len(chosen), desc=f"evaluating {name}", unit=" texts", disable=None, leave=False) as bar,
        ):
            for places in batches_by_length(inputs.lengths[chosen], _EVAL_BATCH):
                rows = chosen[places]
                try:
                    _, ranked = kernels.topk(inputs.embed(rows).numpy(), self._state.head, RANKED)
                except (ValueError, OverflowError) as error:
                    raise self._diverged(str(error)) from error
                meter.update(ranked, inputs.split.labels_of(rows))
                bar.update(len(rows))
                if self._stop_signal is not None:
                    raise StoppedError(self._stop_signal)  # saved before the evaluation, which is repeated on resuming
        return meter.result()

    def _log_training(self, scale: float, texts_per_s: float) -> None:
        settings, progress = self._settings, self._state.progress
        self._log.write(
            {
                "kind": "train",
                "step": progress.step,
                "epoch": progress.epoch + 1,
                "loss": progress.loss_sum / progress.loss_steps,
                "encoder_lr": 0.0 if settings.freeze_encoder else scale * settings.transformer_lr,
                "head_lr": scale * settings.head_lr,
                "texts_per_s": round(texts_per_s, 1),
                "peak_memory_mb": peak_memory_mb(),
                "seconds": round(time.monotonic() - self._clock, 3),
            }
        )
        progress.loss_sum, progress.loss_steps = 0.0, 0

    def _save(self) -> None:
        self._state.progress.seconds = time.monotonic() - self._clock
        checkpoint.save(self._state, self._checkpoints, self._settings.keep)

    def _diverged(self, reason: str) -> DivergedError:
        progress = self._state.progress
        return DivergedError(
            f"training diverged at step {progress.step + 1} (epoch {progress.epoch + 1}): {reason}. "
            "Start again with lower learning rates (--head-lr, --encoder-lr, --intermediate-lr) or a lower --clip-norm"
        )

    @contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks the loop to save and stop; a second one acts at once, as usual."""
        before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

        def ask(signum: int, frame: FrameType | None) -> None:
            self._stop_signal = signum
            for known, handler in before.items():
                signal.signal(known, handler)

        for signum in before:
            signal.signal(signum, ask)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def adamw(encoder: Encoder, settings: Settings) -> torch.optim.Optimizer | None:
    """AdamW over what is trained of the encoder; None when that is nothing. Only matrices are decayed.

    Each group's "peak_lr" is its learning rate at the top of the schedule.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        fresh = name.startswith(INTERMEDIATE)
        parameter.requires_grad_(fresh or not settings.freeze_encoder)
        if parameter.requires_grad:
            groups.setdefault((fresh, parameter.ndim > 1), []).append(parameter)
    if not groups:
        return None
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak_lr": settings.intermediate_lr if fresh else settings.transformer_lr,
                "weight_decay": settings.weight_decay if matrix else 0.0,
            }
            for (fresh, matrix), parameters in groups.items()
        ],
        fused=True,
    )


def schedule(step: int, steps: int, warmup: float, kind: str) -> float:
    """The factor on all learning rates in step `step` (from 0) of `steps`: a rise over the share `warmup`, then decay to 0."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    left = (steps - step) / max(1, steps - rise)
    return left if kind == "linear" else (1 - math.cos(math.pi * left)) / 2


def sample(n: int, limit: int) -> np.ndarray:
    """`limit` of the rows 0 … n − 1, evenly spaced; all of them when limit is 0 or not below n."""
    return np.arange(n) if not 0 < limit < n else np.arange(limit) * n // limit


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MB (10⁶ bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
