"""The loop, on one screen. Mathematics is `TrainStep`'s, looking and recording are the callbacks'."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moetrain.checkpoint.background import Snapshot
from moetrain.checkpoint.compatibility import check_config
from moetrain.checkpoint.manager import CheckpointManager
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.config.layout import ParallelLayout
from moetrain.config.loader import config_from_dict, config_to_dict
from moetrain.config.schema import RunConfig
from moetrain.data.loader import BatchLoader, MicroBatch, SampleDataset
from moetrain.errors import CheckpointError, MoetrainError
from moetrain.optim.schedules import learning_rate
from moetrain.runtime.preemption import StopRequest
from moetrain.runtime.versions import software_versions
from moetrain.train.callback import Callback
from moetrain.train.data import RunData
from moetrain.train.evaluation import summarize
from moetrain.train.metrics import EvalReport, RouterStats, StepReport, Throughput
from moetrain.train.saving import RunSaver
from moetrain.train.state import collect_pieces, restore, restore_weights
from moetrain.train.step import StepOutcome, TrainStep


class Trainer:
    """Runs a `TrainStep` from where the newest checkpoint left off to the end, or to a request to stop."""

    def __init__(
        self,
        config: RunConfig,
        step: TrainStep,
        data: RunData,
        checkpoints: CheckpointManager,
        callbacks: Sequence[Callback],
        throughput: Throughput,
        log: logging.Logger,
    ) -> None:
        self.config, self.step, self.data, self.checkpoints = config, step, data, checkpoints
        self.callbacks, self.throughput, self.log = list(callbacks), throughput, log
        self.layout: ParallelLayout = step.groups.layout
        self.run_dir = Path(config.run.dir)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.iteration = self.start_iteration = self.consumed_samples = 0
        self.skipped_total = self._skipped_in_a_row = 0
        self.saver = RunSaver(checkpoints, config.checkpoint, log, lambda report: self._call("on_checkpoint", report))
        self._evaluation: EvalReport | None = None
        self._loss = math.nan
        self._stop = StopRequest(self.run_dir, poll_file=self.rank == 0)

    def fit(self) -> None:
        """Train to `training.train_iters` (or `stop_after`), validating and saving on the way. Collective."""
        training, checkpoint = self.config.training, self.config.checkpoint
        self._resume()
        last = min(training.train_iters, training.stop_after or training.train_iters)
        if self.iteration >= last:
            self.log.info("nothing to train: the run is at iteration %d and was to end at %d", self.iteration, last)
        self._stop.install()
        try:
            self._call("on_train_start")
            batches = self._loader(self._training_samples(), self.consumed_samples)
            while self.iteration < last:
                self._train_one(batches)
                if training.eval_interval and self.iteration % training.eval_interval == 0:
                    self._evaluate()
                if checkpoint.save_interval and self.iteration % checkpoint.save_interval == 0:
                    self.saver.save(self._snapshot())
                if reason := self._agree_at_boundary():
                    self.log.info("stopping after iteration %d: %s", self.iteration, reason)
                    self._stop.clear()
                    break
            if self.iteration == training.train_iters:
                self._evaluate()
            self.saver.save_last(self._snapshot())
            self._call("on_train_end")
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):  # who interrupts twice does not want to wait
                self.saver.rescue()
            self._call_on_error(error)
            raise
        finally:
            self._stop.uninstall()

    def _train_one(self, batches: Iterator[Sequence[MicroBatch]]) -> None:
        training = self.config.training
        start = time.perf_counter()
        microbatches = next(batches)  # within the time of the step: a slow disk must not look like a fast run
        lr = learning_rate(
            self.config.optimizer.schedule, self.config.optimizer.lr, training.train_iters, self.iteration
        )
        outcome = self.step.run(microbatches, lr, before_update=self.saver.wait_until_copied)
        seconds = time.perf_counter() - start
        self.iteration += 1
        self.consumed_samples += training.global_batch_size
        self._loss = outcome.loss
        self._count_skipped(outcome)
        tokens = training.global_batch_size * self.config.model.seq_length
        self.throughput.update(tokens, seconds)
        router = [self._router_stats(layer, outcome) for layer in sorted(outcome.router)]
        report = StepReport(
            iteration=self.iteration,
            train_iters=training.train_iters,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=lr,
            tokens=tokens,
            consumed_samples=self.consumed_samples,
            consumed_tokens=self.consumed_samples * self.config.model.seq_length,
            step_seconds=seconds,
            skipped=outcome.skipped,
            skipped_total=self.skipped_total,
            aux=_auxiliary(outcome),
            router=router or None,
        )
        self._call("on_step_end", report)

    def _count_skipped(self, outcome: StepOutcome) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if outcome.skipped else 0
        if not outcome.skipped:
            return
        self.skipped_total += 1
        self.log.warning("iteration %d skipped: a gradient is not finite (norm %s)", self.iteration, outcome.grad_norm)
        limit = self.config.training.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            raise MoetrainError(
                f"{limit} steps in a row had non-finite gradients (training.max_skipped_steps), the last at iteration "
                f"{self.iteration}; no weight has changed since iteration {self.iteration - limit}. "
                "Lower optimizer.lr, or resume from a checkpoint before that."
            )

    def _router_stats(self, layer: int, outcome: StepOutcome) -> RouterStats:
        counts, moe = outcome.router[layer], self.config.model.moe
        return RouterStats.from_counts(
            layer=layer,
            tokens_per_expert=counts.tokens_per_expert,
            k_histogram=counts.k_histogram,
            controllers=outcome.controllers[layer],
            hyper_norm_ratio=counts.hyper_norm_ratio,
            dropped=counts.dropped if moe is not None and moe.capacity is not None else None,
        )

    def _evaluate(self) -> None:
        if self.data.valid is None or (self._evaluation is not None and self._evaluation.iteration == self.iteration):
            return
        start = time.perf_counter()
        batches = self._loader(self.data.valid, 0)
        outcomes = [self.step.evaluate(next(batches)) for _ in range(self.data.valid_batches)]
        report = summarize(outcomes, self.data, self.config.training.objective)
        self._evaluation = replace(report, iteration=self.iteration, seconds=time.perf_counter() - start)
        self._call("on_evaluate", self._evaluation)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot:
        extra: dict[str, Any] = {
            "tokenizer": self.data.tokenizer_fingerprint,
            "corpora": self.data.contents,
            "optimizer_steps": self.iteration - self.skipped_total,
            "skipped_steps": self.skipped_total,
            "versions": software_versions(),
        }
        if math.isfinite(self._loss):
            extra["loss"] = self._loss
        if self._evaluation is not None and math.isfinite(self._evaluation.loss):  # what checkpoint.keep_best reads
            extra["evaluation"] = {"iteration": self._evaluation.iteration, "loss": self._evaluation.loss}
        return Snapshot(
            step=self.iteration,
            consumed_samples=self.consumed_samples,
            pieces=collect_pieces(self.step),
            config=config_to_dict(self.config),
            layout=self._layout_record(),
            extra=extra,
        )

    def _resume(self) -> None:
        reader, is_own = self._open_checkpoint()
        if reader is None:
            return
        anew = self.config.checkpoint.load_weights_only and not is_own
        with reader:
            # Through today's schema, so that a setting which did not exist then does not look like a contradiction.
            saved = config_from_dict(reader.config, f"the config in {reader.folder}")
            notes = check_config(
                config_to_dict(saved),
                config_to_dict(self.config),
                saved_tokenizer=reader.extra.get("tokenizer"),
                current_tokenizer=self.data.tokenizer_fingerprint,
                weights_only=anew,
            )
            for note in [*notes, *self._exchanged_corpora(reader)]:
                self.log.info("resume: %s", note)
            if anew:
                restore_weights(self.step, reader, self.log)
                self.log.info("weights from %s; all else starts anew", reader.folder)
                return
            restore(self.step, reader, self._layout_record(), self.log)
            self.iteration = self.start_iteration = reader.step
            self.consumed_samples = reader.consumed_samples
            self.skipped_total = int(reader.extra["skipped_steps"])
            self.saver.saved_at = reader.step if is_own else None
            self.log.info("resumed from %s (made on %s)", reader.folder, reader.layout.get("description"))

    def _exchanged_corpora(self, reader: CheckpointReader) -> list[str]:
        """One sentence per corpus that has another content under the same path: the stream goes on as another one."""
        then, now = reader.extra.get("corpora", {}), self.data.contents
        return [
            f"corpus {path}: {then[path]} in the checkpoint, {now[path]} in this run"
            for path in sorted(then.keys() & now.keys())
            if then[path] != now[path]
        ]

    def _open_checkpoint(self) -> tuple[CheckpointReader | None, bool]:
        """Where to start from, and whether it is this run's own checkpoint rather than `checkpoint.load`."""
        checkpoint = self.config.checkpoint
        own = None
        if checkpoint.resume == "auto":
            own = self.checkpoints.open()
        elif (latest := self.checkpoints.latest()) is not None:
            raise CheckpointError(
                f"checkpoint.resume is never, but this run's folder already holds {latest}, which would be in the way "
                "of its own checkpoints; choose another run.dir, or checkpoint.resume=auto"
            )
        if own is not None or checkpoint.load is None:
            return own, True
        try:
            return self.checkpoints.open(checkpoint.load), False
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint.load: {error}") from error

    def _layout_record(self) -> dict[str, Any]:
        return {
            **asdict(self.layout),
            "sequence": self.config.parallel.sequence,
            "zero_stage": self.config.zero.stage,
            "description": self.layout.describe(),
        }

    # --- small parts --------------------------------------------------------------------------------------------

    def _loader(self, dataset: SampleDataset, consumed_samples: int) -> BatchLoader:
        training = self.config.training
        return BatchLoader(
            dataset,
            training.global_batch_size,
            training.micro_batch_size,
            self.step.groups.coordinates.data,
            self.layout.data,
            consumed_samples,
        )

    def _training_samples(self) -> SampleDataset:
        """As many as this process will read, whatever global batches earlier ones took from the stream."""
        training = self.config.training
        needed = self.consumed_samples + (training.train_iters - self.iteration) * training.global_batch_size
        planned = training.train_iters * training.global_batch_size
        return self.data.train if needed <= planned else self.data.train_of(needed)

    def _agree_at_boundary(self) -> str | None:
        """Tell of a save that is over on all ranks. Returns why to stop, agreed by all: the first rank that has been
        asked decides for everybody."""
        reason = self._stop.requested
        flags = torch.tensor([self.rank if reason else self.world_size, self.saver.is_over], device=self.step.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        asked, is_over = flags.tolist()
        if is_over:
            self.saver.settle()
        if asked == self.world_size:
            return None
        return reason if asked == self.rank else f"rank {asked} was asked to stop"

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    def _call_on_error(self, error: BaseException) -> None:
        """Every callback, and none may hide `error`: a disk that ended the run takes no summary of it either."""
        for callback in self.callbacks:
            try:
                callback.on_error(self, error)
            except Exception as another:
                self.log.error("%s, told of the error, failed itself: %s", type(callback).__name__, another)


def _auxiliary(outcome: StepOutcome) -> dict[str, float]:
    layers = list(outcome.router.values())
    if not layers:
        return {}
    return {
        "load_balance": math.fsum(c.load_balance for c in layers) / len(layers),
        "z_loss": math.fsum(c.z_loss for c in layers) / len(layers),
        "mean_k": math.fsum(c.mean_k for c in layers) / len(layers),
    }
