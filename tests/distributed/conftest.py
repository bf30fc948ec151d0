import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def pool():
    """Four ranks; a case may use the last few of them, so that a rank in its group is not that in the world."""
    pool = RankPool(4)
    yield pool
    pool.close()
