"""The training loop, which never loses a run."""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from config import Config
from utils.data.loaders import Loaders
from utils.device import Process, any_process, gather, main_first
from utils.errors import UserError
from utils.evaluation.confidence import hidden_rows, monitor_pseudo_labels
from utils.plots import plot_curves
from utils.run.checkpoint import load_checkpoint, read_metadata
from utils.run.folder import begin_run, hold_run, unfinished
from utils.run.logger import Logger, NullLogger, read_log
from utils.trainer import MAX_BAD_STEPS, BuildNetwork, State, Trainer

EXIT_INTERRUPTED = 75  # after a signal: the state is saved, and the same command goes on from there
SYNC_EVERY = 10  # steps between looks at the device's counters, for the progress bar and the curves


def fit(cfg: Config, loaders: Loaders, build_network: BuildNetwork, process: Process, *, last: bool = True) -> None:
    """Train two networks by `cfg`, resuming the run of that name; the main process writes.

    Args:
        last: no other run follows, which a signal during the last step would have to keep from beginning.

    Raises:
        UserError: the run was begun with other settings or data, is in use, or cannot be written.
        SystemExit: EXIT_INTERRUPTED, after a signal, with the state saved.
    """
    total = loaders.total_steps
    with ExitStack() as stack:
        state = stack.enter_context(opened(cfg, process))
        if state and state["step"] >= total:
            return process.say(f"{cfg.folder}: this run is finished; --num-epoch or --max-steps extend it")
        trainer = Trainer(cfg, loaders, build_network, process, state)
        del state
        logger = stack.enter_context(begun(trainer, total))
        interrupt = stack.enter_context(Interrupt())
        first = trainer.first_cps_step(total)
        for batches in loaders.training_batches(cfg.accumulate, trainer.step, total, unlabeled_from=first):
            asked_before = trainer.stop_asked
            trainer.train_step(batches, stop=bool(interrupt.received))
            epoch_ends = trainer.step % loaders.steps_per_epoch == 0 or trainer.step == total
            log_step(trainer, logger, always=epoch_ends)
            if epoch_ends:
                end_epoch(trainer, logger)
            # Several processes learn of a signal a step later: none waits for the device.
            alone = process.world_size == 1
            stop = any_process(bool(interrupt.received)) if epoch_ends or alone else bool(asked_before)
            if epoch_ends or stop or (cfg.save_every and trainer.step % cfg.save_every == 0):
                logger.save_checkpoint(trainer.state())
            if epoch_ends:
                draw_epoch(trainer, logger)
            if stop and (trainer.step < total or not last):
                command = "the same command" + " without --restart" * cfg.restart
                logger.say(f"stopped by a signal at step {trainer.step}, saved; {command} goes on from there")
                sys.exit(EXIT_INTERRUPTED)
        logger.finish(f"{cfg.folder}: {trainer.step} steps, best Dice on {trainer.validated} {trainer.best:.2f} %")


@contextmanager
def opened(cfg: Config, process: Process) -> Iterator[State | None]:
    """Hold the folder of a run, and yield its last state; None for a run that begins."""
    with ExitStack() as stack:
        with main_first(process):
            if process.is_main:
                stack.enter_context(hold_run(cfg, process.world_size))
        state = None if cfg.restart else load_checkpoint(cfg.folder)
        logged = read_log(cfg.folder / "log.jsonl")  # empty of a run that was killed in its first epoch
        if state is None and not cfg.restart and logged and not unfinished(cfg.folder):
            raise UserError(f"{cfg.folder}: a finished run without last.pt: use another --run-name, or --restart")
        yield state


@contextmanager
def begun(trainer: Trainer, total: int) -> Iterator[Logger | NullLogger]:
    """Write the settings of a run, say how it begins or goes on, and yield its logger."""
    cfg, process, loaders = trainer.cfg, trainer.process, trainer.loaders
    if cfg.monitor_pseudo_labels:
        hidden_rows(loaders.data, loaders.split)
    with ExitStack() as stack:
        logger = NullLogger()
        with main_first(process):
            if process.is_main:
                weight_bytes = sum(parameter.nbytes for parameter in trainer.parameters)
                outputs = begin_run(cfg, process.world_size, loaders.split._asdict(), weight_bytes)
                facts = {"since": trainer.step, "total": total, "use_wandb": cfg.wandb, "config": asdict(cfg)}
                logger = stack.enter_context(Logger(outputs, **facts))
        try:
            if trainer.best >= 0:
                read_metadata(cfg.folder / "best.safetensors")
        except UserError as error:
            trainer.best = -1.0
            logger.say(f"warning: {error}; the next evaluation writes it anew")
        for text in beginning(trainer, total):
            logger.say(f"{cfg.folder}: {text}")
        yield logger


