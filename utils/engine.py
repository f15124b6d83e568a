"""The training loop, which never loses a run."""

import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, islice, repeat
from pathlib import Path

from tqdm import tqdm

from config import Config
from utils.data.loaders import Loaders
from utils.device import Process, any_process, gather, main_first
from utils.errors import UserError
from utils.evaluation.confidence import hidden_rows, monitor_pseudo_labels
from utils.evaluation.predict import Predictor
from utils.files import OutputFolder
from utils.plots import plot_curves
from utils.run.checkpoint import is_intact, load_checkpoint, save_checkpoint, save_networks
from utils.run.folder import begin_run, open_run
from utils.run.logger import Logger
from utils.trainer import Batch, BuildNetwork, Trainer

EXIT_INTERRUPTED = 75  # after a signal: the state is saved, and the same command goes on from there
MAX_BAD_STEPS = 10  # non-finite steps in a row before training gives up
SYNC_EVERY = 10  # steps between looks at the device's counters, for the progress bar and the curves


def fit(cfg: Config, loaders: Loaders, build_network: BuildNetwork, process: Process, *, last: bool = True) -> None:
    """Train two networks by `cfg`, resuming the run of that name if there is one; the main process writes.

    Args:
        last: no other run follows, which a signal during the last step would have to keep from beginning.

    Raises:
        UserError: the run was begun with other settings or data, is in use, or cannot be written.
        SystemExit: EXIT_INTERRUPTED, after a signal, with the state saved.
    """
    folder = Path(cfg.out_root) / cfg.run_name
    total = min(cfg.num_epoch * loaders.steps_per_epoch, cfg.max_steps or sys.maxsize)
    with ExitStack() as stack:
        with main_first(process):
            if process.is_main:
                stack.enter_context(open_run(folder, cfg, process.world_size))
        state = None if cfg.restart else load_checkpoint(folder)
        if state and state["step"] >= total:
            if process.is_main:
                print(f"{folder}: this run is finished ({state['step']} steps); --num-epoch or --max-steps extend it")
            return
        if cfg.monitor_pseudo_labels:
            hidden_rows(loaders.data, loaders.split)  # before the work
        trainer = Trainer(cfg, loaders, build_network, process, state)
        del state
        logger = outputs = None
        with main_first(process):
            if process.is_main:
                weight_bytes = sum(p.nbytes for net in trainer.nets for p in net.parameters())
                outputs = begin_run(folder, cfg, process.world_size, loaders.split._asdict(), weight_bytes)
                logger = Logger(folder, since=trainer.step, use_wandb=cfg.wandb, config=asdict(cfg))
                stack.enter_context(logger)
                images = cfg.batch_size * cfg.accumulate * process.world_size
                print(f"{folder}: steps of {images} labelled and {images * (1 + cfg.cutmix)} unlabelled images")
                if cfg.pretrained == "none" and not cfg.init_from:
                    begins = f", --cps-warmup {cfg.cps_warmup:g} and --cps-ramp {cfg.cps_ramp:g} epochs"
                    print(f"{folder}: without pretrained weights: --lr {cfg.lr:g}{begins if cfg.cps_weight else ''}")
        if trainer.best >= 0 and not is_intact(folder / "best.safetensors"):
            trainer.best = -1.0
            if logger:
                print(f"warning: {folder}/best.safetensors is missing or damaged; the next evaluation writes it anew")
        if logger and trainer.step:
            print(f"{folder}: goes on from step {trainer.step} of {total}")

        interrupt = stack.enter_context(Interrupt())
        progress = tqdm(total=total, initial=trainer.step, unit="step", desc="train", smoothing=0.1, disable=not logger)
        stack.enter_context(progress)
        recent: deque[list[int]] = deque(maxlen=MAX_BAD_STEPS)  # index rows of the images of each step
        began = time.monotonic()
        # The pseudo supervision alone needs unlabelled images.
        begin = next(filter(trainer.cps_weight, range(trainer.step, total)), total)
        for batches in training_batches(loaders, cfg.accumulate, trainer.step, total, unlabeled_from=begin):
            trainer.train_step(batches)
            progress.update()
            recent.append([row for pair in batches for batch in pair if batch for row in batch["row"].tolist()])
            epoch_ends = trainer.step % loaders.steps_per_epoch == 0 or trainer.step == total
            at_sync = trainer.step % SYNC_EVERY == 0 or epoch_ends
            if at_sync:
                stop_if_diverged(trainer, recent, folder / "not_finite.txt")
                point, trainer.recent = trainer.means(trainer.recent), {}
                progress.set_postfix(loss=f"{point['loss']:.3f}", cps=f"{point['cps']:.3f}")
                if logger:
                    logger.points.append({"step": trainer.step, **point})
            if epoch_ends:
                end_epoch(trainer, time.monotonic() - began, logger, outputs)
                began = time.monotonic()
            # Several processes agree on a stop where they wait for each other anyway.
            stop = any_process(bool(interrupt.received)) if at_sync or process.world_size == 1 else False
            if epoch_ends or stop or (cfg.save_every and trainer.step % cfg.save_every == 0):
                state = trainer.state()
                if logger:
                    save_checkpoint(folder, state)
            if stop and (trainer.step < total or not last):
                progress.close()
                if logger:
                    print(f"stopped by a signal at step {trainer.step}, saved; the same command goes on from there")
                sys.exit(EXIT_INTERRUPTED)
    if logger:
        print(f"{folder}: {trainer.step} steps, best Dice on {trainer.validated} {trainer.best:.2f} %")


