import ast
import sys

import pytest

from litgpt.data import python_corpus
from litgpt.data.python_corpus import Document, is_held_out, python_documents, source_documents, tree_documents


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        found = python_documents()
        patch.setattr(python_corpus, "source_documents", lambda root: pytest.fail("parsed again"))
        assert python_documents() == found
        return found


def test_corpus_is_large_and_clean(documents):
    texts = [document.text for document in documents]
    assert sum(len(text.encode()) for text in texts) > 1_500_000
    assert len(set(texts)) == len(texts) and min(map(len, texts)) >= 40
    assert all(text == text.strip() and " \n" not in text for text in texts)


def test_corpus_knows_the_language_and_the_library(documents):
    by_name = {document.name: document for document in documents}
    assert by_name["os.path.join"].signature == "(a, *p)" and "pathname" in by_name["os.path.join"].text
    assert "Concatenate any number of strings" in by_name["str.join"].text
    assert len(by_name["compound"].text) > 10_000
    assert str(by_name["os.path.join"]).startswith("os.path.join(a, *p)\n\nJoin")
    assert not any(document.name.startswith(("test.", "idlelib.", "encodings.")) for document in documents)


def test_order_is_the_same_when_parsed_again(documents, tmp_path, monkeypatch):
    folder = tmp_path / "library"
    (folder / "pack" / "test").mkdir(parents=True)
    doc = '"""A sentence that is long enough to be kept, number {}."""\n'
    for number, name in enumerate(("b.py", "a.py", "pack/__init__.py", "pack/test/c.py", "pack/__main__.py")):
        (folder / name).write_text(doc.format(number))
    (folder / "broken.py").write_text("print 'python 2'")
    assert [document.name for document in source_documents(folder)] == ["a", "b", "pack"]


def test_docstrings_of_all_definitions_are_found():
    code = '''"""Module."""
class A:
    """Class."""
    def f(self, x: int = 1, *, y=None) -> str:
        """Method,

        first line,\t
           second line.
        """
        def inner():
            """Inner."""
    async def g(self): "Async."
def bare(): ...
'''
    found = list(tree_documents(ast.parse(code), "m"))
    assert found == [
        Document("m", "", "Module."),
        Document("m.A", "", "Class."),
        Document("m.A.f", "(self, x: int=1, *, y=None)", "Method,\n\nfirst line,\n   second line."),
        Document("m.A.f.inner", "()", "Inner."),
        Document("m.A.g", "(self)", "Async."),
    ]


def test_split_hangs_on_the_text_alone(documents):
    held_out = {document.text for document in documents if is_held_out(document.text, 0.05)}
    assert 0.03 < len(held_out) / len(documents) < 0.07
    assert "".join(c for c in "abcdefghijklmnop" if is_held_out(c * 40, 0.5)) == "efglno"  # on any machine
    assert all(is_held_out(text, 0.2) for text in held_out)  # a larger share only adds texts


def test_parsing_imports_none_of_the_library(tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text(
        '"""A sentence that is long enough to be kept here."""\nraise RuntimeError'
    )
    assert [document.name for document in source_documents(tmp_path)] == ["never_imported"]
    assert "never_imported" not in sys.modules


def test_damaged_cache_is_parsed_again(documents, cache, monkeypatch):
    monkeypatch.setattr(python_corpus, "source_documents", lambda root: [])
    few = python_documents()
    (kept,) = cache.rglob("documents-*.json")
    kept.write_text("[[")
    assert python_documents() == few
