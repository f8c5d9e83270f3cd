import itertools

import pytest

from litgpt.generate.stopping import StopMatcher, stop_at_text


def run(text, stops):
    """What goes out while reading, what is held at the end, and whether a stop was found."""
    matcher, held, out = StopMatcher(stops), "", ""
    for character in text:
        held += character
        n = matcher.push(character)
        out, held = out + held[:n], held[n:]
        assert held == "".join(matcher.held)
        if matcher.is_stopped:
            break
    return out, held, matcher.is_stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("abc", [], ("abc", "", False)),
        ("abc", ["b"], ("a", "b", True)),
        ("aaab", ["aab"], ("a", "aab", True)),
        ("aaaab", ["aab"], ("aa", "aab", True)),
        ("abababc", ["ababc"], ("ab", "ababc", True)),
        ("ababd", ["ababc"], ("ababd", "", False)),
        ("xaba", ["abc"], ("xab", "a", False)),
        ("xabz", ["abc", "b"], ("xa", "b", True)),
        ("xabc", ["abc", "bc"], ("x", "abc", True)),
        ("abcd", ["bcx", "d"], ("abc", "d", True)),
        ("ab", ["", "b"], ("a", "b", True)),
    ],
)
def test_items_are_held_exactly_while_they_may_begin_a_stop(text, stops, expected):
    assert run(text, stops) == expected


def test_matcher_agrees_with_search_over_all_short_texts():
    stop_sets = [["aab"], ["aba"], ["abab", "bb"], ["aa", "aba"], ["abb", "bab", "b" * 4]]
    for stops, text in itertools.product(stop_sets, map("".join, itertools.product("ab", repeat=9))):
        out, held, is_stopped = run(text, stops)
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert is_stopped == bool(ends)
        if ends:  # the earliest end; of several that end there, the longest
            stop = max((s for s in stops if text[: min(ends)].endswith(s)), key=len)
            assert (out, held) == (text[: min(ends) - len(stop)], stop)
        else:
            assert out + held == text


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_text_ends_before_a_stop_string_however_it_is_cut(size):
    text = "One. Two.\n\nThree."
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(stop_at_text(pieces, ["\n\n", "###"])) == "One. Two."
    assert "".join(stop_at_text(pieces, ["Three!", "###"])) == text
    assert list(stop_at_text(pieces, [])) == pieces


def test_text_is_not_read_beyond_the_stop():
    read = []

    def pieces():
        for piece in ("a", "b|", "c"):
            read.append(piece)
            yield piece

    assert list(stop_at_text(pieces(), ["|"])) == ["a", "b"]
    assert read == ["a", "b|"]