def training_batches(
    loaders: Loaders, accumulate: int, first: int, last: int, *, unlabeled_from: int = 0
) -> Iterator[list[tuple[Batch, Batch | None]]]:
    """Yield the pairs of a labelled and an unlabelled batch of each step, from step `first` to `last`.

    Before step `unlabeled_from` no unlabelled batch is read: it is None.
    """
    begin = max(first, unlabeled_from)
    for loader, start in ((loaders.labeled, first), (loaders.unlabeled, begin)):
        loader.sampler.start, loader.sampler.stop = start * accumulate, last * accumulate
    unlabeled = chain(repeat(None, (begin - first) * accumulate), loaders.unlabeled)
    pairs = zip(loaders.labeled, unlabeled, strict=True)
    for _ in range(first, last):
        yield list(islice(pairs, accumulate))


def end_epoch(trainer: Trainer, seconds: float, logger: Logger | None, outputs: OutputFolder | None) -> None:
    """Evaluate on source images; keep the best weights; log, and draw curves and samples of the last step."""
    epoch = math.ceil(trainer.step / trainer.loaders.steps_per_epoch)
    means, dice, skipped = trainer.means(trainer.sums), trainer.validate(), int(trainer.bad_steps[1])
    line = {"epoch": epoch, "step": trainer.step, **means, "lr": trainer.cfg.lr, "val_dice": dice,
            "skipped_steps": skipped, "seconds": round(seconds, 1)}  # fmt: skip
    # Weights that no step of the epoch has changed are not worth keeping.
    better = dice > trainer.best and float(trainer.sums["steps"]) > 0
    trainer.best = dice if better else trainer.best
    trainer.sums, trainer.bad_steps[1] = {}, 0
    if not logger:
        return
    if better:
        save_networks(outputs.folder / "best.safetensors", trainer.nets, trainer.metadata())
    if trainer.cfg.keep_epochs:
        name = "epochs/epoch_{:03d}.safetensors"
        save_networks(outputs.claim(name.format(epoch)), trainer.nets, trainer.metadata())
        for old in {name.format(number) for number in range(epoch - trainer.cfg.keep_epochs + 1)} & outputs.made:
            (outputs.folder / old).unlink(missing_ok=True)
    title = f"run {outputs.folder.resolve().name}, data {trainer.loaders.data.name}, step {trainer.step}"
    loader = trainer.loaders.unlabeled
    last = loader.sampler.batch_of_number((trainer.step - 1) * trainer.cfg.accumulate)
    pictures = {"samples": outputs.claim(f"samples/epoch_{epoch:03d}.png")}
    trainer.draw_samples(pictures["samples"], loader.dataset[last], title)
    if trainer.cfg.monitor_pseudo_labels:
        predictor = Predictor(trainer.nets, trainer.mean_reference, trainer.cfg, trainer.autocast)
        with trainer.evaluating():
            line["pseudo_labels"] = monitor_pseudo_labels(predictor, trainer.loaders.data, trainer.loaders.split)
    logger.log(line, pictures)
    selected = max(logger.lines, key=lambda line: line["val_dice"])["step"]
    curves = {"points": logger.points, "epochs": logger.lines, "selected_step": selected}
    plot_curves(outputs.folder / "curves.png", **curves, validated=trainer.validated, title=title)
    scores = f"loss {means['loss']:.4f}, Dice on {trainer.validated} {dice:.2f} % (best {trainer.best:.2f})"
    remark = f"; {skipped} steps were not finite and skipped" if skipped else ""
    tqdm.write(f"epoch {epoch}: {scores}{remark}")


def stop_if_diverged(trainer: Trainer, recent: Sequence[list[int]], path: Path) -> None:
    """Raise UserError after MAX_BAD_STEPS non-finite steps in a row, with the images of these steps named in `path`."""
    if trainer.bad_steps[0] < MAX_BAD_STEPS:
        return
    index = trainer.loaders.data.index
    rows = sorted(set(gather([row for rows in recent for row in rows])))
    names = [f"{index['patient'][r]} frame {index['frame'][r]} slice {index['slice'][r]}" for r in rows]
    if trainer.process.is_main:
        path.write_text("\n".join(names) + "\n")
    raise UserError(
        f"the loss was not finite in {MAX_BAD_STEPS} steps in a row, up to step {trainer.step}; the last checkpoint is "
        f"from before. Try a smaller --lr or --precision fp32. {path} names the {len(names)} images of these steps: "
        + ", ".join(names[:5] + ["..."] * (len(names) > 5))
    )


class Interrupt:
    """Note SIGTERM, SIGUSR1, SIGHUP and Ctrl-C while active; a second signal ends the process at once."""

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
