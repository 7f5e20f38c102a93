"""Routing by words: the documents that have them, as they are, inside of the scope."""

import functools
import math

import torch
import numpy as np
import pytest

from emt.routing.words import WordIndex
from memory_backends import Document, Scope
from tests.emt.routing.worlds import NAMES, build, document, routing, tokens
from tests.emt.words import word_tokenizer

SCRIPTS = {  # name -> text, question
    "Chinese dog": ("我家的狗叫小石头，它最喜欢在河边追蝴蝶。", "狗叫什么名字？"),
    "Chinese bridge": (
        "青溪镇的桥是用红砖建成的，桥上有三座小亭子。",
        "青溪镇的桥是用什么建成的？",
    ),
    "Japanese dog": (
        "祖母の犬の名前はこむぎで、毎朝海岸を歩きます。",
        "祖母の犬の名前は何ですか？",
    ),
    "Japanese bridge": (
        "川上村の橋は赤い石で作られています。",
        "川上村の橋は何で作られていますか？",
    ),
    "Thai dog": ("สุนัขของคุณยายชื่อข้าวปั้น และชอบนอนใต้ต้นมะม่วง", "สุนัขของคุณยายชื่ออะไร"),
    "Thai bridge": ("สะพานของหมู่บ้านริมธารสร้างด้วยอิฐสีแดง", "สะพานของหมู่บ้านสร้างด้วยอะไร"),
    "Lao dog": ("ໝາຂອງແມ່ຕູ້ຊື່ວ່າເມກ", "ໝາຂອງແມ່ຕູ້ຊື່ຫຍັງ"),
    "Lao bridge": ("ຂົວຂອງບ້ານສ້າງດ້ວຍໄມ້", "ຂົວສ້າງດ້ວຍຫຍັງ"),
    "Khmer dog": ("ឆ្កែរបស់ជីដូនឈ្មោះពពក", "ឆ្កែរបស់ជីដូនឈ្មោះអ្វី"),
    "Khmer bridge": ("ស្ពានភូមិសង់ពីឥដ្ឋក្រហម", "តើស្ពានសង់ពីអ្វី"),
    "Burmese dog": ("အဘွားရဲ့ခွေးနာမည်က တိမ်ဖြူ", "အဘွားရဲ့ခွေးနာမည်ဘယ်လိုခေါ်လဲ"),
    "Burmese bridge": ("ရွာရဲ့တံတားကို အုတ်နီနဲ့ ဆောက်ထားတယ်", "တံတားကို ဘာနဲ့ ဆောက်ထားလဲ"),
    "Korean dog": ("할머니의 개는 구름이라고 합니다.", "할머니 개의 이름은?"),
    "Korean bridge": ("마을의 다리는 붉은 벽돌로 지었습니다.", "다리를 무엇으로 지었나요?"),
    "Hindi dog": ("दादी के कुत्ते का नाम बादल है।", "दादी के कुत्ते का नाम क्या है?"),
    "Hindi bridge": ("नदीपुर गाँव का पुल लाल ईंटों से बना है।", "नदीपुर गाँव का पुल किससे बना है?"),
    "Arabic": ("كَلْبُ جَدَّتِي اسْمُهُ غَيْمَة", "ما اسمه كلب جدتي؟"),
    "Greek": ("Ο σκύλος της γιαγιάς λέγεται Ήλιος.", "ΠΩΣ ΛΕΓΕΤΑΙ Ο ΣΚΥΛΟΣ;"),
    "French": ("L'école du village fut bâtie en 1902.", "Quand l'ecole fut-elle batie ?"),
    "one character": ("茶 5", "茶"),
}
MODES = pytest.mark.parametrize("mode", ["words", "both"])


def with_words():
    model = build("llama")
    return model, routing(model, tokenizer=word_tokenizer(), candidates=0)


@pytest.fixture(scope="module")
def world():
    """A model, and its memory that no test changes."""
    return with_words()


def windows_of(index, question, memory, count, *, min_distance=8, **options):
    runs, scores = index.scores(question, memory.backend)
    return runs.windows(scores, count, min_distance=min_distance, **options)


def names_of(routed):
    return [part.passage.document for part in routed.passages]


@MODES
def test_words_find_their_document(world, mode):
    _, memory = world
    for number, name in enumerate(NAMES):
        with memory.using(routing=mode, passage_rows=96):  # room for more than one window
            routed = memory.route(document(number)[20:30])
        names = names_of(routed)
        assert name in names if mode == "both" else names[0] == name
        assert routed.score > 0


@MODES
def test_words_stay_inside_of_the_scope(world, mode):
    _, memory = world
    for number in range(3):
        prompt = document(number)[20:30]
        for name in NAMES:
            with memory.using(routing=mode, documents=[name]):
                assert set(names_of(memory.route(prompt))) <= {name}
        with memory.using(routing=mode, documents=[]):
            assert memory.route(prompt).passages == ()


