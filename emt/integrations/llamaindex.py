"""A LlamaIndex retriever over a memory: `pip install 'emt[llamaindex]'`.

from emt.integrations.llamaindex import EMTRetriever
from emt.integrations.search import MemorySearch, ServerSearch

retriever = EMTRetriever(MemorySearch(memory, max_passages=3))
retriever = EMTRetriever(ServerSearch("http://localhost:8000"))
nodes = retriever.retrieve("Who designed the Slate Bridge?")
"""

from __future__ import annotations

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from emt.integrations.search import FoundPassage, PassageSearch


class EMTRetriever(BaseRetriever):
    """Finds the passages of a memory that a query is about, best first.

    Args:
        search: finds them; its errors are the retriever's.
    """

    def __init__(self, search: PassageSearch) -> None:
        super().__init__()
        self._search = search

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_node(found) for found in self._search(query_bundle.query_str)]


def _node(found: FoundPassage) -> NodeWithScore:
    metadata = found.metadata
    score = metadata.pop("score")
    node = TextNode(
        id_=f"{found.document}:{found.start}-{found.end}",
        text=found.text,
        metadata=metadata,
        start_char_idx=found.start,
        end_char_idx=found.end,
        excluded_embed_metadata_keys=list(metadata),
        excluded_llm_metadata_keys=["start", "end"],
    )
    return NodeWithScore(node=node, score=score)
