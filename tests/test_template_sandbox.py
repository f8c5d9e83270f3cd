import resource
import threading
import time

import pytest

from litgpt.chat_template import ChatTemplate
from litgpt.template_sandbox import MAX_SOURCE, Budget, TooMuchWork, depth, weight

MESSAGES = [{"role": "user", "content": "hi " * 200}]

BOMBS = {
    "nested loops": "{% for a in range(100000) %}" * 4 + "x" + "{% endfor %}" * 4,
    "silent nested loops": "{% for a in range(100000) %}" * 5 + "{% set x = 1 %}" + "{% endfor %}" * 5,
    "filtered loops": "{% for a in range(99999) if false %}{% endfor %}" * 4000,
    "filtered inside": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "recursive loop": "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "text times number": "{{ 'a' * 10 ** 10 }}",
    "number times text": "{{ (10 ** 10) * 'a' }}",
    "list times number": "{% set x = [1] * 10 ** 10 %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "powers": "{% set ns = namespace(x=3) %}{% for i in range(40) %}{% set ns.x = ns.x ** 2 %}{% endfor %}{{ ns.x }}",
    "doubling by plus": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by tilde": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by list": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}"
    ),
    "doubling by dict": (
        "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}"
        "{{ n.x | tojson }}"
    ),
    "doubling by dict()": (
        "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}"
    ),
    "doubling by tuple": (
        "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} }}"
    ),
    "doubling by namespace": (
        "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}"
        "{% for i in range(10 ** 5) %}{{ n.x }}{% endfor %}" * 100
    ),
    "namespace in itself": "{% set n = namespace() %}{% set n.x = [n, n] %}{{ n.x * 10 ** 8 }}",
    "center": "{{ 'a'.center(10 ** 10) }}",
    "center filter": "{{ 'a' | center(10 ** 10) }}",
    "zfill": "{{ '1'.zfill(10 ** 10) }}",
    "format": "{{ '{:>9999999999}'.format('a') }}",
    "format with width": "{{ '{:>{}}'.format('a', 10 ** 10) }}",
    "format_map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent with width": "{{ '%*d' % (10 ** 10, 1) }}",
    "replace": "{{ ('a' * 10 ** 5).replace('a', 'b' * 10 ** 5) | length }}",
    "replace filter": "{{ ('a' * 10 ** 5) | replace('a', 'b' * 10 ** 5) | length }}",
    "join": "{{ ('b' * 10 ** 5).join(range(100000) | map('string') | list) | length }}",
    "join of what comes one by one": "{{ range(100000) | map('string') | join('b' * 10 ** 5) | length }}",
    "join filter": "{{ range(100000) | join('b' * 10 ** 5) | length }}",
    "indent": "{{ ('a\n' * 10 ** 5) | indent(10 ** 5) | length }}",
    "expandtabs": "{{ ('\t' * 10 ** 5).expandtabs(10 ** 5) | length }}",
    "batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "slice": "{{ [1] | slice(10 ** 10) | list }}",
    "tojson": "{{ range(10) | list | tojson(indent=10 ** 9) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "round": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "output of a long text": (
        "{% set x = 'a' * 10 ** 6 %}{% set y %}{% for i in range(100000) %}{{ x }}{% endfor %}{% endset %}"
    ),
    "constant text": "{% set y %}{% for i in range(100000) %}" + "a" * 100000 + "{% endfor %}{% endset %}",
    "slices": "{% set x = 'a' * 10 ** 6 %}" + "{% set y = x[1:] %}" * 5000,
    "search": "{% set x = 'a' * 10 ** 6 %}" + "{% set y = 'b' in x %}" * 5000,
    "map": "{{ range(100000) | map('center', 99999) | list | length }}",
    "sort": "{% for i in range(100000) %}{% set x = range(100000) | list | sort %}{% endfor %}",
    "call block": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 60
    + "x"
    + "{% endcall %}" * 60,
    "include": "{% include 'a' %}",
    "import": "{% import 'a' as b %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_ends_soon_in_one_line_and_without_memory(name):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(ValueError) as caught:
        ChatTemplate(BOMBS[name]).render(MESSAGES)
    assert time.thread_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert "\n" not in str(caught.value) and "chat template" in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__bases__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set n = namespace(__class__=1) %}{{ n }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
    ],
)
def test_template_cannot_escape_nor_change_what_it_gets(source):
    messages = [dict(message) for message in MESSAGES]
    try:
        text = ChatTemplate(source).render(messages)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert text == "", text
    assert messages == MESSAGES


def test_ordinary_work_on_a_long_conversation_is_within_the_budget():
    source = (
        "{% for m in messages %}{% set c = m.content.strip().split('</think>')[-1] | trim %}"
        "{% if 'word' in c and c.startswith('word') %}{{ '<' + m.role ~ '>' + c.replace('\n', ' ') + '\n' }}{% endif %}"
        "{% for n in messages if n.role == 'system' %}{{ n.content }}{% endfor %}{% endfor %}{{ messages | tojson }}"
    )
    messages = [{"role": "user", "content": "word " * 20_000}] * 50
    text = ChatTemplate(source).render(messages)
    assert text.count("<user>") == 50 and len(text) > 10_000_000


def test_threads_have_budgets_of_their_own():
    template = ChatTemplate("{% for i in range(60000) %}{{ i }}{% endfor %}")
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(template.render(MESSAGES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["".join(map(str, range(60000)))] * 4


def test_rendering_again_has_a_fresh_budget():
    template = ChatTemplate("{% for i in range(99999) %}{% set x = [i] %}{% endfor %}done")
    assert [template.render(MESSAGES) for _ in range(5)] == ["done"] * 5


def test_source_has_a_limit():
    with pytest.raises(ValueError, match=r"200,001 characters, more than the 200,000"):
        ChatTemplate("a" * (MAX_SOURCE + 1))


def test_deeply_nested_source_is_refused():
    for source in ("{{ " + "(" * 20_000 + ")" * 20_000 + " }}", "{% if a %}" * 3000 + "{% endif %}" * 3000):
        with pytest.raises(ValueError, match="not valid"):
            ChatTemplate(source)


def test_objects_are_not_handed_to_a_template():
    class Trap:
        def go(self):
            raise AssertionError

    text = ChatTemplate("{{ messages[0].x }} {{ messages[0].x.go is defined }}").render([{"role": "user", "x": Trap()}])
    assert text == "<Trap> False"


def test_weight_counts_what_occurs_twice_twice_and_ends_at_the_limit():
    part = ["ab", {"k": "v"}]
    assert weight([part, part], 1000) == 1 + 2 + 2 * weight(part, 1000) - 0
    huge = "x"
    for _ in range(200):
        huge = [huge, huge]
    assert 1000 < weight(huge, 1000) < 1010
    assert depth({"a": [[1]]}) == 4


def test_budget_by_the_clock():
    budget = Budget(0)
    budget.wall_end = budget.end = 0
    with pytest.raises(TooMuchWork, match="more than 1 seconds"):
        budget.spend(1)
