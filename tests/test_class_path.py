import pytest

from litgpt.class_path import class_path, find_subclass, init_args


class Base:
    pass


class Shape(Base):
    def __init__(self, size=1, name="a"):
        self.size, self.name = size, name


class Hidden(Base):
    def __init__(self, size):
        self._size = size


def test_arguments_that_are_not_the_defaults_make_another_such_object():
    assert init_args(Shape(), "f") == {}
    assert init_args(Shape(2), "f") == {"size": 2}
    assert vars(find_subclass(class_path(Shape), Base, "f")(**init_args(Shape(2, "b"), "f"))) == {
        "size": 2,
        "name": "b",
    }


@pytest.mark.parametrize("thing", [Hidden(3), Shape(object())])
def test_argument_that_yaml_cannot_hold_is_warned_about(thing):
    with pytest.warns(UserWarning, match="style.yaml will lack the argument 'size'"):
        assert init_args(thing, "style.yaml") == {}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module.X", "cannot be imported"),
        ("collections.OrderedDict", "is not a subclass of"),
        ("X", "cannot be"),
    ],
)
def test_class_that_is_none_of_ours_is_refused(path, message):
    with pytest.raises(ValueError, match=f"^here: .*{message}"):
        find_subclass(path, Base, "here")


def test_later_definition_of_a_name_wins():
    def define():
        class Twice(Base):
            pass

        return Twice

    first, second = define(), define()
    assert class_path(first) == class_path(second)
    assert find_subclass(class_path(first), Base, "f") is second
