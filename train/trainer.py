"""The training loop: one fused step of the head and one AdamW step of the encoder for each batch."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.encoder import Encoder
from train import checkpoint, optimization
from train.batches import training_batches
from train.checkpoint import Progress, State
from train.encoding import Encoding
from train.evaluation import evaluate
from train.head import HeadTraining
from train.inputs import Inputs
from train.interrupt import Interrupt
from train.metrics import Meter
from train.runs import Log
from train.settings import Settings
from train.stages import Stages
from train.watch import NotFiniteError, Watch

_SHOWN = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5", "nDCG@5", "recall@10", "macro-F1@5", "coverage@5")  # after each epoch


class DivergedError(RuntimeError):
    """Loss, gradient or scores are no longer finite; the message says at which step."""


class Trainer:
    """Trains an encoder and a head on `inputs`; `evaluations` are held-out splits by name.

    The first of them is evaluated after each epoch, the others after the last one only. On a GPU no step waits for the one
    before: losses are looked at when they are logged, and before anything is saved.
    """

    def __init__(
        self,
        settings: Settings,
        encoder: Encoder,
        training: HeadTraining,
        inputs: Inputs,
        evaluations: dict[str, Inputs],
        label_counts: np.ndarray,
        propensity_weights: np.ndarray,
        checkpoints: Path,
        log: Log,
        stages: Stages,
    ) -> None:
        self._settings = settings
        self._inputs = inputs
        self._encoding = Encoding(inputs, settings.micro_batch, encoder.device)
        self._evaluations = evaluations
        self._counts = label_counts
        self._weights = propensity_weights
        self._checkpoints = checkpoints
        self._log = log
        self._stages = stages
        self._steps = settings.steps(len(inputs.split))
        self._state = State(encoder, training, optimization.optimizers(encoder, settings), Progress())
        self._losses = torch.zeros((), dtype=torch.float64, device=encoder.device)  # their sum since the last log line
        self._watch = Watch(lazy=encoder.device.type == "cuda")
        self._interrupt = Interrupt()
        self._clock = 0.0
        torch.manual_seed(settings.seed)

    @property
    def moment_bytes(self) -> int:
        """Memory of the head's optimizer moments."""
        return sum(moments.nbytes for moments in self._state.training.moments)

    def restore(self, folder: Path, progress: Progress) -> None:
        """Goes on from a checkpoint whose encoder and head this trainer was made with. CheckpointError."""
        self._state = replace(self._state, progress=progress)
        self._losses.fill_(progress.loss_sum)
        checkpoint.restore(self._state, folder)

    def run(self) -> None:
        """Trains to the end, with a checkpoint and an evaluation after each epoch. StoppedError, DivergedError."""
        progress = self._state.progress
        self._clock = time.monotonic() - progress.seconds
        self._stages.log_to(self._log, progress)
        with self._interrupt:
            while progress.epoch < self._settings.epochs:
                with self._stages("training"):
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
                log = progress.step % settings.log_every == 0 or progress.batch == len(batches)
                if log or not loss.is_cuda:
                    bar.set_postfix(loss=f"{float(loss):.4g}", lr=f"{scale * settings.head_lr:.2g}", refresh=False)
                bar.update(len(rows))
                if log:
                    self._look()
                    now = time.monotonic()
                    self._log_training(scale, texts / (now - started))
                    started, texts = now, 0
                if self._interrupt.signum is not None:
                    self._save()
                    self._interrupt.check()
                if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0:
                    self._save()

    def _step(self, rows: np.ndarray) -> tuple[Tensor, float]:
        """One step on the texts `rows`: returns the loss, a sum over labels and mean over texts, and the schedule's factor."""
        try:
            return self._take_step(rows)
        except NotFiniteError as error:
            raise self._diverged(str(error), error.step) from None

    def _take_step(self, rows: np.ndarray) -> tuple[Tensor, float]:
        settings, state, progress = self._settings, self._state, self._state.progress
        scale = optimization.schedule(progress.step, self._steps, settings.warmup, settings.schedule)
        x = self._encoding.embed(rows)
        self._watch.see("the encoder's output", progress.step, x)
        labels = self._inputs.split.labels_of(rows)
        for row in state.training.rewire(x, labels, progress.step):
            self._log.write({"kind": "rewire", "step": progress.step + 1, "epoch": progress.epoch + 1, **row})
        loss, grad_x = state.training.step(x, labels, progress.step, scale)
        self._watch.see("the loss", progress.step, loss)
        self._watch.see("the head's gradient", progress.step, grad_x)
        if state.optimizers:
            self._encoding.backward(grad_x)
            norm = optimization.clip(state.optimizers, settings.clip_norm)
            self._watch.see("the encoder's gradient", progress.step, norm)
            optimization.step(state.optimizers, scale)
        self._losses += loss
        progress.step += 1
        progress.batch += 1
        progress.loss_steps += 1
        return loss, scale

    def _look(self) -> None:
        """Brings what the device knows of the losses into the progress; DivergedError. Waits for the device."""
        try:
            self._watch.check()
        except NotFiniteError as error:
            raise self._diverged(str(error), error.step) from None
        self._state.progress.loss_sum = float(self._losses)

    def _evaluate_epoch(self) -> None:
        settings, progress = self._settings, self._state.progress
        last = progress.epoch + 1 == settings.epochs
        if not last and (progress.epoch + 1) % settings.eval_every:
            return
        names = list(self._evaluations)
        for name in names if last else names[:1]:
            started = time.monotonic()
            with self._stages("evaluation"):
                meter = self._evaluate(name)
            metrics = meter.result()
            seconds = time.monotonic() - started
            self._log.write(
                {
                    "kind": "eval",
                    "split": name,
                    "step": progress.step,
                    "epoch": progress.epoch + 1,
                    **metrics,
                    "deciles": meter.deciles(),
                    "seconds": round(seconds, 3),
                }
            )
            shown = "  ".join(f"{metric} {metrics[metric]:.4f}" for metric in _SHOWN)
            tqdm.write(f"epoch {progress.epoch + 1}/{settings.epochs} {name}: {shown}")

    def _evaluate(self, name: str) -> Meter:
        state, meter = self._state, Meter(self._weights, self._counts)
        try:
            evaluate(
                state.encoder, state.training.topk, self._evaluations[name], meter,
                limit=self._settings.limit_eval, name=name, interrupt=self._interrupt,
            )  # fmt: skip
        except FloatingPointError as error:
            raise self._diverged(str(error), state.progress.step) from error
        return meter

    def _log_training(self, scale: float, texts_per_s: float) -> None:
        settings, progress = self._settings, self._state.progress
        self._log.write(
            {
                "kind": "train",
                "step": progress.step,
                "epoch": progress.epoch + 1,
                "loss": progress.loss_sum / progress.loss_steps,
                "encoder_lr": 0.0 if settings.freeze_encoder else scale * settings.encoder_lr,
                "intermediate_lr": scale * settings.intermediate_lr if settings.intermediate else 0.0,
                "head_lr": scale * settings.head_lr,
                "texts_per_s": round(texts_per_s, 1),
                **self._stages.peaks_mb(),
                "seconds": round(time.monotonic() - self._clock, 3),
            }
        )
        progress.loss_sum, progress.loss_steps = 0.0, 0
        self._losses.zero_()

    def _save(self) -> None:
        self._look()
        self._state.progress.seconds = time.monotonic() - self._clock
        with self._stages("checkpoint"):
            checkpoint.save(self._state, self._checkpoints, self._settings.keep)

    def _diverged(self, reason: str, step: int) -> DivergedError:
        """`step` counts from 0."""
        return DivergedError(
            f"training diverged at step {step + 1} (epoch {self._state.progress.epoch + 1}): {reason}. "
            "Start again with lower learning rates (--head-lr, --encoder-lr, --intermediate-lr) or a lower --clip-norm"
        )
