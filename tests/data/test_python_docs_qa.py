import pytest

from litgpt.data import PythonDocs, PythonDocsQA, python_docs_qa
from litgpt.data.python_corpus import Document, is_held_out, python_documents
from litgpt.data.python_docs_qa import MAX_ANSWER_CHARACTERS, first_paragraphs, question


@pytest.fixture
def corpus(monkeypatch):
    documents = [Document(f"module.thing_{i}", "(x)", f"Return the cat number {i} of all.") for i in range(200)]
    monkeypatch.setattr(python_docs_qa, "python_documents", lambda: documents)
    return documents


def test_questions_fit_what_is_asked_for():
    assert question(Document("os.path.join", "(a, *p)", "Join.")) == "What does os.path.join do?"
    assert question(Document("time.sleep", "", "sleep(seconds)\n\nDelay.")) == "What does time.sleep do?"
    assert question(Document("json", "", "JSON is a format.")) == "What is json?"
    assert question(Document("if", "", 'The "if" statement')) == "What does the Python language reference say about if?"


def test_answers_end_with_a_paragraph():
    assert first_paragraphs("short") == "short"
    text = "\n\n".join(["word " * 60] * 5)
    answer = first_paragraphs(text)
    assert 600 < len(answer) <= MAX_ANSWER_CHARACTERS and text.startswith(answer) and answer.endswith("word")
    assert first_paragraphs("x" * 2000) == ""


def test_split_is_that_of_python_docs(corpus, tokenizer):
    data = PythonDocsQA(val_split_fraction=0.1)
    data.connect(tokenizer, batch_size=4, max_seq_length=200)
    data.setup()
    held_out = {d.text for d in corpus if is_held_out(d.text, 0.1)}
    assert {row["output"] for row in data.test_dataset.data} == held_out and held_out
    assert len(data.train_dataset) + len(data.test_dataset) == len(corpus)
    other_seed = PythonDocsQA(val_split_fraction=0.1, seed=1)
    assert other_seed.load_samples() == data.load_samples()
    assert data.mask_prompt and (data.train_dataset[0]["labels"] == -100).any()


def test_the_corpus_of_this_python_gives_thousands_of_questions():
    train, val = PythonDocsQA().load_samples()
    assert len(train) > 2000 and len(val) > 50
    asked = {row["instruction"]: row["output"] for row in [*train, *val]}
    assert "Join two or more pathname components" in asked["What does os.path.join do?"]
    kept = set(PythonDocs().texts("train"))
    assert all(any(str(d) in kept for d in python_documents() if d.text.startswith(r["output"])) for r in train[:20])


def test_share_must_be_a_share():
    with pytest.raises(ValueError, match=r"--data\.val_split_fraction is 0"):
        PythonDocsQA(val_split_fraction=0)
