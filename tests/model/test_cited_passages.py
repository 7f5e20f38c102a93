"""Which of several recalled documents an answer is from, as a real model's attention says."""

import pytest

from emt import MemoryConfig, Passage, attach, detach
from tests.model.test_gemma3 import DOCUMENTS, FACTS

pytestmark = pytest.mark.model


def document_of(answer):
    (name,) = [name for name, text in DOCUMENTS.items() if answer in text]
    return name


def test_the_document_with_the_answer_gets_most_attention(smollm2):
    tokenizer = smollm2.tokenizer
    memory = attach(smollm2.model, MemoryConfig.published(), tokenizer=tokenizer)
    try:
        for name, text in DOCUMENTS.items():
            memory.write(text, document=name)
        catalog = memory.backend.catalog
        whole = [Passage(n, 0, len(catalog.document(n).row_tokens)) for n in DOCUMENTS]
        cited, quoted, is_right = {}, {}, {}
        for prompt, answer in FACTS.items():
            ids = tokenizer(prompt, return_tensors="pt")
            with memory.recalling(whole), memory.recording() as recording:
                output = smollm2.model.generate(**ids, max_new_tokens=4, do_sample=False)
            is_right[answer] = answer in tokenizer.decode(output[0, ids.input_ids.shape[1] :])
            cited[answer] = recording.citations("passage")
            quoted[answer] = recording.citations(top=1)
    finally:
        detach(smollm2.model)
    assert sum(is_right.values()) >= 3, is_right
    right = {answer: document_of(answer) for answer in FACTS.values() if is_right[answer]}
    assert {answer: cited[answer][0].document for answer in right} == right
    assert {answer: quoted[answer][0].document for answer in right} == right
    assert all(0 < passage.attention < 0.6 for passages in cited.values() for passage in passages)
