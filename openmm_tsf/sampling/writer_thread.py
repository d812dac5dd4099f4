"""A thread that writes while the next iterations are sampled."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class WriterThread:
    """Does jobs of writing one after the other, one of which may be under way.

    A job that is submitted before the one before it has ended waits for that: memory is bounded by
    one job under way and one being prepared. An error of a job, a KeyboardInterrupt too, is raised
    once, as it was, by the next call; later jobs are then left out, since they would leave a gap.

    Parameters
    ----------
    stop
        Called when a Ctrl-C comes while a job is waited for: it lets the job end early. The thread
        is waited for all the same, so that nothing is written later.

    Examples
    --------
    >>> from openmm_tsf.sampling.writer_thread import WriterThread
    >>> written = []
    >>> thread = WriterThread()
    >>> thread.submit(lambda: written.append(1)), thread.submit(lambda: written.append(2))
    (True, True)
    >>> thread.wait()
    >>> thread.close()
    >>> written
    [1, 2]
    """

    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        self._stop = stop
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._job: Future[None] | None = None
        self._failed = False

    def submit(self, job: Callable[[], None]) -> bool:
        """Start a job after the one before it has ended, whose errors are raised.

        False, and the job is left out, after an earlier error.
        """
        self.wait()
        if not self._failed:
            self._job = self._executor.submit(job)
        return not self._failed

    def check(self) -> None:
        """Raise the error of a job that has ended; wait for none."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the job has ended; an error of it is raised."""
        if self._job is None:
            return
        try:
            wait([self._job])
        except BaseException:
            self._end_early(self._job)
            raise
        job, self._job = self._job, None
        self._failed = job.exception() is not None
        job.result()

    def _end_early(self, job: "Future[None]") -> None:
        """After a Ctrl-C: whatever the job did is not continued."""
        self._failed, self._job = True, None
        self._stop()
        while not job.done():
            try:
                wait([job])
            except KeyboardInterrupt:
                self._stop()

    def close(self) -> None:
        """End the thread; a job under way ends early."""
        if self._job is not None:
            self._end_early(self._job)
        self._executor.shutdown()
