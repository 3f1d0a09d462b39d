"""Where vectors are searched: Qdrant's engine in this process, or a collection that a client speaks to."""

from typing import Any, Protocol

from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.encoders import Vector
from dgpo_core.retrieval.ranking import Scored, Window


class Backend(Protocol):
    """A filled collection."""

    def query(
        self,
        name: str,
        vectors: list[Vector],
        limit: int,
        exact: bool = False,
        window: Window | None = None,
    ) -> list[list[Scored]]:
        """Return the best points of each vector by the named vector, best first; of equal ones any.

        `exact` compares with every point's original vector instead of going through graph and quantisation.
        `window` leaves all other points out.
        """
        ...

    def close(self) -> None:
        """Release files and connections; nothing can be asked afterwards."""
        ...


def payload(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "title": passage.title, "text": passage.text}


def scored(point: Any, score: float | None = None) -> Scored:
    """One of Qdrant's points, with its own score unless another is given."""
    return Scored(int(point.id), Passage(**point.payload), float(point.score) if score is None else score)
