"""Metadata in the lines of a .jsonl file."""

import pytest

from emt.errors import CorpusError
from emt.ingest.corpus import Corpus


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[1]", "metadata of document 'x' must be a mapping of text .* got list"),
        ('{"a": [1]}', r"got \[1\] for 'a'. Make text of it"),
        ('{"a": null}', "got None for 'a'"),
        ('{"a": NaN}', "got nan for 'a'"),
        ('{"": 1}', "keys of the metadata .* must be text; got ''"),
    ],
)
def test_lines_with_other_metadata_are_refused(tmp_path, metadata, message):
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"id": "x", "text": "w5", "metadata": {metadata}}}')
    with pytest.raises(CorpusError, match=rf"lines.jsonl' line 1: .*{message}"):
        Corpus([path])


def test_lines_without_metadata_say_nothing(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"id": "x", "text": "w5"}\n{"id": "y", "text": "w6", "metadata": {}}')
    assert [document.metadata for document in Corpus([path])] == [None, {}]