def test_words_are_those_of_the_memory_as_it_is():
    _model, memory = with_words()
    prompt = document(0)[20:30]
    with memory.using(routing="words"):
        assert names_of(memory.route(prompt))[0] == "one"
        memory.write(tokens(70, 99), document="one", replace=True)  # as long as before
        memory.write(document(0), document="four")
        assert names_of(memory.route(prompt))[0] == "four"
        memory.remove("four")
        assert "four" not in names_of(memory.route(prompt))


def test_a_score_is_the_share_of_the_weight_of_all_words():
    _model, memory = with_words()
    memory.clear()
    memory.write(torch.arange(10, 40), document="d")  # w10 to w39, once each
    memory.write(torch.arange(30, 60), document="e")
    windows = functools.partial(windows_of, WordIndex(memory.tokenizer), memory=memory)
    worth = 1 / (1 + 1.5)  # of a word that a text of the mean length has once
    rare, common, unknown = math.log(2), math.log(1.2), math.log(6)  # 1 + (2.5 - n) / (n + 0.5)
    for question, scores in (
        ("w12", [worth]),
        ("w12 w12", [worth]),
        ("w12 w35", [worth, worth * common / (rare + common)]),
        ("w12 w99", [worth * rare / (rare + unknown)]),
    ):
        found = windows(question, count=3)
        assert [window.score for window in found] == pytest.approx(scores)
    assert len(windows("w35", count=1)) == 1
    for question in ("w98 w99", "", "the of and", "unheard"):
        assert windows(question, count=3) == []
    assert windows("w12", count=3, scope=Scope(())) == []
    with memory.using(routing="words"):
        assert memory.route(torch.tensor([90, 91])).passages == ()


def test_words_of_a_long_document_point_to_their_place():
    _model, memory = with_words()
    memory.clear()
    text = " ".join(f"w{number}" for number in [*[3] * 500, 50, *[4] * 500])
    memory.write(text, document="d")
    (window,) = windows_of(WordIndex(memory.tokenizer), "w50", memory, 1, min_distance=64)
    (first_row,) = memory.backend.catalog.first_rows()
    assert window.document == first_row
    assert abs(window.peak - first_row - 500) <= 32


def test_only_new_documents_are_read(monkeypatch):
    _model, memory = with_words()
    catalog, names = type(memory.backend.catalog), []
    own = catalog.document

    def document_of(self, name):
        names.append(name)
        return own(self, name)

    index = WordIndex(memory.tokenizer)
    monkeypatch.setattr(catalog, "document", document_of)
    for _ in range(2):
        index.scores("w12", memory.backend)
    memory.write(document(3), document="four")
    memory.write(document(4), document="one", replace=True)
    names.clear()
    index.scores("w12", memory.backend)
    assert names == ["four", "one"]


def test_words_in_many_scripts_find_their_document():
    """Documents and questions as people write them, and what they have in common."""
    _model, memory = with_words()
    memory.clear()
    backend = memory.backend
    for name, (text, _) in SCRIPTS.items():
        ids = memory.tokenizer("w5")["input_ids"][1:]
        rows = memory.read(ids)
        document = Document(name, np.array(ids, np.int32), text, np.array([[0, len(text)]]))
        backend.add(document, rows)
    index = WordIndex(None)
    for name, (_, question) in SCRIPTS.items():
        (best,) = windows_of(index, question, memory, 1)
        assert backend.catalog.document_of_rows([best.peak])[best.peak] == name


def test_words_of_an_empty_memory():
    _model, memory = with_words()
    memory.clear()
    assert windows_of(WordIndex(memory.tokenizer), "w12", memory, 3) == []


@pytest.mark.parametrize("names", [["one"], ["two", "three"], []])
def test_words_count_in_a_scope_as_if_there_were_nothing_else(names):
    _, memory = with_words()
    index, question = WordIndex(memory.tokenizer), " ".join(f"w{n}" for n in range(3, 97, 5))
    scope = memory.backend.catalog.scope(names)
    runs, scores = index.scores(question, memory.backend, scope)
    rows = {memory.backend.catalog.document(name).first_row for name in names}
    assert set(runs.documents.tolist()) == rows
    assert index.scores(question, memory.backend)[1].shape != scores.shape
    memory.remove(*({"one", "two", "three"} - set(names)))
    alone_runs, alone = WordIndex(memory.tokenizer).scores(question, memory.backend)
    np.testing.assert_array_equal(scores, alone)
    np.testing.assert_array_equal(runs.starts, alone_runs.starts)
    np.testing.assert_array_equal(index.scores(question, memory.backend, scope)[1], alone)
