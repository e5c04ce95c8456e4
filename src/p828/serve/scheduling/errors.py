"""Why a request got no answer, or not all of one. These are for a client, and none ends the server."""

import math


class Unanswered(Exception):
    """What all of them have in common: the message is for the client, in one line."""


class QueueFull(Unanswered):
    """There is no room for another request, or for several at a time. Raised by `Scheduler.submit_all`."""

    def __init__(self, waiting: int, asked: int, retry_after_seconds: float) -> None:
        wait = "1 request waits" if waiting == 1 else f"{waiting} requests wait"
        room = f", and there is no room for {asked} more" if asked > 1 else ""
        seconds = math.ceil(retry_after_seconds)
        super().__init__(f"{wait} already{room}; try again in {seconds} second{'' if seconds == 1 else 's'}")
        self.retry_after_seconds = retry_after_seconds
        """At least 1: the time that those who wait now need to be admitted, by the rate measured last."""


class Closing(Unanswered):
    """The server ends. Raised by `Scheduler.submit`, and of a submission that is not done when the grace is over."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class TimedOut(Unanswered):
    """A request took longer than requests may, waiting or running."""

    def __init__(self, max_seconds: float) -> None:
        super().__init__(f"the request took longer than {max_seconds:g} seconds")
        self.max_seconds = max_seconds


class DecoderFailed(Unanswered):
    """The decoder raised an error, which ends all requests that ran. That error is the cause."""

    def __init__(self, error: Exception, can_go_on: bool) -> None:
        super().__init__(f"the model could not go on: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        self.__cause__ = error
        self.can_go_on = can_go_on
        """Whether the decoder takes other requests. If not, every later `Scheduler.submit` raises DecoderFailed."""
