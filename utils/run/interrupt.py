"""Signals that end a run in good order: the step is finished and saved first."""

import os
import signal

EXIT_INTERRUPTED = 75  # after a signal: the state is saved, and the same command goes on from there


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
