"""Commands killed at every step, damaged bytes, readers beside a writer."""

import pytest

# before any test imports them
pytest.register_assert_rewrite("tests.torture.promises", "tests.torture.attacks")