def beginning(trainer: Trainer, total: int) -> Iterator[str]:
    """Say at the start of a run who is labelled, and what the steps read from when on."""
    cfg, split = trainer.cfg, trainer.loaders.split
    domains = sorted(Counter(trainer.labeled.values()).items())
    source = {*split.labeled, *split.unlabeled, *split.validation}
    images = cfg.batch_size * cfg.accumulate * trainer.process.world_size
    first = trainer.first_cps_step(total)
    begins = f"begins at step {first + 1}" if first < total else "does not begin"
    labeled = ", ".join(f"{domain} {count}" for domain, count in domains)
    yield f"labelled are {len(split.labeled)} of {len(source)} source patients: {labeled}"
    yield f"a step takes {images} labelled and {images * (1 + cfg.cutmix)} unlabelled images"
    yield f"the pseudo supervision {begins} in the {total} steps"
    if cfg.pretrained == "none" and not cfg.init_from:
        yield f"the networks begin without pretrained weights, --lr {cfg.lr:g}"
    if trainer.step:
        yield f"goes on from step {trainer.step} of {total}"


def log_step(trainer: Trainer, logger: Logger | NullLogger, *, always: bool) -> None:
    """Count a step; every SYNC_EVERY steps read the device's counters and write a point."""
    logger.progress.update()
    if always or trainer.step % SYNC_EVERY == 0:
        stop_if_diverged(trainer)
        logger.point({"step": trainer.step, **trainer.mean_scalars(trainer.point_sums)})
        trainer.point_sums = {}


def end_epoch(trainer: Trainer, logger: Logger | NullLogger) -> None:
    """Evaluate on source images, keep the best weights, and log."""
    means, skipped = trainer.mean_scalars(trainer.epoch_sums), int(trainer.bad_steps["in_epoch"])
    seconds = round(time.monotonic() - trainer.epoch_began, 1)
    dice = trainer.validate()
    line = {"epoch": trainer.epoch, "step": trainer.step, **means, "lr": trainer.learning_rate(trainer.step - 1),
            "val_dice": dice, "skipped_steps": skipped, "seconds": seconds}  # fmt: skip
    if trainer.cfg.monitor_pseudo_labels:
        with trainer.evaluating() as predictor:
            line["pseudo_labels"] = monitor_pseudo_labels(predictor, trainer.loaders.data, trainer.loaders.split)
    # Weights that no step of the epoch has changed are not worth keeping.
    if dice > trainer.best and float(trainer.epoch_sums["steps"]) > 0:
        trainer.best = dice
        logger.save_best(trainer.nets, trainer.metadata())
    if trainer.cfg.keep_epochs:
        logger.keep_epoch(trainer.epoch, trainer.cfg.keep_epochs, trainer.nets, trainer.metadata())
    logger.log(line)
    trainer.start_epoch()
    scores = f"loss {means['loss']:.4f}, Dice on {trainer.validated} {dice:.2f} % (best {trainer.best:.2f})"
    remark = f"; warning: {skipped} steps were not finite and skipped" if skipped else ""
    logger.say(f"epoch {trainer.epoch}: {scores}{remark}")


def draw_epoch(trainer: Trainer, logger: Logger | NullLogger) -> None:
    """Draw samples of the last step and the curves so far."""
    title = f"run {trainer.cfg.folder.resolve().name}, data {trainer.loaders.data.name}, step {trainer.step}"

    def curves(path: Path) -> None:
        selected = max(logger.lines, key=lambda line: line["val_dice"])["step"]
        history = {"points": logger.points, "epochs": logger.lines, "selected_step": selected}
        plot_curves(path, **history, validated=trainer.validated, title=title)

    logger.picture(f"samples/epoch_{trainer.epoch:03d}.png", lambda path: trainer.draw_samples(path, title))
    logger.picture("curves.png", curves)


def stop_if_diverged(trainer: Trainer) -> None:
    """Raise UserError after MAX_BAD_STEPS bad steps in a row; not_finite.txt names their images."""
    if trainer.bad_steps["in_row"] < MAX_BAD_STEPS:
        return
    index, path = trainer.loaders.data.index, trainer.cfg.folder / "not_finite.txt"
    rows = sorted(set(gather([row for rows in trainer.recent_rows for row in rows])))
    names = [f"{index['patient'][r]} frame {index['frame'][r]} slice {index['slice'][r]}" for r in rows]
    if trainer.process.is_main:
        path.write_text("\n".join(names) + "\n")
    raise UserError(
        f"the loss was not finite in {MAX_BAD_STEPS} steps in a row, up to step {trainer.step}; the last checkpoint is "
        f"from before. Try a smaller --lr or --precision fp32. {path} names the {len(names)} images of these steps: "
        + ", ".join(names[:5] + ["..."] * (len(names) > 5))
    )


class Interrupt:
    """Note signals while active; a second one ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

    def __init__(self) -> None:
        self.received = ""

    def __enter__(self) -> "Interrupt":
        self.process = os.getpid()
        # nohup has SIGHUP ignored, which stays so.
        wanted = [n for n in self.SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if os.getpid() != self.process:  # a process forked with this handler: the parent ends it
            return
        if self.received:
            os._exit(EXIT_INTERRUPTED)
        self.received = signal.Signals(number).name
