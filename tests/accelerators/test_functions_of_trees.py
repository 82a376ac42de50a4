"""Every function of trees and of embeddings, compiled for five accelerators.

Needs the extra `aot`; without it these tests skip, each with the reason.
"""

import pytest

from tests.accelerators.bounds import check
from tests.accelerators.functions import HOW_MUCH


@pytest.mark.parametrize("room", ["trees", "embeddings"])
@pytest.mark.parametrize("target", HOW_MUCH)
def test_memory_and_kernels(target, room):
    check(room, target, HOW_MUCH[target])
