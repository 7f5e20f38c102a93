"""`emt list` and `emt show`: the documents of a store, without its model."""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

from emt.cli.printing import count, one_line, print_json, printable
from emt.cli.session import existing
from emt.errors import DocumentError
from emt.ingest.names import files_of_documents
from memory_backends.catalog import Catalog


def add_to(commands: Any) -> None:
    """Add the subcommands to a parser's."""
    parser = commands.add_parser("list", help="list the documents of a store")
    parser.set_defaults(run=list_documents)
    parser.add_argument("store", metavar="DIR")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one object: store and documents, each with name, tokens, rows, metadata and "
        "file (null if it came from none)",
    )
    parser = commands.add_parser("show", help="print a document of a store")
    parser.set_defaults(run=show)
    parser.add_argument("store", metavar="DIR")
    parser.add_argument("document")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one object: what `list` has of the document, and its text (null if it was "
        "written as token ids) and token_ids",
    )


def list_documents(options: argparse.Namespace) -> None:
    """List the documents of a store, in the order they were written."""
    store = existing(options.store)
    with contextlib.closing(Catalog.open(store)) as catalog:
        documents = records_of(catalog)
    if options.json:
        print_json({"store": str(store), "documents": documents})
        return
    for document in documents:
        print(document_line(document))
    if not documents:
        print(f"'{one_line(str(store))}' has no documents.")


def show(options: argparse.Namespace) -> None:
    """Print a document with what is known of it."""
    store = existing(options.store)
    with contextlib.closing(Catalog.open(store)) as catalog:
        if not catalog.has_document(options.document):
            raise DocumentError(
                f"no document '{options.document}' in '{store}'. `emt list` lists the documents."
            )
        document = catalog.document(options.document)
        file = files_of_documents(catalog).get(document.name)
    record = {
        "name": document.name,
        "tokens": len(document.token_ids),
        "rows": len(document.row_tokens),
        "metadata": dict(document.metadata or {}),
        "file": file,
    }
    ids = document.token_ids.tolist()
    if options.json:
        print_json({**record, "text": document.text, "token_ids": ids})
        return
    print(f"{document_line(record).strip()}\n")
    if document.text is None:
        print(f"It was written as token ids: {' '.join(map(str, ids))}")
    else:
        print(printable(document.text))


def document_line(document: dict[str, Any]) -> str:
    """Describe a document in one line."""
    words = [
        one_line(document["name"]),
        f"{count(document['tokens'], 'token')}, {count(document['rows'], 'row')}",
    ]
    if document.get("metadata"):
        words.append(one_line(json.dumps(document["metadata"], ensure_ascii=False)))
    if document.get("file"):
        words.append(f"from {one_line(document['file'])}")
    return "  ".join(words)


def records_of(catalog: Catalog) -> list[dict[str, Any]]:
    """Return what is known of each document, as plain JSON types."""
    files, metadata = files_of_documents(catalog), catalog.all_metadata()
    return [
        {
            "name": name,
            "tokens": tokens,
            "rows": rows,
            "metadata": metadata.get(name, {}),
            "file": files.get(name),
        }
        for name, tokens, rows in catalog.document_sizes()
    ]
