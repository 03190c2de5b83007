"""What learns: a network, its optimizer and loss, one batch of them, and their state in a checkpoint."""

import contextlib

import torch
from torch import nn
from torch.optim import swa_utils

import models
import starting
import teachers
import transforms


class Learner:
    """A network in training.

    raw: the network. model: the network of all processes together, the same where there is one. ema: the average of
    its weights by --model-ema, or None.
    """

    def __init__(self, args, start, steps_per_epoch, class_names):
        """start: the checkpoint whose weights the run takes or, if it continues, whose state of training; or None.

        steps_per_epoch: of the optimizer.
        """
        self.args, self.device_type = args, torch.device(args.device).type
        self.raw = models.make_model(args, start)
        averaging = swa_utils.get_ema_multi_avg_fn(args.model_ema)
        self.ema = swa_utils.AveragedModel(self.raw, None, None, averaging, True) if args.model_ema else None
        self.optimizer = models.make_optimizer(self.raw, args)
        self.scheduler = models.make_scheduler(self.optimizer, steps_per_epoch, args)
        in_float16 = args.amp and models.amp_dtype(args) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=in_float16)
        if starting.continues(args):
            self.continue_from(start)
        self.parameters = [p for p in self.raw.parameters() if p.requires_grad]
        self.model = models.distributed(self.raw, args) if args.distributed else self.raw
        self.augment = transforms.make_augment(class_names, args)
        if args.teacher_logits:
            alpha = args.distill_alpha
            self.criterion = teachers.Distillation(alpha, args.distill_temperature, args.label_smoothing)
        else:
            self.criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)

    def continue_from(self, checkpoint):
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["lr_scheduler"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema:
            starting.load_all(self.ema.module, checkpoint["model"], self.args.resume)
            self.ema.n_averaged.fill_(checkpoint["ema_steps"])

    def state(self):
        """Weights and the state of training, for a checkpoint; `model` holds the averaged weights where there are."""
        state = {
            "model": self.networks()[-1].state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.ema:
            state |= {"raw_model": self.raw.state_dict(), "ema_steps": int(self.ema.n_averaged)}
        return state

    def networks(self):
        """The network and, where there is one, its average: the last one is what is validated and saved."""
        return [self.raw, self.ema.module] if self.ema else [self.raw]

    def learn(self, batch, group, ends_group):
        """Gradients of one batch; where it ends a group of `group` batches (--accumulate), a step of the optimizer.

        batch: datasets.Batch. Returns (loss, share of clips that are right before the step), 0-dimensional tensors on
        the device, which is not waited for.
        """
        device, args = self.args.device, self.args
        clips, labels = (part.to(device, non_blocking=True) for part in (batch.clips, batch.labels))
        teacher = None
        if batch.logits is not None:
            teacher = teachers.probabilities(batch.logits.to(device, non_blocking=True), args.distill_temperature)
        clips, *targets = self.augment(clips, labels, teacher)
        with self.model.no_sync() if args.distributed and not ends_group else contextlib.nullcontext():
            with torch.autocast(self.device_type, models.amp_dtype(args), enabled=args.amp):
                output = self.model(clips)
            loss = self.criterion(output.float(), *targets)
            self.scaler.scale(loss / group).backward()
        if ends_group:
            self.step()
        return loss.detach(), (output.detach().argmax(1) == labels).float().mean()

    def step(self):
        if self.args.clip_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.args.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        if self.ema:
            self.ema.update_parameters(self.raw)
