import pytest

from emt.errors import MemoryUseError
from emt.memory.activity import Activity


def assert_refused(hold, what, message):
    with pytest.raises(MemoryUseError, match=message), hold(what):
        pass


def test_many_read_and_one_writes():
    activity = Activity()
    with activity.shared("generate"), activity.shared("generate"):
        assert_refused(activity.alone, "write", "cannot write while the model is generating")
    with activity.alone("write"):
        assert_refused(activity.alone, "clear", r"cannot clear while write\(\) is running")
        assert_refused(activity.shared, "generate", r"cannot generate .* busy with write\(\)")
    with activity.alone("clear"):
        pass


def test_an_error_lets_go():
    activity = Activity()
    for hold in (activity.shared, activity.alone):
        with pytest.raises(ZeroDivisionError), hold("save"):
            raise ZeroDivisionError
    with activity.alone("write"):
        pass
