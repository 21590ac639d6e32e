"""The one training loop: any tower, any ZeRO stage, any number of ranks, resumable at every step."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.profiler import record_function
from tqdm import tqdm

from .. import stopping
from ..config import Config
from ..data.batches import Bank, Batch, moved
from ..data.pairs import PairSource
from ..data.store import first_not_finite
from ..errors import UserError, tell, writing
from ..files import digests
from ..files.atomic import put_in_place, written_aside
from ..hardware import record_hardware
from ..model.efficientclip import EfficientCLIP
from ..model.encode import to_device
from ..noise.confidence import ConfidenceTable
from ..objectives.losses import Keys, Losses, both_sides_loss, mlm_loss, pair_losses
from .checkpoint import Checkpoints, step_of, weights_of, write_model
from .deepspeed_json import deepspeed_config, zero_settings
from .history import forget_from, write_epoch
from .loss_scale import LossScale
from .momentum import MomentumCopies
from .optimizer import build_optimizer, clip, learning_rate
from .ranks import all_rows, gathered, told
from .records import Metrics, Written
from .run_folder import keep_foreign, seal
from .tally import FIGURES, Issued, Tally, of_all
from .trackers import opened

Validate = Callable[[torch.nn.Module], dict[str, dict[str, Any]]]


class Trainer:
    """Trains `model` on `source` as `config` says. `validate` measures recall on held-out stores, by name.

    `span` names the parts of a step for whatever profiler watches.
    """

    span: Callable[[str], AbstractContextManager[Any]] = staticmethod(record_function)

    def __init__(self, config: Config, model: EfficientCLIP, source: PairSource, validate: Validate) -> None:
        self.config, self.source, self.validate = config, source, validate
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.run = config.run
        settings = deepspeed_config(config, self.world_size)
        self._freeze_unused(model)
        self.checkpoints = Checkpoints(self.run, config.training.keep_checkpoints)
        checkpoint = self.checkpoints.newest()
        if checkpoint is not None:
            self.checkpoints.load_weights(model, checkpoint)
        self.device = torch.device(get_accelerator().current_device_name())
        # Copies before ZeRO takes the model apart.
        self.snapshot: torch.nn.Module | None = None
        if config.confidence.score == "snapshot":
            self.snapshot = torch.nn.Module.to(copy.deepcopy(model).eval(), self.device)
        momentum, queue = config.objective.momentum, config.objective.bank_size
        self.copies = MomentumCopies(model, momentum, queue, config.seed, self.device) if momentum else None
        stage = int(zero_settings(config).stage)
        optimizer = build_optimizer(model, config.optimizer, stage)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        # On one rank there is nothing to reduce, yet DeepSpeed would copy all gradients to and fro.
        self.engine.enable_backward_allreduce = self.world_size > 1 or stage > 0
        # Of 100 million pairs it takes 3 GB: rank 0 alone keeps it, and tells the others what it chose.
        self.confidence: ConfidenceTable | None = None
        if self.rank == 0:
            least = config.training.batch_size
            self.confidence = ConfidenceTable(len(source), config.confidence, least, source.by_hand)
        self.bank = Bank(source.table, config.objective.bank_size, config.seed, self.device)
        self.loss_scale = LossScale(self.engine) if model.compute == torch.float16 else None
        self.loader = source.batches(config, self.rank, self.world_size)
        self.loader.kept = self._kept()
        self.step = 0
        self.best = self.recall = -math.inf
        self.grad_norm: torch.Tensor | float = 0.0
        self.tally = Tally(self.device)
        self.started, self.waited, self.loss = time.perf_counter(), 0.0, math.nan
        self.total_steps = math.ceil(config.training.pair_visits / config.training.batch_size)
        self.written = Written(self.run)
        self.best_step: int | None = None
        self.validation_due = False
        if checkpoint is not None:
            self._resume(checkpoint)
        if self.rank == 0:
            record_hardware(self.run / "hardware.json", self.step, self.world_size)
        self.metrics = Metrics(self.run, self.step, opened(config, self.step)) if self.rank == 0 else None
        chosen = self.rank == 0 and config.confidence.selection != "none"
        self.by_source = source.by_source() if chosen else None
        self._count_sources()
        # A finished run writes its last one again, in the place of what is there.
        if self.rank == 0 and self.step < self.total_steps:
            forget_from(self.run, self.loader.epoch)

    @property
    def visits(self) -> int:
        """Pairs that passed through the trained tower so far, over all ranks."""
        return self.step * self.config.training.batch_size

    def train(self) -> int | None:
        """Spend the rest of the budget; returns the signal that ended it early, after saving, or None."""
        try:
            with stopping.finishing(self.config.training.grace_seconds):
                stopped_by = self._train()
                if stopped_by is None:
                    self.finish()
                return stopped_by
        finally:
            self.loader.close()
            if self.metrics is not None:
                self.metrics.close(finished=self.step == self.total_steps)

    def _train(self) -> int | None:
        training = self.config.training
        self.engine.train()
        bar = tqdm(
            total=self.total_steps * training.batch_size,
            initial=self.visits,
            desc=f"{self.run.name}: pair visits",
            unit="pair",
            unit_scale=True,
            disable=self.rank != 0,
            mininterval=1.0,
        )
        waited_seconds = step_seconds = 0.0
        if self.validation_due:
            self.validation_due = False
            if self._validate():
                self.best_step = self.step
            self.checkpoints.save(self.engine, self.step, self._state(), self.best_step)
        while self.step < self.total_steps:
            self.started = time.perf_counter()
            with self.span("data wait"):
                batch = next(self.loader)
            if batch.frozen_MD is not None:
                self.bank.add_to(batch, self.source.edges)
            self.waited = time.perf_counter() - self.started
            self.train_step(batch)
            self.step += 1
            stop, ended = self.anywhere()
            bar.update(training.batch_size)
            waited_seconds += self.waited
            step_seconds += time.perf_counter() - self.started
            bar.set_postfix(
                loss=f"{self.loss:.3f}",
                kept=f"{self.loader.kept_share:.0%}",
                data_wait=f"{waited_seconds / step_seconds:.1%}",
                refresh=False,
            )
            best = False
            last = self.step == self.total_steps
            due = last or training.validates(self.step, self.loader.epoch + 1 if ended else None)
            if stop or ended or due or self.step % training.checkpoint_every == 0:
                # Nothing is chosen or saved before this step's own figures are known.
                stop = self._settle() or stop
            if ended:
                with self.span("confidence"):
                    self._end_epoch()
            # Told to stop, the run saves first: validation may take longer than it is given.
            self.validation_due = due and bool(stop)
            if due and not stop:
                with self.span("validation"):
                    best = self._validate()
            if stop or best or self.step % training.checkpoint_every == 0 or last:
                with self.span("checkpoint"):
                    self.best_step = self.step if best else self.best_step
                    self.checkpoints.save(self.engine, self.step, self._state(), self.best_step)
                    if stop or last:
                        self.checkpoints.finish()
                if not stop:
                    # A signal that came while it was copied need not wait for another one.
                    stop = max(gathered(stopping.requested() or 0))
            if stop:
                self.checkpoints.finish()
                bar.close()
                return stop
        bar.close()
        return None

    def train_step(self, batch: Batch) -> None:
        """Issue forward, backward and update on one global batch; its figures are read a step later."""
        config = self.config
        rate = learning_rate((self.step + 1) / self.total_steps, config.optimizer)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        if batch.frozen_MD is not None:
            batch.frozen_MD = moved(batch.frozen_MD, self.device)
        if batch.caption_ids_M is not None:
            batch.caption_ids_M = moved(batch.caption_ids_M, self.device)
        if batch.image_ids_M is not None:
            batch.image_ids_M = moved(batch.image_ids_M, self.device)
        batch.weights_M = moved(batch.weights_M, self.device)
        if batch.excluded is not None:
            batch.excluded = (moved(batch.excluded[0], self.device), moved(batch.excluded[1], self.device))
        inputs = [to_device(arguments, self.device) for arguments in batch.inputs]
        masked = self._exchange(batch.masked, self.loader.ended)
        keys = None
        if self.copies is not None:
            with self.span("forward"):
                keys = self.copies.keys(inputs)
        if len(inputs) == 1:
            losses, scale, mlm_sum = self._whole_batch(inputs[0], batch, keys, masked)
        else:
            losses, scale, mlm_sum = self._cached_batch(inputs, batch, keys, masked)
        if self.copies is not None and keys is not None:
            with self.span("optimiser"):
                self.copies.follow(self.engine, keys)
        with self.span("confidence"):
            figures = self._figures(losses, scale, inputs, batch, mlm_sum / masked.clamp(min=1))
        if batch.frozen_MD is not None and len(self.bank.ids):
            self.bank.push(batch.frozen_ids_N, batch.weights_N > 0, all_rows(batch.frozen_MD))
        values = {"lr": rate, "tokens": batch.tokens * self.world_size, "data_wait_seconds": self.waited}
        if self.loss_scale is not None:
            values["loss_scale"] = self.loss_scale.value
        kept = dataclasses.replace(batch, inputs=[], bank_QD=None, excluded=None)
        self.tally.under_way = Issued(self.step, kept, losses.cosine_M, figures, values)

    def _losses(self, output: dict[str, torch.Tensor], scale: torch.Tensor, batch: Batch, keys: Keys | None) -> Losses:
        objective = self.config.objective
        if "image_features" in output:
            return both_sides_loss(output["features"], output["image_features"], scale, batch, objective, keys)
        return pair_losses(output["features"], scale, batch, objective)

    def _whole_batch(
        self, inputs: dict[str, Any], batch: Batch, keys: Keys | None, masked: torch.Tensor
    ) -> tuple[Losses, torch.Tensor, torch.Tensor]:
        self.engine.set_gradient_accumulation_boundary(True)
        with self.span("forward"):
            output = self.engine(**inputs)
        with self.span("loss"):
            losses = self._losses(output, output["logit_scale"], batch, keys)
        mlm_sum = output.get("mlm_loss_sum", losses.total.new_zeros(()))
        self._backward(losses.total + mlm_loss(mlm_sum, masked, self.config.mlm))
        return losses, output["logit_scale"].detach(), mlm_sum.detach()

    def _cached_batch(
        self, inputs: list[dict[str, Any]], batch: Batch, keys: Keys | None, masked: torch.Tensor
    ) -> tuple[Losses, torch.Tensor, torch.Tensor]:
        """k micro-batches give exactly the gradients of one batch k times as large (GradCache, arXiv 2101.06983).

        Features of all micro-batches first, without graph; the loss's gradient at the features; then each micro-batch
        again, with graph, against its share of that gradient.
        """
        with self.span("forward"), torch.no_grad():
            outputs = [self.engine(**_without_masks(arguments)) for arguments in inputs]
        sides = [name for name in ("features", "image_features") if name in outputs[0]]
        features = {name: torch.cat([output[name] for output in outputs]).requires_grad_() for name in sides}
        scale = outputs[0]["logit_scale"].detach().requires_grad_()
        with self.span("loss"):
            losses = self._losses(features, scale, batch, keys)
            losses.total.backward()
        sizes = [len(output["features"]) for output in outputs]
        slopes = {name: torch.split(_gradient(whole_MD), sizes) for name, whole_MD in features.items()}
        mlm_total = scale.new_zeros(())
        for number, arguments in enumerate(inputs):
            self.engine.set_gradient_accumulation_boundary(number + 1 == len(inputs))
            with self.span("forward"):
                output = self.engine(**arguments)
            surrogate = torch.stack([(output[name] * slopes[name][number]).sum() for name in sides]).sum()
            if number == 0:
                surrogate = surrogate + (output["logit_scale"] * _gradient(scale)).sum()
            if "mlm_loss_sum" in output:
                mlm_total = output["mlm_loss_sum"].detach()
                surrogate = surrogate + mlm_loss(output["mlm_loss_sum"], masked, self.config.mlm)
            self._backward(surrogate)
        return losses, scale.detach(), mlm_total

    def _backward(self, loss: torch.Tensor) -> None:
        # DeepSpeed divides by the number of micro-batches that it was told.
        with self.span("backward"):
            loss = loss if self.loss_scale is None else self.loss_scale.scaled(loss)
            self.engine.backward(loss * self.engine.gradient_accumulation_steps())
        with self.span("optimiser"):
            self._step()

    def _step(self) -> None:
        """DeepSpeed's step; without ZeRO it does not tell the gradient norm, so it is taken, and clipped by, here.

        Gradients of fp16 that overflow are dropped, by ZeRO itself or here.
        """
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return
        if self.engine.zero_optimization_stage() > 0:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
            self.grad_norm = 0.0 if norm is None else norm
        else:
            self._clip()
            if self.loss_scale is None or math.isfinite(self.grad_norm):
                self.engine.step()
            else:
                self.engine.optimizer.zero_grad()
        if self.loss_scale is not None:
            self.grad_norm = float(self.grad_norm)
            overflowed = not math.isfinite(self.grad_norm)
            self.loss_scale.update(overflowed)
            self.grad_norm = 0.0 if overflowed else self.grad_norm

    def _clip(self) -> None:
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        if self.loss_scale is not None:
            self.loss_scale.unscale(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.optimizer.clip:
            clip(self.engine.optimizer, gradients, norm, self.config.optimizer.clip)
        # Whether fp16 overflowed decides over the step: the one read that this takes.
        self.grad_norm = norm if self.loss_scale is None else float(norm)

    def _figures(
        self, losses: Losses, scale: torch.Tensor, inputs: list[dict[str, Any]], batch: Batch, mlm: torch.Tensor
    ) -> torch.Tensor:
        """This rank's scores, which rank 0 keeps, and its share of this step's figures."""
        score_M = losses.log_probability_M if self.config.confidence.score == "log-probability" else losses.cosine_M
        if self.snapshot is not None and batch.frozen_MD is not None:
            with torch.no_grad():
                features = torch.cat([self.snapshot(**_without_masks(arguments))["features"] for arguments in inputs])
            score_M = (features * batch.frozen_MD).sum(1)
        norm = self.grad_norm if isinstance(self.grad_norm, torch.Tensor) else scale.new_full((), self.grad_norm)
        figures = {
            "cosine": torch.where(batch.weights_M > 0, losses.cosine_M.double(), 0).sum(),
            "mlm": mlm,
            "regression": losses.regression_sum,
            "contrastive": losses.contrastive,
            "logit_scale": scale,
            "grad_norm": norm,
        }
        # With the optimiser on the host, ZeRO tells the norm there.
        flat = [figures[name].detach().to(scale.device, torch.float64).view(1) for name in FIGURES]
        return torch.cat([score_M.double(), *flat])

    def _take_in(self) -> tuple[int, bool]:
        """Read the gather that travels: whether to stop and whether the epoch has ended on any rank. ECL, the check
        and the log take in the figures of the step that came with it."""
        arrived = self.tally.read()
        issued = arrived.issued
        timed = self.tally.under_way or issued
        if timed is not None:
            timed.values["step_seconds"] = time.perf_counter() - self.started
        if issued is not None:
            with self.span("confidence"):
                values = self._observe(issued, arrived.figures_W)
            self._check_finite(values, issued)
            self.loss = values["loss"]
            self._log(issued.step + 1, values)
        if arrived.written:
            with self.span("checkpoint"):
                self.checkpoints.finish()
        return arrived.stop, arrived.ended

    def _exchange(self, masked: int, ended: bool) -> torch.Tensor:
        return self.tally.exchange(masked, stopping.requested() or 0, ended, self.checkpoints.written)

    def _settle(self) -> int:
        """Take in the step under way at once; the signal by which any rank is told to stop by now, or 0."""
        self._exchange(0, False)
        return self._take_in()[0]

    def _observe(self, issued: Issued, figures_W: npt.NDArray[np.float64]) -> dict[str, float]:
        """Show ECL the scores of a step; its figures by name."""
        config, batch = self.config, issued.batch
        score_N, counted_N = figures_W[:, : -len(FIGURES)].reshape(-1), batch.weights_N > 0
        if batch.frozen_MD is not None and self.confidence is not None:
            self.confidence.observe(self.loader.epoch, batch.rows_N, score_N, counted_N)
        figures = dict(zip(FIGURES, figures_W[:, -len(FIGURES) :].T, strict=True))
        contrastive, mlm = of_all(figures["contrastive"]), float(figures["mlm"].sum())
        return {
            "loss": config.objective.contrastive_weight * contrastive
            + config.objective.regression_weight * float(figures["regression"].sum() / counted_N.sum())
            + config.mlm.weight * mlm,
            "contrastive": contrastive,
            "cosine": float(figures["cosine"].sum() / counted_N.sum()),
            "mlm": mlm,
            "logit_scale": of_all(figures["logit_scale"]),
            "lr": issued.values["lr"],
            "tokens": issued.values["tokens"],
            "grad_norm": of_all(figures["grad_norm"]),
            **issued.values,
        }

    def _check_finite(self, values: dict[str, float], issued: Issued) -> None:
        wrong = [name for name in ("loss", "mlm", "cosine", "grad_norm") if not math.isfinite(values[name])]
        if not wrong:
            return
        causes = [cause for cause in gathered(self._not_finite(issued.cosine_M, issued.batch)) if cause is not None]
        raise UserError(
            f"step {issued.step}: {wrong[0]} is {values[wrong[0]]};"
            f" {causes[0] if causes else 'all weights are finite'}."
            " The same command would come to it again: look at these pairs, or begin another run (run=…) with a lower"
            f" optimizer.lr or with optimizer.clip; model.start_from takes the weights of a checkpoint in"
            f" {self.checkpoints.folder}"
        )

    def _not_finite(self, cosine_M: torch.Tensor, batch: Batch) -> str | None:
        """What of this rank is not finite: stored features, pairs whose scores alone are, or a parameter."""
        first = batch.first
        if batch.frozen_MD is not None:
            row = first_not_finite(batch.frozen_MD.float().cpu().numpy())
            if row is not None:
                return f"the stored feature of pair {self._names(batch, [first + row])} is not finite"
        score_M = cosine_M.detach().float().cpu().numpy()
        rows = np.flatnonzero(~np.isfinite(score_M))
        if 0 < len(rows) < len(score_M):
            return f"the scores of these pairs are not finite: {self._names(batch, (first + rows[:8]).tolist())}"
        for name, parameter in self.engine.module.named_parameters():
            if not torch.isfinite(parameter).all():
                pairs = self._names(batch, list(range(first, first + min(8, len(score_M)))))
                return f"parameter {name} is not finite; the batch's pairs begin with {pairs}"
        return None

    def _names(self, batch: Batch, places: list[int]) -> str:
        """How a user finds the pairs at these places of the global batch again."""
        if batch.keys:
            return ", ".join(batch.keys[place - batch.first] for place in places)
        return ", ".join(self.source.names(batch.rows_N[places]))

    def _end_epoch(self) -> None:
        if self.confidence is not None:
            self.confidence.select(self.loader.epoch)
            self._write_history()
            self.confidence.start_epoch()
        if self.snapshot is not None:
            parameters = list(self.engine.module.parameters())
            sharded = self.engine.zero_optimization_stage() == 3
            with deepspeed.zero.GatheredParameters(parameters, enabled=sharded):
                self.snapshot.load_state_dict(self.engine.module.state_dict())
        self.loader.next_epoch()
        self.loader.kept = self._kept()
        self._count_sources()

    def _kept(self) -> npt.NDArray[np.bool_]:
        """The pairs that rank 0 has chosen, bool [pairs]."""
        bits = told(np.packbits(self.confidence.kept if self.confidence is not None else np.empty(0, bool)))
        return np.unpackbits(bits, count=len(self.source)).view(bool)

    def _count_sources(self) -> None:
        """The share of the pairs of each source that the epoch trains on, where there are several."""
        self.kept_by_source: dict[str, float] = {}
        if self.by_source is not None and self.confidence is not None and len(self.by_source.names) > 1:
            shares = self.by_source.shares(self.confidence.kept)
            self.kept_by_source = {name: share for name, (_, share) in shares.items()}

    def _validate(self) -> bool:
        """Measure the validation sets; True when the mean text->image recall@10 is the best so far."""
        reports = self.validate(self.engine.module)
        if not reports:
            return False
        mean = told(float(np.mean([report["t2i"]["R@10"] for report in reports.values()])))
        self.recall = mean
        if self.metrics is not None:
            self.metrics.validation(self.step, self.visits, self.loader.epoch, reports)
            shown = ", ".join(f"{name} t2i R@10 {report['t2i']['R@10']:.1f}" for name, report in reports.items())
            tqdm.write(f"epoch {self.loader.epoch}, {self.visits} visits: {shown}, kept {self.loader.kept_share:.1%}")
        best = mean > self.best
        self.best = max(self.best, mean)
        return best

    def _log(self, step: int, values: dict[str, float]) -> None:
        """Steps are logged before the next epoch begins."""
        training = self.config.training
        if self.metrics is not None:
            self.metrics.add(values)
            if step in (1, self.total_steps) or step % training.log_every == 0:
                visits = step * training.batch_size
                self.metrics.write(
                    step, visits, self.loader.epoch, training.batch_size, self.loader.kept_share, self.kept_by_source
                )

    def anywhere(self) -> tuple[int, bool]:
        """What holds on any rank: they stop together, whichever got the signal, and end an epoch together."""
        return self._take_in()

    def _freeze_unused(self, model: EfficientCLIP) -> None:
        """Parameters without a gradient would desynchronise ZeRO: they do not train."""
        if model.text is not None and self.config.mlm.texts_per_batch == 0:
            for name, parameter in model.text.mlm_head.named_parameters():
                if name != "decoder.weight":
                    parameter.requires_grad_(False)
        if self.config.objective.contrastive_weight == 0:
            model.logit_scale.requires_grad_(False)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "step": np.int64(self.step),
            "best": np.float64(self.best),
            "recall": np.float64(self.recall),
            "validation_due": np.bool_(self.validation_due),
            "best_step": np.int64(-1 if self.best_step is None else self.best_step),
        }
        if self.rank == 0:
            state["written"] = np.array(self.written.state())
        if self.confidence is not None:
            state |= {f"confidence.{name}": value for name, value in self.confidence.state().items()}
        state |= {f"loader.{name}": value for name, value in self.loader.state().items()}
        state |= {f"bank.{name}": value for name, value in self.bank.state().items()}
        if self.loss_scale is not None:
            state |= {f"loss_scale.{name}": value for name, value in self.loss_scale.state().items()}
        if self.copies is not None:
            state |= {f"copies.{name}": value for name, value in self.copies.state().items()}
        if self.snapshot is not None:
            state |= {f"snapshot.{name}": value.cpu().numpy() for name, value in self.snapshot.state_dict().items()}
        return state

    def _resume(self, checkpoint: Path) -> None:
        state = self.checkpoints.load(self.engine, checkpoint, without=() if self.rank == 0 else ("confidence.",))
        self.step, self.best, self.recall = int(state["step"]), float(state["best"]), float(state["recall"])
        self.validation_due = bool(state["validation_due"])
        self.best_step = int(state["best_step"]) if state["best_step"] >= 0 else None
        if self.rank == 0:
            self.written.restore(str(state["written"]))
            self.checkpoints.point(self.step, self.best_step)
        self.loader.restore(_under(state, "loader."))
        if self.confidence is not None:
            self.confidence.restore(_under(state, "confidence."))
        self.bank.restore(_under(state, "bank."))
        if self.copies is not None:
            self.copies.restore(_under(state, "copies."))
        if self.loss_scale is not None:
            self.loss_scale.restore(_under(state, "loss_scale."))
        if self.snapshot is not None:
            self.snapshot.load_state_dict(
                {name: torch.from_numpy(value) for name, value in _under(state, "snapshot.").items()}
            )
        if self.rank == 0:
            tqdm.write(f"resuming {self.run} at step {self.step} ({self.visits} pair visits)")

    def _write_history(self) -> None:
        if self.confidence is not None and len(self.source):
            file = write_epoch(self.run, self.loader.epoch, self.confidence.epoch_score, self.confidence.kept)
            self.written.add(file)

    def finish(self) -> None:
        """The model, ECL's table and the digests of a finished run; each appears whole or not at all."""
        self._write_final()
        if self.loader.epoch_step > 0:
            self._write_history()
        if self.confidence is None:
            return
        if len(self.source):
            with written_aside(self.run / "confidence.parquet") as file:
                pq.write_table(pa.table(self.confidence.verdicts()), file)
        seal(self.run, self.written.history)

    def _write_final(self) -> None:
        """RUN/model: the best weights by validation, where there is one, or the last, as `training.final` says."""
        best = self.checkpoints.whole(self.best_step) if self.config.training.final == "best" else None
        aside = self.run / ".model.partial"
        with writing(self.run / "model"):
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            if best is None or step_of(best) == self.step:
                weights = weights_of(self.engine)
                if weights:
                    write_model(self.engine.module, weights, aside)
            elif self.rank == 0:
                shutil.copytree(best / "model", aside)
                tell(
                    f"{self.run / 'model'}: step {step_of(best)}, the best by validation (recall@10 {self.best:.1f};"
                    f" of the last {self.recall:.1f}); training.final=last takes the last"
                )
            if self.rank == 0:
                digests.write_digests(aside)
                keep_foreign(self.run / "model", aside)
        if self.rank == 0:
            put_in_place(aside, (self.run / "model").resolve())


def _under(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _without_masks(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in ("masked_positions", "masked_labels")}


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
