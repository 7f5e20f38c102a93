"""A LangChain retriever over a memory: `pip install 'emt[langchain]'`.

from emt.integrations.langchain import EMTRetriever
from emt.integrations.search import MemorySearch, ServerSearch

retriever = EMTRetriever(search=MemorySearch(memory, max_passages=3))
retriever = EMTRetriever(search=ServerSearch("http://localhost:8000"))
documents = retriever.invoke("Who designed the Slate Bridge?")
"""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever


class EMTRetriever(BaseRetriever):
    """Finds the passages of a memory that a query is about, best first.

    Attributes:
        search: a `PassageSearch`; its errors are the retriever's.
    """

    search: Any

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [
            Document(page_content=found.text, metadata=found.metadata)
            for found in self.search(query)
        ]
