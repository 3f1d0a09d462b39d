"""What Prometheus gets to know of the agent: episodes, their time, searches and tokens, and who waits."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dgpo_core.serving.events import EpisodeEnd, Event
from dgpo_core.serving.queue import RequestQueue

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)  # bounds of the histogram


class Metrics:
    """The agent's metrics; `ending` of an episode is its own, or the kind of error that ended it."""

    def __init__(self, queue: RequestQueue) -> None:
        self.registry = CollectorRegistry()
        name = "dgpo_agent"
        self._episodes = Counter(f"{name}_episodes", "Episodes", ["ending"], registry=self.registry)
        self._seconds = Histogram(
            f"{name}_episode_seconds", "Time from request to answer", buckets=SECONDS, registry=self.registry
        )
        self._searches = Counter(f"{name}_searches", "Searches of episodes", registry=self.registry)
        self._tokens = Counter(f"{name}_tokens", "Tokens that the model wrote", registry=self.registry)
        waiting = Gauge(f"{name}_waiting", "Questions that wait", registry=self.registry)
        waiting.set_function(lambda: queue.waiting)
        running = Gauge(f"{name}_running", "Questions that are being answered", registry=self.registry)
        running.set_function(lambda: queue.running)
        ready = Gauge(f"{name}_ready", "1 when model and index are loaded", registry=self.registry)
        ready.set_function(lambda: queue.agent is not None)

    async def observe(self, events: AsyncGenerator[Event, None]) -> AsyncIterator[Event]:
        """Yield the events of one request, and count how it ends."""
        started, ending = time.perf_counter(), "left"  # nobody reads on
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, EpisodeEnd):
                        ending = event.episode.ending.value
                        self._searches.inc(len(event.episode.searches))
                        self._tokens.inc(event.episode.model_tokens)
                        self._seconds.observe(time.perf_counter() - started)
                    yield event
        except Exception as error:
            ending = type(error).__name__
            raise
        finally:
            self._episodes.labels(ending).inc()
