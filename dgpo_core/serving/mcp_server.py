"""The agent for other agents: tools of the Model Context Protocol that answer with sources, and search."""

import asyncio
from contextlib import aclosing
from typing import Annotated

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import BaseModel, Field

from dgpo_core.serving.app import error_reply
from dgpo_core.serving.events import AgentRequest, EpisodeEnd, EpisodeRecord, RetrievedPassage, SearchResult
from dgpo_core.serving.queue import RequestQueue
from dgpo_core.serving.unknown_words import unknown_note

INSTRUCTIONS = (
    "Answers from one collection of passages. `ask` lets a trained agent search it in several steps; "
    "`search` returns passages for a query of your own."
)
READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
MOST = 20  # passages of one search


class Answer(BaseModel):
    """A short answer, or none, and what it rests on."""

    answer: str | None
    sources: list[RetrievedPassage] = Field(description="passages that contain the answer")
    searches: list[str] = Field(description="queries that the agent sent to the index")
    note: str | None = Field(description="what speaks against the answer")


class Passages(BaseModel):
    """Passages of the index, best first."""

    passages: list[RetrievedPassage]


def make_server(queue: RequestQueue) -> MCPServer:
    """Return a server of the agent behind `queue`; while that is loading, calls wait."""
    server = MCPServer("dgpo", title="DGPO search agent", instructions=INSTRUCTIONS, log_level="WARNING")

    async def ask(
        question: Annotated[str, Field(description="one question that a name, a date or a number answers")],
        context: Context,
    ) -> Answer:
        """Answer a question by searching the collection, in several steps where one is not enough."""
        try:
            await queue.loaded()
            async with aclosing(queue.submit(AgentRequest(question)).events(_connected)) as events:
                searches = 0
                async for event in events:
                    if isinstance(event, SearchResult):
                        searches += 1
                        await context.report_progress(searches, message=f"searched for {event.query}")
                    if isinstance(event, EpisodeEnd):
                        return answer_of(event.episode)
            raise AssertionError("an episode without an end")
        except Exception as error:
            raise ToolError(error_reply(error)[1]["error"]["message"]) from None

    async def search(
        query: Annotated[str, Field(description="words or a question to search for")],
        count: Annotated[int, Field(ge=1, le=MOST, description="passages at most")] = 3,
    ) -> Passages:
        """Search the collection, and return its best passages."""
        try:
            agent = await queue.loaded()
            return Passages(passages=await asyncio.to_thread(agent.search, query, count))
        except Exception as error:
            raise ToolError(error_reply(error)[1]["error"]["message"]) from None

    server.add_tool(ask, title="Ask the search agent", annotations=READS)
    server.add_tool(search, title="Search the passages", annotations=READS)
    return server


async def _connected() -> bool:
    """Never say that the client has left: the protocol cancels a call whose client leaves."""
    return False


def answer_of(record: EpisodeRecord) -> Answer:
    """Return an episode as a tool's result, with the texts of its sources."""
    found = {passage.id: passage for search in record.searches for passage in search.passages}
    sources = [found[source.id] for source in record.sources]
    note = unknown_note(record.unknown_words)
    if record.answer is None:
        note = note or "the agent gave no answer"
    elif not sources:
        note = note or "no retrieved passage contains this answer"
    return Answer(
        answer=record.answer,
        sources=sources,
        searches=[search.query for search in record.searches],
        note=note,
    )
