import json
import tarfile

import numpy as np
import pytest

from litgpt.data import TinyStories, tinystories
from litgpt.data.tinystories import StoryFile, tokenize


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive like the published one, "downloaded" by copying it."""
    packed = tmp_path / "packed.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        for number in range(3):
            path = tmp_path / f"data{number:02d}.json"
            path.write_text(
                json.dumps([{"story": f" Story {number}.{i} of the cat. "} for i in range(20)] + [{"story": ""}])
            )
            tar.add(path, path.name)
    fetched = []

    def copy(url, path):
        fetched.append(url)
        path.parent.mkdir(parents=True)
        path.write_bytes(packed.read_bytes())
        return path

    monkeypatch.setattr(tinystories, "download_file", copy)
    return fetched


def connected(tokenizer, folder, **kwargs):
    data = TinyStories(folder, num_workers=0, **kwargs)
    data.connect(tokenizer, batch_size=2, max_seq_length=16)
    data.prepare_data()
    data.setup()
    return data


def test_first_file_is_for_validation_and_each_story_begins_with_bos(archive, tmp_path, tokenizer):
    data = connected(tokenizer, tmp_path / "stories")
    for split, numbers in (("val", [0]), ("train", [1, 2])):
        shards = data.shards[split]
        stories = [f"Story {number}.{i} of the cat." for number in numbers for i in range(20)]
        expected = [id for story in stories for id in tokenizer.encode(story, bos=True).tolist()]
        assert shards.windows(np.array([0]), len(shards))[0].tolist() == expected
        assert shards.n_documents == len(stories) and list(data.texts(split)) == stories
    assert next(iter(data.train_dataloader())).shape == (2, 17)


def test_download_happens_once(archive, tmp_path, tokenizer):
    connected(tokenizer, tmp_path / "stories")
    connected(tokenizer, tmp_path / "stories")
    assert archive == [tinystories._URL]


def test_damaged_story_file_is_named(tmp_path):
    path = tmp_path / "data00.json"
    for content in ("[{", '[{"text": "a"}]', "[1]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"data00\.json is damaged"):
            list(StoryFile(path, 9).pieces())


def test_archive_without_stories_is_refused(tmp_path, tokenizer):
    (tmp_path / "TinyStories_all_data").mkdir()
    with pytest.raises(ValueError, match=r"0 JSON files in .* instead of 50"):
        connected(tokenizer, tmp_path)


def test_published_tokenize_gives_each_story_with_bos(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps([{"story": "The cat. "}, {"story": "The dog."}]))
    ids = [ids.tolist() for ids in tokenize(str(tmp_path / "a.json"), tokenizer)]
    assert ids == [tokenizer.encode(text, bos=True).tolist() for text in ("The cat.", "The dog.")]
