"""The SFTTrainer subclass: whole steps at once, loss per token, figures a step late, LoRA+."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig

from peftcli.train import backward
from peftcli.train.batches import Batches, model_inputs
from peftcli.train.clock import StepClock
from peftcli.train.evaluating import EvaluatingTrainer
from peftcli.train.flat import FlatParameters, forget_settings
from peftcli.train.guard import Guard
from peftcli.train.health import Health
from peftcli.train.kernels import attention_kernels
from peftcli.train.unlogged import Unlogged
from peftcli.train.unwaiting import from_bitsandbytes, without_waits


class RecipeTrainer(EvaluatingTrainer):
    """SFTTrainer on rows that are tokenised and masked already."""

    def __init__(
        self,
        *,
        model: PreTrainedModel | PeftModel,
        args: SFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback],
        learning_rate_multipliers: Mapping[str, float],
        keep_checkpoints: int,
        check_interruption: Callable[[], None],
        batches: Batches,
        health: Health,
        eval_batches: Batches,
        clock: StepClock,
    ) -> None:
        self.kernels = "plain layers"
        """What the step runs on, in words."""
        self._flat: FlatParameters | None = None
        self._in_train_mode = False  # PEFT's wrapper says so of itself before its base is
        self.late = args.device.type == "cuda"
        """Whether a step's figures are read while the next step runs, not before it starts."""
        self._unlogged: list[Unlogged] = []
        self._trained: list[torch.nn.Parameter] = []
        self._stepped: list[torch.nn.Parameter] = []  # the same, as the optimizer has them
        self._guard: Guard | None = None
        self._multipliers = learning_rate_multipliers
        self._health = health
        self._clock = clock
        super().__init__(
            model=model,
            args=args,
            batches=batches,
            eval_batches=eval_batches,
            keep_checkpoints=keep_checkpoints,
            check_interruption=check_interruption,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, with other learning rates where the method asks for them."""
        forget_settings()
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.zero_grad = self._zero_grad  # the model's own walks over all modules
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        for key, factor in self._multipliers.items():
            names = {id(p): name for name, p in self.model.named_parameters()}
            for group in list(optimizer.param_groups):
                chosen = [p for p in group["params"] if key in names[id(p)]]
                if not chosen or len(chosen) == len(group["params"]):
                    group["lr"] *= factor if chosen else 1.0
                    continue
                group["params"] = [p for p in group["params"] if key not in names[id(p)]]
                options = {name: value for name, value in group.items() if name != "params"}
                options["lr"] = group["lr"] * factor
                optimizer.add_param_group({"params": chosen, **options})
        if from_bitsandbytes(optimizer):
            self._flat = FlatParameters(optimizer)
            without_waits(optimizer)
        if isinstance(optimizer, torch.optim.SGD):
            optimizer.register_load_state_dict_post_hook(_as_made)
        self._stepped = [p for group in optimizer.param_groups for p in group["params"]]
        stops = self._health.on_nonfinite == "stop" and not self._health.scaled
        if self.late and stops:
            self._guard = Guard(optimizer, self.args.device)
        return optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[Any, Any]:
        """transformers' choice; SGD in one launch, for which AdamW has a name of its own."""
        kind, options = EvaluatingTrainer.get_optimizer_cls_and_kwargs(args, model)
        return kind, options | ({"fused": True} if kind is torch.optim.SGD else {})

    def _zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Forward and backward of every micro-batch; the step's mean loss per trained token."""
        if not self._in_train_mode:  # a walk over all modules, so not at every step
            model.train()
            self._in_train_mode = True
        self._tr_loss.zero_()  # logged already; transformers subtracts it from itself, NaN stays
        total = torch.zeros((), device=self.args.device)
        # A fill runs on the GPU; a copy of the number would wait for it.
        items = torch.full((), float(max(1, inputs["trained_tokens"])), device=self.args.device)
        if self._flat is not None:
            self._flat.release()
        if self.fast is not None:
            self.fast.refresh()
        parts = self._prepare_inputs(inputs)["micro_batches"]
        self.current_gradient_accumulation_steps = len(parts)  # TRL divides a router's loss by it
        here = backward.in_this_thread()
        with here, attention_kernels(), self.maybe_activation_offload_context:
            for batch in parts:
                with self.compute_loss_context_manager():
                    loss = self._micro_loss(model, batch, items)
                self.accelerator.backward(loss)
                total += loss.detach()
        if self._flat is not None:
            self._flat.gather()
        return total

    def _micro_loss(
        self, model: torch.nn.Module, batch: dict[str, Any], items: torch.Tensor
    ) -> torch.Tensor:
        if self.fast is not None:
            return self.fast.loss(batch, 1.0 / items)
        loss: torch.Tensor = self.compute_loss(model, model_inputs(batch), num_items_in_batch=items)
        return loss

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: torch.nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Note the step's figures on a GPU; all are read before anything is kept or looked at."""
        if self.late:
            step, control = self.state.global_step, self.control
            if control.should_log:
                rate = self._get_learning_rate() if learning_rate is None else learning_rate
                self._unlogged.append(Unlogged(step, self.state.epoch, rate, tr_loss, grad_norm))
                tr_loss.zero_()
                self._globalstep_last_logged = step
                control.should_log = False
            soon = control.should_evaluate or control.should_save or control.should_training_stop
            self._log_finished(leave=0 if soon or step >= self.state.max_steps else 1)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def _log_finished(self, leave: int) -> None:
        """Judge and log what was noted, but for the last `leave` steps; stop at a bad one."""
        now = self.state.global_step, self.state.epoch
        while len(self._unlogged) > leave:
            entry = self._unlogged.pop(0)
            self.state.global_step, self.state.epoch = entry.step, entry.epoch
            logs = entry.read()
            self._clock.came(entry.mark)
            if self._guard is not None:
                self._health.admits(entry.step, logs["loss"], logs["grad_norm"])
                if self._health.failure is not None:
                    self._unlogged.clear()  # a step that began before this one was looked at
            self._total_loss_scalar += logs["loss"]
            self.log(logs)
        self.state.global_step, self.state.epoch = now

    def _run_epoch(self, **inputs: Any) -> None:
        """Nothing, when a resumed run was at its end already."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**inputs)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip, and drop a gradient that the optimizer must not use."""
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(
            self._stepped, self.args.max_grad_norm
        )
        if self._guard is not None:
            self._guard.judge(self._tr_loss, norm)
            return norm
        self._log_finished(leave=0)  # of the step before, while the GPU is still at this one
        if not self._health.admits(self.state.global_step + 1, float(self._tr_loss), float(norm)):
            model.zero_grad(set_to_none=True)
            self.optimizer.zero_grad(set_to_none=True)
        return norm


def _as_made(optimizer: torch.optim.Optimizer) -> None:
    """Step as this run does: a checkpoint says of its groups what kernel its own run had."""
    for group in optimizer.param_groups:
        group["fused"] = optimizer.defaults["fused"]
